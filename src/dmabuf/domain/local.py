"""``Local``: a value of this process for each domain, forgotten after a fork.

The layers above a domain keep their per-domain state here. The module that owns the state declares one ``Local``, and other modules import
it from there to reach the value::

    EXPORTS: Local[Exports] = Local(Exports)

    EXPORTS.of(domain).add(...)

In a forked child the parent's values are there until the child joins the domain, so that a hook of the fork can still look at them.
Leaving a domain keeps the values: a value that belongs to one membership compares its life, and calls :meth:`Local.renew`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from dmabuf.domain.domain import Domain

T = TypeVar("T")


class Local(Generic[T]):
    """A slot that every domain has. ``make`` gives the value of a domain at its first use; None is not a value."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[Domain], T]) -> None:
        self._make = make

    def of(self, domain: Domain) -> T:
        """Return the domain's value, made now if there is none. Two threads that come at once get the same one.

        What ``make`` raises is raised here, and the next caller makes the value.
        """
        found: T | None = domain.local.get(self)
        return self.renew(domain, None) if found is None else found

    def peek(self, domain: Domain) -> T | None:
        """Return the domain's value, or None if it isn't made. Takes no lock, so that finalizers may call it."""
        found: T | None = domain.local.get(self)
        return found

    def renew(self, domain: Domain, old: T | None) -> T:
        """Replace ``old``, which no longer serves, by a new value. If it was replaced meanwhile, return the value that is there."""
        with domain.lock:
            found = self.peek(domain)
            if found is not None and found is not old:
                return found
            made = self._make(domain)
            # A signal handler may have run in the middle and have used the slot: its value is in use, so it stays.
            found = self.peek(domain)
            if found is not None and found is not old:
                return found
            domain.local[self] = made
            return made

    def set(self, domain: Domain, value: T) -> None:
        """Make ``value`` the domain's value."""
        domain.local[self] = value
