"""Make docs/features.md: which feature of the kernel is tested, and where.

    python -m tools.features            writes docs/features.md
    python -m tools.features --check    1 when it is not up to date

A row F is one commit to the kernel's dma-buf.h that changed what a user sees; a row S is a feature that the header's history doesn't show
and that a complete system needs. The name of a row's test begins with the row, ``test_F11_…`` (or rows, ``test_F33_F34_…``), in any file.
A row without a test has its reason in a ``NOT_YET`` of tests/conformance.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tools.citations import sections
from tools.pages import up_to_date

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "features.md"

# Row, commit of the kernel (abbreviated as git does), what it brought.
COMMITS = """
F01 d15bd7ee export, get, put, attach, detach, map, unmap
F02 5375764f immutable ops
F03 33ea2dcb unmap gets the direction
F04 55c1c4ca flags of the descriptor
F05 f9a24d1a extra references
F06 6b607e3a no lock of the framework around map
F07 fc13020e CPU access hooks
F08 4c78513e mmap, and its redirection
F09 98f86c9e vmap
F10 ada65c74 no silent stubs
F11 f00b4dad vmaps are counted
F12 78df9695 the exporter's name
F13 b89e3563 the listing of buffers
F14 c0b00a52 devices in the listing
F15 3aac4502 reservation objects
F16 9b495a58 poll
F17 d8fbe341 extensible arguments of export
F18 9abdffe2 the owner module is held
F19 831e9da7 begin and end take no range
F20 18b862dc SYNC returns errors of begin and end
F21 bd3e2208 no helper for debug files
F22 f54d1867 fences are called dma_fence
F23 0959a168 mmap needs no coherence
F24 f9b67f00 kmap renamed
F25 01e5d556 events are a mask
F26 09ea0dfb page hooks are optional
F27 a19741e5 attach finds the device in the attachment
F28 f664a526 no atomic page mapping
F29 f13e143e one cached table per attachment
F30 bb2bb903 users name buffers
F31 52791eee reservation objects are called dma_resv
F32 15fd552d static and dynamic exporters and importers
F33 7f0de8d8 no page mapping calls
F34 4337ebbb no page mapping ops
F35 bb42df46 pin, unpin, move_notify
F36 bd2275ee pin makes an exporter dynamic
F37 09606b54 peer to peer
F38 6348dd29 the name has its own lock
F39 01fd30da mappings that know I/O memory
F40 6619ccf1 vmap fills a cleared map
F41 20e76f1a vunmap takes the map
F42 ac80cd17 whole pages
F43 476b485b the size never changes
F44 de9114ec brackets around vmap access
F45 c545781e only dynamic importers pin
F46 84335675 debug mode hides pages
F47 bdb8d06d a statistics tree
F48 89bcadc8 static exporters return ready memory, dynamic importers wait
F49 05459351 the contract of implicit sync
F50 c715def5 no statistics per attachment
F51 d9edf92d no order between fences
F52 6b51b02a poll, reworked
F53 5460601d pinning in place
F54 7938f421 iosys_map
F55 15325e3c a write fence drops no read fences
F56 7bc80a54 queries by usage
F57 73511edf adding by usage
F58 56e5abba unlocked vmap
F59 19d6634d unlocked map
F60 28743e25 one lock, asserted
F61 3d1ff9df names are never NULL
"""


# Row, section of the semantics, what it is.
SUPPLEMENT = """
S01 5.2 an inode of its own; lseek returns the size
S02 5.3 DMA_BUF_IOCTL_SYNC
S03 5.4 both numbers of SET_NAME; renaming while attached
S04 5.5 EXPORT_SYNC_FILE and IMPORT_SYNC_FILE
S05 4.1 KERNEL and BOOKKEEP fences
S06 5.7 fdinfo
S07 3 dma_fence
S08 3.15–3.17 fence array, chain, unwrap, merge
S09 4 dma_resv
S10 4.10 ww_mutex, wait-die
S11 5.10 sync_file
S12 5.11 sw_sync
S13 3.12 deadlines
S14 5.8 dma-heap and the system heap
S15 5.9 udmabuf
S16 5.12 vgem and PRIME
S17 3.11 signaling sections
S18 2.15 begin_cpu_access waits for implicit fences
S19 2.11 a static importer waits for KERNEL fences at map
S20 6.6 trace events
"""


class Row(NamedTuple):
    """One feature. ``source``: commit or section; ``tests``: the name of each, and whether it asks a real kernel; ``reason``: for none."""

    name: str
    source: str
    title: str
    tests: tuple[tuple[str, bool], ...]
    reason: str


def rows(tests: Path = TESTS) -> list[Row]:
    """Every row, with what the tests say of it."""
    found: dict[str, list[tuple[str, bool]]] = {}
    reasons: dict[str, str] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (match := re.match(r"test((?:_[FS]\d\d)+)_", node.name)):
                for name in match[1].strip("_").split("_"):
                    found.setdefault(name, []).append((node.name, path.parent.name == "kernel"))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NOT_YET":
                reasons |= ast.literal_eval(node.value)
    made = []
    for line in (COMMITS + SUPPLEMENT).split("\n"):
        if line:
            name, source, title = line.split(maxsplit=2)
            here = tuple(found.get(name, ()))
            made.append(Row(name, source, title, here, "" if here else reasons.get(name, "")))
    return made


def page(found: list[Row]) -> str:
    """The text of docs/features.md."""
    history = [row for row in found if row.name.startswith("F")]
    others = [row for row in found if not row.name.startswith("F")]
    return "\n".join(
        [
            "# Features, by the kernel's history",
            "",
            "Each row is a commit to the kernel's `include/linux/dma-buf.h` that changed what a user of the framework sees, with the test",
            f"of it (`make test ARGS='tests -k test_F11'` runs one). {_built(history)} of {len(history)} are built.",
            "[Section 8 of the semantics](semantics/8-history.md) says what each commit requires.",
            "",
            *_table(history, "commit", "what it brought"),
            "",
            "## Features that the header's history does not show",
            "",
            f"A complete system needs more. Sections are those of the [semantics](semantics/index.md). {_built(others)} of {len(others)}",
            "are built. Tests with “(kernel)” ask a real kernel, with `make test-kernel`.",
            "",
            *_table(others, "section", "what it is"),
            "",
            "`python -m tools.features` makes this page from the names of the tests.",
            "",
        ]
    )


def _built(found: list[Row]) -> int:
    return sum(bool(row.tests) for row in found)


def _link(number: str) -> str:
    return f"[{number}]({sections()[0][number].removeprefix('docs/')})"


def _table(found: list[Row], source: str, title: str) -> list[str]:
    lines = [f"| row | {source} | {title} | test | state |", "|---|---|---|---|---|"]
    for row in found:
        tests = "<br>".join(f"`{test}`{' (kernel)' if kernel else ''}" for test, kernel in row.tests) or "–"
        found_at = ", ".join(_link(number) for number in row.source.split("–")) if row.name.startswith("S") else row.source
        lines.append(f"| {row.name} | {found_at} | {row.title} | {tests} | {'built' if row.tests else row.reason} |")
    return lines


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    return int(not up_to_date(PAGE, page(rows()), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
