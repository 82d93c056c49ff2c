"""Requests between the processes of a domain: one answers, another asks, whoever dies is noticed (design: across processes).

A process that has something to serve (:func:`serve`: its first exported buffer, or whatever else registers) listens on a socket of its
own until it leaves the domain, in a thread that sleeps without a bound. In a directory's domain the socket is ``live-<life>`` beside the
domain file, bound and connected through the directory's descriptor; in a private domain it has an abstract name. Both ends look at the
other's effective user (SO_PEERCRED) and refuse another's.

*What can be asked* is a registry, :func:`register`: a kind, and a handler that is called in a thread of the asked process. Who asks has a
:class:`Line` to the other process: :func:`line_to`, then :meth:`Line.call`. A line has one connection that lives as long as somebody
uses it; the other side sees it end, however that came, and then ends the :class:`Session` and all that it was given. Each call has a
connection to itself while it runs, so calls of several threads, and calls that lead to calls back, don't wait for each other.

*The caller's wait* is ended by signals, as every wait is, and by the other process's death: ENODEV. A call that a signal handler's
exception ended goes on in the other process, but what it made is undone there (:attr:`Answer.undo`).

*A message* is one SOCK_SEQPACKET datagram of JSON, with descriptors; what is longer than :data:`INLINE` bytes travels in a memfd. Nothing
in it is trusted: lengths and counts are bounded, :func:`number` and :func:`text` check fields, and what makes no sense is answered with
EBADMSG. No pickles. An error travels as errno, text and the parts of the message; a ``ContractError`` as itself.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import json
import os
import secrets
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from dmabuf import _native
from dmabuf.domain import dispatcher, lives, place
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.errors import ContractError, ContractWarning, DmaBufError, fail, rebuilt

VERSION: Final = 1
INLINE: Final = 32 << 10  # bytes of JSON in the datagram itself; well below any SO_SNDBUF
LONGEST: Final = 64 << 20  # bytes of JSON in a memfd
MAX_FDS: Final = 8
MAX_CONNECTIONS: Final = 2048
IDLE_CONNECTIONS: Final = 4  # kept by a line for the calls to come

_FD: Final = struct.Struct("=i")
_CONTROL: Final = socket.CMSG_SPACE(MAX_FDS * _FD.size)
_UCRED: Final = struct.Struct("=3i")  # pid, uid, gid (unix(7))
_LOST: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)

Body = dict[str, Any]


@dataclass
class Answer:
    """What a handler gives back. ``fds``: sent along, closed afterwards. ``error``: to be raised in the caller, beside the body.

    ``undo``: called when the caller gave up in the meantime, so that it will never hear of what was made. ``lapse``: called when the
    caller has gone or gone on, whatever else happens; both in the handler's thread.
    """

    body: Body = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)
    error: Exception | None = None
    undo: Callable[[], object] | None = None
    lapse: Callable[[], object] | None = None


@dataclass
class Progress:
    """How far a call came, for a caller whose call ends with an exception. ``body``: of the answer, once ``answered``.

    ``then``: called with that body as soon as it is there, whatever comes after; perhaps twice.
    """

    sent: bool = False
    answered: bool = False
    gone: bool = False  # the other process ended, or hung up
    body: Body = field(default_factory=dict)
    then: Callable[[Body], object] = lambda body: None


# A handler may take descriptors out of the list; the rest is closed. What it raises goes to the caller.
Handler = Callable[["Session", Body, list[int]], Answer]
_handlers: dict[str, Handler] = {}


def register(kind: str, handler: Handler) -> None:
    """Answer requests of this kind, in every domain that this process serves. Once for each kind, at import."""
    assert kind not in _handlers, kind
    _handlers[kind] = handler


def number(body: Body, name: str, most: int = (1 << 64) - 1) -> int:
    """A number of a message. Errors: EBADMSG missing, not an int, negative or more than ``most``."""
    value = body.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise _nonsense(f"{name!r} is no number up to {most}")
    return value


def text(body: Body, name: str, longest: int = 255) -> str:
    """A text of a message. Errors: EBADMSG missing, not a str, longer than ``longest``."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise _nonsense(f"{name!r} is no text of up to {longest} characters")
    return value


