"""``Exported``: a buffer with an exporter of this process, and how it ends (semantics 2.6).

*The end.* The descriptors that travel carry a read lock on byte 0, the reference lock. An exported buffer keeps an open file description of
its own, without that lock, and tries to take the write lock through it. Success proves that nobody holds the buffer, in flight or mapped,
and that no newcomer can. Then the exporter's ``release`` runs, once. This process tries when it closes its last handle: in ``close()``
itself if the caller holds no reservation lock and is not a callback, and otherwise (and after ``__del__``) in a thread, the releaser, which
runs while there are exported buffers. While others hold a buffer that this process has closed, the releaser tries again every tick.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final

from dmabuf._native import Mapping, OwnedFd, WeakValues, finish
from dmabuf.core.base.registry import Registry
from dmabuf.core.buffer.backing import Backing
from dmabuf.core.buffer.shared import SharedBuffer
from dmabuf.core.contract import OwnerReference
from dmabuf.core.dma_buf import DmaBuf, new_handle
from dmabuf.core.export.exporter import Exporter
from dmabuf.core.fence.signalling import in_signalling
from dmabuf.core.resv.resv import DmaResv
from dmabuf.core.task.owner import current
from dmabuf.domain import dispatcher
from dmabuf.domain.auto_reset_event import AutoResetEvent
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.local import Local
from dmabuf.domain.records import KIND_RESV
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import ClosedError, ContractError, contract_warning, fail


class Exported(Backing):
    """The backing of a buffer whose exporter is in this process. It keeps the record, so that a buffer that comes back is known again."""

    own_descriptions = 1
    record: SharedBuffer

    def __init__(
        self,
        exporter: Exporter,
        ops: frozenset[str],
        record: SharedBuffer,
        cache: bool,
        resv: DmaResv,
        owner: OwnerReference | None,
        private: OwnedFd,
        in_file: bool,
    ) -> None:
        super().__init__(exporter, ops, record, cache)
        self.in_file = in_file
        self.resv, self.owner, self.private = resv, owner, private
        self.life = record.shm.life
        self.pid = os.getpid()  # it stays this process's exporter when the process leaves the domain
        self.released = self.lost = self._told = False
        self._releaser = 0  # the thread that releases it
        self._last: DmaBuf | None = None  # the handle that the exporter is told with
        self.closing: set[int] = set()  # the id() of each handle that is being closed: its close() releases, and the thread doesn't
        self._once = fork_lock()  # a handle's __del__ may run in the middle
        self._mappings: WeakValues[int, Mapping] = WeakValues()  # by id()

    def check_reachable(self, operation: str) -> None:
        if self.pid != os.getpid():  # an attachment from before a fork, or a fork that Python didn't see
            raise fail(
                errno.ENODEV,
                operation,
                self.record,
                "attach again; what a forked child inherits is the parent's",
                what="its exporter lives in the parent process",
            )

    def keep(self, mapping: Mapping) -> None:
        if self._mappings.get(id(mapping)) is mapping:
            remedy = "make a new one each time, or the buffer is never released"
            contract_warning(f"mmap: {self.record}: its exporter returned a mapping that it had returned before; {remedy}", 6)
        self._mappings[id(mapping)] = mapping

    def before_close(self, handle: object) -> None:
        if self.pid == os.getpid():  # in a forked child a thread that isn't there may hold the lock
            with self._once:
                self.closing.add(id(handle))

    def after_close(self, handle: object, quiet: bool) -> None:
        if self.pid != os.getpid():
            return
        with self._once:  # in one step: between two the thread would find that nobody is closing it
            self.closing.discard(id(handle))
            again = self._releaser == threading.get_ident()  # a signal handler interrupted the release in this thread
            if self.record.handles and not again:
                return
            mine = again or (not quiet and outside() and self._claimed())
        if mine:
            self._release()
        else:
            EXPORTS.of(self.record.domain).wake()

    def try_release(self) -> bool:
        """Release the buffer if nobody holds it. Returns True if it is released."""
        with self._once:
            if self.released or self.pid != os.getpid():
                return True
            if not self._claimed():
                return False
        self._release()
        return True

    def _claimed(self) -> bool:
        """Return True if nobody holds it, and the caller is the one to release it. The lock is held."""
        if self.released or self.lost or self.record.handles or any(not mapping.closed for mapping in self._mappings.values()):
            return False
        me = threading.get_ident()
        try:
            self.released = self.private.set_lock(fcntl.F_WRLCK, 0)  # compares the file too: a lock on another one proves nothing
        except ClosedError as e:
            self.lost = True  # somebody else closed the description: that nobody holds the buffer can't be proven any more
            dispatcher.report(e, self.exporter.release)
        self._releaser = me if self.released else 0
        return self.released

    def _release(self) -> None:
        """Release it (semantics 2.6). No newcomer can come, since their read lock is refused.

        What a signal handler interrupts is called again in the same thread. The exporter is told once.
        """
        record = self.record
        record.backing = None
        bug, self.vmaps, self.mapped = self.vmaps, 0, None
        if self._last is None:  # noted in the call that makes it, since a signal handler may raise after it
            try:
                own = self.private.dup()
            except OSError:
                own = self.private  # no descriptor is free
            next(map(partial(setattr, self, "_last"), map(new_handle, (own,), (record,))))
        last = self._last
        assert last is not None
        try:
            if not bug and not self._told:
                self._told = True
                self.exporter.release(last)
        except Exception as e:
            dispatcher.report(e, self.exporter.release)
        finally:
            last.close()
        self.private.close()
        left = [attachment.dev.name for attachment in self.attachments]
        # The buffer is proven to be gone: no sweep needs to judge the record, which goes with its last reference in this process.
        record.kind = KIND_RESV
        owner, self.owner = self.owner, None
        if owner is not None:
            finish(owner.put)
        if hasattr(self, "resv"):
            del self.resv
        EXPORTS.of(record.domain).forget(self)
        self._releaser, self._last = 0, None
        if bug:
            raise ContractError(
                f"release: {record}: {bug} vmap() without vunmap(), so its exporter was not asked to release it; "
                "call vunmap() once for each vmap()"
            )
        if left:
            contract_warning(f"release: {record}: still attached: {', '.join(left)}; detach before closing", 2)


def outside() -> bool:
    """Return True if the caller holds no lock and is not a callback, so that it may call an exporter."""
    return not dispatcher.in_callback() and not in_signalling() and not any(current(d).locks for d in _DOMAINS)


_DOMAINS: WeakObjects[Domain] = WeakObjects()


class Exports:
    """The exported buffers of this process in one domain, and the thread that releases those that no caller releases."""

    def __init__(self, domain: Domain) -> None:
        self.domain = weakref.ref(domain)
        self.buffers: dict[int, Exported] = {}  # by id()
        self._lock = fork_lock()
        self._event = AutoResetEvent()  # may be set from __del__
        self._thread: threading.Thread | None = None
        OF_PARENT.find("remote")  # imported now, since a forked child needs it at once
        _DOMAINS.add(domain)
        me = weakref.ref(domain)

        def swept() -> None:
            if (here := me()) is not None and (exports := EXPORTS.peek(here)) is not None:
                exports.release_orphans()

        def reset() -> None:
            if (here := me()) is not None and (exports := EXPORTS.peek(here)) is not None:
                exports.forked()

        # Once a domain: after a fork the exports begin again from none, and the hooks stay.
        domain.sweep_hooks.ensure("exports", swept)
        domain.reset_hooks.ensure("exports", reset)

    def add(self, exported: Exported) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="dmabuf-releaser", daemon=True)
                try:
                    self._thread.start()  # it looks when the lock is free
                except BaseException as e:  # none can be started, or a signal handler raised: the next export tries again
                    if isinstance(e, RuntimeError) or not dispatcher.alive_soon(self._thread):
                        self._thread = None
                    raise
            self.buffers[id(exported)] = exported

    def forget(self, exported: Exported) -> None:
        with self._lock:
            self.buffers.pop(id(exported), None)
        self._event.set()

    def wake(self) -> None:
        """Have the thread look now."""
        self._event.set()

    def orphans(self) -> list[Exported]:
        """Return those that this process has closed and others may hold."""
        with self._lock:
            return [
                exported for exported in list(self.buffers.values()) if not (exported.record.handles or exported.closing or exported.lost)
            ]

    def release_orphans(self) -> None:
        """Release what can be released: here if the caller may, else in the thread."""
        orphans = self.orphans()
        if orphans and not outside():
            self.wake()
            return
        for exported in orphans:
            try:
                exported.try_release()
            except Exception as e:
                dispatcher.report(e, exported.exporter)

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self.buffers:
                    self._thread = None
                    return
            self._event.wait(TICK_NS / 1e9 if self.orphans() else None)
            self.release_orphans()

    def forked(self) -> None:
        """Forget what the parent exports, and close the child's copies of its private descriptions."""
        for exported in list(self.buffers.values()):
            exported.private.close()
        self.buffers.clear()


OF_PARENT: Final[Registry[Callable[[SharedBuffer, int, bool], Backing]]] = Registry(
    "backing in a forked child", {"remote": "dmabuf.sharing.remote_backing"}
)
"""Functions that make the backing of a parent's buffer, from its record, the parent's life, and whether the memory is in the file."""


def _after_fork() -> None:
    """In the child the exporter is in another process: the parent."""
    for domain in list(_DOMAINS):
        exports = EXPORTS.peek(domain)
        for exported in list(exports.buffers.values()) if exports is not None else ():
            if exported.released:
                continue  # a thread of the parent has closed the descriptor, or is about to
            # Nothing of the shared state is read: if the parent has left the domain, this record is not there any more.
            exported.record.backing = OF_PARENT.find("remote")(exported.record, exported.life, exported.in_file)


os.register_at_fork(after_in_child=_after_fork)

EXPORTS: Final[Local[Exports]] = Local(Exports)
"""The exports of this process in a domain."""
