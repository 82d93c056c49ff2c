"""The cases of tests/conformance on the kernel's own dma-bufs: our API over udmabuf and the system heap answers as the kernel did."""

from typing import Any

import pytest

from dmabuf import SyncFile
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import call, heap
from tests.conformance import cases
from tests.conformance.cases.bench import CASES, PAGE, Bench, NotHere
from tests.conformance.cases.reasons import DIFFERENCES
from tests.kernel.test_facts import RECORDED, RUNNING

HOMES = {"udmabuf": "udmabuf", "dma_heap:system": "heap:system"}


class KernelTimeline:
    """sw_sync of the kernel's, with the methods of `dmabuf.SwSync`."""

    def __init__(self) -> None:
        self.device = SwSyncTimeline()
        self.inc, self.close = self.device.increment, self.device.close

    def create_fence(self, value: int) -> SyncFile:
        return SyncFile.from_owned_fd(self.device.fence(value))

    def get_deadline(self, file: Any) -> int:
        return self.device.deadline(file if isinstance(file, int) else file.fileno())


class KernelBench(Bench):
    """Buffers and fences of the kernel's."""

    def opened(self, mode: int) -> int | None:
        if self.heap == "udmabuf":  # always O_RDWR
            return None
        with call.open_node("/dev/dma_heap/system", "open") as node:
            return heap.allocate(node.number, PAGE, fd_flags=mode).take()

    def timeline(self) -> Any:
        try:
            made = KernelTimeline()
        except FileNotFoundError:
            raise NotHere from None
        self.keep(made.close)
        return made


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", list(CASES))
def test_our_api_over_a_dma_buf_answers_as_the_kernel(name: str, home: str) -> None:
    question = name.replace("*", HOMES[home])
    if question not in RECORDED:
        pytest.skip("this kernel was not asked")
    try:
        ours = cases.ask(name, KernelBench(home))
    except NotHere:
        pytest.skip(f"{home} is made with one access mode only, or this kernel has no sw_sync")
    theirs = cases.normal(RECORDED[question].answer)
    assert ours == theirs or any(one.covers(question, RUNNING or "") for one in DIFFERENCES), RECORDED[question].call
