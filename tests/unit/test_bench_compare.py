"""`python -m bench.compare`: which rows are marked, which are regressions, and what a failed measurement does. Nothing is timed."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from bench import compare
from bench.compare import SUBJECTS, Subject

A, B = Path("a"), Path("b")
ROWS = [Subject("steady", "1"), Subject("slower", "1")]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Path, str]]:
    """Builds in which every row takes 100 µs, but 'slower' in B 110."""
    calls: Counter[tuple[Path, str]] = Counter()

    def once(build: Path, subject: Subject) -> float:
        calls[build, subject.what] += 1
        return 110.0 if build is B and subject.what == "slower" else 100.0

    monkeypatch.setattr(compare, "once", once)
    return calls


def test_row_above_the_bound_twice_is_a_regression(counted: Counter[tuple[Path, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.compare(A, B, ROWS, 3, 1) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "er  " in line or "steady" in line]
    assert [("> 1.05" in line, "REGRESSION" in line) for line in lines] == [(False, False), (True, False), (False, True)]
    assert counted == {(A, "steady"): 3, (B, "steady"): 3, (A, "slower"): 6, (B, "slower"): 6}


def test_row_above_the_bound_once_is_not_a_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain([100.0, 110.0], itertools.repeat(100.0))
    monkeypatch.setattr(compare, "once", lambda _build, _subject: next(times))
    assert compare.compare(A, B, ROWS[:1], 1, 1) == 0


def test_builds_take_turns_in_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Path] = []
    monkeypatch.setattr(compare, "once", lambda build, _subject: order.append(build) or 1.0)
    compare.compare(A, B, ROWS[:1], 4, 1)
    assert order == [A, B, B, A, A, B, B, A]


def test_without_time_every_row_has_one_pair(counted: Counter[tuple[Path, str]]) -> None:
    compare.compare(A, B, ROWS[:1], 5, 0)
    assert counted == {(A, "steady"): 1, (B, "steady"): 1}


def test_failed_measurement_is_exit_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setattr("sys.argv", ["compare", str(root), str(root), "--pairs", "1"])
    monkeypatch.setattr(compare, "SUBJECTS", [Subject("wrong", "measures.no_such_thing()")])
    assert compare.main() == 2
    assert "no_such_thing" in capsys.readouterr().err


def test_directory_without_an_extension_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "build_ext --inplace" in capsys.readouterr().err


def test_names_of_rows_are_unique() -> None:
    assert len({subject.what for subject in SUBJECTS}) == len(SUBJECTS)
