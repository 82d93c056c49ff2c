"""A pytest plugin for programs that use dmabuf.

A run gets a domain of its own (``DMABUF_DOMAIN``), which no other program sees and which goes with the run. The fixtures:

- `leaves_nothing` fails a test that leaves a descriptor, mapping, process, thread or file behind;
- `child` starts functions in child processes that end with the test. They are forked from a zygote (tests/support/zygote.py);
  with ``--fresh-children`` each is a fresh interpreter.
"""

import gc
import os
from collections.abc import Generator, Iterator

import pytest

from tests.support.children import ENTRY, PREPARE, Nursery, Spawn
from tests.support.directory import RunDirectory
from tests.support.leaks import LeakCheck, warm_up
from tests.support.parents import adopt_orphans
from tests.support.zygote import Zygote

_DIRECTORY = pytest.StashKey[RunDirectory]()
_CHECK = pytest.StashKey[LeakCheck]()
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("dmabuf").addoption(
        "--fresh-children", action="store_true", help="start a fresh interpreter for each child process, instead of forking a zygote"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before test modules are collected, which may open the default domain.
    directory = RunDirectory()
    config.stash[_DIRECTORY] = directory
    os.environ["DMABUF_DOMAIN"] = str(directory.path)
    # An orphan of a killed child becomes a child of this process, where the leak check finds it, and not of init.
    adopt_orphans()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_DIRECTORY].close()
    del os.environ["DMABUF_DOMAIN"]


def _forget_last_look(config: pytest.Config) -> None:
    check = config.stash.get(_CHECK, None)
    if check is not None:
        check.forget()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "leaves_nothing" not in getattr(item, "fixturenames", ()):
        _forget_last_look(item.config)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    # What several tests share is made and ended between two of them.
    if fixturedef.scope != "function":
        _forget_last_look(request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    if fixturedef.scope != "function":
        _forget_last_look(request.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="session")
def leak_check(request: pytest.FixtureRequest) -> Iterator[LeakCheck]:
    """The looks around the tests of this run."""
    warm_up()
    # The collections around each test need not visit what exists now.
    gc.collect()
    gc.freeze()
    check = LeakCheck(request.config.stash[_DIRECTORY].path)
    request.config.stash[_CHECK] = check
    yield check
    del request.config.stash[_CHECK]
    # Hypothesis, imported at the end of a run, asks the collector about objects that trio hands to it.
    gc.unfreeze()


@pytest.fixture
def leaves_nothing(request: pytest.FixtureRequest, leak_check: LeakCheck) -> Iterator[None]:
    """Fail a test that leaves a descriptor, mapping, process, thread or file behind."""
    leak_check.begin()
    yield
    # The traceback of a failed test references all its local variables.
    if request.node.stash.get(_FAILED, False):
        leak_check.forget()
        return
    # pytest keeps the values of fixtures a little longer.
    request.node.funcargs.clear()
    lost = leak_check.end()
    if lost:
        pytest.fail("the test left something behind:\n  " + "\n  ".join(lost), pytrace=False)


@pytest.fixture(scope="session")
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote | None]:
    """The process that forks the children of this run; None with ``--fresh-children``."""
    if request.config.getoption("--fresh-children"):
        yield None
        return
    made = Zygote(ENTRY, PREPARE)
    yield made
    made.close()


@pytest.fixture
def child(zygote: Zygote | None) -> Iterator[Spawn]:
    """Start functions in child processes that end with the test; see tests/support/children.py."""
    with Nursery(zygote) as nursery:
        yield nursery
