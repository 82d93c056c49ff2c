"""The record of a buffer, or of a reservation object of its own, as one process references it.

A record is found by the buffer's ``(st_dev, st_ino)`` and confirmed by its nonce. A process that has the buffer open sets its bit on the
record, and the record stays while any living process has its bit there. The last process to clear its bit watches the inode (inotify(7),
IN_DELETE_SELF). The inode's end proves that nobody has the buffer any more, in flight or mapped, and comes with the closing itself.

If nobody watches, because the last process died, the reference lock decides: ``/proc/locks`` shows it for every holder of the descriptor.
The kernel prints that file in pieces, so a pass is believed only if its pieces overlap, and the lock must be missing in three such passes,
a tick apart, before the record goes. A wrong judgment would cost the name and the torn mark. A pass is expensive, because the kernel walks
the list again for each page of text and blocks every locker meanwhile. So a pass is made only when somebody asks which buffers there are,
or when the pool is full.
"""

from __future__ import annotations

import atexit
import errno
import os
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self, TypeVar

from dmabuf._native import OFF_ID, OwnedFd, Shm, WeakValues, close_at_exit, locks_seen, watch_add, watch_open, watch_read
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.guards import finalizer
from dmabuf.domain.local import Local
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import fail, needing_descriptors

if TYPE_CHECKING:
    from dmabuf.answers import RecordInfo

KIND_BUFFER: Final = 0
KIND_RESV: Final = 1
ABSENT_PASSES: Final = 3
WARM: Final = 64  # records kept in a process after their last handle
R = TypeVar("R", bound="Record")


