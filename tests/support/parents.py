"""What Linux does with a process whose parent ends (prctl(2))."""

import ctypes
import os
import signal

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Let the orphans among what this process starts, directly or not, become children of it and not of init."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; end at once if the parent is gone.

    The signal comes at the end of the parent's thread that made this process, so that must be one that stays: the main thread. A process
    that was adopted belongs to the main thread.
    """
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew that we want to hear of it
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
