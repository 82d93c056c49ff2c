"""Remote calls when one of the two processes has no descriptor left: EMFILE that says where, nothing half-done, connections stay."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dmabuf import Direction, DmaBufAttachment, SgTable
from dmabuf.core.buffer.handle import handle_of
from tests.support import elsewhere as do
from tests.support.children import Spawn
from tests.support.drivers import PAGE, Dynamic
from tests.support.errnos import raises_errno
from tests.support.waiting import until, until_others_sleep

TO = int(Direction.TO_DEVICE)
SIZE = 4 * PAGE
ENTRIES = 4000  # more than a message holds by itself
THERE = "the other process"


class Scattered(Dynamic):
    """Its tables are DMA addresses of its own, many of them."""

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        self.said("map", attachment, direction)
        sgt = SgTable.from_dma([(0x1000 * (2 * i + 1), 0x1000) for i in range(ENTRIES)])
        self.tables.append(sgt)
        return sgt

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)
        self.tables.remove(sgt)


def has_none(state: SimpleNamespace) -> None:
    """No descriptor can be made, whatever others close, until `gives_way`. What waits for a few may go on: poll(2) obeys the limit too."""
    state.limits, state.hoard = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, state.limits[1]))


def hoards(state: SimpleNamespace) -> None:
    """No descriptor is left but for what this process closes from now on, until `gives_way`."""
    until_others_sleep()
    state.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = os.open(os.devnull, os.O_RDONLY)
    state.hoard = [fd]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, state.limits[1]))
    with contextlib.suppress(OSError):
        while True:
            state.hoard.append(os.dup(fd))


def gives_way(state: SimpleNamespace) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, state.limits)
    for fd in state.__dict__.pop("hoard"):
        os.close(fd)


@contextlib.contextmanager
def no_room(where: str) -> Iterator[None]:
    with raises_errno(errno.EMFILE) as caught:
        yield
    assert f"no descriptor is left in {where} (EMFILE); raise RLIMIT_NOFILE there" in str(caught.value)


def calls(state: Any) -> list[Any]:
    return [call if isinstance(call, str) else call[0] for call in state.exporter.calls]


NEEDS_ONE: dict[str, tuple[list[Any], Any, list[str]]] = {
    "attach": ([], (do.attach, True), []),
    "mmap": ([(do.attach, True)], (do.map_bytes,), ["mmap"]),
    "map": ([(do.attach, True)], (do.mapped, TO), ["map", "unmap"]),
    "pin and map": ([(do.attach, True)], (do.mapped, TO), ["pin", "map", "unmap", "unpin"]),
    "vmap": ([(do.attach, True)], (do.vmap,), ["vmap", "vunmap"]),
}


# With MOVE_NOTIFY off, a mapping pins.
CASES = [("attach", True), ("mmap", True), ("map", True), ("pin and map", False), ("vmap", True)]
SENT = [case for case in CASES if case[0] != "attach"]


def works(here: do.Here, op: str) -> None:
    """With room for it the same call does, and is taken back."""
    _, (call, *arguments), _ = NEEDS_ONE[op]
    here.do(call, *arguments)
    here.state.__dict__.pop("mapping", None)
    if op == "vmap":
        here.do(do.vunmap)
    if call is do.mapped:
        here.do(do.unmapped)
    here.do(do.detach)


@pytest.mark.filterwarnings("ignore::dmabuf.ContractWarning")  # a vmap that fails, as of every exporter
@pytest.mark.parametrize(("op", "move_notify"), CASES, indirect=["move_notify"])
@pytest.mark.usefixtures("move_notify")
def test_what_the_exporter_has_no_descriptor_for_is_emfile_and_undone(child: Spawn, op: str) -> None:
    before, (call, *arguments), seen = NEEDS_ONE[op]
    with do.exported(child) as (ask, here):
        here.do(do.begin, TO)  # there is a connection
        here.do(do.end, TO)
        for function, *more in before:
            here.do(function, *more)
        had = len(ask(calls))
        ask(has_none)
        with no_room(THERE):
            here.do(call, *arguments)
        assert ask(calls)[had:] == seen
        assert not here.state.buf.resv.is_locked()
        ask(gives_way)
        works(here, op)


def test_what_needs_no_descriptor_goes_on(child: Spawn, move_notify: bool) -> None:
    with do.exported(child) as (ask, here):
        here.do(do.attach, True)
        here.do(do.mapped, TO)
        here.do(do.vmap)
        here.do(do.begin, TO)
        here.do(do.map_bytes)
        had = len(ask(calls))
        ask(has_none)
        here.do(do.pin)
        here.do(do.begin, TO)
        here.do(do.end, TO)
        here.do(do.end, TO)
        here.do(do.unpin)
        here.do(do.unmapped)
        here.do(do.vunmap)
        here.do(do.detach)
        here.state.__dict__.pop("mapping")
        unpin = [] if move_notify else ["unpin"]
        assert ask(calls)[had:] == ["pin", "begin", "end", "end", "unpin", "unmap", *unpin, "vunmap", "detach"]
        ask(gives_way)


def test_call_to_process_without_descriptors_is_emfile(child: Spawn) -> None:
    with do.exported(child) as (ask, here):
        ask(hoards)
        for _ in range(3):  # what makes room for a refusal is there again each time
            with no_room(THERE):
                here.do(do.begin, TO)
        ask(gives_way)
        here.do(do.begin, TO)
        here.do(do.end, TO)
        assert ask(calls) == ["begin", "end"]


def test_long_answer_without_a_descriptor_is_emfile_and_undone(child: Spawn, move_notify: bool) -> None:
    with do.exported(child, Scattered) as (ask, here):
        here.do(do.attach, True)
        ask(has_none)
        with no_room(THERE):
            here.do(do.mapped, TO)
        assert ask(calls) == ["attach", *NEEDS_ONE["map" if move_notify else "pin and map"][2]]
        assert not here.state.buf.resv.is_locked()
        ask(gives_way)
        assert len(here.do(do.mapped, TO)) == ENTRIES
        here.do(do.unmapped)
        here.do(do.detach)


@pytest.mark.parametrize("full", ["here", "there"])
def test_what_gives_back_needs_no_connection(child: Spawn, full: str, move_notify: bool) -> None:
    with do.exported(child) as (ask, here):
        here.do(do.attach, True)
        here.do(do.mapped, TO)
        here.do(do.vmap)
        client = handle_of(here.state.buf).shared.backing.client
        while client._idle:  # as if other calls were using them
            client._idle.pop().close()
        mine = SimpleNamespace()
        has_none(mine) if full == "here" else ask(hoards)
        try:
            here.do(do.unmapped)
            here.do(do.vunmap)
            here.do(do.detach)
        finally:
            gives_way(mine) if full == "here" else ask(gives_way)
        done = ["detach", "unmap", "vunmap"] if move_notify else ["detach", "unmap", "unpin", "vunmap"]
        until(lambda: sorted(ask(calls)[-len(done) :]) == done)
        until(lambda: not here.state.buf.resv.is_locked())


@pytest.mark.filterwarnings("ignore::dmabuf.ContractWarning")
@pytest.mark.parametrize(("op", "move_notify"), SENT, indirect=["move_notify"])
@pytest.mark.usefixtures("move_notify")
def test_what_the_caller_has_no_descriptor_for_is_emfile_and_undone(child: Spawn, op: str) -> None:
    _, (call, *arguments), seen = NEEDS_ONE[op]
    with do.exported(child) as (ask, here):
        here.do(do.attach, True)
        mine = SimpleNamespace()
        has_none(mine)
        try:
            with no_room("this process"):
                here.do(call, *arguments)
        finally:
            gives_way(mine)
        until(lambda: sorted(ask(calls)) == sorted(["attach", *seen]))
        assert not here.state.buf.resv.is_locked()
        works(here, op)


def test_a_caller_without_descriptors_cant_connect(child: Spawn) -> None:
    with do.exported(child) as (ask, here):
        mine = SimpleNamespace()
        has_none(mine)
        try:
            with no_room("this process"):
                here.do(do.begin, TO)
        finally:
            gives_way(mine)
        here.do(do.begin, TO)
        here.do(do.end, TO)
        assert ask(calls) == ["begin", "end"]
