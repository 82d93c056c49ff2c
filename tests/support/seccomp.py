"""A filter of system calls, as a sandbox has one (seccomp(2)), for the rest of a process."""

import ctypes
import os
import platform
import struct

import pytest

_CALLS = (
    "memfd_create",
    "fallocate",
    "ftruncate",
    "socket",
    "fchmod",
    "getdents64",
    "prlimit64",
    "pread64",
    "inotify_init1",
    "close_range",
)
_NUMBERS = {  # asm/unistd.h
    "x86_64": dict(zip(_CALLS, (319, 285, 77, 41, 91, 217, 302, 17, 294, 436), strict=True)),
    "aarch64": dict(zip(_CALLS, (279, 47, 46, 198, 52, 61, 261, 67, 26, 436), strict=True)),
}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse(call: str, number: int) -> None:
    """Have a system call fail with an errno from now on."""
    code = [
        (_LOAD, 0, 0, 0),
        (_JUMP_EQUAL, 0, 1, _NUMBERS[platform.machine()][call]),
        (_RETURN, 0, 0, _ERRNO | number),
        (_RETURN, 0, 0, _ALLOW),
    ]
    memory = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = _Program(len(code), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


needs_filters = pytest.mark.skipif(platform.machine() not in _NUMBERS, reason="the numbers of its system calls are not known here")
