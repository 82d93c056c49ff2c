"""Raw Linux UAPI for dma-buf, sync_file, sw_sync, dma-heap, udmabuf, DRM prime and vgem,
through libc's ioctl(2), so that bad pointers and exact errnos can be probed."""

import ctypes
import functools
import os
import struct

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

MAP_FAILED = ctypes.c_void_p(-1).value


def _IOC(d, t, nr, size):
    return (d << 30) | (size << 16) | (ord(t) << 8) | nr


def _IO(t, nr):
    return _IOC(0, t, nr, 0)


def _IOW(t, nr, size):
    return _IOC(1, t, nr, size)


def _IOR(t, nr, size):
    return _IOC(2, t, nr, size)


def _IOWR(t, nr, size):
    return _IOC(3, t, nr, size)


DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, DMA_BUF_SYNC_RW = 1, 2, 3
DMA_BUF_SYNC_START, DMA_BUF_SYNC_END = 0, 4
DMA_BUF_IOCTL_SYNC = _IOW("b", 0, 8)
DMA_BUF_SET_NAME_A = _IOW("b", 1, 4)
DMA_BUF_SET_NAME_B = _IOW("b", 1, 8)
DMA_BUF_IOCTL_EXPORT_SYNC_FILE = _IOWR("b", 2, 8)
DMA_BUF_IOCTL_IMPORT_SYNC_FILE = _IOW("b", 3, 8)
SYNC_IOC_MERGE = _IOWR(">", 3, 48)
SYNC_IOC_FILE_INFO = _IOWR(">", 4, 56)
SYNC_IOC_SET_DEADLINE = _IOW(">", 5, 16)
SW_SYNC_IOC_CREATE_FENCE = _IOWR("W", 0, 40)
SW_SYNC_IOC_INC = _IOW("W", 1, 4)
SW_SYNC_GET_DEADLINE = _IOWR("W", 2, 16)
DMA_HEAP_IOCTL_ALLOC = _IOWR("H", 0, 24)
UDMABUF_CREATE = _IOW("u", 0x42, 24)
UDMABUF_CREATE_LIST = _IOW("u", 0x43, 8)
DRM_IOCTL_VERSION = _IOWR("d", 0, 64)
DRM_IOCTL_GEM_CLOSE = _IOW("d", 9, 8)
DRM_IOCTL_PRIME_HANDLE_TO_FD = _IOWR("d", 0x2D, 12)
DRM_IOCTL_PRIME_FD_TO_HANDLE = _IOWR("d", 0x2E, 12)
DRM_IOCTL_MODE_CREATE_DUMB = _IOWR("d", 0xB2, 32)
DRM_IOCTL_MODE_MAP_DUMB = _IOWR("d", 0xB3, 16)
DRM_IOCTL_VGEM_FENCE_ATTACH = _IOWR("d", 0x41, 16)
DRM_IOCTL_VGEM_FENCE_SIGNAL = _IOW("d", 0x42, 8)
DRM_CLOEXEC, DRM_RDWR = os.O_CLOEXEC, os.O_RDWR
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = 1, 2, 4, 8, 16, 32
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB = 1, 2, 4
PAGE = 4096


# The calls of somebody else, by the names of those here; they get the raw one first, for what they don't offer.
THROUGH = {}


def offered(raw):
    """A call that somebody else may offer too."""

    @functools.wraps(raw)
    def call(*arguments, **options):
        other = THROUGH.get(raw.__name__)
        return raw(*arguments, **options) if other is None else other(raw, *arguments, **options)

    return call


def ck(r):
    if r == -1 or r == MAP_FAILED:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))
    return r


def ioctl_raw(fd, req, ptr):
    """ptr: None, int address, or a ctypes buffer; returns the call's value or raises OSError"""
    ctypes.set_errno(0)
    if isinstance(ptr, ctypes.Array):
        ptr = ctypes.addressof(ptr)
    return ck(libc.ioctl(fd, req & 0xFFFFFFFF, ptr))


def ioctl(fd, req, fmt, *vals):
    """pack vals, call, return (ret, unpacked)"""
    raw = struct.pack(fmt, *vals)
    buf = ctypes.create_string_buffer(raw, len(raw))
    r = ioctl_raw(fd, req, buf)
    return r, struct.unpack(fmt, buf.raw)


def mmap(length, prot, flags, fd, off=0, addr=None):
    return ck(libc.mmap(addr, length, prot, flags, fd, off))


