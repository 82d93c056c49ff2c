"""A registry: one value a name, and modules that are imported when a name is looked up."""

import sys

import pytest

from dmabuf.core.base.registry import Registry
from dmabuf.errors import ContractError


def test_find_returns_what_was_registered() -> None:
    kinds: Registry[int] = Registry("kind")
    assert kinds.register("one", 1) == 1
    assert kinds.find("one") == 1


def test_register_of_a_taken_name_is_a_contract_error() -> None:
    kinds: Registry[int] = Registry("kind")
    kinds.register("one", 1)
    with pytest.raises(ContractError, match="there is a kind of the name 'one' already"):
        kinds.register("one", 2)
    assert kinds.find("one") == 1


def test_find_of_an_unknown_name_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="there is no kind of the name 'two'"):
        Registry[int]("kind").find("two")


def test_find_imports_the_module_that_registers_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    kinds: Registry[int] = Registry("kind", {"zen": "this", "one": "dmabuf.core.base.usage"})
    kinds.register("one", 1)
    assert kinds.find("one") == 1
    with pytest.raises(ContractError, match="'zen'"):
        kinds.find("zen")
    assert "this" in sys.modules
