"""For every test: a domain of its own run, and a look at what it left behind."""

import ctypes
import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support.children import Nursery, Spawn
from tests.support.directory import RunDirectory
from tests.support.leaks import LeakCheck, warm_up

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# The debug layer is on in every test and in the processes that it starts; conftests of directories import dmabuf before `pytest_configure`.
os.environ["DMABUF_DEBUG"] = "1"

_DIRECTORY = pytest.StashKey[RunDirectory]()
_FAILED = pytest.StashKey[bool]()
_NOTHING: dict[str, Any] = {}
_NONE: list[tuple[str, Any]] = []


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports dmabuf, which test modules do while they are collected.
    directory = RunDirectory()
    config.stash[_DIRECTORY] = directory
    os.environ["DMABUF_DOMAIN"] = str(directory.path)
    # An orphan of a killed child becomes ours, where the leak check sees it, instead of init's, where nobody does.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_DIRECTORY].close()
    del os.environ["DMABUF_DOMAIN"]


# Every collection looks at all that a run has made, and there are two for each test: of what piles up with thousands of tests, nobody asks
# for the watchdog's timer of a test that is over, nor for more than the result of a report of success.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        vars(item).pop("cancel_timeout", None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        report.keywords, report.sections, report.user_properties = _NOTHING, _NONE, _NONE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def leak_check(request: pytest.FixtureRequest) -> Iterator[LeakCheck]:
    warm_up()
    # What is here now stays: the collections around each test need not look at it again (they took most of the suite's time).
    gc.collect()
    gc.freeze()
    yield LeakCheck(request.config.stash[_DIRECTORY].path)
    # Hypothesis, imported at the end of a run, asks the collector about objects that trio hands to it.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest, leak_check: LeakCheck) -> Iterator[None]:
    """Fail a test that leaves a descriptor, mapping, process, thread or file behind."""
    leak_check.begin()
    yield
    # The traceback of a failed test holds on to all its locals.
    if request.node.stash.get(_FAILED, False):
        return
    lost = leak_check.end()
    if lost:
        pytest.fail("the test left something behind:\n  " + "\n  ".join(lost), pytrace=False)


@pytest.fixture
def child() -> Iterator[Spawn]:
    """Start functions in child processes that end with the test; see tests/support/children.py."""
    with Nursery() as nursery:
        yield nursery
