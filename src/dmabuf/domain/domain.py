"""``Domain``: the mapped file of a group of processes, this process's life in it, ticks, sweeps, and the pools of the life.

Everything else in the package reaches shared memory through a `Domain`. A process joins at the first operation that needs a life, and a
forked child joins again. A process that has not joined can only read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dmabuf._native import (
    CHUNK_BYTES,
    CTX_FIRST_IN_LIFE,
    CTX_PER,
    HEADER_BYTES,
    LIFE_BYTE,
    LIFE_PID,
    LIVES,
    MAX_CHUNKS,
    OFF_SWEEP,
    TICK_CHECK,
    TICK_FENCE,
    TICK_POLL,
    Context,
    OwnedFd,
    Shm,
    TimelineSlot,
    WeakValues,
    closes_heard,
    hurry,
    owned,
    probe_fd,
    rest,
    unraisable,
)
from dmabuf.domain import lives, place, slow_waits
from dmabuf.domain.directory import remove_socket
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.guards import finalizer
from dmabuf.domain.hooks import Hooks
from dmabuf.domain.limits import cant_map, no_memfd
from dmabuf.domain.ofd import no_proc_at_all
from dmabuf.domain.retries import Retries
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import DmaBufError, fail, needing_descriptors

_F_ADD_SEALS: Final = 1033  # linux/fcntl.h
TICK_NS: Final = 40_000_000
_ALL: WeakObjects[Domain] = WeakObjects()
_BY_KEY: WeakValues[str | tuple[int, int], Domain] = WeakValues()  # by id, by directory, and by (st_dev, st_ino) of the file
_lock = fork_lock()
_default: Domain | None = None


class Domain:
    """The place where a group of processes keeps the state of its buffers.

    ``Domain.default()`` is this user's domain, and ``Domain.open(path)`` is another directory's. ``Domain.private()`` makes one without a
    name, which reaches other processes by fork, by `dmabuf.send`, or as an argument of a child process. ``id`` is part of the name of
    every buffer in the domain.

    Raises:
        NotPermittedError: The directory doesn't belong to this user alone (EACCES).
        DmaBufError: The file makes no sense while processes use it (EUCLEAN), or there is no /proc (ENOSYS). A file that makes no sense
            and isn't in use is renamed to ``….corrupt``.
        NoSpaceError: There is no room to make the file or to make it larger (ENOSPC).
    """

    def __init__(self, path: Path | None, shm: Shm, identity: str) -> None:
        self.path = path
        self.id = identity
        self.shm = shm
        self.leaving = False  # hooks of the present life are being called, after which it ends
        self.lock = fork_lock()  # of this object's fields; a thread that holds it waits for nothing but the lifecycle lock
        self.tick_hooks: Hooks[[int, int]] = Hooks("tick")
        self.sweep_hooks: Hooks[[]] = Hooks("sweep")
        self.reset_hooks: Hooks[[]] = Hooks("reset")
        self.leave_hooks: Hooks[[]] = Hooks("leave")
        self._free_ctx: list[int] = []
        self._free_timelines: list[int] = []
        self._closed_timelines: list[int] = []
        self._heard = closes_heard()
        me = weakref.ref(self)
        self.retries = Retries(lambda: domain.shm.life if (domain := me()) is not None else 0, TICK_NS / 1e9)
        # What the layers above keep for this domain in this process (domain/local.py). A forked child starts with nothing.
        self.local: dict[object, Any] = {}
        self._wire(shm)
        _ALL.add(self)
        for key in (identity, path and os.fspath(path), self.file):
            if key:
                _BY_KEY[key] = self

    # ---- opening ----

    @classmethod
    def default(cls) -> Domain:
        """Return this user's domain, or the one that ``DMABUF_DOMAIN`` names. A process opens it once, and stays in it."""
        global _default
        if _default is not None:
            return _default
        told: list[str] = []
        with _lock:
            if _default is None:
                _default = cls._open_default(told)
        _warn(told)
        return _default

    @classmethod
    def _open_default(cls, told: list[str]) -> Domain:
        chosen = place.default_path()
        try:
            return cls._open(chosen, told)
        except OSError as e:
            # What never works there is the same for every process, so all of them go on to the same place.
            others = [path for path in place.default_places() if path != chosen]
            if e.errno not in (errno.ENOTSUP, errno.EROFS) or not others:
                raise
            return cls._open(others[-1], told)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Domain:
        """Return the domain in a directory, which is made if it doesn't exist. While the domain is in use, the object is the same."""
        told: list[str] = []
        if not isinstance(path, str | bytes | os.PathLike):
            raise TypeError(f"open domain: expected the path of a directory, not {type(path).__name__}")
        if not os.fspath(path):
            raise fail(errno.EINVAL, "open domain", repr(path), "name a directory", what="the path is empty")
        if "\0" in os.fsdecode(path):
            raise fail(errno.EINVAL, "open domain", repr(path), "name a directory without a NUL", what="the path has a NUL")
        found = cls._open(Path(path).absolute(), told)
        _warn(told)
        return found

    @classmethod
    def _open(cls, where: Path, told: list[str]) -> Domain:
        with _lock:
            known = _BY_KEY.get(os.fspath(where))
            if known is not None:
                return known
            with needing_descriptors("open domain", where), place.entered(where, told.append) as (fd, identity):
                st = os.fstat(fd)
                known = _BY_KEY.get((st.st_dev, st.st_ino))
                if known is not None:  # by another name, such as one through a symbolic link
                    return known
                shm = _shm_of(owned(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 3))
                domain = cls(where, shm, identity.decode())
                domain._join_here()
            return domain

    @classmethod
    def private(cls) -> Domain:
        """Return a new domain without a name. It ends with its last process."""
        identity = place.new_identity()
        try:
            own = owned(os.memfd_create, f"dmabuf-domain:{identity.decode()}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as e:
            raise no_memfd("make domain", "a private domain", e.errno or errno.EIO) from None
        try:
            place.format_file(own.number, identity)
            fcntl.fcntl(own.number, _F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # a file that gets shorter ends every process that maps it
        except BaseException:
            own.close()
            raise
        return cls(None, _shm_of(own), identity.decode())

    @classmethod
    def adopt(cls, own: OwnedFd) -> Domain:
        """Return the private domain behind a received descriptor, which is consumed."""
        fd = own.number
        *_, seals, link, _ = probe_fd(fd)
        # Not even read before it is known to be a memfd, whose reads end, and which can't become shorter.
        sealed = link.startswith(b"/memfd:dmabuf-domain:") and seals >= 0 and seals & fcntl.F_SEAL_SHRINK
        identity, wrong = place.read_header(fd) if sealed else (b"", "not sealed")
        if wrong:
            own.close()
            raise fail(errno.EINVAL, "open domain", "the received fd", "send a private Domain", what="not a private domain")
        with _lock:
            known = _BY_KEY.get(identity.decode())
            if known is not None and known.path is None:
                own.close()
                return known
            with needing_descriptors("open domain", "the received fd"), place.lifecycle_lock(fd):
                shm = _shm_of(own)
            return cls(None, shm, identity.decode())

    def __repr__(self) -> str:
        return f"<dmabuf.Domain {self.id} {self.path or 'private'}>"

    def fileno(self) -> int:
        """Return the descriptor of the domain's file, which the domain keeps."""
        return self.shm.fd

    # ---- life ----

    def _wire(self, shm: Shm) -> None:
        st = os.fstat(shm.fd)
        self.file = (st.st_dev, st.st_ino)
        me = weakref.ref(self)

        def tick(kind: int, value: int) -> None:
            domain = me()
            if domain is not None:
                domain.tick(kind, value)

        def on_sync(handle: int) -> None:
            domain = me()
            if domain is not None:
                domain.retries.later(lambda: domain.shm.sync_wake(handle))

        def slow(kind: int, value: int) -> None:
            domain = me()
            if domain is not None:
                slow_waits.tell(domain, kind, value)

        shm.tick, shm.slow, shm.on_sync = tick, slow, on_sync
        shm.path = None if self.path is None else os.fsencode(self.path / place.FILE)

    @property
    def life(self) -> int:
        """The id of this process's life. A process without a life joins first, and so does a forked child."""
        return self.shm.life or self._join()

    def join(self) -> Shm:
        """Join the domain unless this process has a life in it, and return the mapped file."""
        shm = self.shm
        return shm if shm.life else self._rejoined()

    def _rejoined(self) -> Shm:
        self._join()
        return self.shm

    def _join(self) -> int:
        with self.lock:
            if self.shm.life:
                return self.shm.life
            if self.shm.forked:
                self._forget()
            # By the file that this process has, whatever its path names by now.
            with needing_descriptors("join", "the domain"), place.lifecycle_lock(self.shm.fd):
                return self._join_here()

    def _join_here(self) -> int:
        """Reap the dead and begin a life. The lifecycle lock is held."""
        shm = self.shm
        place.check_header(shm.fd, self.path)
        shm.look_again()
        self.reap_dead()
        shm.begin_boot(place.boot_id())
        first = lives.begin(shm) * CTX_PER
        shm.sync_wake_missed()
        self._free_ctx = [first + i for i in range(CTX_PER - 1, CTX_FIRST_IN_LIFE - 1, -1)]
        self._free_timelines, self._closed_timelines = [], []
        if "multiprocessing.util" in sys.modules:  # its children end by os._exit, which knows no atexit
            from multiprocessing import util

            util.Finalize(None, _leave_if_there, args=(weakref.ref(self),), exitpriority=-1000)
        return shm.life

    def _forget(self) -> None:
        """In a forked child, forget what the parent owns."""
        self._free_ctx, self._free_timelines, self._closed_timelines = [], [], []
        self.retries.reset()
        self.reset_hooks()
        self.leave_hooks.clear()  # of the parent's life
        self.local.clear()

    def leave(self) -> None:
        """End this process's life in the domain. Its pending fences are signaled with -EOWNERDEAD. The last process empties the file.

        Accesses end too, as if the process had died: what a ``write()`` block that is open has written so far is torn content (EOWNERDEAD).

        Without a free descriptor the life ends too, but the file isn't emptied. What this process still has of the domain, such as fences
        and records, it may look at as before, and the next operation that needs a life joins again.
        """
        shm = self.shm
        ended: list[int] = []
        try:
            self.leaving = bool(shm.life)
            while shm.life and self.leave_hooks:  # a forked child that hasn't joined has the parent's hooks, until a join forgets them
                try:
                    self.leave_hooks.call_once()
                except Exception as e:  # the hooks after it are called, too, and the life ends
                    unraisable(e, self)
            with self.lock, contextlib.ExitStack() as locked:
                try:
                    locked.enter_context(place.lifecycle_lock(shm.fd))
                except OSError:  # no descriptor is free, or somebody closed the domain's: the next process that leaves empties the file
                    ended = shm.life_leave(self.forget_socket)
                else:
                    ended = shm.life_leave(self.forget_socket)
                    self._look_away()
        finally:
            self.leaving = False
        for handle in ended:  # callbacks of the program: no lock is held
            if (on_local := shm.on_local) is not None:
                on_local(handle)

    def _look_away(self) -> None:
        """If this was the last process, reap the dead, and give the file's memory back. The lifecycle lock is held."""
        with contextlib.suppress(OSError):  # the next process that leaves does it
            if not self.shm.locked(LIFE_BYTE, LIVES):
                self.reap_dead()
                self.shm.look_away()

    def forget_socket(self, life: int) -> None:
        """Remove the socket of a life that has ended, if it had one."""
        with contextlib.suppress(OSError), self.directory() as directory:  # an abstract name ends with the process
            if directory is not None:
                remove_socket(directory, place.socket_name(life))

    def directory(self) -> contextlib.AbstractContextManager[int | None]:
        """Open the domain's directory for the block; None if it is private, or its directory was removed."""
        return place.own_directory(self.path, self.file)

    @finalizer
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: at the interpreter's end modules are empty
        # Nothing of this process uses the domain. A private domain's memory is freed with its last process.
        if getattr(self, "shm", None) is not None and not ending() and self.shm.life:
            self.leave()

    # ---- ticks, sweeps and hooks ----

    def on_tick(self, name: str, hook: Callable[[int, int], None]) -> None:
        """Call ``hook(kind, value)`` at each tick of this process. It may raise, which ends the wait that ticked.

        Raises:
            ContractError: A hook of this name is installed.
        """
        self.tick_hooks.add(name, hook)

    def on_sweep(self, name: str, hook: Callable[[], None]) -> None:
        """Call ``hook()`` at each sweep. Raises: as ``on_tick``."""
        self.sweep_hooks.add(name, hook)

    def on_reset(self, name: str, hook: Callable[[], None]) -> None:
        """Call ``hook()`` in a forked child, before it forgets what is local to its parent. Raises: as ``on_tick``."""
        self.reset_hooks.add(name, hook)

    def on_leave(self, name: str, hook: Callable[[], None]) -> None:
        """Call ``hook()`` once, when this process leaves; a forked child doesn't inherit it. Raises: as ``on_tick``."""
        self.leave_hooks.add(name, hook)

    def tick(self, kind: int, value: int) -> None:
        """Reap the dead and call the hooks: a wait has ticked, or a poll came long after the last look. A hook may raise."""
        with contextlib.suppress(OSError):  # the error has nothing to do with the wait; the next tick, or another process, tries again
            if kind == TICK_CHECK:  # value: a life that the waiter is about to yield to
                index = lives.index_of(value)
                if value != self.shm.life and not lives.is_alive(self.shm, index) and lives.reap(self.shm, index, self.forget_socket):
                    self.wake_sync_files()
                return
            self.sweep_if_due()
            if kind == TICK_POLL:
                return
        if kind == TICK_FENCE:
            self.shm.stream_look(value)  # whoever was to end it may have died before
        self.retries.check()
        self.tick_hooks(kind, value)

    def sweep_if_due(self) -> None:
        """Reap the dead if no process has done so within this tick. The process that moves the shared time forward does it.

        After news of a death each process looks by itself: the death may have come after the last look.
        """
        shm = self.shm
        last, now, heard = shm.load64(OFF_SWEEP), time.monotonic_ns(), closes_heard()  # in this order: time only grows
        if heard == self._heard and 0 <= now - last < TICK_NS * 9 // 10:
            return
        if shm.cas64(OFF_SWEEP, last, now) or heard != self._heard:
            self._heard = heard
            self.reap_dead()
            shm.sync_wake_missed()

    def reap_dead(self) -> int:
        """Reap every life whose process is gone. Return how many."""
        shm = self.shm
        mine = lives.index_of(shm.life) if shm.life else -1
        dead = [i for i in lives.alive_slots(shm) if i != mine and not lives.is_alive(shm, i)]
        count = sum(lives.reap(shm, i, self.forget_socket) for i in dead)
        if count < len(dead):  # another process reaps it, a thread of it still runs, or something could not be done now
            hurry()
        if count:
            self.wake_sync_files()
        return count

    def wake_sync_files(self) -> bool:
        """Advance every sync file, after a death, to finish what the dead process had begun. Return False if that must be tried again."""
        if self.shm.sync_wake_all(False):
            return True
        shm = self.shm
        self.retries.later(lambda: shm.sync_wake_all(False))
        return False

    def sweep(self) -> None:
        """Clean up after the dead and after buffers that are gone, although no process waits for that."""
        self.reap_dead()
        self.shm.sync_wake_missed()
        self.sweep_hooks()

    def pid_of(self, life: int) -> int:
        """Return the pid of a life, 0 if the life has ended."""
        pid = self.shm.load32(lives.slot_offset(lives.index_of(life)) + LIFE_PID)
        return pid if self.shm.life_current(life) else 0  # in this order: the next life of the slot changes the generation before the pid

    # ---- pools of this life ----

    def ctx_open(self, ctx: Context, tid: int, real: bool) -> None:
        """Open a context of this life, which closes with the object. ``real``: a WwAcquireContext."""
        ctx.open(self.join(), self._free_ctx, tid, real, 0)

    def timeline_open(self, driver: bytes, name: bytes, context: int = 0) -> TimelineSlot:
        """Open a timeline of this life, which closes with the object.

        Args:
            driver: Its driver's name.
            name: Its name.
            context: The context number that it shares with other timelines, 0 for a number of its own.
        """
        return TimelineSlot(self.join(), self._free_timelines, self._closed_timelines, context, driver, name)


def every() -> list[Domain]:
    """Return the domains that this process has open."""
    with _lock:
        return list(_ALL)


def known(identity: str) -> Domain | None:
    """Return the domain with this id, None if this process doesn't have it open."""
    with _lock:
        return _BY_KEY.get(identity)


def _warn(told: list[str]) -> None:
    """Warn of files that were set aside. No lock is held, because a filter or hook of the program may run."""
    for text in told:
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _shm_of(own: OwnedFd) -> Shm:
    """Map the file behind a descriptor, which the Shm closes at its end."""
    try:
        shm = Shm(own.number, fail)
    except OSError as e:
        own.close()
        if e.errno == errno.ENOENT:
            raise no_proc_at_all("open domain") from None
        if isinstance(e, DmaBufError) or e.errno != errno.ENOMEM:
            raise
        raise cant_map("open domain", "its file", HEADER_BYTES + MAX_CHUNKS * CHUNK_BYTES) from None
    except BaseException:
        own.close()
        raise
    shm.owns_fd = True  # no signal handler can raise between the two: one of them closes the descriptor, and once
    own.take()
    return shm


def _leave_if_there(ref: weakref.ref[Domain]) -> None:
    domain = ref()
    if domain is not None:
        domain.leave()


def _leave_all() -> None:
    for domain in list(_ALL):
        try:
            domain.leave()
        except OSError:
            pass  # the process ends, and the next process that opens the domain reaps this life
        domain.shm.at_exit()


def _after_fork() -> None:
    lives.FORK_GUARD.release()


atexit.register(_leave_all)
os.register_at_fork(before=rest)  # Python warns of a fork with other threads, as this one is
os.register_at_fork(before=lives.FORK_GUARD.acquire, after_in_parent=lives.FORK_GUARD.release, after_in_child=_after_fork)
