"""Asking another process of the domain: a :class:`Client` to it, and calls over it (sharing/server.py answers).

*The caller's wait* is ended by the other process's death: ENODEV. Signal handlers run in it. What one raises ends the call: it goes on in
the other process, but what it made is undone there. A call under a lock (``locked``) is waited for even then, until it is undone.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Final

from dmabuf._native import step
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.lending import finish_shielded
from dmabuf.sharing.messages import (
    LOST,
    NO_ROOM,
    VERSION,
    Body,
    address_of,
    check_user,
    close_all,
    no_room,
    opened,
    raised_of,
    receive_last,
    send,
    shut,
    text,
)

IDLE_CONNECTIONS: Final = 4  # kept by a client for the calls to come


class Client:
    """The asking side: this process's connections to one other process of the domain.

    ``users``: who keeps it open (:meth:`use`, :meth:`leave`).
    """

    def __init__(self, domain: Domain, peer: int) -> None:
        self.domain, self.peer, self.life = domain, peer, domain.life
        self._users: Counter[int] = Counter()
        self._main: socket.socket | None = None
        self._token = ""
        self._idle: list[socket.socket] = []
        self._late: list[Body] = []  # posts that found no room

    def use(self, user: object) -> None:
        """Keep the client open for ``user``, until as many :meth:`leave`."""
        with _lock:
            self._users[id(user)] += 1

    def leave(self, user: object) -> None:
        """``user`` needs it no more; with the last one the other process forgets all that it did for us."""
        with _lock:
            self._users[id(user)] -= 1
            self._users = +self._users  # those that are left
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
        """Is the other process there, as far as it is known?"""
        return self.domain.shm.life == self.life and self.domain.shm.life_current(self.peer)

    def gone(self, operation: str, obj: object) -> DmaBufError:
        """The error of a call to a process that is no more."""
        return fail(errno.ENODEV, operation, obj, "ask who makes such buffers for a new one", what="the process of its exporter is gone")

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
    ) -> tuple[Body, list[int]]:
        """Ask, and wait for the answer: its body, and descriptors, which are the caller's from now on.

        ``locked``: never left alone; what a signal handler raises comes when the other process is out of the call. ``or_post``: where no
        descriptor is left for a connection, here or there, it is told by :meth:`post`.

        Errors: those of the handler over there, as they were raised; ENODEV the other process is gone, has left the domain, or serves
        nothing; EPERM it is another user's; EMFILE, EBADMSG; what a signal handler raises, and then the call is undone there.
        """
        operation = operation or kind
        try:
            sock = self._take()
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
            got = self._wait(sock)
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
            raise raised_of(answer)
        made = answer.get("with")
        return made if isinstance(made, dict) else {}, came

    def _undone(self, sock: socket.socket, body: Body) -> None:
        """Until the other process has ended the call and undone it, or is gone. Begun again, it asks again, which does nothing more."""
        try:
            send(sock, {"abandoned": True, "holder": body.get("holder", 0)})
            while (got := self._wait(sock)) is not None:
                close_all(got[1])
                if "undone" in got[0]:
                    return
        except (ConnectionError, EOFError):
            pass
        except DmaBufError as e:
            if e.errno == errno.EMFILE:  # a long answer that found no room here: nobody wants it
                return self._undone(sock, body)
            if e.errno != errno.EBADMSG:  # of a signal handler
                raise
        self._reap()

    def post(self, kind: str, body: Body) -> None:
        """Tell the other process something and wait for nothing: may come from the garbage collector. Lost when it is gone."""
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
        """The posts that found no room, in a thread that waits for it."""
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
        """The other end is closed. If its process died, its locks and fences are free when the caller hears of it."""
        with contextlib.suppress(OSError):
            self.domain.reap_dead()

    def _wait(self, sock: socket.socket) -> tuple[Body, list[int]] | None:
        """The next message. A fork of the other process may hold its end open: its life is what counts, looked at each tick."""
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        while not poller.poll(TICK_NS // 1_000_000):
            self.domain.sweep_if_due()
            if not self.alive:
                return None
        return receive_last(sock)

    def _connect(self, hello: Body) -> tuple[socket.socket, Body]:
        if not self.alive:
            raise ConnectionRefusedError
        sock = opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        try:
            with address_of(self.domain, self.peer) as address:
                sock.connect(address)
            check_user(sock)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is refused; the reason was sent before
                send(sock, {"version": VERSION, "domain": self.domain.id, "to": self.peer, "life": self.life, **hello})
            got = self._wait(sock)
            if got is None:
                raise EOFError
            close_all(got[1])
            if "text" in got[0]:
                raise raised_of(got[0])
            return sock, got[0]
        except BaseException:
            shut(sock)
            raise

    def _take(self) -> socket.socket:
        with _lock:
            if self._idle:
                return self._idle.pop()
            token = self._token if self._main is not None else ""
        if not token:
            main, answer = self._connect({})
            with _lock:
                if self._main is None:
                    self._main, self._token = main, text(answer, "session")
                else:
                    shut(main)  # another thread was quicker
                token = self._token
        return self._connect({"session": token})[0]

    def _give(self, sock: socket.socket) -> None:
        with _lock:
            if self._users and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(sock)
                return
        shut(sock)


_clients: dict[tuple[str, int], Client] = {}


def client_of(domain: Domain, peer: int, user: object) -> Client:
    """The client to the process with this life, kept open for ``user``."""
    key = (domain.id, peer)
    with _lock:
        found = _clients.get(key)
        if found is None or found.life != domain.life:
            found = _clients[key] = Client(domain, peer)
        found.use(user)
    return found


_lock = threading.RLock()  # of all lines: a mapping's end may come from the garbage collector, in the middle of anything


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # perhaps held by a thread that isn't here
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