class Record:
    """This process's reference to one record. There is one object for each record of a process.

    ``handles``: the id() of each handle of this process that is open. ``last``: of a kernel dma-buf, tells whether a descriptor is the last
    reference anywhere. ``resv_ref``: the object that stands for the reservation object in this process. ``resv``: if the exporter gave the
    buffer a reservation object, the number of that one's record + 1; ``resv_gen``: that record's generation. ``layout``: which of a
    picture's buffers it is, and the bytes of the layout, once this process knows it.
    """

    def __init__(self, domain: Domain, dev: int, ino: int, size: int, nonce: bytes, exp_name: bytes, home: bytes, kind: int) -> None:
        self.domain = domain
        self.dev, self.ino, self.size, self.nonce, self.exp_name, self.home, self.kind = dev, ino, size, nonce, exp_name, home, kind
        self.life = 0
        self.shm: Shm = domain.shm
        self.index = self.gen = 0  # gen 0: it was never referenced
        self.lock = fork_lock()  # a handle's __del__ may run in the middle of another handle's enter()
        self.handles: set[int] = set()
        self.unwatched = False  # whether the reference was dropped, and what follows that not done yet
        self.last: Callable[[int], bool] | None = None
        self.resv_ref: weakref.ref[object] | None = None
        self.resv = self.resv_gen = 0
        self.layout: tuple[int, bytes] | None = None

    def known_name(self) -> bytes | None:
        """Return the buffer's name, for messages: it joins nothing, waits for nobody, and is None if the record is gone."""
        try:
            found = self.shm.rec_info(self.index) if self.gen else None
        except OSError:  # the file makes no sense any more, which is not what the message is about
            return None
        return found["name"] if found is not None and found["gen"] == self.gen else None

    def __str__(self) -> str:
        name = self.known_name()
        return f"buffer ino {self.ino}" if name is None else f"buffer {os.fsdecode(name)!r} ino {self.ino}"

    def reference(self, name: bytes | None = None) -> None:
        """Find or make the record, and set this process's bit. ``name``: the buffer's, for a record that has to be made.

        The bit and ``life`` are set in one step. All else comes before, so that a signal handler that raises leaves no half of it.
        """
        shm = self.domain.join()
        self.life, self.shm = 0, shm
        self.referenced()
        found = shm.rec_find(self.dev, self.ino) if self.ino else None
        info = shm.rec_info(found[0]) if found and found[2] == self.nonce else None
        if found is not None and info is not None and info["gen"] == found[1]:  # its maker knows more than who only has the descriptor
            self.exp_name, self.home = info["exp_name"], info["home"]
            self.resv, self.resv_gen = info["resv"], info["resv_gen"]
            self.unwatched = False
            if shm.rec_get(found[0], found[1], self):
                return
        self._create(shm, name)

    def referenced(self) -> None:
        """Do what the first reference of a life to the record needs."""

    def _create(self, shm: Shm, name: bytes | None) -> None:
        arguments = (self.dev, self.ino, self.size, self.nonce, self.exp_name, self.home, name, self.kind, os.getpid(), time.time_ns())
        part, layout = self.layout or (0, None)
        self.unwatched = False
        for attempt in range(ABSENT_PASSES + 1):
            try:
                shm.rec_create(*arguments, part, layout, self)
            except OSError as e:
                if e.errno != errno.ENOSPC or attempt == ABSENT_PASSES or not shm.rec_orphans():
                    raise
            else:
                return
            # The pool is full of records whose buffers are probably gone: check them now, a tick apart, rather than refuse.
            sweep(self.domain)
            shm.wait(OFF_ID, shm.load32(OFF_ID), TICK_NS / 1e9)

    def ensure(self) -> int:
        """Return the record's index, referenced by this process's present life; a forked child takes a reference of its own."""
        return self.at()[1]

    def at(self) -> tuple[Shm, int]:
        """Return the mapped domain and the index, referenced by this process's present life. Joining may change both at once."""
        life, shm = self.life, self.shm
        if not life or life != shm.life:
            with self.lock:
                self._again()
        return self.shm, self.index

    def _again(self, name: bytes | None = None) -> None:
        shm = self.domain.join()
        if shm is self.shm and self.life == shm.life:
            return
        if shm is self.shm and self.gen:
            self.referenced()
            if shm.rec_get(self.index, self.gen, self):
                return
        self.reference(name)

    def info(self) -> RecordInfo:
        """Return what the record says now."""
        self.ensure()
        return self.seen()

    def seen(self) -> RecordInfo:
        """Return what the record says, without a reference of this process's present life to it."""
        found = self.shm.rec_info(self.index)
        if found is None or found["gen"] != self.gen:
            what = "the domain file was changed from outside"
            raise fail(errno.EUCLEAN, "look up", "a buffer's record", "end the processes that use the domain", what=what)
        return found

    def find_layout(self) -> tuple[int, bytes] | None:
        """Return which of a picture's buffers it is, and the bytes of the layout; None if it has none. It has the first one for ever."""
        if self.layout is None:
            shm, index, gen = self._place()
            self.layout = shm.rec_layout(index, gen)
        return self.layout

    def set_layout(self, part: int, layout: bytes) -> bool:
        """Give the buffer its layout. Return False if it has another one already."""
        shm, index, gen = self._place()
        shm.rec_set_layout(index, gen, part, layout)
        return self.find_layout() == (part, layout)

    def _place(self) -> tuple[Shm, int, int]:
        with self.lock:  # joining again may change all three
            self._again()
            return self.shm, self.index, self.gen

    def enter(self, handle: object, name: bytes | None = None) -> None:
        """Count a handle and take the reference that it needs, in one step: another thread may be closing the last handle.

        ``name``: for a record that has to be made again.
        """
        with self.lock:
            self.handles.add(id(handle))  # first: a handle that the garbage collector closes meanwhile must not be the last
            life, shm = self.life, self.shm
            if not life or life != shm.life:
                try:
                    now = shm.life
                    # A buffer comes back: what _again() does, in fewer steps.
                    if life or not self.gen or shm is not self.domain.shm or not now or not shm.rec_get(self.index, self.gen, self):
                        self._again(name)
                except BaseException:
                    self.handles.discard(id(handle))
                    raise

    def leave(self, handle: object, fd: int, closing: bool = True) -> InodeWatch | None:
        """Count a handle no more. The last of this process drops the reference. What a signal handler interrupted can be called again.

        The caller then closes ``fd``, or gives it away if not ``closing``. Returns the watch that the caller must check after closing.
        """
        with self.lock:
            self.handles.discard(id(handle))
            if self.handles:
                return None
            shm, domain = self.shm, self.domain
            if self.life and shm.life == self.life:
                # Keep the object for a while without a reference: a buffer that circulates comes back, and is then found in one step.
                warm: deque[Record] | None = domain.local.get(_WARM)  # not of() alone: each last handle makes this call
                (_WARM.of(domain) if warm is None else warm).append(self)
                self.unwatched, self.life = True, 0
                held = shm.rec_put(self.index)
            elif self.unwatched and not self.life and shm.life:  # a signal handler raised when the reference had been dropped
                held = bool(shm.rec_holders(self.index))
            else:
                return None
            found = None if held else self._after_last(shm, fd, closing)
            self.unwatched = False
            return found

    def forget(self, handle: object) -> None:
        """Count a handle no more, and keep the reference for the reservation object alone."""
        with self.lock:
            self.handles.discard(id(handle))

    def _after_last(self, shm: Shm, fd: int, closing: bool) -> InodeWatch | None:
        """Do what follows when no process has the buffer open. Returns the watch of its inode, if it has one."""
        if self.last is not None:  # its inode can't be watched, but the kernel counts
            if closing and self.last(fd):
                shm.rec_free(self.index, self.gen)
            return None
        watch = _WATCH.of(self.domain)
        return watch if watch.add(fd, self) else None

    def tombstone(self) -> Self:
        """Return a record that says which buffer it was, without a reference: for a closed handle."""
        return type(self)(self.domain, self.dev, self.ino, self.size, self.nonce, self.exp_name, self.home, self.kind)

    @finalizer
    def __del__(self) -> None:
        # Only a reservation object that outlived its buffer's handles still has a reference here.
        shm = getattr(self, "shm", None)  # None: a signal handler raised before there was one
        if shm is not None and self.life and shm.life == self.life:
            self.life = 0
            if not shm.rec_put(self.index) and self.kind == KIND_RESV:
                shm.rec_free(self.index, self.gen)


