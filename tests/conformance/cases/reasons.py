"""Why an answer differs from the kernel's, and why a question does not apply: each was decided on purpose.

Patterns are those of fnmatch, for the recorded question and the kernel's short name. tests/conformance/test_cases.py fails for a difference
without an entry here, and for an entry that no difference needs.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Difference:
    """Questions whose answers differ, on which kernels (patterns, separated by spaces), and why the library's is what it is."""

    questions: tuple[str, ...]
    why: str
    kernels: str = "*"

    def covers(self, question: str, kernel: str) -> bool:
        """Return True if it explains the difference of this question on this kernel."""
        return any(fnmatchcase(kernel, pattern) for pattern in self.kernels.split()) and any(
            fnmatchcase(question, pattern) for pattern in self.questions
        )


DIFFERENCES = (
    Difference(
        ("sync/udmabuf-end-first",),
        "udmabuf makes its table at the first START, and has nothing to end before. All other exporters give 0, and so does the library: "
        "nothing pairs begin and end.",
    ),
    Difference(
        ("file/vivid-size", "file/vivid-fdinfo"),
        "The camera's format decides the size of its buffers.",
    ),
    Difference(
        ("file/vgem-fdinfo", "file/vkms-fdinfo"),
        "A DRM object keeps two references of its own to the file it exported. Buffers of the library have no such object.",
    ),
    Difference(
        ("poll/count-polled", "name/fdinfo-unnamed", "file/count-1", "file/count-dup", "file/count-mmap", "file/count-fork"),
        "Debian's 6.1 has neither udmabuf nor heaps. It was asked about a buffer of vgem, which keeps two references of its own.",
        "6.1",
    ),
    Difference(
        ("file/count-inflight",),
        "User space can't see a descriptor in the queue of a socket: count is the number of descriptors and mappings in processes that "
        "this user may inspect (docs/homes.md).",
    ),
    Difference(
        ("poll/closed",),
        "poll(2) reports POLLNVAL for one of many descriptors. A method of a closed object raises EBADF, as all methods do.",
    ),
    Difference(
        ("poll/poll-neg-timeout",),
        "For poll(2) a negative number means no limit. Timeouts of the library are seconds or None, and a negative one is EINVAL, as in "
        "ppoll(2).",
    ),
    Difference(
        ("poll/alive-after",),
        "On 6.1 the buffer was one of vgem, whose handle kept it alive.",
        "6.1",
    ),
    Difference(
        ("heap/len-2?63", "heap/len-max-page", "limits/heap-1.01-ram"),
        "The kernel's heap takes memory until the OOM killer ends the caller. The library refuses such sizes: EINVAL if no address space "
        "is that large, or above udmabuf's limit, and ENOMEM if this machine or cgroup doesn't have the memory.",
    ),
    Difference(
        ("heap/sync-wronly-?", "heap/setname-wronly", "heap/export-wronly"),
        "A handle has a reference lock on its descriptor, which shows others that the buffer is open. fcntl(2) gives no such lock on a "
        "descriptor that can't be read, so get() of a write-only one is EACCES. The kernel can't map it either.",
    ),
    Difference(
        (
            *("syncfile/empty-info", "syncfile/info-n?", "syncfile/done-info", "syncfile/m-[12]-info", "syncfile/m-sig-info"),
            *("syncfile/merge-name0", "syncfile/exp-all-done", "swsync/close-tl", "swsync/err-export", "swsync/err-merge-half"),
            "swsync/err-merge-done",
        ),
        "Since 6.18 a signaled fence no longer has its names (detached-driver, signaled-timeline), and in 7.3 the stub's time is that of "
        "its creation. Fences of the library keep their names, as up to 6.12, because readers of a log want them.",
        "6.18 7.3*",
    ),
    Difference(
        ("syncfile/deadline", "syncfile/deadline-past"),
        "Linux 6.1 has no deadlines; 6.12 has them.",
        "6.1",
    ),
    Difference(
        ("swsync/open", "debugfs/sync-info"),
        "Debian's images are built without sw_sync. The library always has it.",
    ),
)

_POINTER = "A bad pointer, which Python can't pass. `make test-kernel` checks the raw call on each kernel."
_NUMBER = "An unknown ioctl number; the library has methods. `make test-kernel` checks it on each kernel."
_RAW = "A raw system call on the descriptor, which is a memfd. docs/homes.md says what it does."
_MAPPING = "A raw system call on a mapping, which is one of ordinary memory (docs/homes.md)."
_DRIVER = "An argument of a driver's own ioctl. `make test-kernel` checks it on each kernel that has the driver."
_FIELD = "A field of the ioctl's structure that the method doesn't have. `make test-kernel` checks it on each kernel."
_SOCKET = "A raw system call on the descriptor, which is a socket. poll(2) answers as the kernel does; docs/homes.md has the others."
_CELL = "A raw system call on the descriptor, which is a memfd with the timeline's state."
_MACHINE = "Not an operation: it is what the machine has, which `dmabuf doctor` and `dmabuf.heaps()` show."

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
    "sync/opath": "The ioctl on a descriptor that is not a dma-buf, which dmabuf.get() refuses.",
    "sync/devnull": "The ioctl on a descriptor that is not a dma-buf, which dmabuf.get() refuses.",
    "sync/pipe": "The ioctl on a descriptor that is not a dma-buf, which dmabuf.get() refuses.",
    "sync/memfd": "The ioctl on a descriptor that is not a dma-buf, which dmabuf.get() refuses.",
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
    "poll/neg-fd": "poll(2) with an array of descriptors; the library has methods.",
    "poll/ppoll-nsec": "A time with two fields; the library's is a float.",
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
    "swsync/sync-info": "A text about everything that the questions had made before; debugfs/sync-info compares the same text.",
    "debugfs/bufinfo": "A text about all buffers of the machine; tests/observe/test_bufinfo.py compares it line by line.",
    "debugfs/sysfs-*": "Files of the kernel; `dmabuf.buffers()` shows the same.",
    "debugfs/fdinfo-attached": "As file/*-fdinfo; the questions had other references open.",
}


def no_meaning(question: str) -> str | None:
    """Return why a question does not apply, or None if no reason is recorded."""
    return next((why for pattern, why in NO_MEANING.items() if fnmatchcase(question, pattern)), None)
