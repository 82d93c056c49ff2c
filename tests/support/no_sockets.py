"""A process in which no socket can be made any more, as when the system has no file left."""

import ctypes
import errno
import platform
import struct

_SOCKET = {"x86_64": 41, "aarch64": 198}  # asm/unistd.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS; BPF_JMP | BPF_JEQ; BPF_RET
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

AVAILABLE = platform.machine() in _SOCKET


def forbid(number: int = errno.ENFILE) -> None:
    """Let every socket(2) of this process fail from now on (seccomp(2)). There is no way back."""
    code = [
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_EQUAL, 0, 1, _SOCKET[platform.machine()]),
        (_RETURN, 0, 0, _ERRNO | number),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    about = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, about, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