def flag(body: Body, name: str) -> bool:
    """A yes or no of a message. Errors: EBADMSG missing or neither."""
    value = body.get(name)
    if not isinstance(value, bool):
        raise _nonsense(f"{name!r} is neither true nor false")
    return value


def _nonsense(what: str) -> DmaBufError:
    return fail(errno.EBADMSG, "request", "a message", "both processes use the same version of dmabuf?", what=what)


# ---- messages ----


def _send(sock: socket.socket, body: Body, fds: Iterable[int] = (), flags: int = 0) -> None:
    data, given, extra = json.dumps(body, separators=(",", ":")).encode(), list(fds), -1
    try:
        if len(data) > INLINE:
            extra = os.memfd_create("dmabuf-message", os.MFD_CLOEXEC)
            with open(extra, "wb", closefd=False) as f:
                f.write(data)
            data, given = json.dumps({"long": len(data)}).encode(), [extra, *given]
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(given)}i", *given))] if given else []
        sock.sendmsg([data], control, socket.MSG_NOSIGNAL | flags)
    finally:
        if extra >= 0:
            os.close(extra)


def _receive(sock: socket.socket) -> tuple[Body, list[int]] | None:
    """One message; None at the end. Errors: EBADMSG (the descriptors are closed); what recvmsg(2) says."""
    data, control, flags, _ = sock.recvmsg(INLINE + 1, _CONTROL, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, raw in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += (n for (n,) in _FD.iter_unpack(raw[: len(raw) // _FD.size * _FD.size]))
    try:
        if not data and not fds:
            return None
        if flags & _LOST or len(data) > INLINE:
            raise _nonsense("it is cut, or no descriptors are left here")
        body = json.loads(data)
        if isinstance(body, dict) and "long" in body:
            body = json.loads(_long(number(body, "long", LONGEST), fds))
        if not isinstance(body, dict):
            raise _nonsense("it is no object")
    except (ValueError, RecursionError) as e:
        _close(fds)
        raise _nonsense(f"it is no JSON: {e}") from None
    except BaseException:
        _close(fds)
        raise
    return body, fds


def _next(sock: socket.socket) -> tuple[Body, list[int]] | None:
    """:func:`_receive` for who answers: what was sent before the other end closed comes after its reset."""
    for _ in range(2):
        with contextlib.suppress(ConnectionResetError):
            return _receive(sock)
    return None


def _long(size: int, fds: list[int]) -> bytes:
    if not fds:
        raise _nonsense("a long message without its memory")
    fd = fds.pop(0)
    try:
        data = os.pread(fd, size, 0)
    except OSError:
        data = b""  # not a file
    finally:
        os.close(fd)
    if len(data) != size:
        raise _nonsense("a long message that is shorter than it says")
    return data


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _told(error: BaseException, kind: str) -> Body:
    """An exception as it travels."""
    if isinstance(error, OSError):
        number = error.errno if isinstance(error.errno, int) and 0 < error.errno < 4096 else errno.EIO
        told: Body = {"errno": number, "text": error.strerror or str(error)}
        if isinstance(error, DmaBufError):
            told |= {"ours": True, "operation": error.operation, "remedy": error.remedy}
        return told
    for name, one in _OTHERS.items():
        if type(error) is one:
            return {"error": name, "text": str(error)}
    dispatcher.report(error, _handlers.get(kind))  # its author is in this process
    return {"error": "ContractError", "text": f"{kind}: the exporter raised {type(error).__name__}: {error}"}


_OTHERS: Final[dict[str, type[Exception]]] = {"ContractError": ContractError, "ContractWarning": ContractWarning, "TypeError": TypeError}


def _raised(told: Body) -> BaseException:
    """What :func:`_told` told."""
    message = text(told, "text", 1 << 16)
    if "error" in told:
        return _OTHERS.get(text(told, "error"), ContractError)(message)
    value = number(told, "errno", 4095) or errno.EIO
    if not told.get("ours"):
        return OSError(value, message)
    parts = [part if isinstance(part, str) else None for part in (told.get("operation"), told.get("remedy"))]
    return rebuilt(value, message, *parts)


def _same_user(sock: socket.socket) -> None:
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        raise fail(errno.EPERM, "request", f"a process of uid {uid}", "use a domain of one user", what="the other end is another user's")


# ---- what a fork must not share ----

_open: set[socket.socket] = set()  # every socket of ours: a child's copy would keep the other end from seeing us die


def _opened(make: Callable[[], socket.socket]) -> socket.socket:
    with lives.FORK_GUARD:
        sock = make()
        _open.add(sock)
        return sock


def _shut(sock: socket.socket) -> None:
    _open.discard(sock)
    sock.close()


def _after_fork() -> None:
    global _lock, _starting
    _lock, _starting = threading.RLock(), threading.Lock()  # perhaps held by a thread that isn't here
    for sock in list(_open):
        sock.close()
    _open.clear()
    _lines.clear()


# ---- who answers ----


class Session:
    """One asking process, as the asked one sees it. ``life``: the other's life; ``state``: what handlers keep for it, by their name.

    ``at_end``: called once, when the other process has gone or uses nothing here any more, and its connections are closed.
    """

    def __init__(self, domain: Domain, life: int) -> None:
        self.domain, self.life = domain, life
        self.token = secrets.token_hex(16)
        self.state: dict[str, Any] = {}
        self.at_end: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._running, self._over = 0, False

    def begin(self) -> bool:
        """A connection for its calls is there; False when it is over."""
        with self._lock:
            self._running += not self._over
            return not self._over

    def finish(self, over: bool = False) -> None:
        """Such a connection has ended; ``over``: instead, the other process has gone."""
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


class Service:
    """The answering side of this process in one domain. Its thread keeps neither it nor the domain; open connections do."""

    def __init__(self, domain: Domain) -> None:
        self._domain, self.life, self._id = weakref.ref(domain), domain.life, domain.id
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        self._connections: set[socket.socket] = set()
        sock = _opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        try:
            with _address(domain, self.life, make=True) as address:
                sock.bind(address)
            _native.step("service_bound")  # a file of a life: whoever reaps it unlinks it
            sock.listen(128)
            sock.setblocking(False)  # what is accepted blocks all the same
        except BaseException:
            _shut(sock)
            raise
        domain.leave_hooks.append(partial(_stop, sock, self._connections))
        threading.Thread(target=_accept, args=(sock, weakref.ref(self)), name="dmabuf-service", daemon=True).start()

    def take(self, conn: socket.socket) -> None:
        """Serve a connection in a thread of its own."""
        if len(self._connections) >= MAX_CONNECTIONS:
            with contextlib.suppress(OSError):
                _send(conn, _told(fail(errno.EAGAIN, "request", "a process", "make fewer calls at once"), ""), flags=socket.MSG_DONTWAIT)
            _shut(conn)
            return
        self._connections.add(conn)
        threading.Thread(target=self._serve, args=(conn,), name="dmabuf-server", daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        try:
            _same_user(conn)
            got = _receive(conn)
            if got is not None:
                hello, fds = got
                _close(fds)
                self._greeted(conn, hello)
        except OSError as e:
            with contextlib.suppress(OSError):
                _send(conn, _told(e, ""), flags=socket.MSG_DONTWAIT)
        finally:
            _shut(conn)
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
                _send(conn, {"session": session.token})
                while (got := _next(conn)) is not None:
                    self._notes(session, *got)
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
            _send(conn, {})
            while (got := _next(conn)) is not None:
                body, fds = got
                try:
                    if body.get("abandoned"):
                        _undo(last)
                        return
                    _lapse(last)
                    last = Answer()
                    last = self._answer(conn, found, body, fds)
                finally:
                    _close(fds)
        finally:
            _lapse(last)  # first: the end of the session may need the lock
            found.finish()

    def _notes(self, session: Session, body: Body, fds: list[int]) -> None:
        """What the other says without asking: nobody hears of errors."""
        try:
            if session.begin():
                try:
                    for note in body.get("notes", ())[:INLINE]:
                        _handlers[text(note, "kind")](session, note, fds)
                finally:
                    session.finish()
        except Exception as e:
            dispatcher.report(e, self._notes)
        finally:
            _close(fds)

    def _answer(self, conn: socket.socket, session: Session, body: Body, fds: list[int]) -> Answer:
        kind = str(body.get("kind"))
        try:
            handler = _handlers.get(kind)
            if handler is None:
                raise fail(errno.ENOSYS, "request", f"kind {kind[:64]!r}", "update dmabuf in the process that is asked")
            answer = handler(session, body, fds)
        except Exception as e:
            answer = Answer(error=e)
        try:
            _close(fds)  # before the caller goes on: it may count
            told = {"with": answer.body} | (_told(answer.error, kind) if answer.error is not None else {})
            _native.step("service_answered")
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError
            ):  # what the caller said last tells whether it gave up or is gone
                _send(conn, told, answer.fds)
        except BaseException:
            _lapse(answer)
            raise
        finally:
            _close(answer.fds)
        return answer


def _undo(answer: Answer) -> None:
    """The caller gave up: it will never hear of what was made. The caller of this lapses it."""
    if answer.undo is not None:
        try:
            answer.undo()
        except Exception as e:
            dispatcher.report(e, answer.undo)


def _stop(sock: socket.socket, connections: set[socket.socket]) -> None:
    """No more answers: every caller sees the end."""
    for one in [sock, *connections]:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    _shut(sock)


def _accept(sock: socket.socket, me: weakref.ref[Service]) -> None:
    poller = select.poll()
    with contextlib.suppress(ValueError):  # stopped already
        poller.register(sock, select.POLLIN)
    while sock.fileno() >= 0:
        poller.poll()
        try:
            conn = _opened(lambda: sock.accept()[0])
        except BlockingIOError:
            continue
        except OSError:  # stopped; or no descriptor is left: somebody may close one
            if sock.fileno() >= 0:
                select.select([], [], [], TICK_NS / 1e9)
            continue
        service = me()
        if service is None:
            _shut(conn)
            return
        service.take(conn)
        del service


def _lapse(answer: Answer) -> None:
    call, answer.lapse, answer.undo = answer.lapse, None, None
    if call is not None:
        call()


@contextlib.contextmanager
def _address(domain: Domain, life: int, *, make: bool = False) -> Any:
    """The address of a life's socket, good for the block."""
    if domain.path is None:
        yield b"\0dmabuf-" + domain.id.encode() + b"-%08x" % life
        return
    directory = place.open_directory(domain.path, make=make)
    try:
        yield f"/proc/self/fd/{directory}/{place.socket_name(life)}"  # a path of its own could be too long for a socket (unix(7))
    finally:
        os.close(directory)


def serve(domain: Domain) -> Service:
    """Answer requests in this domain from now on, until the process leaves it. Errors: EMFILE, ENOSPC; what bind(2) says."""
    life = domain.life
    found: Service | None = domain.local.get("service")
    if found is None or found.life != life:
        with _starting:
            found = domain.local.get("service")
            if found is None or found.life != life:
                found = domain.local["service"] = Service(domain)
    return found


_starting = threading.Lock()


# ---- who asks ----


class Line:
    """The asking side: this process's connections to one other process of the domain.

    ``users``: who keeps it open (:meth:`use`, :meth:`leave`).
    """

    def __init__(self, domain: Domain, peer: int) -> None:
        self.domain, self.peer, self.life = domain, peer, domain.life
        self._users: set[int] = set()
        self._main: socket.socket | None = None
        self._token = ""
        self._idle: list[socket.socket] = []
        self._late: list[Body] = []  # notes that found no room

    def use(self, user: object) -> None:
        """Keep the line open for ``user``, until :meth:`leave`."""
        self._users.add(id(user))

    def leave(self, user: object) -> None:
        """``user`` needs it no more; with the last one the other process forgets all that it did for us."""
        with _lock:
            self._users.discard(id(user))
            if not self._users:
                self._hang_up()
                if _lines.get((self.domain.id, self.peer)) is self:
                    del _lines[self.domain.id, self.peer]

    def _hang_up(self) -> None:
        main, self._main = self._main, None
        idle, self._idle = self._idle, []
        for sock in [*idle, *([main] if main else [])]:
            _shut(sock)

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
        progress: Progress | None = None,
    ) -> tuple[Body, list[int]]:
        """Ask, and wait for the answer: its body, and descriptors, which are the caller's from now on.

        Errors: those of the handler over there, as they were raised; ENODEV the other process is gone, has left the domain, or serves
        nothing; EPERM it is another user's; EMFILE, EBADMSG; what a signal handler raises, and then the call is undone there.
        """
        operation, progress = operation or kind, progress or Progress()
        try:
            sock = self._take()
        except (ConnectionError, FileNotFoundError, EOFError):
            self._reap()
            raise self.gone(operation, obj) from None
        done = False
        try:
            progress.sent = True
            _send(sock, {**body, "kind": kind}, fds)
            _native.step("service_asked")
            got = self._wait(sock)
            if got is None:
                raise EOFError
            answer, came = got
            if isinstance(answer.get("with"), dict):
                progress.body = answer["with"]
            progress.answered = True
            progress.then(progress.body)
            done = True
        except (ConnectionError, EOFError):
            progress.gone = True
            self._reap()
            raise self.gone(operation, obj) from None
        finally:
            if not done:
                if progress.answered:
                    progress.then(progress.body)
                self._abandon(sock)
        self._give(sock)
        if "text" in answer:
            _close(came)
            raise _raised(answer)
        return progress.body, came

    def note(self, kind: str, body: Body) -> None:
        """Tell the other process something and wait for nothing: may come from the garbage collector. Lost when it is gone."""
        with _lock:
            waiting = bool(self._late)
            self._late.append({**body, "kind": kind})
            if self._main is None or waiting:
                return
            try:
                _send(self._main, {"notes": self._late}, flags=socket.MSG_DONTWAIT)
                self._late = []
            except BlockingIOError:
                _thread.start_new_thread(self._flush, ())
            except OSError:
                self._late = []

    def _flush(self) -> None:
        """The notes that found no room, in a thread that waits for it."""
        while True:
            with _lock:
                notes, main = list(self._late), self._main
            with contextlib.suppress(OSError):
                if main is not None:
                    _send(main, {"notes": notes})
            with _lock:
                self._late = self._late[len(notes) :]
                if not self._late:
                    return

    def _abandon(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            _send(sock, {"abandoned": True}, flags=socket.MSG_DONTWAIT)
        _shut(sock)

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
        return _receive(sock)

    def _connect(self, hello: Body) -> tuple[socket.socket, Body]:
        if not self.alive:
            raise ConnectionRefusedError
        sock = _opened(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        try:
            with _address(self.domain, self.peer) as address:
                sock.connect(address)
            _same_user(sock)
            _send(sock, {"version": VERSION, "domain": self.domain.id, "to": self.peer, "life": self.life, **hello})
            got = self._wait(sock)
            if got is None:
                raise EOFError
            _close(got[1])
            if "text" in got[0]:
                raise _raised(got[0])
            return sock, got[0]
        except BaseException:
            _shut(sock)
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
                    _shut(main)  # another thread was quicker
                token = self._token
        return self._connect({"session": token})[0]

    def _give(self, sock: socket.socket) -> None:
        with _lock:
            if self._users and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(sock)
                return
        _shut(sock)


_lines: dict[tuple[str, int], Line] = {}


def line_to(domain: Domain, peer: int, user: object) -> Line:
    """The line to the process with this life, kept open for ``user``."""
    key = (domain.id, peer)
    with _lock:
        found = _lines.get(key)
        if found is None or found.life != domain.life:
            found = _lines[key] = Line(domain, peer)
        found.use(user)
    return found


_lock = threading.RLock()  # of all lines: a mapping's end may come from the garbage collector, in the middle of anything


os.register_at_fork(after_in_child=_after_fork)
