"""Hooks of a domain: by name, each installed whatever the others are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import dmabuf
from dmabuf import ContractError, Domain
from dmabuf.domain.hooks import Hooks
from tests.support.drivers import Bare


@pytest.fixture
def hooks() -> Hooks[[int]]:
    return Hooks("tick")


@pytest.mark.parametrize("moment", ["tick", "sweep", "reset", "leave"])
def test_installing_a_name_twice_is_contract_error(moment: str) -> None:
    domain = Domain.private()
    install = getattr(domain, f"on_{moment}")
    install("mine", print)
    with pytest.raises(ContractError, match=f"on_{moment}: hook 'mine': it is already installed; remove it first"):
        install("mine", print)
    domain.leave_hooks.clear()


def test_the_same_function_twice_under_one_name_is_contract_error(hooks: Hooks[[int]]) -> None:
    hooks.add("mine", print)
    with pytest.raises(ContractError):
        hooks.add("mine", print)


def test_hooks_are_called_with_the_arguments_in_order(hooks: Hooks[[int]]) -> None:
    seen: list[tuple[str, int]] = []
    for name in "ab":
        hooks.add(name, lambda value, name=name: seen.append((name, value)))  # type: ignore[misc]
    hooks(7)
    assert seen == [("a", 7), ("b", 7)]
    assert list(hooks) == ["a", "b"]


def test_ensure_keeps_the_first_hook_of_a_name(hooks: Hooks[[int]]) -> None:
    seen: list[int] = []
    hooks.ensure("mine", seen.append)
    hooks.ensure("mine", print)
    hooks(1)
    assert seen == [1]


def test_ensure_from_many_threads_installs_one_hook(hooks: Hooks[[int]]) -> None:
    seen: list[int] = []
    start = threading.Barrier(8)

    def install(number: int) -> None:
        start.wait()
        hooks.ensure("mine", lambda _: seen.append(number))

    threads = [threading.Thread(target=install, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hooks(0)
    assert len(seen) == 1


def test_a_hook_that_removes_itself_leaves_the_others(hooks: Hooks[[int]]) -> None:
    seen: list[int] = []
    hooks.add("once", lambda _: hooks.remove("once"))
    hooks.add("always", seen.append)
    hooks(1)
    hooks(2)
    assert seen == [1, 2]
    assert list(hooks) == ["always"]


def test_removing_a_name_that_is_not_installed_does_nothing(hooks: Hooks[[int]]) -> None:
    hooks.remove("mine")
    assert list(hooks) == []


def test_a_removed_name_can_be_installed_again(hooks: Hooks[[int]]) -> None:
    hooks.add("mine", print)
    hooks.remove("mine")
    hooks.add("mine", print)
    assert list(hooks) == ["mine"]


def test_call_once_removes_each_hook_even_if_one_raises(hooks: Hooks[[int]]) -> None:
    seen: list[int] = []

    def wrong(_: int) -> None:
        raise OSError

    hooks.add("first", wrong)
    hooks.add("second", seen.append)
    with pytest.raises(OSError):
        hooks.call_once(1)
    assert list(hooks) == ["second"]
    assert hooks.call_once(2) == 1
    assert hooks.call_once(3) == 0
    assert seen == [2]


def test_leave_hooks_are_of_one_life(tmp_path: Path) -> None:
    domain = Domain.open(tmp_path / "domain")
    seen: list[str] = []
    domain.on_leave("mine", lambda: seen.append("first"))
    domain.leave()
    domain.join()
    domain.on_leave("mine", lambda: seen.append("second"))
    domain.leave()
    domain.join()
    domain.leave()
    assert seen == ["first", "second"]


def test_records_are_swept_when_an_export_was_first(tmp_path: Path) -> None:
    domain = Domain.open(tmp_path / "domain")
    exporter = Bare()
    dmabuf.export(exporter, 4096, domain=domain).close()
    exporter.close()
    with dmabuf.allocate(4096, domain=domain):
        assert {"records", "exports"} <= set(domain.sweep_hooks)
