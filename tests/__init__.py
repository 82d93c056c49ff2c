"""The tests, and what they share in `tests.support`."""

import sys

if "--multiprocessing-fork" in sys.orig_argv and "pytest" not in sys.modules:
    from tests.support.light_pytest import LightPytest

    sys.modules["pytest"] = LightPytest("pytest")
