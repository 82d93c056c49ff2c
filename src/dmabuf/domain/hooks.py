"""What the layers above a domain have asked it to call, by name.

A name stands for one hook: a layer asks for its own by name, and never concludes from another's hook that its own is installed. A hook may
remove itself, and add others, while the hooks are being called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec

from dmabuf.errors import ContractError

P = ParamSpec("P")


class Hooks(Generic[P]):
    """The functions to call at one kind of moment, oldest first.

    Every change is one operation of a dict, so that threads, finalizers and signal handlers may add and remove without a lock.
    """

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self._hooks: dict[str, tuple[Callable[P, None]]] = {}

    def add(self, name: str, hook: Callable[P, None]) -> None:
        """Install a hook.

        Raises:
            ContractError: A hook of this name is installed.
        """
        entry = (hook,)  # a new object, by which the first of two threads is told from the second
        if self._hooks.setdefault(name, entry) is not entry:
            raise ContractError(f"on_{self.moment}: hook {name!r}: it is already installed; remove it first, or choose another name")

    def ensure(self, name: str, hook: Callable[P, None]) -> None:
        """Install a hook unless one of this name is installed; for a layer whose first user installs it, in whichever thread."""
        self._hooks.setdefault(name, (hook,))

    def remove(self, name: str) -> None:
        """Remove a hook; without one of this name, nothing."""
        self._hooks.pop(name, None)

    def clear(self) -> None:
        """Remove all hooks."""
        self._hooks.clear()

    def call_once(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Remove every hook and call it. Returns how many there were."""
        count = 0
        for name in tuple(self._hooks):
            entry = self._hooks.pop(name, None)
            if entry is not None:
                count += 1
                entry[0](*args, **kwargs)
        return count

    def get(self, name: str) -> Callable[P, None]:
        """Return the hook of this name. Raises: KeyError."""
        return self._hooks[name][0]

    def __iter__(self) -> Iterator[str]:
        """The names of the hooks, oldest first."""
        return iter(tuple(self._hooks))

    def __bool__(self) -> bool:
        """Whether a hook is installed."""
        return bool(self._hooks)

    def __contains__(self, name: str) -> bool:
        return name in self._hooks

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call every hook that is installed now. What a hook raises ends the round."""
        for (hook,) in tuple(self._hooks.values()):
            hook(*args, **kwargs)
