"""The protocol of the shared memory as small state machines, which accept the log of a test's steps or refuse it.

Each rule is a sentence of docs/design.md or of tests/model/README.md. Where a log can't tell, because two processes wrote their entries in
the other order, or because one was killed between a change and its entry, the machines accept. So what they refuse did happen.

What gives something away is logged before it is done, and what takes it after. So in the log everything is held for a shorter time than in
the memory: of two owners at once, both were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tests.support.tracing import Entry

Key: TypeAlias = tuple[int, int]  # the domain, and an object or a number in it

_FENCE_ORDER: Final = {"fence_error": 1, "fence_stamped": 2, "fence_signaled": 3, "fence_woken": 4, "fence_dispatchers_woken": 5}
_UNDER_TABLE_LOCK: Final = ("rec_", "name_", "layout_", "block_", "chunk_allocated", "chunk_typed", "chunk_published")
# A record: its state -> the steps that may come next.
_RECORD: Final = {
    "free": ("rec_filled",),
    "filled": ("rec_held",),
    "held": ("rec_live",),
    "live": ("rec_linked", "rec_dying", "rec_cleared"),  # cleared: a new buffer has the same inode
    "dying": ("rec_unlinked", "rec_cleared"),
    "unlinked": ("rec_cleared",),
    "cleared": ("rec_freed", "rec_filled"),
}
_STABLE: Final = ("free", "live")
_RESV_IN_RECORD: Final = 256  # bytes; DB_AT(db_rec, resv)
# A life's end, and a reset: each step comes after those before it, and none but those in brackets may be left out.
_ENDING: Final = ("reap_fences_done", "reap_contexts_done", "reap_returned", "reap_clean")
_RESET: Final = ("reset_begun", "reset_rebuilt", "reset_floors", "reset_lists", "reset_counted", "reset_unlocked", "reset_cut")
_WITHIN_RESET: Final = {"reset_judged": "reset_begun", "reset_chunk": "reset_lists", "reset_punched": "reset_cut"}


class RefusedError(AssertionError):
    """A log that the protocol doesn't allow."""


