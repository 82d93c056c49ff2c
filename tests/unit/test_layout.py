"""docs/layout.md says what native/domain/layout.h and its parts say, and a header that contradicts itself is refused."""

import pytest

from dmabuf import _native
from tools.layout import PAGE, page, read, text_of_headers

TEXT = text_of_headers()


def test_layout_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(TEXT), "run python -m tools.layout"


def test_layout_tool_reads_the_values_that_the_compiler_sees() -> None:
    header = read(TEXT)
    assert header.values["DB_HEADER_BYTES"] == _native.HEADER_BYTES
    assert header.values["OFF_CHUNKTAB"] == _native.OFF_CHUNKTAB
    assert header.offsets["db_header", "life_high"] == _native.OFF_LIFE_HIGH
    assert header.sizes["db_life"] == _native.LIFE_BYTES


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param("DB_AT(db_life, pid, 8);", "DB_AT(db_life, pid, 12);", "db_life.pid", id="gap"),
        pytest.param("DB_AT(db_life, pid, 8);\n", "", "db_life.pid", id="no offset"),
        pytest.param("DB_AT(db_life, pid, 8);\n", "DB_AT(db_life, pid, 8);\n" * 2, "two offsets", id="two offsets"),
        pytest.param("DB_SIZE(db_life, 64);", "DB_SIZE(db_life, 72);", "db_life: DB_SIZE", id="size"),
        pytest.param("  a32 pid; ", "  a32 pid, tid; ", "not one field", id="two fields on a line"),
        pytest.param("  LIFE_CLEAN, ", "  LIFE_CLEAN = 4, ", "not one name", id="numbered name"),
    ],
)
def test_layout_tool_refuses_a_header_that_contradicts_itself(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=says):
        page(TEXT.replace(old, new))
