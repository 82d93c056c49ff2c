"""The code blocks of README and of the other pages run as they stand; tests/support/pages.py says how a page marks them."""

from pathlib import Path

import pytest

from tests.support.pages import PAGES, programs
from tests.support.programs import run


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_of_page_run_and_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    found = programs(page)
    assert found
    for program in found:
        done = run(program.code, tmp_path, DMABUF_SPILL_DIRECTORY=str(tmp_path))
        assert (done.stdout, done.stderr, done.returncode) == (program.output, "", 0)


def test_pages_with_code_blocks_are_found() -> None:
    assert {"README.md", "docs/fences.md", "docs/sharing.md"} <= set(PAGES)
