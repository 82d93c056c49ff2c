"""Why an answer differs, and why a question has no meaning for us: decided on purpose, one by one.

Names are matched as by fnmatch, against the recorded question and the kernel's short name. tests/conformance/test_cases.py fails for a
difference without an entry here, and for an entry that no difference needs any more.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Difference:
    """Questions whose answers differ, on which kernels (patterns, with spaces between), and why ours is what it is."""

    questions: tuple[str, ...]
    why: str
    kernels: str = "*"

    def covers(self, question: str, kernel: str) -> bool:
        """Does it explain this one?"""
        return any(fnmatchcase(kernel, pattern) for pattern in self.kernels.split()) and any(
            fnmatchcase(question, pattern) for pattern in self.questions
        )


DIFFERENCES = (
    Difference(
        ("sync/udmabuf-end-first",),
        "udmabuf has nothing to end before the first START: it makes its table then. All other exporters give 0, and so do we: nothing "
        "counts begin against end.",
    ),
    Difference(
        ("file/vivid-size", "file/vivid-fdinfo"),
        "The camera's format decides the size of its buffers.",
    ),
    Difference(
        ("file/vgem-fdinfo", "file/vkms-fdinfo"),
        "A DRM object keeps two references of its own to the file it exported. Our buffers have no such keeper.",
    ),
    Difference(
        ("poll/count-polled", "name/fdinfo-unnamed", "file/count-1", "file/count-dup", "file/count-mmap", "file/count-fork"),
        "Debian's 6.1 has neither udmabuf nor heaps; it was asked with a buffer of vgem, which keeps two references of its own.",
        "6.1",
    ),
    Difference(
        ("file/count-inflight",),
        "User space can't see a descriptor that is in a socket's queue: count is of descriptors and mappings of processes that this user "
        "may look into (docs/homes.md).",
    ),
    Difference(
        ("poll/closed",),
        "POLLNVAL is how poll(2) says it for one of many descriptors. A method of a closed object says EBADF, as all the others do.",
    ),
    Difference(
        ("poll/poll-neg-timeout",),
        "poll(2) takes a negative number for no limit. Our timeouts are seconds or None, and a negative one is a mistake: EINVAL, as the "
        "kernel's ppoll has it.",
    ),
    Difference(
        ("poll/alive-after",),
        "On 6.1 the buffer was one of vgem, whose handle held it.",
        "6.1",
    ),
    Difference(
        ("heap/len-2?63", "heap/len-max-page", "limits/heap-1.01-ram"),
        "The kernel's heap takes memory until the OOM killer ends the caller. We refuse what can't be had: EINVAL for a size that no "
        "address space has, and for one above udmabuf's limit; ENOMEM for one that this machine or cgroup has not.",
    ),
    Difference(
        ("heap/sync-wronly-?", "heap/setname-wronly", "heap/export-wronly"),
        "A handle holds a lock on its descriptor, by which others know that it lives, and fcntl(2) gives none on a descriptor that can't "
        "be read: get() of a write-only one is EACCES. The kernel can't map it either.",
    ),
    Difference(
        (
            *("syncfile/empty-info", "syncfile/info-n?", "syncfile/done-info", "syncfile/m-[12]-info", "syncfile/m-sig-info"),
            *("syncfile/merge-name0", "syncfile/exp-all-done", "swsync/close-tl", "swsync/err-export", "swsync/err-merge-half"),
            "swsync/err-merge-done",
        ),
        "From 6.18 on a fence that has ended no longer tells its names (detached-driver, signaled-timeline), and in 7.3 the stub's time is "
        "that of its making. Ours tell their names to the end, as up to 6.12: who reads a log wants them.",
        "6.18 7.3*",
    ),
    Difference(
        ("syncfile/deadline", "syncfile/deadline-past"),
        "Linux 6.1 has no deadlines; 6.12 has them.",
        "6.1",
    ),
    Difference(
        ("swsync/open", "debugfs/sync-info"),
        "Debian's images are built without sw_sync. Ours is part of the library.",
    ),
)

_POINTER = "A bad pointer: Python passes none. The raw call is confirmed on each kernel by `make test-kernel`."
_NUMBER = "An ioctl number that is none: our calls are methods. Confirmed on each kernel by `make test-kernel`."
_RAW = "A raw system call on the descriptor, which is a memfd: docs/homes.md says what it does there."
_MAPPING = "What a raw system call does to a mapping, which is one of ordinary memory here (docs/homes.md)."
_DRIVER = "An argument of a driver's own ioctl. Confirmed on each kernel that has the driver by `make test-kernel`."
_FIELD = "A field of the ioctl's structure that our method does not have. Confirmed on each kernel by `make test-kernel`."
_SOCKET = "A raw system call on the descriptor, which is a socket: poll(2) answers as the kernel's; for the rest docs/homes.md."
_CELL = "A raw system call on the descriptor, which is a memfd with the timeline's state."
_MACHINE = "What the machine has: `dmabuf doctor` and `dmabuf.heaps()` tell it; no operation."

# Question: reason.
NO_MEANING = {
    "env/*": _MACHINE,
    "*/source": "Which driver made the fences for these questions.",
    "udmabuf/*": _DRIVER,
    "vgem/*": _DRIVER,
    "limits/emfile-udmabuf": _DRIVER,
    "limits/heap-0.99-ram": "Whether nearly all memory is free depends on what else runs.",
    "heap/open": _MACHINE,
    "heap/len-64G": "The size was chosen for the guest's memory; limits/heap-1.01-ram asks the same of any machine.",
    "heap/fdflags-*": "allocate() has no flags: its descriptors are O_RDWR and close-on-exec.",
    "heap/getfl-*": "allocate() has no flags: its descriptors are O_RDWR and close-on-exec.",
    "heap/heapflags-*": "allocate() has no flags: the kernel defines none for heaps.",
    "heap/order-heapflags-len0": "allocate() has no flags: the kernel defines none for heaps.",
    "heap/fd-*": _FIELD,
    "heap/ptr-*": _POINTER,
    "heap/ioctl-*": _NUMBER,
    "heap/dev-*": "The device node of a heap of the kernel.",
    "heap/fdinfo": "As file/heap:system-fdinfo; the questions had two descriptors open.",
    "heap/mmap-*-private-*": "buf.mmap() is always shared.",
    "heap/mmap-*-shared-none": "buf.mmap() is readable, or readable and writable.",
    "heap/mmap-*-shared-w": "buf.mmap() is readable, or readable and writable.",
    "heap/mmap-*-shared-rx": "buf.mmap() is readable, or readable and writable.",
    "heap/mprotect-upgrade": _MAPPING,
    "sync/*-null": _POINTER,
    "sync/*-badptr": _POINTER,
    "sync/ioctl-*": _NUMBER,
    "sync/opath": "The ioctl on what is no dma-buf; dmabuf.get() refuses such a descriptor.",
    "sync/devnull": "The ioctl on what is no dma-buf; dmabuf.get() refuses such a descriptor.",
    "sync/pipe": "The ioctl on what is no dma-buf; dmabuf.get() refuses such a descriptor.",
    "sync/memfd": "The ioctl on what is no dma-buf; dmabuf.get() refuses such a descriptor.",
    "name/set-A": "A second number of the same ioctl, for 32-bit programs.",
    "name/link-A": "A second number of the same ioctl, for 32-bit programs.",
    "name/set-null": _POINTER,
    "name/set-bad": _POINTER,
    "name/link-after-bad": _POINTER,
    "name/set-page-end*": _POINTER,
    "name/maps*": "How /proc/PID/maps shows a mapping (docs/homes.md).",
    "name/vmflags-*": "How /proc/PID/smaps shows a mapping (docs/homes.md).",
    "file/*-fstat": _RAW,
    "file/read*": _RAW,
    "file/pread": _RAW,
    "file/write": _RAW,
    "file/pwrite": _RAW,
    "file/ftruncate*": _RAW,
    "file/fallocate": _RAW,
    "file/f*sync": _RAW,
    "file/fchmod": _RAW,
    "file/mode-after-fchmod": _RAW,
    "file/fchown": _RAW,
    "file/futimens": _RAW,
    "file/flock": _RAW,
    "file/setlk": _RAW,
    "file/*-seals": _RAW,
    "file/setfl-*": _RAW,
    "file/getfl-after": _RAW,
    "file/reopen*": _RAW,
    "file/fstatfs": _RAW,
    "file/f_type": _RAW,
    "file/sendfile": _RAW,
    "file/splice": _RAW,
    "file/*xattr": _RAW,
    "file/fchdir": _RAW,
    "file/getdents": _RAW,
    "file/copy_file_range": _RAW,
    "file/posix_fadvise": _RAW,
    "file/kcmp": _RAW,
    "file/ino-sequence": "Inode numbers count up in the kernel's memfd file system, which every program uses (docs/homes.md).",
    "mmap/*-private*": "buf.mmap() is always shared.",
    "mmap/*-validate": "buf.mmap() has no flags.",
    "mmap/*-populate": "buf.mmap() has no flags.",
    "mmap/*-locked": "buf.mmap() has no flags.",
    "mmap/*-exec": "buf.mmap() is readable, or readable and writable.",
    "mmap/*-wonly": "buf.mmap() is readable, or readable and writable.",
    "mmap/*-none": "buf.mmap() is readable, or readable and writable.",
    "mmap/*-mprotect-*": _MAPPING,
    "mmap/*-msync": _MAPPING,
    "mmap/*-mlock": _MAPPING,
    "mmap/*-madv-*": _MAPPING,
    "mmap/*-mremap-*": _MAPPING,
    "mmap/*-proc-mem": _MAPPING,
    "mmap/*-vmsplice": _MAPPING,
    "mmap/munmap-partial": _MAPPING,
    "poll/neg-fd": "poll(2) with an array of descriptors; ours are methods.",
    "poll/ppoll-nsec": "A time of two fields; ours is a float.",
    "poll/epollet-*": "Edge triggering on the descriptor itself. poll_fd() is one-shot: it becomes readable once.",
    "syncfile/export-null": _POINTER,
    "syncfile/export-bad": _POINTER,
    "syncfile/export-ro*": _POINTER,
    "syncfile/import-null": _POINTER,
    "syncfile/import-badptr": _POINTER,
    "syncfile/info-*ptr": _POINTER,
    "syncfile/info-null": _POINTER,
    "syncfile/merge-null": _POINTER,
    "syncfile/deadline-null": _POINTER,
    "swsync/*-null": _POINTER,
    "syncfile/ioctl-*": _NUMBER,
    "swsync/ioctl-bad": _NUMBER,
    "syncfile/*-flags": _FIELD,
    "syncfile/*-pad": _FIELD,
    "syncfile/merge-order": _FIELD,
    "swsync/deadline-pad": _FIELD,
    "swsync/fence-name32": _FIELD,
    "syncfile/empty-fl": _SOCKET,
    "syncfile/empty-link": _SOCKET,
    "syncfile/empty-fdinfo": _SOCKET,
    "syncfile/empty-fstat": _SOCKET,
    "syncfile/empty-lseek": _SOCKET,
    "syncfile/empty-read": _SOCKET,
    "syncfile/empty-write": _SOCKET,
    "syncfile/empty-mmap": _SOCKET,
    "syncfile/merge-fl": _SOCKET,
    "swsync/fence-fl": _SOCKET,
    "swsync/fl": _CELL,
    "swsync/read": _CELL,
    "swsync/poll": _CELL,
    "swsync/sync-info": "A text about all that the questions had made before; debugfs/sync-info compares the same text.",
    "debugfs/bufinfo": "A text about all buffers of the machine; tests/observe/test_bufinfo.py compares ours with it line by line.",
    "debugfs/sysfs-*": "Files of the kernel; `dmabuf.buffers()` tells the same.",
    "debugfs/fdinfo-attached": "As file/*-fdinfo; the questions had other references open.",
}


def no_meaning(question: str) -> str | None:
    """The reason why a question has none; None if there is none on record."""
    return next((why for pattern, why in NO_MEANING.items() if fnmatchcase(question, pattern)), None)
