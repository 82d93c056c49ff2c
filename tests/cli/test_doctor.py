"""`dmabuf doctor` and `dmabuf heaps`."""

from pathlib import Path

import pytest

import dmabuf
from tests.cli.conftest import Run
from tests.cli.test_ls import fits

DOCTOR = {"ok": bool, "checks": [{"name": str, "status": str, "required": bool, "detail": str, "remedy": str}]}
HEAPS = {"heaps": [{"name": str, "unavailable": (str, type(None)), "about": str, "recommended": bool}]}


def test_doctor_here_finds_all_that_is_required(run: Run) -> None:
    ran = run("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert ran.lines[-1] == "Everything required is here."
    assert any(line.startswith("OK ") and " memfd " in line for line in ran.lines)


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_doctors_lines_fit_the_terminal(run: Run, columns: int) -> None:
    assert max(map(len, run("doctor", columns=columns).lines)) <= columns


def test_doctors_json_has_exactly_the_documented_fields(run: Run) -> None:
    found = run("doctor", "--json").json
    assert fits(found, DOCTOR)
    assert found["ok"]


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_doctor_ends_with_1_when_something_required_is_missing(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    tmp_path.chmod(0o755)
    ran = run("doctor", "--domain", str(tmp_path), *arguments)
    assert (ran.status, ran.err) == (1, "")
    if arguments:
        assert not ran.json["ok"]
    else:
        assert "REQUIRED" in ran.out
        assert ran.lines[-1] == "dmabuf can't work here: domain missing."


def test_the_script_runs_doctor(script: Run) -> None:
    ran = script("doctor", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["ok"]


def test_heaps_lists_all_the_default_first(run: Run) -> None:
    ran = run("heaps")
    assert ran.status == 0
    names = [heap.name for heap in dmabuf.heaps()]
    assert [line.split()[0] for line in ran.lines[1:] if line[0] != " "] == names
    assert " default " in ran.lines[1]


def test_heaps_json_has_exactly_the_documented_fields(run: Run) -> None:
    found = run("heaps", "--json").json
    assert fits(found, HEAPS)
    assert [heap["recommended"] for heap in found["heaps"]].count(True) == 1


def test_every_field_of_their_json_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for schema in (DOCTOR, DOCTOR["checks"][0], HEAPS, HEAPS["heaps"][0]):  # type: ignore[index]
        for field in schema:
            assert f"`{field}`" in text, field
