"""The output of the commands: escaped text, and a grid for terminals and pipes.

On a terminal (or with COLUMNS set) lines are wrapped and long names are cut. In a pipe each row is one whole line. Text of other processes
may be any bytes: :func:`safe` makes it printable, and none of it is read as markup.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

_NOTE = "    "  # before a note
_GAP = Text("  ")
GLUE = "\ue000"  # a space at which no line is broken; it isn't printable, so no safe() text contains it


def safe(text: str) -> str:
    """Return text that a terminal shows as it is, with control characters, undecodable bytes and the like as backslash escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(c: str) -> str:
    code = ord(c)
    if c in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[c]
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def console() -> Console:
    """Return the console for people's output."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def width_of(out: Console) -> int | None:
    """Return the number of columns, None for a pipe."""
    return out.width if out.is_terminal or os.environ.get("COLUMNS", "").isdigit() else None


class Grid:
    """Rows in columns, of which the last one wraps, with notes below a row.

    ``heads``: the column titles, which are not printed if all are empty. ``right``: the columns to align right. ``cut``: the columns that
    may be cut to a quarter of a terminal's width.
    """

    def __init__(self, *heads: str, right: Sequence[int] = (), cut: Sequence[int] = ()) -> None:
        self.heads = [Text(head, "bold") for head in heads]
        self.right, self.cut = right, cut
        self.rows: list[tuple[list[Text], list[Text]]] = []

    def row(self, *cells: Text | str, notes: Sequence[Text] = ()) -> None:
        """Add one row. Its text is shown as it is, so text of other processes must be :func:`safe`."""
        self.rows.append(([cell if isinstance(cell, Text) else Text(cell) for cell in cells], list(notes)))

    def print(self, out: Console) -> None:
        """Print the rows."""
        limit = width_of(out)
        if limit is not None:
            for cells, _ in self.rows:
                for i in self.cut:
                    cells[i].truncate(max(12, limit // 4), overflow="ellipsis")
        titled = any(head.plain for head in self.heads)
        lines = [self.heads] if titled else []
        lines += [cells for cells, _ in self.rows]
        widths = [max(cells[i].cell_len for cells in lines) if lines else 0 for i in range(len(self.heads) - 1)]
        if titled:
            self._line(out, self.heads, widths, limit)
        for cells, notes in self.rows:
            self._line(out, cells, widths, limit)
            for note in notes:
                _hang(out, [Text(_NOTE)], note, limit)

    def _line(self, out: Console, cells: list[Text], widths: list[int], limit: int | None) -> None:
        left = []
        for i, width in enumerate(widths):
            gap = Text(" " * (width - cells[i].cell_len))
            left += [gap, cells[i], _GAP] if i in self.right else [cells[i], gap, _GAP]
        _hang(out, left, cells[-1], limit)


def _hang(out: Console, left: list[Text], text: Text, limit: int | None) -> None:
    """Print `text` behind `left`, and its further lines below it at the same indent."""
    if limit is None:
        _put(out, [*left, text])
        return
    indent = sum(part.cell_len for part in left)
    if limit - indent < 16 and text.plain:  # too narrow for columns: below, a little indented
        _put(out, left)
        left, indent = [Text(_NOTE)], len(_NOTE)
    room = max(16, limit - indent)
    if text.cell_len <= room:
        _put(out, [*left, text])
        return
    if max(map(len, text.plain.split())) > room:
        text = _unglued(text)
    for line in text.wrap(out, room):
        _put(out, [*left, line])
        left = [Text(" " * indent)]


def _put(out: Console, parts: list[Text]) -> None:
    if out.color_system is None:  # without styles this is fast, and tens of thousands of lines don't take minutes
        out.file.write("".join(part.plain for part in parts).replace(GLUE, " ").rstrip() + "\n")
        return
    line = Text.assemble(*map(_unglued, parts))
    line.rstrip()
    out.print(line)


def _unglued(text: Text) -> Text:
    if GLUE not in text.plain:
        return text
    text = text.copy()
    text.plain = text.plain.replace(GLUE, " ")
    return text
