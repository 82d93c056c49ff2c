"""Numbers and structures of the ioctls: against the specification's values, and against this system's headers."""

import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dmabuf.uapi import layout, structures, table
from dmabuf.uapi.layout import Ioctl, Layout
from tests.support.errnos import raises_errno

# Semantics 5.1, "Number table"; V4L2 from the Linux UAPI documentation of each ioctl.
VALUES = {
    "DMA_BUF_IOCTL_SYNC": 0x40086200,
    "DMA_BUF_SET_NAME": 0x40086201,
    "DMA_BUF_SET_NAME_A": 0x40046201,
    "DMA_BUF_SET_NAME_B": 0x40086201,
    "DMA_BUF_IOCTL_EXPORT_SYNC_FILE": 0xC0086202,
    "DMA_BUF_IOCTL_IMPORT_SYNC_FILE": 0x40086203,
    "SYNC_IOC_MERGE": 0xC0303E03,
    "SYNC_IOC_FILE_INFO": 0xC0383E04,
    "SYNC_IOC_SET_DEADLINE": 0x40103E05,
    "DMA_HEAP_IOCTL_ALLOC": 0xC0184800,
    "UDMABUF_CREATE": 0x40187542,
    "UDMABUF_CREATE_LIST": 0x40087543,
    "SW_SYNC_IOC_CREATE_FENCE": 0xC0285700,
    "SW_SYNC_IOC_INC": 0x40045701,
    "SW_SYNC_GET_DEADLINE": 0xC0105702,
    "DRM_IOCTL_VGEM_FENCE_ATTACH": 0xC0106441,
    "DRM_IOCTL_VGEM_FENCE_SIGNAL": 0x40086442,
    "DRM_IOCTL_PRIME_HANDLE_TO_FD": 0xC00C642D,
    "DRM_IOCTL_PRIME_FD_TO_HANDLE": 0xC00C642E,
    "DRM_IOCTL_GEM_CLOSE": 0x40086409,
    "DRM_IOCTL_MODE_CREATE_DUMB": 0xC02064B2,
    "DRM_IOCTL_MODE_MAP_DUMB": 0xC01064B3,
    "DRM_IOCTL_MODE_DESTROY_DUMB": 0xC00464B4,
    "DRM_IOCTL_SYNCOBJ_CREATE": 0xC00864BF,
    "DRM_IOCTL_SYNCOBJ_DESTROY": 0xC00864C0,
    "DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD": 0xC01064C1,
    "DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE": 0xC01064C2,
    "DRM_IOCTL_SYNCOBJ_WAIT": 0xC02864C3,
    "DRM_IOCTL_SYNCOBJ_WAIT (before v6.8)": 0xC02064C3,
    "DRM_IOCTL_SYNCOBJ_RESET": 0xC01064C4,
    "DRM_IOCTL_SYNCOBJ_SIGNAL": 0xC01064C5,
    "DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT": 0xC03064CA,
    "DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT (before v6.8)": 0xC02864CA,
    "DRM_IOCTL_SYNCOBJ_QUERY": 0xC01864CB,
    "DRM_IOCTL_SYNCOBJ_TRANSFER": 0xC02064CC,
    "DRM_IOCTL_SYNCOBJ_TIMELINE_SIGNAL": 0xC01864CD,
    "DRM_IOCTL_SYNCOBJ_EVENTFD": 0xC01864CF,
    "DRM_IOCTL_VERSION": 0xC0406400,
    "DRM_IOCTL_GET_CAP": 0xC010640C,
    "VIDIOC_QUERYCAP": 0x80685600,
    "VIDIOC_G_FMT": 0xC0D05604,
    "VIDIOC_S_FMT": 0xC0D05605,
    "VIDIOC_REQBUFS": 0xC0145608,
    "VIDIOC_QUERYBUF": 0xC0585609,
    "VIDIOC_QBUF": 0xC058560F,
    "VIDIOC_EXPBUF": 0xC0405610,
    "VIDIOC_DQBUF": 0xC0585611,
    "VIDIOC_STREAMON": 0x40045612,
    "VIDIOC_STREAMOFF": 0x40045613,
}

