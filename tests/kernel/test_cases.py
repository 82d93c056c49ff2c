"""The cases of tests/conformance on the kernel's own dma-bufs: our API over udmabuf and the system heap answers as the kernel did."""

from typing import Any

import pytest

from dmabuf import DmaBuf, Usage
from dmabuf.drivers.sw_sync import SwSyncTimeline
from dmabuf.uapi import call, dma_buf, heap
from tests.conformance import cases
from tests.conformance.cases.bench import CASES, PAGE, Bench, NotHere
from tests.conformance.cases.reasons import DIFFERENCES
from tests.kernel.test_facts import RECORDED, RUNNING

HOMES = {"udmabuf": "udmabuf", "dma_heap:system": "heap:system"}


class Pending:
    """A fence of the kernel's that somebody can end."""

    def __init__(self) -> None:
        self.timeline = SwSyncTimeline()
        self.file = self.timeline.fence(1)

    def signal(self) -> None:
        self.timeline.increment()

    def close(self) -> None:
        self.file.close()
        self.timeline.close()


class KernelBench(Bench):
    """Buffers and fences of the kernel's."""

    def opened(self, mode: int) -> int | None:
        if self.heap == "udmabuf":  # always O_RDWR
            return None
        with call.open_node("/dev/dma_heap/system", "open") as node:
            return heap.allocate(node.number, PAGE, fd_flags=mode).take()

    def pending(self) -> Any:
        made = Pending()
        self.keep(made.close)
        return made

    def add(self, buf: DmaBuf, pending: Any, usage: Usage) -> None:
        dma_buf.import_sync_file(buf.fileno(), dma_buf.WRITE if usage == Usage.WRITE else dma_buf.READ, pending.file.number)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", list(CASES))
def test_our_api_over_a_dma_buf_answers_as_the_kernel(name: str, home: str) -> None:
    question = name.replace("*", HOMES[home])
    if question not in RECORDED:
        pytest.skip("this kernel was not asked")
    try:
        ours = cases.ask(name, KernelBench(home))
    except NotHere:
        pytest.skip(f"{home} has none")
    theirs = cases.normal(RECORDED[question].answer)
    assert ours == theirs or any(one.covers(question, RUNNING or "") for one in DIFFERENCES), RECORDED[question].call
