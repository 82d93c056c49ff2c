"""Modules that are imported at their first use.

FFmpeg's libraries have as many mappings as all else that a test run has, and each fork of the run copies them.
"""

import importlib
from typing import Any


class Lazy:
    """Stands for a module, which is imported when an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        # pytest asks all that it finds in a module of tests.
        if attribute.startswith("__") or attribute == "_mock_name":
            raise AttributeError(attribute)
        return getattr(self(), attribute)

    def __call__(self) -> Any:
        """The module itself."""
        return importlib.import_module(self._name)
