"""``Client``: the calls of this process to one other process of the domain, whose `server` answers them.

The wait of a call ends with ENODEV if the other process dies. Signal handlers run during the wait. If one of them raises, the call ends
here, goes on in the other process, and what it made is undone there. A call under a lock (``locked``) ends here only when that is done.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterable
from typing import Final

from dmabuf._native import OwnedFd, step
from dmabuf.domain import naming, slow_waits
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.lending import finish_shielded
from dmabuf.sharing.messages import (
    LOST,
    NO_ROOM,
    VERSION,
    Body,
    check_socket,
    check_user,
    close_all,
    connect,
    decode_error,
    no_room,
    opened,
    receive_last,
    send,
    shut,
    text,
)

IDLE_CONNECTIONS: Final = 4  # that a client keeps for later calls


class Client:
    """The connections from this process to one other process of the domain, open while anything uses them."""

    def __init__(self, domain: Domain, peer: int) -> None:
        self.domain, self.peer, self.life = domain, peer, domain.life
        self._users: set[int] = set()  # by id()
        self._main: socket.socket | None = None
        self._token = ""
        self._idle: list[socket.socket] = []
        self._late: list[Body] = []  # messages without an answer for which the socket had no room

    def use(self, user: object) -> None:
        """Take a reference for ``user``. Doing so again has no effect, since a signal handler may raise before the user knows."""
        with _lock:
            self._users.add(id(user))

    def leave(self, user: object) -> None:
        """Drop the reference of ``user``. When no user is left, the server frees everything it kept for this process."""
        with _lock:
            self._users.discard(id(user))
            if not self._users:
                self._hang_up()
                if _clients.get((self.domain.id, self.peer)) is self:
                    del _clients[self.domain.id, self.peer]

    def _hang_up(self) -> None:
        main, self._main = self._main, None
        idle, self._idle = self._idle, []
        for sock in [*idle, *([main] if main else [])]:
            shut(sock)

    @property
    def alive(self) -> bool:
        """Whether the other process is in the domain, as far as this one knows."""
        return self.domain.shm.life == self.life and self.domain.shm.life_current(self.peer)

    def gone(self, operation: str, obj: object) -> DmaBufError:
        """Return the error of a call to a process that is gone."""
        return fail(errno.ENODEV, operation, obj, "get a new buffer from its exporter", what="the process of its exporter is gone")

    def call(
        self,
        kind: str,
        body: Body,
        fds: Iterable[int] = (),
        *,
        operation: str = "",
        obj: object = "a request",
        locked: bool = False,
        or_post: bool = False,
        limit: float | None = None,
    ) -> tuple[Body, list[OwnedFd]]:
        """Make a remote call and wait for the answer. Return its body and its descriptors, which the caller owns.

        ``locked``: the call has the caller's reservation lock. ``or_post``: if no descriptor is left for a connection, in either process,
        send the call as a :meth:`post`. ``limit``: seconds to wait for the other process, None for as long as
        it lives. If a signal handler raises during the call, its exception comes when the server has undone the call.

        Raises:
            NoDeviceError: The other process is gone, has left the domain, or serves nothing (ENODEV).
            NotPermittedError: The other process belongs to another user (EPERM).
            DmaBufError: No descriptor is free (EMFILE), or the answer makes no sense (EBADMSG).
            Exception: The handler in the other process raised it.
        """
        operation = operation or kind
        try:
            sock = self._take(limit)
        except (ConnectionError, FileNotFoundError, EOFError):
            self._reap()
            raise self.gone(operation, obj) from None
        except OSError as e:
            if e.errno not in NO_ROOM:
                raise
            if or_post:
                self.post(kind, {**body, "holder": 0})
                return {}, []
            if isinstance(e, DmaBufError):
                raise
            raise no_room(operation, obj, "this process", e.errno) from None
        done = False
        try:
            send(sock, {**body, "kind": kind}, fds)
            step("service_asked")
            got = self._wait(sock, limit)
            if got is None:
                raise EOFError
            answer, came = got
            if answer[LOST]:
                raise no_room(operation, obj, "this process")
            done = True
        except (ConnectionError, EOFError):
            self._reap()
            raise self.gone(operation, obj) from None
        except BaseException:
            if locked:
                finish_shielded(lambda: self._undone(sock, body))
            raise
        finally:
            if not done:
                self._abandon(sock)
        self._give(sock)
        if "text" in answer:
            close_all(came)
            raise decode_error(answer)
        made = answer.get("with")
        return made if isinstance(made, dict) else {}, came

    def _undone(self, sock: socket.socket, body: Body) -> None:
        """Wait until the server has undone the call, or is gone. Calling it again has no other effect."""
        try:
            send(sock, {"abandoned": True, "holder": body.get("holder", 0)})
            while (got := self._wait(sock)) is not None:
                close_all(got[1])
                if "undone" in got[0]:
                    return
        except (ConnectionError, EOFError):
            pass
        except DmaBufError as e:
            if e.errno == errno.EMFILE:  # no descriptor for a long answer, which is not needed any more
                return self._undone(sock, body)
            if e.errno != errno.EBADMSG:  # from a signal handler
                raise
        self._reap()

    def post(self, kind: str, body: Body) -> None:
        """Send a message without an answer. It doesn't wait, so finalizers may call it. If the other process is gone, it has no effect."""
        with _lock:
            waiting = bool(self._late)
            self._late.append({**body, "kind": kind})
            if self._main is None or waiting:
                return
            try:
                send(self._main, {"posts": self._late}, flags=socket.MSG_DONTWAIT)
                self._late = []
            except BlockingIOError:
                _thread.start_new_thread(self._flush, ())
            except OSError:
                self._late = []

    def _flush(self) -> None:
        """Send the messages for which the socket had no room, in a thread that may wait."""
        while True:
            with _lock:
                posts, main = list(self._late), self._main
            with contextlib.suppress(OSError):
                if main is not None:
                    send(main, {"posts": posts})
            with _lock:
                self._late = self._late[len(posts) :]
                if not self._late:
                    return

    def _abandon(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            send(sock, {"abandoned": True}, flags=socket.MSG_DONTWAIT)
        shut(sock)

    def _reap(self) -> None:
        """Reap the other process if it died, so that its locks and fences are free when the caller gets the error."""
        with contextlib.suppress(OSError):
            self.domain.reap_dead()

    def _wait(self, sock: socket.socket, limit: float | None = None) -> tuple[Body, list[OwnedFd]] | None:
        """Wait for the next message. A fork of the other process may keep its end open, so its life is checked at each tick."""
        poller, wait, end = select.poll(), slow_waits.Wait(), math.inf if limit is None else time.monotonic() + limit
        poller.register(sock, select.POLLIN)
        while not poller.poll(TICK_NS // 1_000_000):
            self.domain.sweep_if_due()
            check_socket(sock)
            if not self.alive:
                return None
            if time.monotonic() >= end:
                who = naming.process(self.domain, self.peer)
                remedy = "continue that process (kill -CONT), or end it"
                raise fail(errno.ETIMEDOUT, "request", who, remedy, what=f"it has not answered for {limit:g} s")
            wait.look(self.domain, lambda: f"an answer from {naming.process(self.domain, self.peer)}")
        return receive_last(sock)

    def _connect(self, hello: Body, limit: float | None) -> tuple[socket.socket, Body]:
        if not self.alive:
            raise ConnectionRefusedError
        sock = opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        try:
            connect(sock, self.domain, self.peer)
            check_user(sock)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server refuses, and has sent the reason
                send(sock, {"version": VERSION, "domain": self.domain.id, "to": self.peer, "life": self.life, **hello})
            got = self._wait(sock, limit)
            if got is None:
                raise EOFError
            close_all(got[1])
            if "text" in got[0]:
                raise decode_error(got[0])
            return sock, got[0]
        except BaseException:
            shut(sock)
            raise

    def _take(self, limit: float | None) -> socket.socket:
        with _lock:
            if self._idle:
                return self._idle.pop()
            token = self._token if self._main is not None else ""
        if not token:
            main, answer = self._connect({}, limit)
            with _lock:
                if self._main is None:
                    self._main, self._token = main, text(answer, "session")
                else:
                    shut(main)  # another thread was faster
                token = self._token
        return self._connect({"session": token}, limit)[0]

    def _give(self, sock: socket.socket) -> None:
        with _lock:
            if self._users and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(sock)
                return
        shut(sock)


_clients: dict[tuple[str, int], Client] = {}


def client_of(domain: Domain, peer: int, user: object) -> Client:
    """Return the client of the process with this life, with a reference for ``user``."""
    key = (domain.id, peer)
    with _lock:
        found = _clients.get(key)
        if found is None or found.life != domain.life:
            found = _clients[key] = Client(domain, peer)
        found.use(user)
    return found


_lock = threading.RLock()  # of all clients; re-entrant, as the finalizer of a mapping may run in the middle of anything


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
