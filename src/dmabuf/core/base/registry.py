"""``Registry``: what a lower module offers to be filled by name, and what an upper one puts in.

A name is registered once. A registry can know which module registers a name: that module is imported when the name is first looked up,
so that a process pays only for what it uses, and no module has to be imported for its side effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Generic, TypeVar

from dmabuf.errors import ContractError

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by name. ``what`` is what messages call a value; ``modules`` says where a name is registered, if not at import."""

    __slots__ = ("_modules", "_values", "_what")

    def __init__(self, what: str, modules: Mapping[str, str] | None = None) -> None:
        self._what, self._modules = what, dict(modules or {})
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Give ``name`` its value, and return the value.

        Raises:
            ContractError: The name has one.
        """
        if name in self._values:
            raise ContractError(f"register: there is a {self._what} of the name {name!r} already; choose another name")
        self._values[name] = value
        return value

    def find(self, name: str) -> T:
        """Return the value of ``name``, importing the module that registers it if it isn't there yet.

        Raises:
            ContractError: Nobody registers the name.
        """
        found = self._values.get(name)
        if found is not None:
            return found
        module = self._modules.get(name)
        if module is not None:
            import_module(module)
        if name not in self._values:
            raise ContractError(f"find: there is no {self._what} of the name {name!r}; register it first")
        return self._values[name]
