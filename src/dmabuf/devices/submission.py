"""Submission: where a job meets the reservation objects of its buffers (semantics 4.11). Used by every device of ours.

Under the locks of all reservation objects at once, so that jobs of all processes have one order: what is in the way is collected, then the
job's own fence is added. A job that reads a buffer waits for its KERNEL and WRITE fences and adds READ; one that writes also waits for
READ fences and adds WRITE. With ``implicit=False`` it waits for KERNEL fences only, which are never skipped, and adds BOOKKEEP, which
nobody waits for but who moves or frees the memory. Explicit fences are waited for either way.

A failed dependency does not fail the job, as in the kernel: who cares looks at the fence.

For a real dma-buf the kernel's fences are waited for as well. The kernel does not tell its KERNEL fences from WRITE ones, so
``implicit=False`` waits for both there. The job's own fence does not go into the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dmabuf.core.base.usage import Usage
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.resv.resv import DmaResv
from dmabuf.core.resv.ww_mutex import lock_all
from dmabuf.devices.queue import Job, Queue


def checked_wait(wait: Iterable[DmaFence]) -> list[DmaFence]:
    """The explicit dependencies. Errors: TypeError one fence, or something that is none."""
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

    Errors, with nothing added: those of ``prepare`` and of the queue; ENOMEM, ENOSPC no room for a fence; ``ContractWarning`` and EDEADLK
    one of the locks is held by this thread or task.
    """
    with lock_all(resvs):
        try:
            prepare()
            found: dict[DmaFence, None] = dict.fromkeys(wait)
            for resv, write in resvs.items():
                resv.reserve(1)
                found.update(dict.fromkeys(resv.fences(Usage.rw(write) if implicit else Usage.KERNEL)))
            for attached, write in job.uses().items():
                fence = attached.kernels_fence(write and implicit)
                if fence is not None:
                    found[fence] = None
            job.dependencies = list(found)
            # From here a signal handler that raises can't lose the job: it is in its queue, and ends there in its turn.
            with queue.placing(job) as fence:
                for resv, write in resvs.items():
                    resv.add(fence, (Usage.WRITE if write else Usage.READ) if implicit else Usage.BOOKKEEP)
        except BaseException:
            if not job.placed:
                job.leave()  # before anybody can have the locks, and look for its fence
            raise
