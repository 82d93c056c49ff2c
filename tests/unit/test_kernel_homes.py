"""Buffers that are the kernel's own, over a kernel that is made up: the logic runs where no kernel has dma-bufs; see tests/kernel too."""

import errno
import os
import random
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import place
from dmabuf.heap import dma_heap, udmabuf
from tests.support.budget import times
from tests.support.errnos import raises_errno
from tests.support.fake_kernel import FakeKernel
from tests.support.faults import faults
from tests.support.home_scenarios import SCENARIOS, SIZE, whole_after
from tests.support.steps import fork, reap

REAL_LIMITS = udmabuf.limits
HEAPS = {"udmabuf": "udmabuf", "dma_heap:system": "system"}


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with pytest.MonkeyPatch.context() as patch:
        yield FakeKernel(patch)


@pytest.fixture(params=HEAPS)
def heap(request: pytest.FixtureRequest, kernel: FakeKernel) -> str:
    name: str = request.param
    return name


def test_a_buffer_of_a_kernel_heap_says_what_it_is(heap: str) -> None:
    with dmabuf.allocate(SIZE - 1, heap=heap, name="camera") as buf:
        assert (buf.size, buf.exp_name, buf.name) == (SIZE, HEAPS[heap], "camera")


def test_both_ends_of_an_access_are_told_to_the_kernel(kernel: FakeKernel, heap: str) -> None:
    with dmabuf.allocate(SIZE, heap=heap) as buf:
        with buf.write():
            pass
        with buf.read():
            pass
        assert kernel.sync == [(buf.ino, flags) for flags in (3, 7, 1, 5)]


@pytest.mark.parametrize("size", [0, -1, 1 << 63, 65 << 20])
def test_a_size_that_udmabuf_does_not_make_is_einval(kernel: FakeKernel, size: int) -> None:
    with raises_errno(errno.EINVAL) as caught:
        dmabuf.allocate(size, heap="udmabuf")
    assert size != 65 << 20 or "size_limit_mb" in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_a_size_that_a_heap_does_not_make_is_einval(kernel: FakeKernel, size: int) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.allocate(size, heap="dma_heap:system")


@pytest.mark.parametrize("heap", ["udmabuf", "dma_heap:system", "dma_heap:nowhere", "dma_heap:../null"])
def test_a_heap_that_is_not_here_is_enodev_with_what_would_help(monkeypatch: pytest.MonkeyPatch, heap: str) -> None:
    monkeypatch.setattr(udmabuf, "DEVICE", Path("/nowhere/udmabuf"))
    monkeypatch.setattr(dma_heap, "DIRECTORY", Path("/nowhere/dma_heap"))
    monkeypatch.setattr(dma_heap, "names", list)
    with raises_errno(errno.ENODEV) as caught:
        dmabuf.allocate(SIZE, heap=heap)
    assert {"udmabuf": "modprobe udmabuf", "dma_heap:system": "CONFIG_DMABUF_HEAPS_SYSTEM"}.get(heap, "use one of") in str(caught.value)


@pytest.mark.parametrize("heap", ["udmabuf", "dma_heap:system"])
def test_heap_is_eacces_and_names_group_when_device_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, heap: str) -> None:
    device = tmp_path / heap.removeprefix("dma_heap:")
    device.touch(mode=0o600)
    monkeypatch.setattr(udmabuf, "DEVICE", device)
    monkeypatch.setattr(dma_heap, "DIRECTORY", tmp_path)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with raises_errno(errno.EACCES, PermissionError) as caught:
        dmabuf.allocate(SIZE, heap=heap)
    assert f"chgrp {'kvm' if heap == 'udmabuf' else 'video'} {device}" in str(caught.value)
    (told,) = (one.unavailable for one in dmabuf.heaps() if one.name == heap)
    assert told is not None
    assert told in str(caught.value)


@pytest.mark.usefixtures("kernel")
def test_a_limit_below_zero_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "size_limit_mb").write_text("-1\n")
    monkeypatch.setattr(udmabuf, "limits", REAL_LIMITS)
    monkeypatch.setattr(udmabuf, "PARAMETERS", tmp_path)
    with dmabuf.allocate(65 << 20, heap="udmabuf") as buf:
        assert buf.size == 65 << 20


@pytest.mark.parametrize(("heap", "name"), [*(("udmabuf", name) for name in SCENARIOS), ("dma_heap:system", "named")])
@pytest.mark.usefixtures("kernel")
def test_whatever_call_fails_nothing_is_lost(heap: str, name: str) -> None:
    made, ran = partial(dmabuf.allocate, SIZE, heap=heap), 0
    every = times(quick=3, full=1)
    start = random.randrange(every)
    for at, fault in enumerate(faults(partial(SCENARIOS[name], made), whole_after)):
        if at % every == start:
            fault()
            ran += 1
    assert ran


def test_container_that_is_told_another_boot_finds_the_record_of_a_kernel_buffer(heap: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Domain.default().join()

    def place_of(buf: dmabuf.DmaBuf) -> bytes:
        shared = handle_of(buf).shared
        return b"%d %d" % (shared.index, shared.gen)

    def container() -> None:
        place.boot_id = lambda: b"a container's id"  # type: ignore[assignment]
        _, (fd,), *_ = socket.recv_fds(theirs, 1, 1)
        with dmabuf.get(fd) as buf:
            theirs.send(place_of(buf))

    pid = fork(container)
    with ours, theirs, dmabuf.allocate(SIZE, heap=heap) as buf:
        socket.send_fds(ours, [b"x"], [buf.fileno()])
        assert reap(pid) == 0
        assert ours.recv(16) == place_of(buf)