class Machines:
    """What the log has told so far."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.at = 0
        self.last_of = {entry.process: at for at, entry in enumerate(entries)}  # a dead process passes no step any more
        self.last_of_thread = {entry.thread: at for at, entry in enumerate(entries)}
        # Locks: who may hold each, by the word of its context. Of a lock that was passed on, either.
        self.holders: dict[Key, set[int]] = {}
        self.passing: dict[int, Key] = {}  # thread -> the lock that it passes on
        self.locker: dict[Key, int] = {}  # context -> the process that locked with it
        self.closing: set[Key] = set()  # contexts
        self.dead_owner: dict[int, int] = {}  # thread -> the context from which it takes a lock
        # Fences, by their handles.
        self.in_slot: dict[Key, int] = {}  # the last handle in a slot
        self.maker: dict[Key, int] = {}  # -> the process
        self.anybody: set[Key] = set()  # fences that all may signal
        self.filling: dict[int, Key] = {}  # thread -> the fence that it fills
        self.ended: set[Key] = set()
        self.progress: dict[tuple[int, Key], int] = {}  # how far a thread is with ending a fence
        # Accesses, by the handles of their fences.
        self.listed: set[Key] = set()  # fences that were added to a list
        self.record_of: dict[Key, int] = {}
        self.writes: set[Key] = set()  # those that write, or are about to
        self.granted: dict[Key, dict[int, bool]] = {}  # record -> handle -> does it write
        self.torn: set[Key] = set()  # whose content was marked torn before they ended
        self.reaping: dict[
            int, tuple[Key, bool]
        ] = {}  # thread -> the slot of the fence that it reaps, and whether it looked at the content
        # The table of each domain.
        self.table: dict[int, int] = {}  # domain -> the thread with the table lock
        self.broken: set[int] = set()  # domains whose table lock was taken from a dead process, until they are repaired
        self.records: dict[Key, str] = {}
        self.changing: dict[int, set[Key]] = {}  # domain -> the records that are not in a stable state
        self.record_gen: dict[Key, int] = {}
        self.naming: set[Key] = set()
        self.describing: set[Key] = set()
        self.growing: dict[int, tuple[int, str]] = {}  # thread -> the chunk that it makes, and how far it is
        # Lives, by their slots.
        self.alive: dict[Key, int] = {}  # -> the life
        self.last_use: dict[Key, int] = {}  # of a life: where it last takes something as its own
        for at, entry in enumerate(entries):
            if entry.name in ("table_locked", "chunk_owned", "life_chunk", "life_leaving"):
                self.last_use[entry.domain, entry.number] = at
        self.left: set[Key] = set()  # lives that ended themselves, or began to
        self.reaper: dict[Key, Entry] = {}  # -> who holds the byte of a dead life
        self.ending: dict[tuple[int, Key], int] = {}  # how far a thread is with ending a life
        self.owner: dict[Key, int] = {}  # chunk -> the life
        self.resetting: dict[int, tuple[int, int]] = {}  # domain -> the thread, and how far it is
        self.looks_away: dict[int, str] = {}  # thread -> its last step on the way to a reset

    def run(self) -> None:
        """Take the whole log.

        Raises:
            RefusedError: An entry breaks a rule; the text says which, and shows what its thread did before.
        """
        steps: dict[str, Callable[[Entry], None] | None] = {}
        for at, entry in enumerate(self.entries):
            self.at = at
            name = entry.name
            if name.startswith(_UNDER_TABLE_LOCK) and entry.domain:
                self.under_table_lock(entry)
            if name not in steps:
                steps[name] = getattr(self, f"on_{name}", None)
            step = steps[name]
            if step is not None:
                step(entry)
            elif name in _FENCE_ORDER:
                self.fence(entry)
            elif name in _RESET or name in _WITHIN_RESET:
                self.reset(entry)
            elif name in _ENDING:
                self.end_life(entry)

    def refuse(self, entry: Entry, rule: str) -> None:
        before = [str(other) for other in self.entries[: self.at] if other.thread == entry.thread or other.object == entry.object][-25:]
        raise RefusedError(f"{rule}: {entry}\nafter\n  " + "\n  ".join(before))

    def lives_on(self, process: int | None) -> bool:
        """Does it pass a step after this one?"""
        return process is not None and self.last_of[process] > self.at

    # ---- locks of reservation objects ----

    def on_resv_locked(self, e: Entry) -> None:
        holders = self.holders.get((e.domain, e.object))
        if holders:
            self.refuse(e, f"a lock has one owner, and {' or '.join(map(hex, holders))} has it")
        self._holds(e)

    def on_resv_dead_owner(self, e: Entry) -> None:
        holders = self.holders.get((e.domain, e.object))
        if holders and e.number not in holders and any(self.lives_on(self.locker.get((e.domain, word))) for word in holders):
            self.refuse(e, f"a lock is taken from its owner, which is {' or '.join(map(hex, holders))}")
        if (e.domain, e.number) not in self.closing:
            self.refuse(e, "a lock is taken from a context that was closed")
        self.dead_owner[e.thread] = e.number

    def on_resv_stolen(self, e: Entry) -> None:
        if self.dead_owner.pop(e.thread, None) is None:
            self.refuse(e, "a lock is taken from a dead owner")
        self._holds(e)

    def _holds(self, e: Entry) -> None:
        if (e.domain, e.number) in self.closing and self.lives_on(e.process):
            self.refuse(e, "a lock is taken by an open context")
        self.holders[e.domain, e.object] = {e.number}
        self.locker[e.domain, e.number] = e.process

    def on_resv_unlocking(self, e: Entry) -> None:
        holders = self.holders.get((e.domain, e.object))
        if holders is not None and e.number not in holders:
            self.refuse(e, f"a lock is given back by its owner, which is {' or '.join(map(hex, holders)) or 'nobody'}")
        self.holders[e.domain, e.object] = set()

    def on_resv_passing(self, e: Entry) -> None:
        key = e.domain, e.object
        if e.number in self.holders.get(key, ()):
            self.passing[e.thread] = key

    def on_resv_passing_to(self, e: Entry) -> None:
        key = self.passing.pop(e.thread, None)
        if key is not None:
            self.holders[key].add(e.number)

    def on_resv_added(self, e: Entry) -> None:
        self.listed.add((e.domain, e.number))
        holders = self.holders.get((e.domain, e.object))
        if holders is None:
            return
        if e.process not in {self.locker.get((e.domain, word), e.process) for word in holders}:
            self.refuse(e, "a list of fences changes under its lock")

    on_resv_copied = on_resv_cut = on_resv_added

    def on_ctx_closing(self, e: Entry) -> None:
        self.closing.add((e.domain, e.number))

    # ---- fences ----

    def on_fence_filled(self, e: Entry) -> None:
        slot = e.domain, e.object
        before = self.in_slot.get(slot)
        if before is not None:
            if e.number >> 24 <= before >> 24 and before >> 24 < 1 << 39:
                self.refuse(e, f"a generation of a slot never comes again, and {before:#x} was there")
            last = e.domain, before
            if last not in self.ended and last not in self.anybody and self.lives_on(self.maker.get(last)):
                self.refuse(e, f"a slot is used again when its fence has ended, and {before:#x} has not")
        self.filling[e.thread] = e.domain, e.number

    def on_fence_published(self, e: Entry) -> None:
        if self.filling.pop(e.thread, None) != (e.domain, e.number):
            self.refuse(e, "a fence is filled before it is published")
        self.in_slot[e.domain, e.object] = e.number
        self.maker[e.domain, e.number] = e.process

    def on_fence_ending(self, e: Entry) -> None:
        self.anybody.add((e.domain, e.number))

    def fence(self, e: Entry) -> None:
        key = e.domain, e.number
        before, now = self.progress.get((e.thread, key), 0), _FENCE_ORDER[e.name]
        if before >= now and not (now < 3 and before < 3):
            self.refuse(e, f"a fence ends in this order: {', '.join(_FENCE_ORDER)}")
        if now == 3 and before != 2:
            self.refuse(e, "the end and the time of a fence are stored before it is signaled")
        if now > 3 and before < 3:
            self.refuse(e, "who waits is woken after the fence is signaled")
        self.progress[e.thread, key] = now
        if now == 1:
            self._failed(e, key)
        elif now == 2:
            self._ends(e, key)
        elif now == 3:
            if key in self.ended:
                self.refuse(e, "a fence is signaled once")
            self.ended.add(key)

    def _failed(self, e: Entry, key: Key) -> None:
        if self._inside(e) and key not in self.torn and e.thread not in self.reaping:
            self.refuse(e, "content is marked torn before the fence of a write that failed ends")

    def _ends(self, e: Entry, key: Key) -> None:
        slot, looked = self.reaping.get(e.thread, ((0, 0), True))
        if self._inside(e) and slot == (e.domain, e.object) and not looked:
            self.refuse(e, "content is marked torn before the fence of a dead writer ends")
        rec = self.record_of.get(key)
        if rec is not None:
            self.granted.get((e.domain, rec), {}).pop(e.number, None)

    def _inside(self, e: Entry) -> bool:
        """Is it the fence of a write that was let in?"""
        rec = self.record_of.get((e.domain, e.number))
        return rec is not None and self.granted.get((e.domain, rec), {}).get(e.number, False)

    # ---- accesses ----

    def on_access_added(self, e: Entry) -> None:
        if (e.domain, e.number) not in self.listed:
            self.refuse(e, "an access waits with its fence in the list")

    def on_access_writing(self, e: Entry) -> None:
        self.writes.add((e.domain, e.number))

    def on_access_granted(self, e: Entry) -> None:
        key = e.domain, e.number
        if key not in self.listed:
            self.refuse(e, "an access is in the list of fences before it is granted")
        if key in self.ended:
            return  # by the life's end, in another thread
        self.record_of[key] = e.object
        writes, others = key in self.writes, self.granted.setdefault((e.domain, e.object), {})
        against = [handle for handle, other_writes in others.items() if (writes or other_writes) and handle != e.number]
        if against:
            self.refuse(e, f"a write excludes others, and {against[0]:#x} is inside")
        others[e.number] = writes

    def on_access_torn(self, e: Entry) -> None:
        self.torn.add((e.domain, e.number))

    def on_access_whole(self, e: Entry) -> None:
        if (e.domain, e.number) not in self.writes:
            self.refuse(e, "content is made whole by who writes it")
        if (e.domain, e.number) in self.ended and self.lives_on(e.process):
            self.refuse(e, "content is made whole before the fence of the write ends")

    def on_reap_pending(self, e: Entry) -> None:
        self.reaping[e.thread] = (e.domain, e.object), False

    def on_reap_torn(self, e: Entry) -> None:
        if self.reaping.get(e.thread, (None, False))[0] != (e.domain, e.object):
            self.refuse(e, "content is marked torn for a pending fence of a dead life")
        self.reaping[e.thread] = (e.domain, e.object), True

    def on_reap_fence(self, e: Entry) -> None:
        self.reaping.pop(e.thread, None)

    # ---- the table ----

    def on_table_locked(self, e: Entry) -> None:
        owner = self.table.get(e.domain)
        if owner is not None:
            self.refuse(e, f"the table lock has one owner, and thread {owner} has it")
        self.table[e.domain] = e.thread

    def on_table_stolen(self, e: Entry) -> None:
        owner = self.table.get(e.domain)
        if owner is not None:
            if self.last_of_thread[owner] > self.at:
                self.refuse(e, f"the table lock is taken from the dead, and thread {owner} goes on")
        self.table[e.domain] = e.thread
        self.broken.add(e.domain)

    def on_table_rebuilt(self, e: Entry) -> None:
        self.broken.discard(e.domain)
        for key in self.changing.pop(e.domain, ()):
            self.records.pop(key, None)  # free or live, as the repair found it
        self.naming = {key for key in self.naming if key[0] != e.domain}
        self.describing = {key for key in self.describing if key[0] != e.domain}

    def on_table_unlocking(self, e: Entry) -> None:
        if self.table.get(e.domain, e.thread) != e.thread:
            self.refuse(e, f"the table lock is given back by its owner, which is thread {self.table[e.domain]}")
        if e.domain in self.broken:
            self.refuse(e, "a table lock that was taken from the dead is given back when the table is repaired")
        for key in self.changing.pop(e.domain, ()):
            state = self.records.pop(key)
            if state == "dying":
                self.records[key] = "live"  # it is referenced again
            elif state != "cleared":  # a free one again: a new buffer has its inode
                self.refuse(e, f"the table lock is given back between two changes, and a record is {state}")
        chunk = self.growing.pop(e.thread, None)
        if chunk is not None and chunk[1] != "chunk_published":
            self.refuse(e, f"a chunk is published before the table lock is given back, and {chunk[0]:#x} is not")
        self.table.pop(e.domain, None)

    def under_table_lock(self, e: Entry) -> None:
        if self.table.get(e.domain) != e.thread:
            self.refuse(e, f"the table changes under its lock, which {self.table.get(e.domain, 'nobody')} has")
        if e.domain in self.broken and e.name != "rec_cleared":
            self.refuse(e, "a table lock that was taken from the dead is for repairing the table first")
        if e.name.startswith("rec_"):
            self._record(e)

    def _record(self, e: Entry) -> None:
        key, name = (e.domain, e.object), e.name
        state = self.records.get(key)
        repairs = e.domain in self.broken and state not in _STABLE
        if state is not None and name not in _RECORD[state] and not repairs:
            self.refuse(e, f"a record that is {state} is not {name.removeprefix('rec_')} next")
        if name == "rec_filled":
            if e.number <= self.record_gen.get(key, 0):
                self.refuse(e, f"a generation of a record never comes again, and {self.record_gen[key]:#x} was there")
            self.granted.pop(key, None)
        elif name == "rec_cleared":
            self.holders.pop((e.domain, e.object + _RESV_IN_RECORD), None)  # whoever had the lock of the buffer is dead
        elif name == "rec_live":
            self.record_gen[key] = e.number
        states = {"rec_linked": "live", "rec_freed": "free"}
        self.records[key] = now = states.get(name, name.removeprefix("rec_"))
        unstable = self.changing.setdefault(e.domain, set())
        if now in _STABLE:
            unstable.discard(key)
        else:
            unstable.add(key)

    def on_name_written(self, e: Entry) -> None:
        self.naming.add((e.domain, e.object))

    def on_name_switched(self, e: Entry) -> None:
        if (e.domain, e.object) not in self.naming:
            self.refuse(e, "a name is written before it counts")
        self.naming.discard((e.domain, e.object))

    def on_layout_filled(self, e: Entry) -> None:
        self.describing.add((e.domain, e.object))

    def on_layout_named(self, e: Entry) -> None:
        if (e.domain, e.object) not in self.describing:
            self.refuse(e, "a layout is written before the record names it")
        self.describing.discard((e.domain, e.object))

    # ---- chunks ----

    def on_chunk_allocated(self, e: Entry) -> None:
        self.growing[e.thread] = e.object, e.name

    def on_chunk_typed(self, e: Entry) -> None:
        self._grows(e, "chunk_allocated")

    def on_chunk_published(self, e: Entry) -> None:
        self._grows(e, "chunk_typed")

    def _grows(self, e: Entry, before: str) -> None:
        if self.growing.get(e.thread) != (e.object, before):
            self.refuse(e, "a chunk has memory, then a type, and then it is published")
        self.growing[e.thread] = e.object, e.name

    def on_chunk_owned(self, e: Entry) -> None:
        key = e.domain, e.object
        owner = self.owner.get(key)
        if owner is not None:
            self.refuse(e, f"a chunk has one owner, and the life {owner:#x} has it")
        self.owner[key] = e.number

    def on_chunk_returning(self, e: Entry) -> None:
        self.owner.pop((e.domain, e.object), None)

    def on_test_returned_chunk(self, e: Entry) -> None:
        """A test has written into the chunk table."""
        for key in [key for key in self.owner if key[1] == e.number]:
            self.owner.pop(key)

    # ---- lives ----

    def on_life_locked(self, e: Entry) -> None:
        reaper = self.reaper.get((e.domain, e.object))
        if reaper is not None and self.lives_on(reaper.process):
            self.refuse(e, "a life's byte has one owner, and a reaper has it")

    def on_life_alive(self, e: Entry) -> None:
        slot = e.domain, e.object
        before = self.alive.get(slot)
        if before is not None and self.goes_on((e.domain, before)):
            self.refuse(e, f"a slot is claimed when it is clean, and the life {before:#x} goes on")
        if before == e.number:
            self.refuse(e, "a life never comes again")
        self.alive[slot] = e.number

    def goes_on(self, life: Key) -> bool:
        """Does the life take something as its own after this?"""
        return self.last_use.get(life, -1) > self.at and life not in self.left

    def on_life_leaving(self, e: Entry) -> None:
        self.left.add((e.domain, e.number))

    def on_reap_locked(self, e: Entry) -> None:
        slot = e.domain, e.object
        reaper = self.reaper.get(slot)
        if reaper is not None and self.lives_on(reaper.process):
            self.refuse(e, f"a life has one reaper, and it is {reaper}")
        if self.goes_on((e.domain, e.number)):
            self.refuse(e, f"a life is reaped when its process is dead, and {e.number:#x} goes on")
        self.reaper[slot] = e
        self.ending.pop((e.thread, (e.domain, e.number)), None)

    on_reap_again = on_reap_locked

    def on_reap_unlocking(self, e: Entry) -> None:
        self.reaper.pop((e.domain, e.object), None)

    def end_life(self, e: Entry) -> None:
        if not e.domain:
            return
        key, now = (e.domain, e.number), _ENDING.index(e.name)
        before = self.ending.get((e.thread, key), -1 if now < 2 else 1)  # the second part is with the byte locked anew
        if now != before + 1:
            self.refuse(e, f"a life ends in this order: {', '.join(_ENDING)}")
        self.ending[e.thread, key] = now
        if now == 3:
            self.ending.pop((e.thread, key))
            self.alive.pop((e.domain, e.object), None)

    # ---- giving the memory back ----

    def on_left_copied(self, e: Entry) -> None:
        self.looks_away[e.thread] = e.name

    def on_left_absent(self, e: Entry) -> None:
        if self.looks_away.get(e.thread) != "left_copied":
            self.refuse(e, "a process has its private copy before its presence ends")
        self.looks_away[e.thread] = e.name

    def reset(self, e: Entry) -> None:
        thread, at = self.resetting.get(e.domain, (0, -1))
        if e.name == "reset_begun":
            if self.looks_away.pop(e.thread, None) != "left_absent":
                self.refuse(e, "who resets isn't present itself")
            lives = [life for (domain, _), life in self.alive.items() if domain == e.domain]
            if lives:
                self.refuse(e, f"a reset comes when all lives are clean, and the life {lives[0]:#x} isn't")
            thread, at = e.thread, -1
            self.table[e.domain] = e.thread
            self.broken.add(e.domain)
        if e.thread != thread:
            self.refuse(e, "a reset has one process")
        within = _WITHIN_RESET.get(e.name)
        if within is not None:
            if at != _RESET.index(within):
                self.refuse(e, f"this comes just after {within}")
            return
        if _RESET.index(e.name) != at + 1:
            self.refuse(e, f"a reset has this order: {', '.join(_RESET)}")
        self.resetting[e.domain] = e.thread, at + 1
        if e.name == "reset_rebuilt":
            self.on_table_rebuilt(e)
        elif e.name == "reset_unlocked":
            self.table.pop(e.domain, None)
            self.changing.pop(e.domain, None)
            for locks in (self.holders, self.records):
                for key in [key for key in locks if key[0] == e.domain]:
                    locks.pop(key)


def check(entries: Sequence[Entry]) -> None:
    """Accept a log. Raises: RefusedError, as `Machines.run`."""
    Machines(entries).run()
