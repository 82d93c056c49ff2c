"""A lazy module is imported when something of it is asked for."""

import sys

import pytest

from tests.support.lazy import Lazy


def test_it_is_imported_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    colors = Lazy("colorsys")
    assert not hasattr(colors, "__test__")
    assert not hasattr(colors, "_mock_name")
    assert "colorsys" not in sys.modules
    assert colors.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    assert colors() is sys.modules["colorsys"]


def test_what_is_not_there_is_told_at_the_first_use() -> None:
    missing = Lazy("dmabuf_has_no_such_module")
    with pytest.raises(ModuleNotFoundError):
        missing.anything  # noqa: B018
    with pytest.raises(AttributeError):
        Lazy("colorsys").anything  # noqa: B018
