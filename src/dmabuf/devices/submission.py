"""Submission: how a job gets its dependencies, and its buffers the job's fence (semantics 4.11). Every device of this library uses it.

A submission holds the locks of all its reservation objects at once, so the jobs of all processes have one order. Under the locks it
collects the job's dependencies, and then adds the job's own fence. A job that reads a buffer waits for its KERNEL and WRITE fences and adds
READ. A job that writes also waits for READ fences and adds WRITE. With ``implicit=False`` a job waits for KERNEL fences only, which nothing
can skip, and adds BOOKKEEP, for which only an exporter that moves or frees the memory waits. In both cases the job also waits for the
fences in ``wait=[…]``.

A failed dependency does not fail the job, as in the kernel. A program that needs to know checks the fence.

A job on a kernel dma-buf also waits for the kernel's fences. The kernel does not tell KERNEL fences from WRITE fences, so there
``implicit=False`` waits for both. The job's own fence does not go into the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dmabuf.core.base.usage import Usage
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.resv.resv import DmaResv
from dmabuf.core.resv.ww_mutex import lock_all
from dmabuf.devices.queue import Job, Queue


def checked_wait(wait: Iterable[DmaFence]) -> list[DmaFence]:
    """Return the explicit dependencies. Raise TypeError for a single fence, or for something that is not a fence."""
    if isinstance(wait, DmaFence):
        raise TypeError("submit: wait= takes a list of DmaFences, as wait=[fence], not one")
    found = list(wait)
    for fence in found:
        if not isinstance(fence, DmaFence):
            raise TypeError(f"submit: wait= takes DmaFences, not {type(fence).__name__}")
    return found


def submit(
    queue: Queue, job: Job, resvs: Mapping[DmaResv, bool], prepare: Callable[[], object], *, wait: list[DmaFence], implicit: bool
) -> None:
    """Queue a job that uses these reservation objects, True: writes. ``prepare`` is called first, with the locks held.

    After an error nothing is added.

    Raises:
        DeadlockError: This thread or task holds one of the locks, with a ``ContractWarning`` (EDEADLK).
        NoMemoryError, NoSpaceError: There is no room for a fence (ENOMEM, ENOSPC).
        DmaBufError: ``prepare`` failed, or the queue takes no jobs.
    """
    with lock_all(resvs):
        try:
            prepare()
            job.dependencies = _dependencies(job, resvs, wait, implicit)
            # If a signal handler raises from here on, the job is in its queue and ends there in its turn.
            with queue.placing(job) as fence:
                _add(fence, resvs, implicit)
                job.canceled = False
        except BaseException:
            if not job.placed:
                job.leave()  # before anybody can have the locks, and look for its fence
            raise


def _dependencies(job: Job, resvs: Mapping[DmaResv, bool], wait: list[DmaFence], implicit: bool) -> list[DmaFence]:
    """Reserve a place in each reservation object, and return what the job waits for."""
    found: dict[DmaFence, None] = dict.fromkeys(wait)
    for resv, write in resvs.items():
        resv.reserve(1)
        found.update(dict.fromkeys(resv.fences(Usage.rw(write) if implicit else Usage.KERNEL)))
    for attached, write in job.uses().items():
        fence = attached.kernels_fence(write and implicit)
        if fence is not None:
            found[fence] = None
    return list(found)


def _add(fence: DmaFence, resvs: Mapping[DmaResv, bool], implicit: bool) -> None:
    for resv, write in resvs.items():
        resv.add(fence, (Usage.WRITE if write else Usage.READ) if implicit else Usage.BOOKKEEP)