# (structure of ours, header, C type, the C member behind each field of ours)
STRUCTURES: list[tuple[Layout[Any], str, str, tuple[str, ...]]] = [
    (table.DMA_BUF_SYNC.layout, "linux/dma-buf.h", "struct dma_buf_sync", ("flags",)),
    (table.DMA_BUF_EXPORT_SYNC_FILE.layout, "linux/dma-buf.h", "struct dma_buf_export_sync_file", ("flags", "fd")),
    (table.DMA_BUF_IMPORT_SYNC_FILE.layout, "linux/dma-buf.h", "struct dma_buf_import_sync_file", ("flags", "fd")),
    (table.SYNC_MERGE.layout, "linux/sync_file.h", "struct sync_merge_data", ("name", "fd2", "fence", "flags", "pad")),
    (
        table.SYNC_FILE_INFO.layout,
        "linux/sync_file.h",
        "struct sync_file_info",
        ("name", "status", "flags", "num_fences", "pad", "sync_fence_info"),
    ),
    (table.FENCE_INFO, "linux/sync_file.h", "struct sync_fence_info", ("obj_name", "driver_name", "status", "flags", "timestamp_ns")),
    (table.DMA_HEAP_ALLOC.layout, "linux/dma-heap.h", "struct dma_heap_allocation_data", ("len", "fd", "fd_flags", "heap_flags")),
    (table.UDMABUF_CREATE.layout, "linux/udmabuf.h", "struct udmabuf_create", ("memfd", "flags", "offset", "size")),
    (table.UDMABUF_CREATE_LIST.layout, "linux/udmabuf.h", "struct udmabuf_create_list", ("flags", "count")),
    (table.UDMABUF_ITEM, "linux/udmabuf.h", "struct udmabuf_create_item", ("memfd", "__pad", "offset", "size")),
    (
        table.VIDIOC_QUERYCAP.layout,
        "linux/videodev2.h",
        "struct v4l2_capability",
        ("driver", "card", "bus_info", "version", "capabilities", "device_caps"),
    ),
    (
        table.VIDIOC_S_FMT.layout,
        "linux/videodev2.h",
        "struct v4l2_format",
        (
            "type",
            *(f"fmt.pix.{name}" for name in "width height pixelformat field bytesperline sizeimage colorspace priv flags".split()),
            *(f"fmt.pix.{name}" for name in "ycbcr_enc quantization xfer_func".split()),
        ),
    ),
    (table.VIDIOC_REQBUFS.layout, "linux/videodev2.h", "struct v4l2_requestbuffers", ("count", "type", "memory", "capabilities", "flags")),
    (
        table.VIDIOC_QBUF.layout,
        "linux/videodev2.h",
        "struct v4l2_buffer",
        (
            *"index type bytesused flags field timestamp.tv_sec timestamp.tv_usec timecode sequence memory m length".split(),
            "reserved2",
            "request_fd",
        ),
    ),
    (table.VIDIOC_EXPBUF.layout, "linux/videodev2.h", "struct v4l2_exportbuffer", ("type", "index", "plane", "flags", "fd")),
]
IN_HEADERS = {
    "linux/dma-buf.h": ("DMA_BUF_IOCTL_SYNC", "DMA_BUF_SET_NAME_A", "DMA_BUF_SET_NAME_B", "DMA_BUF_SET_NAME"),
    "linux/sync_file.h": ("SYNC_IOC_MERGE", "SYNC_IOC_FILE_INFO"),
    "linux/dma-heap.h": ("DMA_HEAP_IOCTL_ALLOC",),
    "linux/udmabuf.h": ("UDMABUF_CREATE", "UDMABUF_CREATE_LIST"),
    "linux/videodev2.h": tuple(name for name in VALUES if name.startswith("VIDIOC_")),
    "drm/drm.h": tuple(name for name in VALUES if name.startswith("DRM_IOCTL_") and "VGEM" not in name and "(" not in name),
    "drm/vgem_drm.h": ("DRM_IOCTL_VGEM_FENCE_ATTACH", "DRM_IOCTL_VGEM_FENCE_SIGNAL"),
}
# Newer than some headers: asked only where they are there.
NEWER = {
    "linux/dma-buf.h": ("DMA_BUF_IOCTL_EXPORT_SYNC_FILE", "DMA_BUF_IOCTL_IMPORT_SYNC_FILE"),
    "linux/sync_file.h": ("SYNC_IOC_SET_DEADLINE",),
}
BY_NAME = {ioctl.name: ioctl for ioctl in table.ALL}


def header(name: str) -> Path:
    found = [Path("/usr/include") / place / name for place in ("", "libdrm") if (Path("/usr/include") / place / name).exists()]
    if not found or shutil.which("cc") is None:
        pytest.skip(f"no <{name}>, or no C compiler, on this system")
    return found[0]


