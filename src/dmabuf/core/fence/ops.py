"""``FenceOps``: the operations of a fence with behavior of its own (semantics 3.1, 3.6-3.9).

``Timeline.fence(ops=…)`` makes one. Every operation is optional, and runs in the process that made the fence:

====================  ========================================================================================================
``enable_signaling``  called once: before the first wait, callback or await, or before the fence becomes known to other processes
                      (added to a reservation object, sent). See to it that the fence will be signaled. False: it is done, or can't
                      be enabled; the fence is then signaled at once, with the error that ``set_error`` has set
``signaled``          is the work done, though the fence isn't signaled? ``is_signaled``, ``status`` and ``describe`` ask. Once
                      True, always True. It never enables anything, so a fence may answer True only after it was enabled
``wait``              a wait of its own instead of the futex
``set_deadline``      a hint that the fence is wanted by a time; called any number of times. Of other processes' hints it gets
                      the earliest, in the dispatcher's thread, once the fence is known to them
``release``           the last reference is gone
====================  ========================================================================================================

So "signaled" means two things. ``add_callback`` and waits use the flag alone; ``is_signaled`` and ``status`` also ask ``signaled``, and
signal the fence if the answer is True. Other processes see the flag only: they wait for the fence's slot and call no operation. The
package holds no lock of its own while it calls an operation, and any thread may make the call. In a forked child a fence that was made
before the fork belongs to the parent: its operations are not called.
"""

from __future__ import annotations

from dmabuf.core.fence.fence import DmaFence


class FenceOps:
    """The operations of a custom fence. Override those that it needs.

    Kernel: dma_fence_ops.
    """

    def enable_signaling(self, fence: DmaFence) -> bool:
        """See to it that the fence will be signaled. Optional. Called at most once, and must not wait.

        Returns:
            False if the work is done, or can't be enabled.

        Kernel: dma_fence_ops.enable_signaling.
        """
        return True

    def signaled(self, fence: DmaFence) -> bool:
        """Return True if the work is done. Optional. May set the error just before the first True.

        Kernel: dma_fence_ops.signaled.
        """
        raise NotImplementedError

    def wait(self, fence: DmaFence, interruptible: bool, timeout: float | None) -> float:
        """Wait at most ``timeout`` seconds, None for no limit. Optional.

        Returns:
            The seconds left, more than 0, or 0.0 when the time is over.

        Kernel: dma_fence_ops.wait.
        """
        raise NotImplementedError

    def set_deadline(self, fence: DmaFence, ns: int) -> None:
        """Take the hint that the fence is wanted by this CLOCK_MONOTONIC time in ns. Optional.

        Kernel: dma_fence_ops.set_deadline.
        """

    def release(self, fence: DmaFence) -> None:
        """Free what belongs to the fence, which this process no longer references. Optional.

        Runs in whichever thread dropped the last reference, so it must take no lock.

        Kernel: dma_fence_ops.release.
        """
