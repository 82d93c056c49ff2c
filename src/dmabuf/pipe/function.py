"""How a user's function works on frames.

``module:name`` or ``file.py:name`` names a function, a class, or an object that can be called. A class is instantiated once in each
process, with the stage's own options; those of a function are its keyword arguments. What is called gets the frame's array, and

- with a parameter ``out``, an array to write the next frame into; the frame goes on unless it returns False;
- with a parameter ``meta``, the dict of the frame's metadata, which it may change.

Without ``out``, an array that it returns is the next frame; None, and the frame ends here; any other value goes on in ``meta`` under the
stage's name, with the frame as it was. A tuple is an array and a value. A class may have ``close()``, whose result is the stage's.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dmabuf.pipe.words import refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_OUT, _META = "out", "meta"


@dataclass
class Loaded:
    """What a target names. ``options``: keyword arguments that it has yet to be given; ``is_instance``: of a class, which has had them."""

    object: Any
    options: dict[str, Any]
    is_instance: bool


def loaded(target: str, options: dict[str, str]) -> Loaded:
    """Import what a target names, and instantiate it if it is a class.

    Raises:
        InvalidError: There is no such module or name, or it doesn't take the options (EINVAL).
    """
    where, _, name = target.rpartition(":")
    found: Any = _module(where, target)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            there = f"; it has {', '.join(sorted(names)[:8])}" if names else ""
            raise refused(target, f"{where} has no {part}", f"name a function or a class of it{there}")
        found = getattr(found, part)
    if not callable(found):
        raise refused(target, f"it is {type(found).__name__}, which can't be called", "name a function or a class")
    given = {key: _value(text) for key, text in options.items()}
    _check_options(found, given, target)
    if inspect.isclass(found):
        return Loaded(found(**given), {}, True)
    return Loaded(found, given, False)


def _module(where: str, target: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise refused(target, f"there is no file {where}", "name a file of Python, or a module")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    if "/" in where:
        raise refused(target, "it is neither a module nor a file of Python", "write MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as e:
        if e.name is None or not (where == e.name or where.startswith(e.name + ".")):
            raise
        raise refused(target, f"there is no module {e.name}", "run it where the module is, or set PYTHONPATH") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parameters(found: Any) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of something that can be called; None if Python can't tell, as of some functions in C."""
    try:
        return dict(inspect.signature(found).parameters)
    except (ValueError, TypeError):
        return None


def _check_options(found: Any, given: dict[str, Any], target: str) -> None:
    parameters = _parameters(found)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    own = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = own if inspect.isclass(found) else [name for name in own[1:] if name not in (_OUT, _META)]
    for key in given:
        if key not in own:
            there = f"; its own are {', '.join(own)}" if own else ""
            remedy = "use an option of stages (buffers, checksum, kill_at, name, policy, restart, when_full, workers), or a parameter of it"
            raise refused(f"{target} {key}=", f"no such option{there}", remedy)


@dataclass
class Result:
    """What came of a frame. ``goes_on``: whether there is a next frame; ``array``: what it is, None for what was written, or the frame as
    it was; ``value``: for ``meta``, None for none.
    """

    goes_on: bool
    array: Array | None = None
    value: Any = None


class Work:
    """A function that works on frames. ``writes``: whether it writes into an array that it is given."""

    def __init__(self, target: str, options: dict[str, str]) -> None:
        import numpy as np

        self._array_type = np.ndarray
        made = loaded(target, options)
        self.target, self._object, self._is_instance = target, made.object, made.is_instance
        if not callable(made.object):
            raise refused(target, "its objects can't be called", "give the class a method __call__(self, frame)")
        parameters = _parameters(made.object)
        names = set() if parameters is None else set(parameters)
        self.writes, self._wants_meta = _OUT in names, _META in names
        if parameters is not None:
            _check_parameters(parameters, made.options, target)
        self._call = functools.partial(made.object, **made.options) if made.options else made.object

    def __call__(self, frame: Array, meta: dict[str, Any], out: Array | None = None) -> Result:
        """Work on a frame."""
        named: dict[str, Any] = {}
        if self._wants_meta:
            named[_META] = meta
        if out is not None:
            named[_OUT] = out
        found = self._call(frame, **named)
        if out is not None:
            if found is None or found is out or found is True:
                return Result(True)
            return Result(False) if found is False else Result(True, None, self._checked(found))
        if found is None:
            return Result(False)
        if isinstance(found, self._array_type):
            return Result(True, self._numbers(found))
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], self._array_type):
            return Result(True, self._numbers(found[0]), self._checked(found[1]))
        return Result(True, None, self._checked(found))

    def _numbers(self, found: Array) -> Array:
        if found.dtype.hasobject or not found.nbytes:
            raise TypeError(f"{self.target} returned an array of {found.dtype} and {found.nbytes} bytes; return an array of numbers")
        return found

    def _checked(self, value: Any) -> Any:
        try:
            json.dumps(value)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"{self.target} returned {type(value).__name__}: {e}; return an array of NumPy, None, or what JSON can say"
            ) from None
        return value

    def close(self) -> Any:
        """End the work. Return what ``close()`` of the user's class says."""
        closing = getattr(self._object, "close", None) if self._is_instance else None
        return None if closing is None else self._checked(closing())


def _check_parameters(parameters: dict[str, inspect.Parameter], options: dict[str, Any], target: str) -> None:
    fillable = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if not fillable:
        raise refused(target, "it takes no frame", "give it a parameter for the frame's array")
    for p in parameters.values():
        if p is fillable[0] or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
            continue
        if p.name not in (_OUT, _META, *options):
            raise refused(target, f"its parameter {p.name} has no value", f"write {p.name}=… after it")
