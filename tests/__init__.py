"""The tests, and what they share in `tests.support`."""

import sys

# By multiprocessing, or by tests/support/children.py.
if not {"--multiprocessing-fork", "tests.support.children"}.isdisjoint(sys.orig_argv) and "pytest" not in sys.modules:
    from tests.support.light_pytest import LightPytest

    sys.modules["pytest"] = LightPytest("pytest")
