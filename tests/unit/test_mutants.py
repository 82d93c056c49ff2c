"""Each mutant still fits the sources; whether the tests find it is what `make mutants` shows."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tools.mutants import MUTANTS, ROOT, Mutant, main, run


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_its_file_and_names_tests_that_exist(mutant: Mutant, tmp_path: Path) -> None:
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
    mutant.apply(tmp_path)
    assert (tmp_path / mutant.file).read_text() != (ROOT / mutant.file).read_text()
    assert all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests)


def test_mutant_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "native/domain").mkdir(parents=True)
    (tmp_path / MUTANTS[0].file).write_text("")
    with pytest.raises(ValueError, match="this text 0 times"):
        MUTANTS[0].apply(tmp_path)


def test_list_names_every_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [mutant.name for mutant in MUTANTS]


def test_unknown_mutant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["no-such"])
    assert caught.value.code == 2
    assert "no such mutant: no-such" in capsys.readouterr().err


def test_process_that_mutants_tests_leave_behind_ends_with_them(tmp_path: Path) -> None:
    leaves = "import os, signal\npid = os.fork()\nif not pid:\n    signal.pause()\nprint(pid, flush=True)\nos._exit(3)\n"
    with (tmp_path / "output").open("w+") as output:
        assert run([sys.executable, "-c", leaves], tmp_path, dict(os.environ), output) == 3
    _, status = os.waitpid(int((tmp_path / "output").read_text()), 0)  # the test run is a subreaper
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