class InodeWatch:
    """The inodes of buffers that this process was the last to have open. An inode's end frees the record."""

    def __init__(self, domain: Domain) -> None:
        self.domain = weakref.ref(domain)
        self.watched: dict[int, tuple[int, int]] = {}
        self.watch: OwnedFd | None
        try:
            self.watch = watch_open()
        except OSError:
            self.watch = None  # no descriptor or no instance left (inotify(7)): the sweep checks reference locks

    def add(self, fd: int, record: Record) -> bool:
        """Watch the inode of a record, of which ``fd`` is a descriptor. Its end frees the record. Returns False if that is impossible."""
        if self.watch is None:
            return False
        try:
            self.watched[watch_add(self.watch, fd, record.dev, record.ino)] = (record.index, record.gen)
        except OSError:
            return False
        return True

    def free_gone(self) -> None:
        """Free the records of the inodes that have ended."""
        domain = self.domain()
        while self.watch is not None and self.watched and domain is not None:
            try:
                events = watch_read(self.watch)
            except OSError:  # somebody else closed it: the sweep checks reference locks
                self.watch = None
                return
            if not events:
                return
            for at in range(0, len(events), _EVENT.size):
                wd, mask, _, _ = _EVENT.unpack_from(events, at)
                if mask & _IN_DELETE_SELF and (found := self.watched.pop(wd, None)) and domain.shm.life:
                    domain.shm.rec_free(*found)


_EVENT = struct.Struct("iIII")  # struct inotify_event; for a watched inode itself no name follows
_IN_DELETE_SELF: Final = 0x400


_RECORDS: Final[Local[WeakValues[tuple[int, int], Record]]] = Local(lambda domain: _swept(domain))
"""The buffers of this process, by ``(st_dev, st_ino)``."""
_RESVS: Final[Local[WeakValues[tuple[int, int], Record]]] = Local(lambda domain: _swept(domain))
"""The reservation objects on records of their own that this process has, by index and generation."""
_adding = fork_lock()  # of both, to look and add in one step
_WARM: Final[Local[deque[Record]]] = Local(lambda _: deque(maxlen=WARM))
_WATCH: Final[Local[InodeWatch]] = Local(InodeWatch)


def _swept(domain: Domain) -> WeakValues[tuple[int, int], Record]:
    """Return an empty table of records, and have the domain's sweep look after records too."""
    me = weakref.ref(domain)

    def sweep_records() -> None:
        here = me()
        if here is not None:
            sweep(here)

    domain.sweep_hooks.ensure("records", sweep_records)
    _DOMAINS.add(domain)
    return WeakValues()


def free_gone(domain: Domain) -> None:
    """Free the records of the inodes that have ended."""
    watch = _WATCH.peek(domain)
    if watch is not None:
        watch.free_gone()


_DOMAINS: Final[WeakObjects[Domain]] = WeakObjects()


def _close_at_exit() -> None:
    """Have the buffers that the program hasn't closed be closed when the interpreter is gone, so that the last process sees it."""
    for domain in _DOMAINS:
        table = _RECORDS.peek(domain)
        if table is not None:
            close_at_exit([key for key, record in table.items() if record.handles])


atexit.register(_close_at_exit)


def known(domain: Domain, dev: int, ino: int) -> Record | None:
    """Return this process's record of a buffer, if it has one. Takes no lock."""
    table = _RECORDS.peek(domain)
    return None if table is None else table.get((dev, ino))


def in_words(domain: Domain, dev: int, ino: int) -> str:
    """Return what a message calls a buffer of which only the inode is known."""
    return str(known(domain, dev, ino) or f"buffer ino {ino}")


