"""Makes the table of pixel formats, src/dmabuf/layout/format_table.py and docs/formats.md, from the kernel's headers.

    python -m tools.formats            writes both
    python -m tools.formats --check    1 when one is not up to date

``drm_fourcc.h`` says of each format which code it has, and in its comments which bits of which plane are what. ``videodev2.h`` has the
codes of V4L2. Which names mean the same pixels is in no header: ``NAMES`` below says it. ``tests/unit/test_layout_formats.py`` compares it
with the comments of ``videodev2.h``, and ``test_layout_formats_ffmpeg.py`` with what FFmpeg makes of a picture.

The headers come from ``/usr/include`` (linux-libc-dev and libdrm-dev). What is not there is taken out of Debian's package, into the cache
of ``tools.kernel``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tools.kernel.needs import download
from tools.kernel.place import Trouble, cache
from tools.pages import up_to_date

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "src" / "dmabuf" / "layout" / "format_table.py"
PAGE = ROOT / "docs" / "formats.md"
# Header: where it may be, and Debian's package.
_PLACES: Final = {
    "drm_fourcc.h": (("/usr/include/drm", "/usr/include/libdrm"), "libdrm-dev"),
    "videodev2.h": (("/usr/include/linux",), "linux-libc-dev"),
}
SYSTEMS: Final = ("V4L2", "GStreamer", "FFmpeg", "OpenCV", "ROS")

# DRM, V4L2 (V4L2_PIX_FMT_ left out), GStreamer, FFmpeg, OpenCV, ROS; "-" where there is none. Where a system has several names for the
# same bytes, the first is what the format is called, and the others are accepted. V4L2's names that end in M are for planes in several
# buffers.
NAMES: Final = """
R8                  GREY              GRAY8            gray             GRAY    mono8
R10                 Y10               GRAY10_LE16      gray10le         -       -
R12                 Y12               -                gray12le         -       -
R16                 Y16               GRAY16_LE        gray16le         -       mono16
RG88                -                 -                -                -       -
GR88                -                 -                -                -       -
RG1616              -                 -                -                -       -
GR1616              -                 -                -                -       -
RGB332              RGB332            -                rgb8             -       -
BGR233              -                 -                bgr8             -       -
XRGB4444            XRGB444,RGB444    -                rgb444le         -       -
XBGR4444            XBGR444           -                bgr444le         -       -
RGBX4444            RGBX444           -                -                -       -
BGRX4444            BGRX444           -                -                -       -
ARGB4444            ARGB444           -                -                -       -
ABGR4444            ABGR444           -                -                -       -
RGBA4444            RGBA444           -                -                -       -
BGRA4444            BGRA444           -                -                -       -
XRGB1555            XRGB555,RGB555    RGB15            rgb555le         BGR555  -
XBGR1555            XBGR555           BGR15            bgr555le         -       -
RGBX5551            RGBX555           -                -                -       -
BGRX5551            BGRX555           -                -                -       -
ARGB1555            ARGB555           -                -                -       -
ABGR1555            ABGR555           -                -                -       -
RGBA5551            RGBA555           -                -                -       -
BGRA5551            BGRA555           -                -                -       -
RGB565              RGB565            RGB16            rgb565le         BGR565  -
BGR565              -                 BGR16            bgr565le         -       -
RGB888              BGR24             BGR              bgr24            BGR     bgr8
BGR888              RGB24             RGB              rgb24            RGB     rgb8
XRGB8888            XBGR32,BGR32      BGRx             bgr0             -       -
XBGR8888            RGBX32            RGBx             rgb0             -       -
RGBX8888            BGRX32            xBGR             0bgr             -       -
BGRX8888            XRGB32,RGB32      xRGB             0rgb             -       -
ARGB8888            ABGR32            BGRA             bgra             BGRA    bgra8
ABGR8888            RGBA32            RGBA             rgba             RGBA    rgba8
RGBA8888            BGRA32            ABGR             abgr             -       -
BGRA8888            ARGB32            ARGB             argb             -       -
XRGB2101010         -                 BGR10x2_LE       x2rgb10le        -       -
XBGR2101010         -                 RGB10x2_LE       x2bgr10le        -       -
ARGB2101010         -                 BGR10A2_LE       -                -       -
ABGR2101010         -                 RGB10A2_LE       -                -       -
XRGB16161616        -                 -                -                -       -
XBGR16161616        -                 -                -                -       -
ARGB16161616        -                 BGRA64_LE        bgra64le         -       bgra16
ABGR16161616        -                 RGBA64_LE        rgba64le         -       rgba16
XRGB16161616F       -                 -                -                -       -
XBGR16161616F       -                 -                -                -       -
ARGB16161616F       -                 -                -                -       -
ABGR16161616F       -                 -                rgbaf16le        -       -
AXBXGXRX106106106106 -                -                -                -       -
YUYV                YUYV              YUY2             yuyv422          YUY2,YUYV  yuv422_yuy2,yuyv
YVYU                YVYU              YVYU             yvyu422          YVYU    -
UYVY                UYVY              UYVY             uyvy422          UYVY    yuv422,uyvy
VYUY                VYUY              VYUY             -                -       -
AYUV                VUYA32            VUYA             vuya             -       -
XYUV8888            VUYX32            -                vuyx             -       -
VUY888              YUV24             v308             -                -       -
Y210                -                 Y210             y210le           -       -
Y212                -                 Y212_LE          y212le           -       -
Y216                -                 Y216_LE          y216le           -       -
Y410                -                 Y410             -                -       -
Y412                -                 Y412_LE          -                -       -
Y416                -                 Y416_LE          -                -       -
XVYU2101010         -                 -                xv30le           -       -
XVYU12_16161616     -                 -                xv36le           -       -
XVYU16161616        -                 -                xv48le           -       -
NV12                NV12,NV12M        NV12             nv12             NV12    -
NV21                NV21,NV21M        NV21             nv21             NV21    nv21
NV16                NV16,NV16M        NV16             nv16             -       -
NV61                NV61,NV61M        NV61             -                -       -
NV24                NV24              NV24             nv24             -       nv24
NV42                NV42              -                nv42             -       -
NV15                -                 NV12_10LE40      -                -       -
P010                P010              P010_10LE        p010le           -       -
P012                -                 P012_LE          p012le           -       -
P016                -                 P016_LE          p016le           -       -
P210                -                 -                p210le           -       -
P030                -                 -                -                -       -
Q410                -                 -                yuv444p10msble   -       -
Q401                -                 -                -                -       -
YUV410              YUV410            YUV9             yuv410p          -       -
YVU410              YVU410            YVU9             -                -       -
YUV411              YUV411P           Y41B             yuv411p,yuvj411p -       -
YVU411              -                 -                -                -       -
YUV420              YUV420,YUV420M    I420             yuv420p,yuvj420p I420    -
YVU420              YVU420,YVU420M    YV12             -                YV12    -
YUV422              YUV422P,YUV422M   Y42B             yuv422p,yuvj422p -       -
YVU422              YVU422M           -                -                -       -
YUV444              YUV444M           Y444             yuv444p,yuvj444p -       -
YVU444              YVU444M           -                -                -       -
"""

_CODE: Final = r"\(\s*'(.)',\s*'(.)',\s*'(.)',\s*'(.)'\s*\)"
_DEFINE: Final = re.compile(
    rf"^#define\s+(?:DRM_FORMAT|V4L2_PIX_FMT)_(\w+)\s+(?:v4l2_)?fourcc(?:_code)?{_CODE}[ \t]*(?:/\*(.*?)\*/)?", re.M
)
_INDEX: Final = re.compile(r"index (\d)\s*[:=]\s*[\w:]+ plane, \[(\d+):0\] ([\w:]+)(?: \[([\d:]+)\])?(?: ([\d:]+))?")


_TABLE_HEAD: Final = '''\
"""The pixel formats, made by ``python -m tools.formats`` from ``drm_fourcc.h`` and ``videodev2.h``: do not edit.

