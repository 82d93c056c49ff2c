"""Every test of the project has a domain of its own run, the debug layer, and a look at what it left behind."""

import gc
import marshal
import os
import random
import sys
import tempfile
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import create_terminal_writer
from _pytest.faulthandler import fault_handler_stderr_fd_key
from pytest_timeout import Settings, timeout_timer  # type: ignore[import-untyped]

from tests.support.apart import Apart
from tests.support.apart import apart as process
from tests.support.children import Spawn
from tests.support.watchdog import LastResort, Watchdog

# The debug layer is on in every test and in the processes that it starts; conftests of directories import dmabuf before `pytest_configure`.
os.environ["DMABUF_DEBUG"] = "1"
# On, as it is by default; what depends on it is tried with it on and off (`move_notify` in tests/conformance/conftest.py).
os.environ.pop("DMABUF_MOVE_NOTIFY", None)

_WATCHDOG = Watchdog()
_LAST_RESORT = pytest.StashKey[LastResort]()
_KERNEL = Path(__file__).parent / "kernel"

pytest_plugins = ["tests.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # In a worker of xdist stdout is /dev/null, and the watchdog's list of stacks is only seen on stderr, where faulthandler's goes too.
        writer = create_terminal_writer(config, os.fdopen(os.dup(2), "w"))
        config.get_terminal_writer = lambda: writer  # type: ignore[method-assign]
    # pytest-randomly would seed three times a test, and numpy's old generator too, which no test uses.
    config.option.randomly_reset_seed = False


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    plugin: Any = config.pluginmanager.getplugin("faulthandler")
    config.stash[_LAST_RESORT] = LastResort(plugin.get_timeout_config_value(config), config.stash[fault_handler_stderr_fd_key])
    plugin.get_timeout_config_value = lambda _: 0.0  # no thread of its own for each test


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Watch a test that may never give the GIL back, and have its random choices depend on the run's seed and its name only."""
    item.config.stash[_LAST_RESORT].watch()
    if (seed := item.config.getoption("randomly_seed", None)) is not None:
        random.seed(f"{seed} {item.nodeid}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect the tests without the collector: they stay, and it would visit all of them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any], dict[str, Any]]:
    """In a worker of xdist pack a report: execnet sends dictionaries item by item, in Python, three a test."""
    data = yield
    try:
        return {"packed": marshal.dumps(data)}
    except ValueError:  # something of a type of its own
        return data


@pytest.hookimpl(wrapper=True)
def pytest_report_from_serializable(data: dict[str, Any]) -> Generator[None, Any, Any]:
    """Unpack it; xdist has added to the dictionary."""
    if (packed := data.pop("packed", None)) is not None:
        data.update(marshal.loads(packed))
    return (yield)


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Watch the next test anew: pytest has disarmed it."""
    node.config.stash[_LAST_RESORT].forget()


def pytest_timeout_set_timer(item: pytest.Item, settings: Settings) -> bool | None:
    """Watch a test by the thread for all of them, instead of one of its own."""
    if settings.method != "thread":
        return None
    _WATCHDOG.watch(settings.timeout, partial(timeout_timer, item, settings))
    return True


def pytest_timeout_cancel_timer() -> bool | None:
    """The test is over. None, so that a timer of its own is cancelled too."""
    _WATCHDOG.rest()
    return None


@pytest.fixture(autouse=True)
def _leaves_nothing(leaves_nothing: None) -> None:
    """Check every test."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests for the guest of `make test-kernel`, a third of all, where they would be skipped and nobody named them."""
    if collection_path != _KERNEL or "DMABUF_KERNEL" in os.environ:
        return None
    named = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return None if any(path.is_relative_to(_KERNEL) for path in named) else True


@pytest.fixture
def apart(child: Spawn) -> Iterator[Apart]:
    """Run a function in a small process with a domain of its own."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="apart-", dir=base) as directory:
        yield process(child, directory)


@pytest.fixture
def keepers_are_reaped() -> Iterator[None]:
    """Wait until the processes have ended that keep what a test's queues have pickled, and keep nothing here either."""
    from tests.support.queues import keepers_reaped  # imports dmabuf, which would not find the debug layer on yet

    with keepers_reaped():
        yield
    if (keeping := sys.modules.get("dmabuf.sharing.keeping")) is not None:
        keeping.TABLE.drop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for ``-n auto``: none where collecting the tests in each of them would take longer than the tests."""
    files = all(argument.partition("::")[0].endswith(".py") for argument in config.args)
    if files or config.option.keyword or config.option.collectonly:
        return 0
    # Many tests sleep most of their time, so half as many again as there are cores.
    cores = len(os.sched_getaffinity(0))
    return min(cores + (cores + 1) // 2, 16)
