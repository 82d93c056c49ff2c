"""Show that the tests find faults: put each known fault into a copy of the tree, and run the tests that should find it.

    python -m tools.mutants                      every mutant, with five seeds of the quick budget
    python -m tools.mutants --seeds 1 torn-mark  one of them, with one seed
    python -m tools.mutants --list               their names

A mutant replaces a text of one file by another. It is found if one of its tests fails with every seed, which sets the order of the tests
and the state of the random generators. The exit status is 0 if all mutants are found.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5
_PASSED, _FAILED = 0, 1  # exit statuses of pytest; any other means that it could not run the tests
_WATCHDOG = 60  # seconds for one test: a fault may let one wait forever


class Change(NamedTuple):
    """A text that a file has once, and the text in its place."""

    text: str
    instead: str


class Mutant(NamedTuple):
    """A fault of one file. ``tests``: those that find it, together."""

    name: str
    what: str
    file: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Put the fault into a tree.

        Raises:
            ValueError: The file doesn't have one of the texts once, so the mutant must be rewritten.
        """
        path = root / self.file
        content = path.read_text(encoding="utf-8")
        for text, instead in self.changes:
            if content.count(text) != 1:
                raise ValueError(f"mutant {self.name}: {self.file} has this text {content.count(text)} times: {text!r}")
            content = content.replace(text, instead)
        path.write_text(content, encoding="utf-8")