A row: name, code, planes, and the names of V4L2, GStreamer, FFmpeg, OpenCV and ROS. A plane: pixels across and down for one sample, samples
and bytes of a block, type and count of the numbers in an array, and each component with its lowest bit and its bits.
"""

'''

_PAGE_HEAD: Final = """\
# Pixel formats

The formats that `dmabuf.PixelFormat` knows, by the names of DRM, and what others call the same bytes. `PixelFormat.of("NV12")` and
`from_v4l2`, `from_gstreamer`, `from_ffmpeg`, `from_opencv`, `from_ros` find a format, and the properties of these names tell what it is
called there. Where the table has “–” they raise LookupError. [layouts.md](layouts.md) says how to use them.

DRM names the parts of a pixel from its highest bit down, and most others in the order of memory. V4L2's names are shown with their four
characters; names in parentheses are accepted too.
"""

_PAGE_END: Final = """\
*In an array*: for each plane, the type of the numbers, how many there are for each pixel if there are several, and “÷ 2×2” if a sample
stands for two columns and two rows. A type with “/ 4 px” packs so many samples together, which an array doesn't take apart.

`python -m tools.formats` makes this page from the kernel's headers.
"""


class Define(NamedTuple):
    """One format of a header."""

    name: str
    code: str
    comment: str
    block: str  # the comment before it and its neighbours


def defines(text: str) -> dict[str, Define]:
    """Return the formats that a header defines, by name."""
    found = {}
    for match in _DEFINE.finditer(text):
        before = text[: match.start()]
        block = before[before.rfind("\n/*") :]
        name, *code, comment = match.groups()
        found[name] = Define(name, "".join(code), " ".join((comment or "").split()), block)
    return found


class Part(NamedTuple):
    """A component; ``x`` and ``0`` are padding."""

    name: str
    shift: int
    bits: int

    @property
    def pads(self) -> bool:
        return self.name in ("x", "X", "0")


def components(names: str, widths: str, total: int) -> list[Part]:
    """Return the parts of a block, from what a comment lists from the highest bit down. Raises ValueError if they don't fill it."""
    parts = names.split(":")
    bits = [int(width) for width in widths.split(":")] if widths else [total // len(parts)] * len(parts)
    if len(bits) != len(parts) or sum(bits) != total:
        raise ValueError(f"{names} {widths} doesn't fill {total} bits")
    found, shift = [], total
    for name, width in zip(parts, bits, strict=True):
        shift -= width
        found.append(Part(name, shift, width))
    return list(reversed(found))


def plane(parts: list[Part], across: int, down: int, is_float: bool) -> str:
    """Return a plane as a row of the table has it: what stands for each pixel in an array follows from where its parts are."""
    total = max(part.shift + part.bits for part in parts)
    used = [part for part in parts if not part.pads]
    names = [re.sub(r"\d$", "", part.name) for part in used]
    block = max(names.count(name) for name in names)

    def in_cells(cell: int, alone: bool) -> bool:
        cells = [part.shift // cell for part in used]
        inside = all(part.shift // cell == (part.shift + part.bits - 1) // cell for part in used)
        return total % cell == 0 and inside and not (alone and len(set(cells)) < len(cells))

    if all(part.bits == 8 for part in parts) and in_cells(8, True):
        cell = 8
    elif in_cells(16, True) and total > 8:
        cell = 16
    elif total in (8, 16, 32):
        cell = total
    else:
        cell = 32 if in_cells(32, False) else 8
    channels = total // cell
    if channels % block == 0:
        channels //= block
    dtype = {8: "u1", 16: "f2" if is_float else "u2", 32: "u4"}[cell]
    listed = ",".join(f"{'A' if part.name == 'a' else part.name}:{part.shift}:{part.bits}" for part in used)
    return f"{across} {down} {block} {total // 8} {dtype} {channels} {listed}"


def planes(define: Define) -> str:
    """Return the planes of a format, as a row of the table has them."""
    packed = re.match(r"\[(\d+):0\] ([\w:]+)(?: ([\d:]+))?", define.comment)
    if packed:
        parts = components(packed[2], packed[3] or "", int(packed[1]) + 1)
        return plane(parts, 1, 1, define.name.endswith("F"))
    across, down = 1, 1
    if ratio := re.match(r"(\d)x(\d) subsampled", define.comment):
        across, down = int(ratio[1]), int(ratio[2])
    swapped = "Cb:Cr plane" in define.comment or "Cr (1)" in define.comment
    made: dict[int, str] = {}
    for index, last, names, in_brackets, bare in _INDEX.findall(define.block):
        chroma = int(index) > 0
        first = names.startswith("Cb" if len(names) > 2 and ":" in names else "Cr")
        if int(index) in made and not (swapped and first):
            continue  # the second of two orders, which this format doesn't have
        parts = components(names, in_brackets or bare, int(last) + 1)
        made[int(index)] = plane(parts, across if chroma else 1, down if chroma else 1, False)
    if swapped and len(made) == 3:
        made[2] = made[1].replace("Cr", "Cb")
    if not made or set(made) != set(range(len(made))):
        raise ValueError(f"{define.name}: no planes in: {define.block}")
    return ";".join(made[index] for index in range(len(made)))


def rows(drm: str, v4l2: str) -> Iterator[tuple[str, ...]]:
    """Yield (name, code, planes, names of each system) of each format, in the order of ``NAMES``, from the texts of the headers."""
    formats, cameras = defines(drm), defines(v4l2)
    for line in NAMES.strip().splitlines():
        name, *names = line.split()
        define = formats[name]
        given = ["" if part == "-" else part for part in names]
        codes = [cameras[camera].code for camera in given[0].split(",") if camera]
        given[0] = ",".join([*codes, *(f"V4L2_PIX_FMT_{camera}" for camera in given[0].split(",") if camera)])
        yield name, define.code, planes(define), *given


def table(found: list[tuple[str, ...]]) -> str:
    """Return the text of the module."""
    lines = [
        *_TABLE_HEAD.splitlines(),
        "# fmt: off",
        "# ruff: noqa: E501",
        "ROWS = (",
        *(f"    {'|'.join(row)!r},".replace("'", '"') for row in found),
        ")",
        "",
    ]
    return "\n".join(lines)


_NUMBER: Final = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "f2": "float16"}


def page(found: list[tuple[str, ...]]) -> str:
    """Return the text of docs/formats.md."""
    lines = [
        *_PAGE_HEAD.splitlines(),
        "",
        f"| DRM | {' | '.join(SYSTEMS)} | in an array |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, code, shapes, v4l2, *others in found:
        cameras = v4l2.split(",") if v4l2 else []
        count = len(cameras) // 2
        shown = [f"{full.removeprefix('V4L2_PIX_FMT_')} `{short}`" for short, full in zip(cameras[:count], cameras[count:], strict=True)]
        cells = [_listed(shown), *(_listed([f"`{one}`" for one in part.split(",") if one]) for part in others)]
        lines.append(f"| {name} `{code}` | {' | '.join(cells)} | {'; '.join(map(_array, shapes.split(';')))} |")
    lines += ["", *_PAGE_END.splitlines(), ""]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return (names[0] + (f" ({', '.join(names[1:])})" if names[1:] else "")) if names else "–"


def _array(shape: str) -> str:
    across, down, block, size, dtype, channels, _ = shape.split(" ")
    cell = int(dtype[-1]) * int(channels) * int(block) // int(size)
    text = _NUMBER[dtype] + (f" × {channels}" if channels != "1" else "")
    text += f" / {cell} px" if cell > 1 else ""
    return text + (f" ÷ {across}×{down}" if (across, down) != ("1", "1") else "")


def header(name: str, fetch: bool = True) -> Path | None:
    """Return where a header is. Takes it from Debian's package if it is nowhere and ``fetch`` allows it; else None."""
    directories, package = _PLACES[name]
    into = cache() / "headers"
    unpacked = sorted(into.rglob(name)) if into.is_dir() else []
    for path in [*(Path(directory) / name for directory in directories), *unpacked]:
        if path.is_file():
            return path
    if not fetch:
        return None
    subprocess.run(["dpkg-deb", "-x", download(package, into), into / package], check=True)
    found = sorted((into / package).rglob(name))
    if not found:
        raise Trouble(f"{package} has no {name}")
    return found[0]


def made(fetch: bool = True) -> tuple[str, str] | None:
    """Return the texts of the table and of the page; None if a header is missing and must not be fetched."""
    paths = [header(name, fetch) for name in _PLACES]
    if None in paths:
        return None
    drm, v4l2 = (path.read_text(encoding="utf-8") for path in paths if path is not None)
    found = list(rows(drm, v4l2))
    return table(found), page(found)


def main(arguments: list[str]) -> int:
    """Write both, or check them."""
    try:
        texts = made()
    except Trouble as trouble:
        print(f"formats: {trouble}", file=sys.stderr)
        return 1
    assert texts is not None
    return int(not all([up_to_date(TABLE, texts[0], arguments), up_to_date(PAGE, texts[1], arguments)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
