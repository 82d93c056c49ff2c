"""The machines accept a good log, and refuse each one that breaks a rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from tests.support.apart import Apart
from tests.support.protocol import RefusedError, check
from tests.support.steps import fork, reap
from tests.support.tracing import Entry, Tracing, log_to

LOCK, LIST, TABLE, RECORD, CHUNK, SLOT, LIFE = 0x100, 0x100, 0x44, 0x200, 0x300, 0x400, 0x500
RESV = RECORD + 256
FIRST, SECOND = 1 << 24, 2 << 24  # two fences of one slot


def log(*steps: str) -> list[Entry]:
    """Entries from lines such as "1 resv_locked LOCK 7": thread and process, step, object, number."""
    entries = []
    for step in steps:
        who, name, what, number = (*step.split(), "0", "0")[:4]
        where = globals().get(what)
        number = globals().get(number) or int(number, 0)
        entries.append(Entry(name, int(who), int(who), int(who), 1, where if where is not None else int(what, 0), number))
    return entries


def table(*steps: str) -> tuple[str, ...]:
    """Steps of thread 1 with the table lock."""
    return ("1 table_locked TABLE 2048", *(f"1 {step}" for step in steps), "1 table_unlocking TABLE 2048")


FENCE = ("1 fence_filled SLOT FIRST", "1 fence_published SLOT FIRST")
ENDED = ("1 fence_stamped SLOT FIRST", "1 fence_signaled SLOT FIRST", "1 fence_woken SLOT FIRST", "1 fence_dispatchers_woken SLOT FIRST")
LISTED = (*FENCE, "1 resv_locked LOCK 7", "1 resv_added LIST FIRST", "1 resv_unlocking LOCK 7")
WRITES = (*LISTED, "1 access_writing RECORD FIRST", "1 access_granted RECORD FIRST")
MADE = table("rec_filled RECORD 1", "rec_held RECORD 1", "rec_live RECORD 1", "rec_linked RECORD 1")
FREED = table("rec_dying RECORD 1", "rec_unlinked RECORD 1", "rec_cleared RECORD 1", "rec_freed RECORD 2")
LIVES = ("1 life_locked LIFE", "1 life_alive LIFE 2048", "1 life_chunk LIFE 2048")
PART_ONE = ("2 reap_locked LIFE 2048", "2 reap_fences_done LIFE 2048", "2 reap_contexts_done LIFE 2048", "2 reap_unlocking LIFE")
PART_TWO = ("2 reap_again LIFE 2048", "2 reap_returned LIFE 2048", "2 reap_clean LIFE 2048", "2 reap_unlocking LIFE")
AWAY = ("2 left_copied 0 1", "2 left_absent 0 1")
RESET = (
    *("2 reset_begun 0", "2 reset_judged 0", "2 reset_rebuilt 0", "2 reset_floors 0", "2 reset_lists 0", "2 reset_chunk CHUNK"),
    *("2 reset_counted 0", "2 reset_unlocked 0", "2 reset_cut 0", "2 reset_punched CHUNK"),
)

GOOD = {
    "lock": ("1 resv_locked LOCK 7", "1 resv_unlocking LOCK 7", "2 resv_locked LOCK 8", "2 resv_unlocking LOCK 8"),
    "lock of a dead owner": ("1 resv_locked LOCK 7", "3 ctx_closing 0 7", "2 resv_dead_owner LOCK 7", "2 resv_stolen LOCK 8"),
    "lock of a buffer that is gone": (*MADE, "2 resv_locked RESV 7", *FREED, "3 resv_locked RESV 8"),
    "lock on loan": ("1 resv_locked LOCK 7", "1 resv_passing LOCK 7", "1 resv_passing_to LOCK 8", "2 resv_added LIST 1",
                     "2 resv_unlocking LOCK 8"),
    "lock not passed on": ("1 resv_locked LOCK 7", "2 resv_passing LOCK 9", "2 resv_passing_to LOCK 8", "1 resv_unlocking LOCK 7"),
    "fence": (*FENCE, *ENDED, "1 fence_filled SLOT SECOND", "1 fence_published SLOT SECOND"),
    "fence of a dead owner": (*FENCE, "2 reap_pending SLOT FIRST", *(step.replace("1", "2", 1) for step in ENDED)),
    "write": (*WRITES, *ENDED),
    "write that fails": (*WRITES, "1 access_torn RECORD FIRST", "1 fence_error SLOT FIRST", *ENDED),
    "write of the dead": (*WRITES, "2 reap_pending SLOT FIRST", "2 reap_torn SLOT 2048", "2 fence_error SLOT FIRST",
                          "2 fence_stamped SLOT FIRST"),
    "record": (*MADE, *FREED),
    "record that is used again": table("rec_dying RECORD 1"),
    "record with a layout": table("layout_filled RECORD 1", "layout_named RECORD 1", "rec_filled RECORD 1", "rec_held RECORD 1",
                                  "rec_live RECORD 1", "rec_linked RECORD 1"),
    "layout given later": (*MADE, *table("layout_filled RECORD 1", "layout_named RECORD 1")),
    "table of the dead": (*MADE, "1 table_locked TABLE", "1 rec_dying RECORD 1", "2 table_stolen TABLE", "2 rec_cleared RECORD 1",
                          "2 table_rebuilt TABLE", "2 table_unlocking TABLE"),
    "chunk": (*table("chunk_allocated CHUNK", "chunk_typed CHUNK", "chunk_published CHUNK"), "1 chunk_owned CHUNK 2048",
              "2 chunk_returning CHUNK 2048", "3 chunk_owned CHUNK 2049"),
    "life": (*LIVES, *PART_ONE, *PART_TWO, "3 life_locked LIFE", "3 life_alive LIFE 4096"),
    "life that leaves": (*LIVES, "1 life_leaving LIFE 2048", *(step.replace("2", "1", 1) for step in (*PART_ONE[1:3], *PART_TWO[1:3]))),
    "reset": (*LIVES, *PART_ONE, *PART_TWO, *AWAY, *RESET),
}  # fmt: skip

# A rule, and a log that breaks it.
BAD = [
    ("a lock has one owner", (GOOD["lock"][0], GOOD["lock"][2])),
    ("taken from a context that was closed", tuple(step for step in GOOD["lock of a dead owner"] if "ctx" not in step)),
    ("taken from a dead owner", ("1 resv_stolen LOCK 8",)),
    ("taken by an open context", ("1 ctx_closing 0 7", "1 resv_locked LOCK 7", "1 access_ended 0")),
    ("taken from its owner", ("1 resv_locked LOCK 7", "3 ctx_closing 0 9", "2 resv_dead_owner LOCK 9", "1 resv_unlocking LOCK 7")),
    ("given back by its owner", ("1 resv_locked LOCK 7", "2 resv_unlocking LOCK 8")),
    ("changes under its lock", ("1 resv_locked LOCK 7", "1 resv_unlocking LOCK 7", "1 resv_added LIST 1")),
    ("changes under its lock", ("1 resv_locked LOCK 7", "2 resv_copied LIST 1")),
    ("filled before it is published", ("1 fence_published SLOT FIRST",)),
    ("generation of a slot never comes again", (*FENCE, *ENDED, *FENCE)),
    ("used again when its fence has ended", (*FENCE, "1 fence_filled SLOT SECOND", "1 access_ended 0")),
    ("a fence is signaled once", (*FENCE, *ENDED, "2 fence_stamped SLOT FIRST", "2 fence_signaled SLOT FIRST")),
    ("stored before it is signaled", (*FENCE, ENDED[1])),
    ("woken after the fence is signaled", (*FENCE, ENDED[0], ENDED[2])),
    ("a fence ends in this order", (*FENCE, *ENDED, ENDED[2])),
    ("a fence ends in this order", (*FENCE, ENDED[0], ENDED[1], ENDED[0])),
    ("in the list of fences before it is granted", (*FENCE, "1 access_granted RECORD FIRST")),
    ("waits with its fence in the list", (*FENCE, "1 access_added RECORD FIRST")),
    ("a write excludes others", (*WRITES, "2 fence_filled 0x480 5", "2 fence_published 0x480 5", "2 resv_locked LOCK 8",
                                 "2 resv_added LIST 5", "2 access_granted RECORD 5")),
    ("torn before the fence of a write that failed ends", (*WRITES, "1 fence_error SLOT FIRST", *ENDED)),
    ("torn before the fence of a dead writer ends", (*WRITES, "2 reap_pending SLOT FIRST", "2 fence_stamped SLOT FIRST")),
    ("torn for a pending fence of a dead life", (*WRITES, "2 reap_torn SLOT 2048")),
    ("made whole by who writes it", (*LISTED, "1 access_whole RECORD FIRST")),
    ("made whole before the fence of the write ends", (*WRITES, *ENDED, "1 access_whole RECORD FIRST", "1 access_ended 0")),
    ("the table lock has one owner", ("1 table_locked TABLE", "2 table_locked TABLE")),
    ("the table lock is taken from the dead", ("1 table_locked TABLE", "2 table_stolen TABLE", "1 table_unlocking TABLE")),
    ("given back when the table is repaired", ("2 table_stolen TABLE", "2 table_unlocking TABLE")),
    ("the table lock is given back by its owner", ("1 table_locked TABLE", "2 table_unlocking TABLE")),
    ("the table changes under its lock", ("1 rec_filled RECORD 1",)),
    ("the table changes under its lock", ("2 table_locked TABLE", "1 name_written RECORD 1")),
    ("for repairing the table first", ("2 table_stolen TABLE", "2 rec_filled RECORD 1")),
    ("given back between two changes", table("rec_filled RECORD 1", "rec_held RECORD 1")),
    ("is not live next", table("rec_filled RECORD 1", "rec_live RECORD 1")),
    ("is not filled next", (*MADE, *table("rec_filled RECORD 2"))),
    ("generation of a record never comes again", (*MADE, *FREED, *MADE)),
    ("a name is written before it counts", table("name_switched RECORD 1")),
    ("a layout is written before the record names it", table("layout_named RECORD 1")),
    ("the table changes under its lock", ("1 layout_filled RECORD 1",)),
    ("then it is published", table("chunk_allocated CHUNK", "chunk_published CHUNK")),
    ("published before the table lock is given back", table("chunk_allocated CHUNK", "chunk_typed CHUNK")),
    ("a chunk has one owner", ("1 chunk_owned CHUNK 2048", "2 chunk_owned CHUNK 2049")),
    ("a life has one reaper", (PART_ONE[0], PART_ONE[0].replace("2", "3", 1), PART_ONE[1])),
    ("reaped when its process is dead", (*LIVES, *PART_ONE, "1 table_locked TABLE 2048")),
    ("claimed when it is clean", (*LIVES, "2 life_locked LIFE", "2 life_alive LIFE 4096", "1 table_locked TABLE 2048")),
    ("a life never comes again", (*LIVES, "2 life_locked LIFE", "2 life_alive LIFE 2048")),
    ("the byte has one owner|a life's byte has one owner", (PART_ONE[0], "3 life_locked LIFE", PART_ONE[1])),
    ("a life ends in this order", (*LIVES, PART_ONE[0], PART_ONE[2])),
    ("a life ends in this order", (*LIVES, *PART_ONE, PART_TWO[0], PART_TWO[2])),
    ("private copy before its presence ends", (AWAY[1], AWAY[0])),
    ("who resets isn't present itself", (AWAY[0], *RESET)),
    ("when all lives are clean", (*LIVES, *AWAY, *RESET)),
    ("a reset has this order", (*AWAY, *(step for step in RESET if "floors" not in step))),
    ("a reset has this order", (*AWAY, *(step for step in RESET if "counted" not in step))),
    ("a reset has one process", (*AWAY, RESET[0], "3 reset_rebuilt 0")),
    ("this comes just after reset_cut", (*AWAY, *RESET[:-2], RESET[-1])),
]  # fmt: skip


@pytest.mark.parametrize("steps", GOOD.values(), ids=list(GOOD))
def test_good_log_is_accepted(steps: tuple[str, ...]) -> None:
    check(log(*steps))


@pytest.mark.parametrize(("rule", "steps"), BAD, ids=[f"{i}: {rule[:40]}" for i, (rule, _) in enumerate(BAD)])
def test_log_that_breaks_a_rule_is_refused(rule: str, steps: tuple[str, ...]) -> None:
    with pytest.raises(RefusedError, match=rule):
        check(log(*steps))


def test_every_rule_has_a_log_that_breaks_it() -> None:
    text = (Path(__file__).parents[1] / "support" / "protocol.py").read_text()
    rules = [re.sub(r"\{.*", "", rule) for rule in re.findall(r'self\.refuse\(\w+, f?"([^"]+)"', text)]
    refused = []
    for _, steps in BAD:
        try:
            check(log(*steps))
        except RefusedError as e:
            refused.append(str(e))
    assert [rule for rule in rules if rule and not any(text.startswith(rule) for text in refused)] == []


# ---- the log itself ----


def use() -> None:
    with dmabuf.allocate(4096) as buf, buf.write():
        pass


def logs_a_write() -> list[Entry]:
    with Tracing() as tracing:
        use()
        assert reap(fork(use)) == 0
    return tracing.entries()


def test_log_has_the_steps_of_all_processes_in_order(apart: Apart) -> None:
    entries = apart(logs_a_write)
    check(entries)
    for process in {entry.process for entry in entries}:
        names = [entry.name for entry in entries if entry.process == process]
        assert names.index("rec_live") < names.index("access_granted") < names.index("access_ended")
    assert len({entry.process for entry in entries}) == 2
    assert len({entry.domain for entry in entries if entry.name == "access_granted"}) == 1


def test_full_log_keeps_its_beginning() -> None:
    with Tracing(capacity=4) as tracing:
        for number in range(9):
            _native.step("numbered", number)
    assert [(entry.name, entry.number) for entry in tracing.entries()] == [("numbered", number) for number in range(3)]


def test_nothing_is_logged_after_the_block() -> None:
    with Tracing() as tracing:
        _native.step("inside")
    _native.step("outside")
    assert [entry.name for entry in tracing.entries()] == ["inside"]
    assert not tracing.path.exists()


def test_log_that_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        log_to(tmp_path / "log")
    with pytest.raises(TypeError):
        _native.step_log("log")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [(), (1,), ("name", "number"), ("name", 1, 2), ("name", -1)])
def test_bad_arguments_of_a_step_are_refused(arguments: tuple[object, ...]) -> None:
    with Tracing(), pytest.raises((TypeError, OverflowError)):
        _native.step(*arguments)  # type: ignore[arg-type]
