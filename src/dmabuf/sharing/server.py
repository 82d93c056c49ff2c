"""``Server``: answers remote calls from other processes of the domain.

A process that has something to serve calls :func:`serve`, for example for its first exported buffer. From then on, until it leaves the
domain, a thread listens on a socket and sleeps without a time limit. In a domain with a directory the socket is ``server-<life>``, beside
the domain's file, bound and connected through the directory's descriptor. In a private domain it has an abstract name. Both ends check the
other's effective user (SO_PEERCRED) and refuse another user.

*The calls* are in a registry (:func:`register`): a kind, and a handler, which runs in a thread of the serving process. A `Client` has one
main connection that stays open as long as anything uses it. When it ends, for whatever reason, this side ends the :class:`Session` and
everything that the client was given. Each call has its own connection and its own thread while it runs. So calls of several threads, and
calls that lead to calls back, don't wait for each other.

If a caller gives up in the middle of a call, what the call made is undone (:attr:`Answer.undo`).
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import select
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar, cast

from dmabuf._native import OwnedFd, WeakValues, step
from dmabuf.domain import dispatcher
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.local import Local
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.messages import (
    INLINE,
    NO_ROOM,
    THERE,
    VERSION,
    Body,
    bind,
    bind_without_path,
    check_socket,
    check_user,
    close_all,
    encode_error,
    no_room,
    number,
    opened,
    receive,
    receive_last,
    send,
    shut,
    text,
)

MAX_CONNECTIONS: Final = 2048
T = TypeVar("T")


@dataclass
class Answer:
    """The answer of a handler.

    ``fds``: sent along, then closed. ``undo``: called in the handler's thread if the caller has given up, and so never learns what was
    made; with the message in which it said so.
    """

    body: Body = field(default_factory=dict)
    fds: list[OwnedFd] = field(default_factory=list)
    undo: Callable[[Body], object] | None = None


# A handler may take descriptors out of the list, and the rest is closed. What it raises is raised in the caller.
Handler = Callable[["Session", Body, list[OwnedFd]], Answer]
_handlers: dict[str, Handler] = {}


def register(kind: str, handler: Handler) -> None:
    """Answer calls of this kind in every domain that this process serves. Each kind is registered once, at import."""
    assert kind not in _handlers, kind
    _handlers[kind] = handler


class Session:
    """One client of this process. ``life``: the client's life.

    ``at_end``: called once, when the client is gone or uses nothing of this process any more, and its connections are closed.
    """

    def __init__(self, domain: Domain, life: int) -> None:
        self.domain, self.life = domain, life
        self.token = secrets.token_hex(16)
        self._states: dict[object, object] = {}
        self.at_end: list[Callable[[], object]] = []
        self._lock = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle
        self._running, self._over = 0, False

    def state(self, kind: Callable[[Session], T]) -> T:
        """Return what handlers keep for the other process: one object of each kind, made at first use."""
        with self._lock:
            found = self._states.get(kind)
            if found is None:
                found = self._states[kind] = kind(self)
            return cast(T, found)

    def begin(self) -> bool:
        """Count a connection for calls. Return False if the session has ended."""
        with self._lock:
            self._running += not self._over
            return not self._over

    def finish(self, over: bool = False) -> None:
        """Uncount a connection for calls or, with ``over``, end the session."""
        with self._lock:
            if over:
                self._over = True
            else:
                self._running -= 1
            last = self._over and not self._running
        if last:
            calls, self.at_end = self.at_end, []
            for call in calls:
                try:
                    call()
                except Exception as e:
                    dispatcher.report(e, call)


class Server:
    """The server of this process in one domain. Its thread keeps neither it nor the domain alive, but open connections do."""

    def __init__(self, domain: Domain) -> None:
        self._domain, self.life, self._id = weakref.ref(domain), domain.life, domain.id
        self._sessions: WeakValues[str, Session] = WeakValues()
        self._connections: set[socket.socket] = set()
        sock, second = _listener(), None
        try:
            in_directory = bind(sock, domain, self.life)
            step("service_bound")  # if this process dies, the reaper of its life unlinks the socket
            sock.listen(128)
            if in_directory:
                second = _second_listener(domain, self.life)
            try:
                listeners = [one for one in (sock, second) if one is not None]
                threading.Thread(target=_accept, args=(listeners, weakref.ref(self)), name="dmabuf-service", daemon=True).start()
            except RuntimeError:  # no thread can be started: the next serve() tries again, at the same address
                domain.forget_socket(self.life)
                raise
        except BaseException:
            shut(sock)
            if second is not None:
                shut(second)
            raise
        domain.on_leave("server", partial(_stop, listeners, self._connections))

    def take(self, conn: socket.socket) -> None:
        """Serve a connection in a thread of its own."""
        if len(self._connections) < MAX_CONNECTIONS:
            self._connections.add(conn)
            with contextlib.suppress(RuntimeError):  # no thread can be started: this caller gets an error
                threading.Thread(target=self._serve, args=(conn,), name="dmabuf-server", daemon=True).start()
                return
            self._connections.discard(conn)
        with contextlib.suppress(OSError):
            what = "it has too many callers, or can't start a thread"
            error = fail(errno.EAGAIN, "request", "a process", "make fewer calls at once", what=what)
            send(conn, encode_error(error, ""), flags=socket.MSG_DONTWAIT)
        shut(conn)

    def _serve(self, conn: socket.socket) -> None:
        try:
            check_user(conn)
            got = receive(conn)
            if got is not None:
                hello, fds = got
                close_all(fds)
                self._greeted(conn, hello)
        except OSError as e:
            with contextlib.suppress(OSError):
                send(conn, encode_error(e, ""), flags=socket.MSG_DONTWAIT)
        finally:
            shut(conn)
            self._connections.discard(conn)

    def _greeted(self, conn: socket.socket, hello: Body) -> None:
        domain = self._domain()
        if (
            domain is None
            or number(hello, "version") != VERSION
            or text(hello, "domain") != self._id
            or (number(hello, "to"), domain.shm.life) != (self.life, self.life)
        ):
            raise fail(errno.ENODEV, "request", self._id, what="another process, or another version of dmabuf, answers here")
        if "session" not in hello:
            session = Session(domain, number(hello, "life", 0x7FFFFFFF))
            self._sessions[session.token] = session
            try:
                send(conn, {"session": session.token})
                while (got := receive_last(conn)) is not None:
                    self._posted(session, *got)
            finally:
                session.finish(over=True)
            return
        found = self._sessions.get(text(hello, "session"))
        if found is None:
            raise fail(errno.ENODEV, "request", self._id, what="the session is over")
        if not found.begin():
            raise fail(errno.ENODEV, "request", self._id, what="the session is over")
        last = Answer()
        try:
            send(conn, {})
            while (got := self._request(conn)) is not None:
                body, fds = got
                try:
                    if body.get("abandoned"):
                        _undo(last, body)
                        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a caller without a lock doesn't wait for it
                            send(conn, {"undone": True})
                    else:
                        last = self._answer(conn, found, body, fds)
                finally:
                    close_all(fds)
        finally:
            found.finish()

    def _request(self, conn: socket.socket) -> tuple[Body, list[OwnedFd]] | None:
        """Wait for the next call. If its descriptors found no room, the caller gets an error, and the connection stays."""
        while True:
            try:
                return receive_last(conn)
            except DmaBufError as e:
                if e.errno != errno.EMFILE:
                    raise
                send(conn, encode_error(e, ""))

    def _posted(self, session: Session, body: Body, fds: list[OwnedFd]) -> None:
        """Handle messages without an answer. Their errors are only reported."""
        try:
            if session.begin():
                try:
                    for post in body.get("posts", ())[:INLINE]:
                        _handlers[text(post, "kind")](session, post, fds)
                finally:
                    session.finish()
        except Exception as e:
            dispatcher.report(e, self._posted)
        finally:
            close_all(fds)

    def _answer(self, conn: socket.socket, session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
        kind = str(body.get("kind"))
        try:
            handler = _handlers.get(kind)
            if handler is None:
                raise fail(errno.ENOSYS, "request", f"kind {kind[:64]!r}", "update dmabuf in the other process")
            answer = handler(session, body, fds)
            told: Body = {"with": answer.body}
        except BaseException as e:  # also SystemExit of an op, because the caller waits, and the thread belongs to the library
            answer, told = Answer(), encode_error(e, kind)
        try:
            close_all(fds)  # before the caller goes on, which may count descriptors
            step("service_answered")
            try:
                send(conn, told, answer.fds)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the caller's last message says whether it has given up
            except OSError as e:
                if e.errno not in NO_ROOM and e.errno != errno.EMSGSIZE:
                    raise
                _undo(answer, body)
                told = encode_error(e if e.errno == errno.EMSGSIZE else no_room(kind, "the answer", THERE, e.errno), kind)
                send(conn, told)
        finally:
            close_all(answer.fds)
        return answer


def _undo(answer: Answer, told: Body) -> None:
    """Undo a call whose caller has given up, and so never learns what was made. This has an effect once."""
    call, answer.undo = answer.undo, None
    if call is not None:
        try:
            call(told)
        except Exception as e:
            dispatcher.report(e, call)


def _listener() -> socket.socket:
    sock = opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
    sock.setblocking(False)  # accepted sockets block all the same
    return sock


def _second_listener(domain: Domain, life: int) -> socket.socket | None:
    """Listen at an address without a path too, where clients ask if the domain's directory is removed.

    It is an abstract name, which every user of the machine can take. Then this process can't be called after that.
    """
    try:
        sock = _listener()
    except OSError:
        return None
    try:
        bind_without_path(sock, domain, life)
        sock.listen(128)
    except OSError:
        shut(sock)
        return None
    return sock


def _stop(listeners: list[socket.socket], connections: set[socket.socket]) -> None:
    """End the server. Every caller notices."""
    for one in [*listeners, *connections]:
        with contextlib.suppress(OSError):
            check_socket(one)
            one.shutdown(socket.SHUT_RDWR)
    for sock in listeners:
        shut(sock)


def _accept(listeners: list[socket.socket], me: weakref.ref[Server]) -> None:
    with contextlib.closing(_Spare()) as spare:
        _accepting(listeners, me, spare)


class _Spare:
    """A descriptor in reserve. If no other is left, it makes room for a connection, so that the caller gets the error."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None

    def fill(self) -> None:
        if self.sock is None:
            with contextlib.suppress(OSError):
                self.sock = opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))

    def close(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            shut(sock)

    def refuse(self, sock: socket.socket, number: int) -> bool:
        """Accept a connection in its place, send the error, and close it. Return False if there was no room even so."""
        self.close()
        try:
            conn = opened(lambda: sock.accept()[0])
        except OSError:
            return False
        with contextlib.suppress(OSError):
            send(conn, encode_error(no_room("request", "a connection", THERE, number), ""), flags=socket.MSG_DONTWAIT)
        shut(conn)
        return True


def _accepting(listeners: list[socket.socket], me: weakref.ref[Server], spare: _Spare) -> None:
    poller = select.poll()
    by_fd = {sock.fileno(): sock for sock in listeners}
    for fd in by_fd:
        if fd >= 0:  # else the server has ended already
            poller.register(fd, select.POLLIN)
    while all(sock.fileno() >= 0 for sock in listeners):
        spare.fill()
        for fd, _ in poller.poll():
            sock = by_fd[fd]
            try:
                check_socket(sock)
            except OSError:
                return  # somebody else closed it: nobody can be served any more, and the next socket of this number is another one's
            conn = _accepted(sock, spare)
            if conn is None:
                continue
            server = me()
            if server is None:
                shut(conn)
                return
            server.take(conn)
            del server


def _accepted(sock: socket.socket, spare: _Spare) -> socket.socket | None:
    """Accept a connection. Return None if there is none after all, or no descriptor is left for it, or the server has ended."""
    try:
        return opened(lambda: sock.accept()[0])
    except BlockingIOError:
        return None
    except OSError as e:
        if not (e.errno in NO_ROOM and spare.refuse(sock, e.errno)) and sock.fileno() >= 0:
            select.select([], [], [], TICK_NS / 1e9)  # a descriptor may be closed meanwhile
        return None


SERVER: Local[Server] = Local(Server)


def serve(domain: Domain) -> Server:
    """Answer calls in this domain from now on, until the process leaves it.

    Raises:
        NoSpaceError: There is no room for the server (ENOSPC).
        DmaBufError: No descriptor is free (EMFILE), or bind(2) failed.
    """
    life = domain.life
    found = SERVER.of(domain)
    return found if found.life == life else SERVER.renew(domain, found)