def compiled(tmp_path: Path, include: str, lines: list[str]) -> list[str]:
    """What a C program prints."""
    source = tmp_path / "ask.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <sys/time.h>\n#include <sys/ioctl.h>\n#include <linux/types.h>\n"
        f'#include "{header(include)}"\nint main(void) {{\n{body}\nreturn 0; }}\n'
    )
    program = tmp_path / "ask"
    subprocess.run(["cc", "-w", "-I/usr/include/libdrm", "-o", str(program), str(source)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()


def test_each_number_of_the_table_is_the_one_of_the_specification() -> None:
    assert {ioctl.name: hex(ioctl.number) for ioctl in table.ALL} == {name: hex(value) for name, value in VALUES.items()}


def test_a_number_and_its_parts_are_the_same() -> None:
    for ioctl in table.ALL:
        assert layout.number(*layout.parts(ioctl.number)) == ioctl.number


@pytest.mark.parametrize("given", [(4, "b", 0, 8), (1, "b", 256, 8), (1, "b", 0, 1 << 14), (1, "bb", 0, 8), (1, "b", -1, 8)])
def test_a_number_that_no_ioctl_can_have_is_refused(given: tuple[int, str, int, int]) -> None:
    with pytest.raises(ValueError, match="no ioctl has"):
        layout.number(*given)


@pytest.mark.parametrize("include", sorted(IN_HEADERS))
def test_numbers_are_those_of_the_systems_headers(tmp_path: Path, include: str) -> None:
    lines = [f'printf("%s %#lx\\n", "{name}", (unsigned long){name});' for name in IN_HEADERS[include]]
    lines += [f'\n#ifdef {name}\nprintf("%s %#lx\\n", "{name}", (unsigned long){name});\n#endif' for name in NEWER.get(include, ())]
    said = compiled(tmp_path, include, lines)
    for name, value in zip(said[::2], said[1::2], strict=True):
        # From v6.16 on the syncobj's handle has a point; the kernel goes on taking the size without.
        if not name.startswith("DRM_IOCTL_SYNCOBJ_"):
            assert value == hex(BY_NAME[name].number), name


@pytest.mark.parametrize(("ours", "include", "theirs", "members"), STRUCTURES, ids=[row[2] for row in STRUCTURES])
def test_structures_have_the_layout_of_the_systems_headers(
    tmp_path: Path, ours: Layout[Any], include: str, theirs: str, members: tuple[str, ...]
) -> None:
    if not header(include).read_text().count(theirs):
        pytest.skip(f"the system's <{include}> is too old for {theirs}")
    asked = [f'printf("%zu\\n", offsetof({theirs}, {member}));' for member in members]
    said = [int(word) for word in compiled(tmp_path, include, [*asked, f'printf("%zu\\n", sizeof({theirs}));'])]
    assert ours.size == said[-1]
    assert len(members) == len(ours.fields)
    # Where each of our fields lies: the first byte that changes when it alone does.
    zero = ours.kind(*(b"" if isinstance(value, bytes) else 0 for value in ours.unpack(bytes(ours.size))))
    blank = ours.pack(zero)
    for field, offset in zip(ours.fields, said, strict=False):
        value = b"\xff" if isinstance(getattr(zero, field), bytes) else 1
        packed = ours.pack(zero._replace(**{field: value}))
        assert next(i for i in range(ours.size) if packed[i] != blank[i]) == offset, field


@pytest.mark.parametrize("ioctl", table.ALL, ids=lambda ioctl: ioctl.name)
def test_what_a_client_packs_a_server_unpacks(ioctl: Ioctl[Any]) -> None:
    values: list[Any] = []
    for at, value in enumerate(ioctl.layout.unpack(bytes(ioctl.layout.size))):
        values.append(bytes([at + 1]) * len(value) if isinstance(value, bytes) else at + 1)
    given = ioctl.layout.kind(*values)
    assert ioctl.layout.unpack(ioctl.layout.pack(given)) == given
    assert ioctl.number >> 16 & 0x3FFF == ioctl.layout.size or ioctl.name == "DMA_BUF_SET_NAME_A"
    assert table.BY_NUMBER[ioctl.number].number == ioctl.number


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_field_that_does_not_fit_is_einval(value: int) -> None:
    with raises_errno(errno.EINVAL) as caught:
        table.DMA_BUF_SYNC.layout.pack(structures.Sync(value))
    assert "Sync" in str(caught.value)


def test_bytes_too_few_for_a_structure_are_einval() -> None:
    with raises_errno(errno.EINVAL):
        table.DMA_BUF_SYNC.layout.unpack(b"1234567")