def adopt(kind: type[R], domain: Domain, dev: int, ino: int, size: int, nonce: bytes, exp_name: bytes, home: bytes) -> R:
    """Return the record of a buffer whose fd this process has, as a ``kind``; made if nobody has one.

    Each handle then enters it, and the first one references it. Two threads that come at once get the same one, because a process has one
    bit for each record: if two objects shared it, the end of one would take it from the other.
    """
    domain.join()
    table = _RECORDS.of(domain)
    record = table.get((dev, ino))
    if isinstance(record, kind) and record.nonce == nonce:
        return record
    made = kind(domain, dev, ino, size, nonce, exp_name, home, KIND_BUFFER)
    with _adding:
        record = table.get((dev, ino))
        if isinstance(record, kind) and record.nonce == nonce:
            return record
        table[dev, ino] = made
    return made


def confirmed(kind: type[R], domain: Domain, dev: int, ino: int, size: int, nonce: bytes) -> R | None:
    """Return the record of a buffer whose fd this process has, if there is one with that nonce; None: look at the fd's name."""
    table: WeakValues[tuple[int, int], Record] | None = domain.local.get(_RECORDS)  # each call less is worth it here
    record = table.get((dev, ino)) if table is not None else None
    if record is not None:
        return record if record.nonce == nonce and isinstance(record, kind) else None
    found = domain.join().rec_find(dev, ino)
    if found is None or found[2] != nonce:
        return None
    return adopt(kind, domain, dev, ino, size, nonce, b"memfd", b"memfd")


def standalone(domain: Domain) -> Record:
    """Return the record of a new reservation object that belongs to no buffer."""
    domain.join()
    record = Record(domain, 0, 0, 0, os.urandom(16), b"", b"", KIND_RESV)
    record.reference()
    _RESVS.of(domain)[record.index, record.gen] = record
    return record


def foreign_resv(record: Record) -> Record | None:
    """Return the record of the reservation object that a buffer's exporter gave it; None when it has its own.

    Raises:
        NoDeviceError: It is gone: the exporter, and every other process that had it, has ended (ENODEV).
    """
    if not record.resv:
        return None
    table = _RESVS.of(record.domain)
    shm, index = record.domain.join(), record.resv - 1
    info = shm.rec_info(index)
    if info is None or info["kind"] != KIND_RESV or info["gen"] != record.resv_gen:
        raise _resv_gone(record)
    with _adding:
        found = table.get((index, info["gen"]))
        if found is None:
            found = Record(record.domain, 0, 0, 0, info["nonce"], b"", b"", KIND_RESV)
            found.shm = shm
            if not shm.rec_get(index, info["gen"], found):
                raise _resv_gone(record)
            table[index, info["gen"]] = found
    return found


def _resv_gone(record: Record) -> OSError:
    what = "its reservation object is gone"
    return fail(errno.ENODEV, "resv", record, "ask its exporter for a new buffer", what=what)


def reference_locks() -> set[tuple[int, int]] | None:
    """Return (st_dev, st_ino) of every file that has an OFD lock, from a pass over /proc/locks that misses none (proc(5)).

    Return None if other programs lock and unlock so much that no pass can be believed, or if a sandbox hides the locks.
    """
    with needing_descriptors("look up", "reference locks in /proc"):
        found = locks_seen()
    return None if found is None else set(found)


def sweep(domain: Domain) -> int:
    """Check the records that no living process references, and free those whose lock was missing often enough. Returns how many."""
    shm = domain.shm
    watch = _WATCH.peek(domain)
    if watch is not None:
        watch.free_gone()
    orphans = shm.rec_orphans()
    if not orphans or not shm.life:
        return 0
    locked, now, freed = reference_locks(), time.monotonic_ns(), 0
    if locked is None:
        return 0
    for index, gen, dev, ino, absent, since in orphans:
        if not ino:
            freed += shm.rec_free(index, gen)
        elif (dev, ino) in locked:
            if absent:
                shm.rec_set_absent(index, gen, 0, since)
        elif not 0 <= now - since < TICK_NS:
            if absent + 1 >= ABSENT_PASSES:
                freed += shm.rec_free(index, gen)
            else:
                shm.rec_set_absent(index, gen, absent + 1, now)
    return freed


def present(domain: Domain) -> list[int]:
    """Return the indices of the records whose buffers exist: a living process references them, or a pass shows their reference lock."""
    shm = domain.shm
    orphans = shm.rec_orphans()
    gone = {index for index, *_ in orphans}
    if gone:
        for _ in range(ABSENT_PASSES):  # a single pass may miss a lock that is there
            seen = reference_locks()
            gone -= {index for index, _, dev, ino, *_ in orphans if ino and (seen is None or (dev, ino) in seen)}
    return [i for i in shm.rec_list() if i not in gone]
