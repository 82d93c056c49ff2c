"""The sender's side of a pickled descriptor: the table of those that wait for their receivers (``kept``).

A thread answers as long as something is in the table, and ends with the last entry. What is still there when the process ends in order goes
to a keeper. If the process is killed, it is lost, and the receiver's error names the process.

Every program that has a buffer imports this module, so most of multiprocessing is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import process
from typing import Any, Final, TypeVar

from dmabuf._native import OwnedFd, owned
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.native_thread import NativeThread
from dmabuf.sharing import kept

ROOM_S: Final = 10.0  # how long a queue's thread waits for a free descriptor
_AGAIN_S: Final = 0.05  # between two tries for a descriptor that other code of the process may free
_LAST: Final = -100  # the priority of a finalizer that runs after the threads of all queues (-5) have ended

T = TypeVar("T")

Place = tuple[bytes, bytes, int, str]
"""Where a descriptor is: the name of a socket, a key, and the pid and the name of the process."""


class Table:
    """The descriptors of this process that wait for their receivers."""

    def __init__(self) -> None:
        self._lock = fork_lock()  # re-entrant: a signal handler may pickle something too
        self._entries: dict[bytes, OwnedFd] = {}
        self._socket: socket.socket | None = None
        self._thread: NativeThread | None = None
        self._ending = False
        self._ends_in = 0  # the process whose end hands the table on
        self._follows = False  # whether children of multiprocessing call at_end()
        self.received = threading.Event()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, make: Callable[[], OwnedFd]) -> Place:
        """Keep the descriptor that ``make`` returns until it is received, and return where it is. ``make`` is called last."""
        import multiprocessing.util  # noqa: F401  (from now on there is an end to wait for)

        key = os.urandom(kept.KEY_BYTES)
        with self._lock:
            sock = self._socket = self._socket or _listening()
            served = self._thread is not None or self._started()
            name: bytes = sock.getsockname()
            self._entries[key] = make()
            self.at_end()
            if not served or self._ends_in != os.getpid():
                self.hand_over()
        return name, key, os.getpid(), process.current_process().name

    def _started(self) -> bool:
        thread = NativeThread(self._work, "dmabuf-kept")
        try:
            thread.start()  # it ends if nothing is in the table when the lock is free
        except RuntimeError:
            if not _ends():
                raise
            return False  # Python ends, and starts no thread any more (3.12 and newer)
        self._thread = thread
        return True

    def at_end(self) -> None:
        """Hand the table on when this process ends.

        multiprocessing collects what it does then before the threads of its queues pickle the rest. So this is called as early as possible.
        """
        util = _util()
        if util is None or _ends():
            return
        if not self._follows:  # a child of multiprocessing forgets all finalizers when it begins, and then calls this
            util.register_after_fork(self, Table._again_at_end)
            self._follows = True
        if self._ends_in != os.getpid():
            util.Finalize(None, self.hand_over, exitpriority=_LAST)
            self._ends_in = os.getpid()

    def _again_at_end(self) -> None:
        self._ends_in = 0
        self.at_end()

    def after_fork(self) -> None:
        """Forget the parent's table in a forked child."""
        self.forget()
        self.at_end()

    # ---- the thread ----

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        sock = self._socket
        while sock is not None and not self._over(sock):
            kept.answer(sock, self._descriptor, self._done)

    def _over(self, sock: socket.socket) -> bool:
        with self._lock:
            if not self._ending and (self._entries or _ends()):
                return False
            self._thread = None
            if not self._entries:
                self._socket = None
                sock.close()
            return True

    def _descriptor(self, key: bytes) -> int:
        found = self._entries.get(key)
        return -1 if found is None else found.number

    def _done(self, key: bytes) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            found.close()
            self.received.set()

    # ---- the end ----

    def hand_over(self) -> None:
        """Hand what is in the table to a keeper, at the end of the process."""
        while self._entries and self._thread is not None:  # as long as receivers are about to take something
            self.received.clear()
            if self._entries and not self.received.wait(_AGAIN_S):
                break
        self._end_thread()
        try:
            if self._entries and self._socket is not None:
                _start_keeper(self._socket, {key: fd.number for key, fd in self._entries.items()})
        finally:
            self.forget()

    def drop(self) -> None:
        """Close what is in the table; its receivers are told that it is gone."""
        self._end_thread()
        self.forget()

    def _end_thread(self) -> None:
        with self._lock:
            sock, thread, self._ending = self._socket, self._thread, True
        if thread is not None and sock is not None:
            # If its queue of messages is full, the thread wakes up anyway.
            with contextlib.suppress(OSError):
                sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.WAKE, bytes(kept.KEY_BYTES)), socket.MSG_DONTWAIT, sock.getsockname())
            thread.join()

    def forget(self) -> None:
        """Close everything: of a forked child, whose parent has the table, or of a process that has handed it on."""
        sock, entries = self._socket, self._entries
        self._entries, self._socket, self._thread, self._ending = {}, None, None, False
        self.received = threading.Event()  # another thread may have been in the old one at the fork
        for fd in entries.values():
            fd.close()
        if sock is not None:
            sock.close()


def _util() -> Any:
    """Return multiprocessing.util if it is there; a process that has a queue or was started by multiprocessing has it."""
    return sys.modules.get("multiprocessing.util")


def _ends() -> bool:
    """Return True if multiprocessing is ending this process."""
    util = _util()
    return util is not None and bool(util.is_exiting())


def _listening() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(b"\0dmabuf-kept-" + os.urandom(8).hex().encode())
    except BaseException:
        sock.close()
        raise
    return sock


def _start_keeper(sock: socket.socket, table: dict[bytes, int]) -> None:
    from multiprocessing import spawn, util

    parent = _parent()
    fds = [sock.fileno(), *table.values()]
    with owned(os.memfd_create, "dmabuf-kept", os.MFD_CLOEXEC) as rows, contextlib.ExitStack() as opened:
        os.write(rows.number, kept.packed(table))
        if parent is not None:
            opened.enter_context(parent)
            fds.append(parent.number)
        arguments = [sock.fileno(), -1 if parent is None else parent.number, rows.number]
        executable = os.fsencode(spawn.get_executable())
        command = [executable, b"-I", b"-S", os.fsencode(kept.__file__), *(str(number).encode() for number in arguments)]
        util.spawnv_passfds(executable, command, [*fds, rows.number])


def _parent() -> OwnedFd | None:
    """Return a pidfd of the process that started this one by multiprocessing, None if there is none or it has ended."""
    from multiprocessing.connection import wait

    parent = process.parent_process()
    if parent is None or parent.pid is None:
        return None
    try:
        fd = owned(os.pidfd_open, parent.pid)
    except OSError:
        return None
    # The number is that of the parent if it lives now. The sentinel may say that it doesn't when it has only forgotten this process.
    if os.getppid() == parent.pid or not wait([parent.sentinel], 0):
        return fd
    fd.close()
    return None


TABLE: Final = Table()


TABLE.at_end()
os.register_at_fork(after_in_child=TABLE.after_fork)


def with_room(act: Callable[[], T]) -> T:
    """Return what ``act`` returns. If no descriptor is free, wait some seconds for receivers to take what is in the table."""
    end = time.monotonic() + ROOM_S
    while True:
        received = TABLE.received
        received.clear()
        try:
            return act()
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() > end:
                raise
        received.wait(_AGAIN_S)
