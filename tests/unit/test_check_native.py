"""The check of the C finds circles of includes, long files and long lines, and nothing else."""

from pathlib import Path

import pytest

from tools.check_native import check

NATIVE = Path(__file__).resolve().parents[2] / "native"


def faults(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """What the check says about a directory with these files."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return check(tmp_path)


def test_native_has_no_fault() -> None:
    assert check(NATIVE) == []


def test_includes_that_go_down_are_allowed(tmp_path: Path) -> None:
    files = {
        "a/top.c": '#include "a/top.h"\n#include "a/low.h"\n#include <errno.h>\n',
        "a/top.h": '#include "a/low.h"\n',
        "a/low.h": "",
        "a/low.c": '#include "a/low.h"\n',
    }
    assert faults(tmp_path, files) == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param({"a/x.h": '#include "a/y.h"\n', "a/y.h": '# include "a/x.h"\n'}, "circle", id="headers"),
        pytest.param(
            {"a/x.c": '#include "a/y.h"\n', "a/x.h": "", "a/y.c": '#include "a/x.h"\n', "a/y.h": ""}, "circle", id="files behind headers"
        ),
        pytest.param({"a/x.c": '#include "x.h"\n'}, "is not in", id="header that is not there"),
        pytest.param({"a/x.c": "\n" * 501}, "501 lines", id="long file"),
        pytest.param({"a/x.c": "\n" + "x" * 141}, "x.c:2: 141 columns", id="long line"),
    ],
)
def test_fault_is_found(tmp_path: Path, files: dict[str, str], says: str) -> None:
    (fault,) = faults(tmp_path, files)
    assert says in fault