MUTANTS = (
    Mutant(
        "torn-mark",
        "the reaper leaves the content that a dead writer wrote in part as if it were whole",
        "native/domain/reap.c",
        (Change("    atomic_store(&r->torn, TORN_MAKE(atomic_load(&life_slot(s, life)->pid), EOWNERDEAD));\n", "    (void)life;\n"),),
        ("tests/conformance/test_access_processes.py",),
    ),
    Mutant(
        "layout-reset",
        "the last process that leaves gives the layouts of buffers in flight back, too",
        "native/domain/reset.c",
        (Change("  if (type == CH_LAYOUT) return layouts_used(s, c);\n", ""),),
        ("tests/crash/test_layouts.py",),
    ),
    Mutant(
        "layout-early",
        "a record is live before it has the layout that it is made with",
        "native/domain/buffer_layout.c",
        (Change("  atomic_store(&r->layout, i + 1);\n", "  if (atomic_load(&r->state) == REC_LIVE) atomic_store(&r->layout, i + 1);\n"),),
        ("tests/crash/test_layouts.py",),
    ),
    Mutant(
        "layout-generation",
        "a process that copies a layout doesn't look whether the record is another buffer's by now",
        "native/domain/records.c",
        (
            Change(
                "  if (!rec_live(s, i, r) || atomic_load(&r->gen) != gen) Py_RETURN_NONE; /* last, as in rec_find() */\n"
                '  return Py_BuildValue("Iy#"',
                '  return Py_BuildValue("Iy#"',
            ),
        ),
        ("tests/crash/test_reads_together.py",),
    ),
    Mutant(
        "rebuild",
        "a process that takes the table lock from a dead one leaves the table as it is",
        "native/domain/table.c",
        (Change("void table_rebuild(Shm *s) {\n", "void table_rebuild(Shm *s) {\n  if (s) return;\n"),),
        ("tests/crash/test_steps.py",),
    ),
    Mutant(
        "readers",
        "a writer doesn't wait for readers",
        "native/domain/access.c",
        (Change("if (E_USAGE(e) > (write ? 2u : 1u) ||", "if (E_USAGE(e) > 1u ||"),),
        ("tests/conformance/test_access.py",),
    ),
    Mutant(
        "wake-fence",
        "the signaler of a fence leaves its waiters to their next tick",
        "native/domain/fence.c",
        (Change("  if (w & FW_WAITERS) word_wake(&f->word, INT32_MAX);\n", ""),),
        ("tests/unit/test_wakes.py",),
    ),
    Mutant(
        "wake-dispatcher",
        "the signaler of a fence leaves the dispatchers of other processes to their next tick",
        "native/domain/fence.c",
        (Change("if (me && i == LIFE_INDEX(me)) continue;", "if (me) continue;"),),
        ("tests/unit/test_wakes.py",),
    ),
    Mutant(
        "wake-lock",
        "a process that unlocks a reservation object leaves its waiters to their next tick",
        "native/domain/resv_lock.c",
        (Change("  if ((w & CTX_WAITERS) || atomic_load(&r->next)) wake_waiters(r);\n", ""),),
        ("tests/unit/test_wakes.py",),
    ),
    Mutant(
        "wake-table",
        "a process that unlocks the table leaves its waiters to their next tick",
        "native/domain/table.c",
        (Change("  if (atomic_exchange(w, 0) & TL_WAITERS) word_wake(w, INT32_MAX);\n", "  atomic_exchange(w, 0);\n"),),
        ("tests/unit/test_wakes.py",),
    ),
    Mutant(
        "floors",
        "the numbers of slots start again when the last process has given the domain's memory back",
        "native/domain/reset.c",
        (Change("  raise_floors(s);\n", "  if (!s) raise_floors(s);\n"),),
        ("tests/crash/test_facts_outlive.py::test_numbers_never_start_again_after_a_reset",),
    ),
    Mutant(
        "facts-forgotten",
        "the last process forgets a buffer that a message still holds, and with it that its content is torn",
        "native/domain/reset.c",
        (Change("    if (!held) atomic_store", "    if (!held || r) atomic_store"),),
        ("tests/crash/test_facts_outlive.py::test_facts_outlive_all_processes_in_a_message",),
    ),
    Mutant(
        "presence-unasked",
        "the last process takes away the memory of a file that a child still maps",
        "native/domain/reset.c",
        (Change("  done = !anybody_present(s, fd);\n", "  done = s || !anybody_present(s, fd);\n"),),
        ("tests/crash/test_facts_outlive.py::test_facts_outlive_all_processes_in_an_unjoined_child",),
    ),
    Mutant(
        "callbacks-under-the-byte",
        "a reaper calls the program's callbacks while it holds the lock of the dead life's byte",
        "native/domain/fence.c",
        (Change("  if (s->ending) { /* the end of a life", "  if (!s) { /* the end of a life"),),
        ("tests/crash/test_leaving.py::test_callback_of_a_dead_fence_keeps_nobody_from_leaving",),
    ),
    Mutant(
        "wake-semaphore",
        "the signal of a semaphore's point leaves its waiters to their next tick",
        "native/domain/points.c",
        (Change("tick */\n  wake_all(words(x));\n", "tick */\n"),),
        ("tests/unit/test_wakes.py",),
    ),
    Mutant(
        "idle-in-one-look",
        "a reader without the lock looks once at a list that others change",
        "native/domain/resv.c",
        (
            Change("    if (!h) h = look(s, r, rec, usage, but, &last);\n", ""),
            Change("if (h || atomic_load(&r->changes) == seen)", "if (!seen || seen)"),
        ),
        ("tests/crash/test_snapshot_steps.py",),
    ),
    Mutant(
        "record-half-new",
        "a record that is made without a name has the one that a dead process left there",
        "native/domain/records.c",
        (
            Change("  memset(r->name, 0, sizeof r->name);\n", ""),
            Change("  r->name_len[0] = (uint8_t)(name ? nname + 1 : 0);\n", "  if (name) r->name_len[0] = (uint8_t)(nname + 1);\n"),
        ),
        ("tests/crash/test_snapshot_steps.py",),
    ),
    Mutant(
        "sync-slot-reused",
        "the slot of a sync file that another process has is used for the next one",
        "native/domain/sync.c",
        (Change("  return pollable_exists(&n, atomic_load(&f->net)) != 0;\n", "  return 0;\n"),),
        ("tests/conformance/test_sync_file_waiting.py",),
    ),
    Mutant(
        "fold-unread",
        "a point that is signaled while another process folds the word into the record is lost",
        "src/dmabuf/core/sync/semaphore_file.py",
        (Change("        while (point := self.points.value()) >= 0:\n", "        if (point := self.points.value()) >= 0:\n"),),
        ("tests/conformance/test_semaphore_processes.py",),
    ),
    Mutant(
        "size-before-count",
        "a process that joins while another makes the domain grow takes its file for a broken one",
        "src/dmabuf/domain/place.py",
        (
            Change("    size = os.fstat(fd).st_size\n    if len(head)", "    if len(head)"),
            Change("    count = _read(fd, 4,", "    size = os.fstat(fd).st_size\n    count = _read(fd, 4,"),
        ),
        ("tests/unit/test_domain_end.py",),
    ),
    Mutant(
        "lock-unproved",
        "a life's lock is believed to be held as long as its page is mapped, on overlayfs too",
        "native/fds/hold.c",
        (Change("if (!r && is_locked(fd, byte)) return 0;", "if (!r) return 0;"),),
        ("tests/unit/test_proved.py::test_hold_keeps_the_lock_until_it_is_dropped",),
    ),
    Mutant(
        "stranger-at-the-path",
        "what stands at the path of a domain's directory is taken for the domain's own",
        "src/dmabuf/domain/place.py",
        (Change("return own.number if _has_file(own.number, self._file) else None", "return own.number"),),
        ("tests/crash/test_vanished_directory.py::test_stranger_at_the_same_path_keeps_its_socket_and_file",),
    ),
    Mutant(
        "file-unseen",
        "whatever stands at the name of a domain's file is opened and used",
        "src/dmabuf/domain/directory.py",
        (Change("    return stat.S_ISREG(st.st_mode) and st.st_uid == os.geteuid() and st.st_nlink <= 1\n", "    return True\n"),),
        ("tests/unit/test_domain_directory.py::test_thing_in_place_of_the_domains_file_is_refused_and_stays",),
    ),
    Mutant(
        "floor",
        "the last process that leaves gives memory back without raising the floors, so generations of slots come again",
        "native/domain/reset.c",
        (Change("  raise_floors(s);\n  STEP_OF", "  if (!s) raise_floors(s);\n  STEP_OF"),),
        ("tests/crash/test_facts_outlive.py",),
    ),
    Mutant(
        "absent-first",
        "a process that leaves ends its presence before it has a private copy of the file",
        "native/domain/reset.c",
        (
            Change(
                "  if (lived_in(s, fd) || shm_map_copy(s)) goto out;\n",
                "  if (lived_in(s, fd)) goto out;\n  shm_end_presence(s);\n  STEP_OF(left_absent, NULL, s->id.ino);\n"
                "  if (shm_map_copy(s)) goto out;\n",
            ),
        ),
        ("tests/crash/test_facts_outlive.py::test_reset_is_left_to_the_last_when_a_process_looks_on",),
    ),
    Mutant(
        "punched-first",
        "the memory of a chunk is given back before the chunk table says so",
        "native/domain/reset.c",
        (
            Change(
                "    atomic_store(chunk_entry(s, c), 0);\n",
                "    punch(fd, DB_HEADER_BYTES + (off_t)c * DB_CHUNK, DB_CHUNK);\n    STEP_OF(reset_punched, chunk_entry(s, c), 0);\n"
                "    atomic_store(chunk_entry(s, c), 0);\n",
            ),
        ),
        ("tests/crash/test_facts_outlive.py::test_reset_is_left_to_the_last_when_a_process_looks_on",),
    ),
    Mutant(
        "torn-later",
        "the reaper ends the fence of a dead writer before it marks the content torn",
        "native/domain/reap.c",
        (
            Change("    mark_torn(s, f, life);\n", ""),
            Change("    STEP(reap_fence);", "    mark_torn(s, f, life);\n    STEP(reap_fence);"),
        ),
        ("tests/crash/test_steps.py::test_death_at_every_step_is_repaired_by_whoever_comes_next[write]",),
    ),
    Mutant(
        "live-unreferenced",
        "a record becomes live before the process that makes it references it",
        "native/domain/records.c",
        (
            Change(
                "  STEP_OF(rec_filled,",
                "  atomic_store(&r->state, REC_LIVE);\n  STEP_OF(rec_live, r, atomic_load(&r->gen));\n  STEP_OF(rec_filled,",
            ),
        ),
        ("tests/crash/test_steps.py::test_death_at_every_step_is_repaired_by_whoever_comes_next[allocate]",),
    ),
    Mutant(
        "made-twice",
        "two threads that use a domain first each make what there is one of for a domain",
        "src/dmabuf/domain/local.py",
        (
            Change("        with domain.lock:\n", "        if self is not None:\n"),
            Change(
                "            made = self._make(domain)\n            # A signal handler may",
                "            made = found = self._make(domain)\n            # A signal handler may",
            ),
            Change(
                "            found = self.peek(domain)\n            if found is not None and found is not old:\n"
                "                return found\n            domain",
                "            domain",
            ),
        ),
        ("tests/crash/test_schedules.py::test_orders_of_threads[FirstDispatcher]",),
    ),
    Mutant(
        "leaves-later",
        "a process that leaves lets its threads go on in the life that it ends",
        "native/domain/life.c",
        (
            Change("  atomic_store(&s->own->life, 0);\n  s->own->hold.address", "  s->own->hold.address"),
            Change("  life_clean(s, life); /* if", "  atomic_store(&s->own->life, 0);\n  life_clean(s, life); /* if"),
        ),
        ("tests/crash/test_leaving.py::test_access_beside_leave_is_in_a_life_of_its_own",),
    ),
    Mutant(
        "stream-promise",
        "a producer uses the slot of a frame that is promised to a reader",
        "native/stream/produce.c",
        (
            Change("promised = p->policy == SP_WAIT ?", "promised = p->policy > SP_DROP ?"),
            Change("if (seq && p->policy == SP_WAIT && seq", "if (seq && p->policy > SP_DROP && seq"),
        ),
        ("tests/stream/test_pipeline_kills.py",),
    ),
    Mutant(
        "stream-foreign",
        "a producer writes into a buffer that a program uses which doesn't know the stream",
        "native/stream/produce.c",
        (Change("  if (foreign_blocks(s, x, k, false, false)) return 0;\n", ""),),
        ("tests/stream/test_pipeline_kills.py",),
    ),
    Mutant(
        "stream-writing",
        "programs that don't know the stream read a frame that is being made",
        "native/domain/streams.c",
        (Change("  if (kind == ENTRY_WRITE) return (state & S_WRITING) != 0;\n", "  if (kind == ENTRY_WRITE) return 0;\n"),),
        ("tests/stream/test_pipeline_kills.py",),
    ),
    Mutant(
        "stream-torn",
        "a producer that gives up a frame leaves its bytes as if they were whole",
        "native/stream/produce.c",
        (Change("    if (r) atomic_store(&r->torn, TORN_MAKE((uint32_t)getpid(), ECANCELED));\n", "    (void)r;\n"),),
        ("tests/stream/test_produce.py",),
    ),
    Mutant(
        "stream-dead-reader",
        "the places that a dead reader had in streams stay its own",
        "native/domain/streams.c",
        (Change("if (atomic_load(&x->reader[k].owner) == life) stream_place_end(x, k);", "(void)life;"),),
        ("tests/stream/test_processes.py::test_places_of_dead_readers_are_used_again",),
    ),
    Mutant(
        "redeliver-claim",
        "what a dead member had only tried to take is handed out again",
        "native/domain/streams.c",
        (Change("  if (!has) atomic_store(&r->claims", "  if (!has && !x) atomic_store(&r->claims"),),
        ("tests/crash/test_redeliver_steps.py",),
    ),
    Mutant(
        "redeliver-note",
        "a member moves the cursor of its group on, and makes no note of who moved it before",
        "native/stream/read.c",
        (Change("    if (again) note_taker(p, x, word);\n", "    if (0) note_taker(p, x, word);\n"),),
        ("tests/crash/test_redeliver_steps.py",),
    ),
    Mutant(
        "redeliver-last",
        "what is left of a group without members keeps its slots",
        "native/domain/streams.c",
        (Change("      stream_orphans_free(x, life);\n", ""),),
        ("tests/stream/test_redeliver.py::test_group_whose_members_are_all_dead_begins_anew",),
    ),
)


