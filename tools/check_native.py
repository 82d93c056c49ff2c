"""Checks the C of native/: its includes have no circle, its files are short, and so are its lines.

    python tools/check_native.py [DIRECTORY]

An arrow goes from a file to each header of the project that it includes, and a ``.c`` file counts as one with the header of its name: what
includes ``domain/table.h`` needs ``domain/table.c``. Lines that include are ``#include "folder/name.h"``, from the directory on.
"""

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LINES = 500
COLUMNS = 140

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def check(directory: Path) -> list[str]:
    """Return what is wrong, each with its place."""
    faults = []
    arrows: dict[str, set[str]] = {}
    for path in sorted([*directory.rglob("*.c"), *directory.rglob("*.h")]):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if len(lines) > LINES:
            faults.append(f"{path}: {len(lines)} lines, at most {LINES}: cut it where it holds two things")
        faults += [f"{path}:{n}: {len(line)} columns, at most {COLUMNS}" for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
        part = path.relative_to(directory).with_suffix("").as_posix()
        for name in _INCLUDE.findall(text):
            if not (directory / name).is_file():
                faults.append(f"{path}: includes {name}, which is not in {directory}")
        arrows.setdefault(part, set()).update(name.removesuffix(".h") for name in _INCLUDE.findall(text) if name.removesuffix(".h") != part)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as e:
        faults.append(f"{directory}: a circle of includes: {' → '.join(reversed(e.args[1]))}")
    return faults


def main(arguments: list[str]) -> int:
    """Check the directory, and say what is wrong."""
    directory = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1] / "native"
    faults = check(directory)
    print("\n".join(faults) or f"native: {sum(1 for _ in directory.rglob('*.[ch]'))} files, no circle")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
