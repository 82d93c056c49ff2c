"""Forks in every way, and what there is to inherit."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
import warnings
from collections.abc import Callable

import dmabuf
from dmabuf import Usage
from tests.support.fences import attach
from tests.support.steps import reap

_libc = ctypes.PyDLL(None, use_errno=True)
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine)


def python_fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: a fork with threads
        return os.fork()


def raw_fork() -> int:
    """clone(2) with nothing but SIGCHLD: a fork that runs no hook of Python's or of the C library's."""
    pid = _libc.syscall(_SYS_CLONE, signal.SIGCHLD, None, None, None, None)
    assert pid >= 0
    return int(pid)


FORKS = [python_fork] + ([raw_fork] if _SYS_CLONE else [])


class Scene:
    """A buffer, another one, and a timeline with a pending fence."""

    def __init__(self) -> None:
        self.buf, self.other = dmabuf.allocate(4096, name="buf"), dmabuf.allocate(4096, name="other")
        self.timeline = dmabuf.Timeline("parent")
        self.fence = self.timeline.fence()
        attach(self.other.resv, self.fence, Usage.BOOKKEEP)

    def close(self) -> None:
        if not self.fence.is_signaled():
            self.fence.signal()
        self.timeline.close()
        self.buf.close()
        self.other.close()


def in_child(fork: Callable[[], int], action: Callable[[], object], end: Callable[[], object] = lambda: os._exit(0)) -> int:
    """The exit code of a child that does something and ends."""
    pid = fork()
    if pid:
        return reap(pid)
    try:
        action()
        end()
    except SystemExit as e:
        os._exit(int(e.code or 0))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