def memfd(size, seals=F_SEAL_SHRINK, flags=MFD_ALLOW_SEALING | MFD_CLOEXEC, name="probe"):
    import fcntl

    fd = os.memfd_create(name, flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


@offered
def udmabuf(memfd_, off=0, size=PAGE, flags=1, dev=None):
    d = dev if dev is not None else os.open("/dev/udmabuf", os.O_RDWR)
    try:
        return ioctl(d, UDMABUF_CREATE, "IIQQ", memfd_, flags, off, size)[0]
    finally:
        if dev is None:
            os.close(d)


@offered
def udmabuf_list(items, flags=1, count=None, dev=None, pad=0):
    d = dev if dev is not None else os.open("/dev/udmabuf", os.O_RDWR)
    try:
        raw = struct.pack("II", flags, len(items) if count is None else count)
        for m, off, size in items:
            raw += struct.pack("IIQQ", m, pad, off, size)
        buf = ctypes.create_string_buffer(raw, len(raw))
        return ioctl_raw(d, UDMABUF_CREATE_LIST, buf)
    finally:
        if dev is None:
            os.close(d)


@offered
def heap_alloc(length, fd_flags=os.O_RDWR | os.O_CLOEXEC, heap_flags=0, fd=0, heap="system", dev=None, req=DMA_HEAP_IOCTL_ALLOC):
    d = dev if dev is not None else os.open("/dev/dma_heap/" + heap, os.O_RDONLY)
    try:
        return ioctl(d, req, "QIIQ", length, fd, fd_flags, heap_flags)[1][1]
    finally:
        if dev is None:
            os.close(d)


@offered
def drm_driver(fd):
    name = ctypes.create_string_buffer(32)
    raw = struct.pack("iiiiQQQQQQ", 0, 0, 0, 0, 31, ctypes.addressof(name), 0, 0, 0, 0)
    buf = ctypes.create_string_buffer(raw, len(raw))
    ioctl_raw(fd, DRM_IOCTL_VERSION, buf)
    return name.value.decode()


def open_drm(want):
    d = "/dev/dri"
    for n in sorted(os.listdir(d)) if os.path.isdir(d) else []:
        if n.startswith("card"):
            fd = os.open(f"{d}/{n}", os.O_RDWR | os.O_CLOEXEC)
            if drm_driver(fd) == want:
                return fd
            os.close(fd)
    return None


@offered
def create_dumb(fd, w=64, h=64, bpp=32):
    _r, v = ioctl(fd, DRM_IOCTL_MODE_CREATE_DUMB, "IIIIIIQ", h, w, bpp, 0, 0, 0, 0)
    return v[4], v[6]


@offered
def prime_export(fd, handle, flags=DRM_CLOEXEC | DRM_RDWR):
    return ioctl(fd, DRM_IOCTL_PRIME_HANDLE_TO_FD, "IIi", handle, flags, -1)[1][2]


@offered
def prime_import(fd, dfd, flags=0):
    return ioctl(fd, DRM_IOCTL_PRIME_FD_TO_HANDLE, "IIi", 0, flags, dfd)[1][0]


def gem_close(fd, handle):
    return ioctl(fd, DRM_IOCTL_GEM_CLOSE, "II", handle, 0)[0]


@offered
def vgem_attach(fd, handle, write=False, flags=None, pad=0):
    return ioctl(fd, DRM_IOCTL_VGEM_FENCE_ATTACH, "IIII", handle, flags if flags is not None else int(write), 0, pad)[1][2]


@offered
def vgem_signal(fd, fence, flags=0):
    return ioctl(fd, DRM_IOCTL_VGEM_FENCE_SIGNAL, "II", fence, flags)[0]


@offered
def sync(fd, flags):
    return ioctl(fd, DMA_BUF_IOCTL_SYNC, "Q", flags)[0]


@offered
def set_name(fd, name, req=DMA_BUF_SET_NAME_B):
    b = ctypes.create_string_buffer(name)
    return ioctl_raw(fd, req, ctypes.addressof(b))


@offered
def export_sync_file(fd, flags):
    return ioctl(fd, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, "Ii", flags, -1)[1][1]


@offered
def import_sync_file(fd, flags, sfd):
    return ioctl(fd, DMA_BUF_IOCTL_IMPORT_SYNC_FILE, "Ii", flags, sfd)[0]


def cstr(b):
    return b.split(b"\0")[0].decode(errors="backslashreplace")


@offered
def file_info(fd, n=None, flags=0, pad=0, ptr=None):
    """SYNC_IOC_FILE_INFO; n None: ask the count first, as libsync does"""
    if n is None:
        raw = struct.pack("32siIIIQ", b"", 0, 0, 0, 0, 0)
        buf = ctypes.create_string_buffer(raw, len(raw))
        ioctl_raw(fd, SYNC_IOC_FILE_INFO, buf)
        n = struct.unpack("32siIIIQ", buf.raw)[3]
    arr = ctypes.create_string_buffer(max(n, 1) * 80)
    raw = struct.pack("32siIIIQ", b"", 0, flags, n, pad, (ctypes.addressof(arr) if ptr is None else ptr) if n else 0)
    buf = ctypes.create_string_buffer(raw, len(raw))
    r = ioctl_raw(fd, SYNC_IOC_FILE_INFO, buf)
    name, status, fl, num, pd, _ = struct.unpack("32siIIIQ", buf.raw)
    fences = []
    for i in range(min(num, n)):
        o, d, st, f2, ts = struct.unpack_from("32s32siIQ", arr.raw, i * 80)
        fences.append({"obj_name": cstr(o), "driver_name": cstr(d), "status": st, "flags": f2, "timestamp_ns": ts})
    return {"ret": r, "name": cstr(name), "status": status, "flags": fl, "num_fences": num, "pad": pd, "fences": fences}


@offered
def merge(fd, fd2, name=b"merged", flags=0, pad=0):
    return ioctl(fd, SYNC_IOC_MERGE, "32siiII", name, fd2, -1, flags, pad)[1][2]


SW_SYNC = "/sys/kernel/debug/sync/sw_sync"


@offered
def sw_sync():
    return os.open(SW_SYNC, os.O_RDWR | os.O_CLOEXEC)


@offered
def sw_fence(tl, value, name=b"fence"):
    return ioctl(tl, SW_SYNC_IOC_CREATE_FENCE, "I32si", value, name, -1)[1][2]


@offered
def sw_inc(tl, n=1):
    return ioctl(tl, SW_SYNC_IOC_INC, "I", n)[0]
