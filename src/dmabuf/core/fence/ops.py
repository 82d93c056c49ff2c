"""``FenceOps``: fences with behaviour of their own, and what containers share with them (spec 3.1, 3.6-3.9).

``Timeline.fence(ops=…)`` makes one. Every operation is optional, and belongs to the process that made the fence:

====================  ========================================================================================================
``enable_signaling``  called once, before the first wait, callback or await, and when the fence becomes known elsewhere (added to a
                      reservation object, sent): see to it that it will be signalled. False: it is done already, or can't be
                      enabled; the fence is signalled at once, with the error that ``set_error`` has set
``signaled``          is it done, though nobody signalled it? Asked by ``is_signaled``, ``status`` and ``describe``; once True, always
                      True. It never enables anything, so a fence may report only after it was enabled
``wait``              a wait of its own instead of the futex
``set_deadline``      a hint that somebody wants it by then; any number of times. Of other processes' hints it hears the earliest,
                      in the dispatcher's thread, once the fence is known to them
``release``           the last reference is gone
====================  ========================================================================================================

So there are two notions of "signalled": ``add_callback`` and waits go by the flag alone, ``is_signaled`` and ``status`` also ask
``signaled`` and, on True, signal the fence. Other processes see the flag: they wait for the fence's slot, and nothing of this calls
across. Operations are called without any lock of the package held; they may be called by any thread. In a forked child a fence made
before is another process's: its operations are not called.
"""

from __future__ import annotations

from dmabuf.core.fence.fence import DmaFence


class FenceOps:
    """The operations of a custom fence; override those that it needs. Kernel: dma_fence_ops."""

    def enable_signaling(self, fence: DmaFence) -> bool:
        """Optional. See to it that the fence will be signalled; False: it is done, or can't be. Called at most once, and must not wait.

        Kernel: dma_fence_ops.enable_signaling.
        """
        return True

    def signaled(self, fence: DmaFence) -> bool:
        """Optional. Is it done? May set the error just before the first True. Kernel: dma_fence_ops.signaled."""
        raise NotImplementedError

    def wait(self, fence: DmaFence, interruptible: bool, timeout: float | None) -> float:
        """Optional. Wait at most ``timeout`` seconds (None: for ever); the seconds left (> 0), or 0.0 when the time is over.

        Kernel: dma_fence_ops.wait.
        """
        raise NotImplementedError

    def set_deadline(self, fence: DmaFence, ns: int) -> None:
        """Optional. Somebody would like the fence to be signalled by this CLOCK_MONOTONIC time, in ns.

        Kernel: dma_fence_ops.set_deadline.
        """

    def release(self, fence: DmaFence) -> None:
        """Optional. Nobody here has the fence any more. Called in whichever thread let go of it last: take no lock.

        Kernel: dma_fence_ops.release.
        """
