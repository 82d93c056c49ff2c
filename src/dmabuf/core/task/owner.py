"""The owner of a lock or an access: a thread, or the task of asyncio or trio that runs in it.

An owner has one context in the domain, which names it in lock words and in fences of accesses, and in which it publishes the fence that it
waits for. So any process can follow "waits for" edges from owner to owner. At a tick each waiting process looks for a cycle.
"""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable
from functools import partial

from dmabuf._native import FF_ACCESS, FF_WATCH_DEADLINE, OFF_STAMP, TICK_FENCE, Context
from dmabuf.core.task import waiting
from dmabuf.core.task.pause import Pause
from dmabuf.domain import slow_waits
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import WeakKeys
from dmabuf.domain.local import Local
from dmabuf.domain.weak_objects import WeakObjects
from dmabuf.errors import fail

_CYCLE_LIMIT = 256
_GIVES_WAY = FF_ACCESS | FF_WATCH_DEADLINE


class Owner(Context):
    """One thread or task in one domain; ``word`` names its context, and ``locks`` counts the reservation locks that it holds."""

    __slots__ = (
        "__weakref__",
        "awaiting",
        "blocked",
        "domain",
        "lasts",
        "name",
        "open_context",
        "stalled",
        "tid",
        "wait_stamp",
        "waits_for",
    )

    def __init__(self, domain: Domain, name: str) -> None:
        self.domain = domain
        self.name = name
        self.wait_stamp = self.waits_for = 0  # when its wait for an access began, and the fence
        self.awaiting: Pause | None = None  # where its task waits for that
        self.blocked = 0  # or the native id of the thread that waits, and in which no other task runs meanwhile
        self.stalled: list[Owner] = []  # those tasks, once a tick has found the wait to last
        self.tid = threading.get_native_id()
        self.lasts: slow_waits.Wait | None = None  # the wait of its task, once a tick came
        self.open_context: weakref.ref[Context] | None = None  # the WwAcquireContext that it made last
        domain.ctx_open(self, self.tid, False)


class _Thread(threading.local):
    """The owner that stands for the running thread."""

    owner: Owner | None = None


class _Owners:
    """The owners of this process in one domain. ``all``: every one; ``waiting``: those that wait for an access."""

    def __init__(self, domain: Domain) -> None:
        self.thread = _Thread()
        self.all: WeakObjects[Owner] = WeakObjects()
        self.tasks: weakref.WeakKeyDictionary[object, Owner] = WeakKeys()
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
            owners.all.add(owner)
        return owner
    mine = owners.thread.owner
    if mine is None or mine.life != life:
        mine = owners.thread.owner = Owner(domain, threading.current_thread().name)
        owners.all.add(mine)
    return mine


def thread_of(domain: Domain) -> object:
    """Return the object whose attribute ``owner`` stands for the running thread; it may be None, or of another life."""
    return _OWNERS.of(domain).thread


def acting(owner: Owner, call: Callable[[], object]) -> None:
    """Call ``call`` in this thread, in which no task runs, as the owner that waits for it. Raises what the call raises."""
    thread = _OWNERS.of(owner.domain).thread
    before, thread.owner = thread.owner, owner
    try:
        call()
    finally:
        thread.owner = before


def publish(owner: Owner, handle: int, *, blocking: bool = False) -> None:
    """Publish the fence that the owner is about to wait for; 0 when it no longer waits. ``blocking``: the running thread waits."""
    shm = owner.domain.shm
    owners = _OWNERS.of(owner.domain)
    if handle:
        if not owner.wait_stamp:
            owner.wait_stamp = owner.domain.shm.add64(OFF_STAMP, 1)
        owner.waits_for = handle
        owner.blocked = threading.get_native_id() if blocking else 0
        owners.waiting[owner] = None
    else:
        owner.wait_stamp = owner.blocked = 0
        owner.lasts = None
        owners.waiting.pop(owner, None)
        if owner.stalled:
            for other in owner.stalled:
                shm.ctx_waits(other.word, 0, 0)
            owner.stalled = []
    shm.ctx_waits(owner.word, handle, owner.wait_stamp)


def _stall(owners: _Owners, owner: Owner) -> None:
    """Publish that the other tasks of the thread that ``owner`` keeps waiting can't go on either, for other processes and threads."""
    if not owner.stalled:
        owner.stalled = [other for other in owners.all if other.tid == owner.blocked and other not in owners.waiting]
    for other in owner.stalled:
        owner.domain.shm.ctx_waits(other.word, owner.waits_for, owner.wait_stamp)


def youngest_in_cycle(owner: Owner) -> bool:
    """Return True if the owner is in a cycle of waits for accesses, and began its wait last of all in it.

    The cycle may go through another task of the thread that the owner keeps waiting.
    """
    shm = owner.domain.shm
    word, youngest = owner.word, owner.wait_stamp
    for _ in range(_CYCLE_LIMIT):
        context = shm.ctx_info(word)
        if context is None or not context[4]:
            return False
        fence = shm.fence_info(context[4])
        if fence is None or not fence["pending"] or not fence["owner"]:
            return False
        if fence["flags"] & _GIVES_WAY == _GIVES_WAY:
            return False  # what a read() block has left: it ends soon, though its owner waits
        word = fence["owner"]
        youngest = max(youngest, context[5])
        if word == owner.word or (owner.blocked and (found := shm.ctx_info(word)) is not None and found[:2] == (owner.life, owner.blocked)):
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
    here = threading.get_native_id()
    for owner in list(owners.waiting):
        if owner.life != domain.shm.life:
            continue
        blocks = owner.blocked == here and kind == TICK_FENCE
        if blocks:
            _stall(owners, owner)
        if owner.awaiting is not None:  # a thread that waits is told of in C
            owner.lasts = owner.lasts or slow_waits.Wait()
            owner.lasts.look(domain, partial(slow_waits.named, domain, TICK_FENCE, owner.waits_for))
        if not youngest_in_cycle(owner):
            continue
        if owner.awaiting is not None:
            owner.awaiting.end(deadlock("access", "a buffer"))
        elif blocks:
            raise deadlock("access", "a buffer")