def run(command: Sequence[str], directory: Path, environment: dict[str, str], output: IO[str]) -> int:
    """Return the exit status. What the process leaves behind ends with it: a fault may let a forked child hang, with the output open."""
    process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0)
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the number is nobody else's until the process is waited for
        status = process.wait()
    return status


class Tree:
    """A copy of the tree, with an extension of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # a file that was removed and not committed is still listed
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        self.build()

    def build(self) -> None:
        """Build the extension in place."""
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=self.root, check=True)

    def test(self, tests: Sequence[str], seed: int) -> tuple[int, str]:
        """Run tests until one fails. Return pytest's exit status, and the line that says what happened."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"--randomly-seed={seed}",
            "-o",
            f"timeout={_WATCHDOG}",
        ]
        environment = os.environ | {"PYTHONPATH": str(self.root / "src"), "DMABUF_TEST_BUDGET": "quick"}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            status = run([*command, *tests], self.root, environment, output)
            output.seek(0)
            lines = output.read().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return status, (failed or lines or ["no output"])[-1]


def hunt(mutants: Sequence[Mutant], seeds: Sequence[int]) -> list[str]:
    """Look for each mutant with each seed. Return the names of those that a seed did not find."""
    escaped = []
    with tempfile.TemporaryDirectory(prefix="dmabuf-mutants-") as directory:
        tree = Tree(Path(directory))
        for mutant in mutants:
            status, line = tree.test(mutant.tests, seeds[0])
            if status != _PASSED:
                raise SystemExit(f"{mutant.name}: its tests fail without the fault: {line}")
            path = tree.root / mutant.file
            whole = path.read_bytes()
            mutant.apply(tree.root)
            compiled = path.suffix != ".py"
            if compiled:
                tree.build()
            found = []
            for seed in seeds:
                status, line = tree.test(mutant.tests, seed)
                if status not in (_PASSED, _FAILED):
                    raise SystemExit(f"{mutant.name}: pytest could not run its tests: {line}")
                found.append(status == _FAILED)
                print(f"{mutant.name}: seed {seed}: {'found' if found[-1] else 'ESCAPED'}: {line}", flush=True)
            if not all(found):
                escaped.append(mutant.name)
            path.write_bytes(whole)
            if compiled:
                tree.build()
    return escaped


def main(arguments: Sequence[str] | None = None) -> int:
    """Hunt the mutants that are named. Return 1 if one escaped."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description="Show that the tests find known faults.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which mutants (all of them)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many seeds, from 1 on ({SEEDS})")
    parser.add_argument("--list", action="store_true", help="name the mutants, and do nothing else")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}; see --list")
    chosen = [mutant for mutant in MUTANTS if mutant.name in (given.names or {one.name for one in MUTANTS})]
    if given.list:
        print("\n".join(f"{mutant.name}: {mutant.what}" for mutant in chosen))
        return 0
    escaped = hunt(chosen, range(1, given.seeds + 1))
    print(f"{len(chosen) - len(escaped)} of {len(chosen)} mutants found" + (f"; escaped: {', '.join(escaped)}" if escaped else ""))
    return bool(escaped)


if __name__ == "__main__":
    sys.exit(main())
