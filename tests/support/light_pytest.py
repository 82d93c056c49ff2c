"""What stands for pytest in an interpreter that a test has started: such a child imports a test's module for one function of it.

The decorators of the module do nothing here. All else is pytest's own, which is imported when it is asked for: that takes ten times the CPU
of the interpreter's start.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Nothing:
    """Any mark or fixture: it returns what it decorates. And any type that only an annotation names."""

    def __getattr__(self, _: str) -> "_Nothing":
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and not keywords and callable(arguments[0]) else self

    def __getitem__(self, _: object) -> "_Nothing":
        return self

    def __or__(self, _: object) -> "_Nothing":
        return self


class LightPytest(ModuleType):
    """In the place of the module ``pytest``."""

    fixture = mark = param = _Nothing()
    MonkeyPatch = FixtureRequest = CaptureFixture = LogCaptureFixture = TempPathFactory = MarkDecorator = ExceptionInfo = _Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        if sys.modules.get("pytest") is self:
            del sys.modules["pytest"]
        return getattr(importlib.import_module("pytest"), name)
