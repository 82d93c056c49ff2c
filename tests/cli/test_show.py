"""Text for people: escaping, and the grid."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from dmabuf.cli.show import GLUE, Grid, safe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("frame", "frame"),
        ("é – 画", "é – 画"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\udcff\udc80", "\\xff\\x80"),
        ("\u202eabc", "\\u202eabc"),
        ("\U000e0001", "\\U000e0001"),
        (GLUE, "\\ue000"),
        ("[red]", "[red]"),
    ],
    ids=["plain", "UTF-8", "white space", "escape", "control", "no UTF-8", "right to left", "tag", "private use", "markup"],
)
def test_text_of_others_is_made_printable(text: str, shown: str) -> None:
    assert safe(text) == shown
    assert safe(text).isprintable()


def printed(grid: Grid, monkeypatch: pytest.MonkeyPatch, columns: int | None) -> list[str]:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    file = io.StringIO()
    grid.print(Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True))
    return file.getvalue().splitlines()


def sample() -> Grid:
    grid = Grid("N", "NAME", "TEXT", right=(0,), cut=(1,))
    grid.row("1", "a name that is rather long", "one two three " * 5, notes=[Text("a note")])
    grid.row("22", "b", "[bold]short[/] :smile:")
    return grid


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(sample(), monkeypatch, None) == [
        " N  NAME                        TEXT",
        " 1  a name that is rather long  " + ("one two three " * 5).rstrip(),
        "    a note",
        "22  b                           [bold]short[/] :smile:",
    ]


@pytest.mark.parametrize("columns", [20, 40, 80, 140])
def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    lines = printed(sample(), monkeypatch, columns)
    assert max(map(len, lines)) <= max(columns, 22)
    assert not any(line != line.rstrip() for line in lines)


def test_a_long_name_is_cut_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("a name that…" in line for line in printed(sample(), monkeypatch, 48))


def test_what_wraps_goes_on_below_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid("A", "B")
    grid.row("x", f"aaaa{GLUE}bbbb{GLUE}cccc, dddd{GLUE}eeee")
    assert printed(grid, monkeypatch, 20) == ["A  B", "x  aaaa bbbb cccc,", "   dddd eeee"]


def test_without_heads_no_title_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid("", "")
    grid.row("key", "value")
    assert printed(grid, monkeypatch, None) == ["key  value"]


def test_a_grid_without_rows_is_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(Grid("A", "B"), monkeypatch, 80) == ["A  B"]
