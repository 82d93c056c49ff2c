"""The owner of a lock or an access: a thread, or the task of asyncio or trio that runs in it.

An owner has one context in the domain, which names it in lock words and in fences of accesses, and in which it publishes the fence that it
waits for. So any process can follow "waits for" edges from owner to owner. At a tick each waiting process looks for a cycle.
"""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable

from dmabuf._native import OFF_STAMP, TICK_FENCE, Context
from dmabuf.core.task import waiting
from dmabuf.core.task.pause import Pause
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.errors import fail

_CYCLE_LIMIT = 256


class Owner(Context):
    """One thread or task in one domain; ``word`` names its context, and ``locks`` counts the reservation locks that it holds."""

    __slots__ = ("__weakref__", "awaiting", "domain", "name", "open_context", "wait_stamp")

    def __init__(self, domain: Domain, name: str) -> None:
        self.domain = domain
        self.name = name
        self.wait_stamp = 0
        self.awaiting: Pause | None = None  # where its task waits for an access
        self.open_context: weakref.ref[Context] | None = None  # the WwAcquireContext that it made last
        domain.ctx_open(self, threading.get_native_id(), False)


class _Thread(threading.local):
    """The owner that stands for the running thread."""

    owner: Owner | None = None


class _Owners:
    """The owners of this process in one domain. ``waiting``: those that wait for an access."""

    def __init__(self, domain: Domain) -> None:
        self.thread = _Thread()
        self.tasks: weakref.WeakKeyDictionary[object, Owner] = weakref.WeakKeyDictionary()
        self.waiting: dict[Owner, None] = {}
        me = weakref.ref(domain)

        def look_for_cycles(kind: int, value: int) -> None:
            this = me()
            if this is not None:
                _end_deadlocks(this, kind)

        # Once a domain: after a fork there are new owners, and the hook stays. It comes first, so that no owner waits without it.
        domain.tick_hooks.ensure("cycles", look_for_cycles)


_OWNERS: Local[_Owners] = Local(_Owners)


def current(domain: Domain) -> Owner:
    """Return the owner that runs now: the task, or else the thread."""
    life = domain.shm.life or domain.life
    owners: _Owners = domain.local.get(_OWNERS) or _OWNERS.of(domain)  # not peek(): each access and each lock makes this call
    task = waiting.running()
    if task is not None:
        owner = owners.tasks.get(task)
        if owner is None or owner.life != life:
            owner = owners.tasks[task] = Owner(domain, waiting.name_of(task))
        return owner
    mine = owners.thread.owner
    if mine is None or mine.life != life:
        mine = owners.thread.owner = Owner(domain, threading.current_thread().name)
    return mine


def acting(owner: Owner, call: Callable[[], object]) -> None:
    """Call ``call`` in this thread, in which no task runs, as the owner that waits for it. Raises what the call raises."""
    thread = _OWNERS.of(owner.domain).thread
    before, thread.owner = thread.owner, owner
    try:
        call()
    finally:
        thread.owner = before


def publish(owner: Owner, handle: int) -> None:
    """Publish the fence that the owner is about to wait for; 0 when it no longer waits."""
    shm = owner.domain.shm
    owners = _OWNERS.of(owner.domain)
    if handle:
        if not owner.wait_stamp:
            owner.wait_stamp = owner.domain.shm.add64(OFF_STAMP, 1)
        owners.waiting[owner] = None
    else:
        owner.wait_stamp = 0
        owners.waiting.pop(owner, None)
    shm.ctx_waits(owner.word, handle, owner.wait_stamp)


def youngest_in_cycle(owner: Owner) -> bool:
    """Return True if the owner is in a cycle of waits for accesses, and began its wait last of all in it."""
    shm = owner.domain.shm
    word, youngest = owner.word, owner.wait_stamp
    for _ in range(_CYCLE_LIMIT):
        context = shm.ctx_info(word)
        if context is None or not context[4]:
            return False
        fence = shm.fence_info(context[4])
        if fence is None or not fence["pending"] or not fence["owner"]:
            return False
        word = fence["owner"]
        youngest = max(youngest, context[5])
        if word == owner.word:
            return youngest == owner.wait_stamp
    return False


def deadlock(operation: str, obj: object) -> OSError:
    """Return the error of an owner that waits for itself, directly or around a cycle."""
    remedy = "take all buffers at once with dmabuf.access(read=[…], write=[…])"
    return fail(errno.EDEADLK, operation, obj, remedy, what="accesses wait for each other in a circle")


def _end_deadlocks(domain: Domain, kind: int) -> None:
    """Let the youngest owner of a cycle fail, at a tick. It may be the thread that ticks, or a task, which doesn't tick itself."""
    owners = _OWNERS.peek(domain)
    if owners is None:
        return
    mine = owners.thread.owner
    for owner in list(owners.waiting):
        if owner.life != domain.shm.life or not youngest_in_cycle(owner):
            continue
        if owner.awaiting is not None:
            owner.awaiting.end(deadlock("access", "a buffer"))
        elif owner is mine and kind == TICK_FENCE:
            raise deadlock("access", "a buffer")
