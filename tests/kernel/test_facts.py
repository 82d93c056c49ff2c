"""The running kernel answers as the recorded facts of its series say: the judge of the default tests is still that kernel."""

import contextlib
import os
import re
from functools import cache
from typing import Any

import pytest

from dmabuf.drivers.camera import Camera
from tests.kernel.questions import AREAS, ask
from tests.support.facts import Fact, fact_of, facts_of, short_name

RUNNING = short_name(os.environ.get("DMABUF_KERNEL", "6.12.0-uml"))
RECORDED = facts_of(RUNNING) if RUNNING is not None else {}

# What says something of the machine or of the moment, not of dma-bufs.
VOLATILE = {
    "env/uname": "the release itself",
    "env/dri": "which drivers a kernel was built with",
    "debugfs/bufinfo": "which exporters there are; compared by its blocks below",
    "limits/heap-0.99-ram": "whether 99 % of memory is free depends on what else runs",
    "debugfs/sysfs-inos": "inode numbers count up from boot",
}

# Exporters that a shorter build leaves out.
OPTIONAL = ("vkms", "heap:reserved", "heap:default_cma_region", "vivid")


def normal(value: Any) -> Any:
    """An answer without what differs from run to run: inode and context numbers, times since boot."""
    if isinstance(value, str):
        value = re.sub(r"@\d+\.\d{9}", "@T", value)
        value = re.sub(r"(sw_sync-python)3?\d+", r"\1N", value)
        value = re.sub(r"(?m)^(\d{8}(?:\t[0-9a-f]{8}){2}\t\d{8}\t\w+)\t\d{8}", r"\1\tINO", value)
        value = re.sub(r"fence:\d+:", "fence:N:", value)
        return re.sub(r"(ino|mnt_id):\t\d+", r"\1:\tN", value)
    if isinstance(value, list):
        return [normal(one) for one in value]
    if isinstance(value, dict):
        return {normal(key) if not str(key).isdigit() else "N": normal(one) for key, one in value.items()}
    return value


@pytest.fixture(autouse=True)
def leaves_nothing() -> None:
    """The look at what a test left behind, which costs more than the question: what asks is a child that ends."""


def default_picture() -> None:
    """The test camera's, which other tests change: the size of its buffers is on record."""
    with contextlib.suppress(FileNotFoundError), Camera() as camera:
        camera.configure(640, 360, "YUYV")


@cache
def answers(area: str, through: bool) -> dict[str, Fact]:
    """What the running kernel says, asked once. ``through``: by our uapi layer."""
    default_picture()
    return {row["id"]: fact_of(row["id"], row["call"], row) for row in ask(area, through=through)}


@pytest.mark.parametrize("through", [False, True], ids=["raw", "uapi"])
@pytest.mark.parametrize("name", [name for name in RECORDED if name not in VOLATILE])
def test_the_kernel_answers_as_recorded(name: str, through: bool) -> None:
    """Raw calls, and those of dmabuf.uapi: results and errnos are the same."""
    found = answers(name.partition("/")[0], through)
    for exporter in OPTIONAL:
        if exporter in name and not any(exporter in one for one in found):
            pytest.skip(f"this kernel is built without {exporter}")
    assert name in found, f"not asked: {[one for one in found if one.endswith(('ABORTED', 'KILLED'))] or 'the question is gone'}"
    assert normal(found[name].answer) == normal(RECORDED[name].answer), found[name].call


def test_bufinfo_has_the_recorded_text_for_each_buffer() -> None:
    def blocks(facts: dict[str, Fact]) -> list[str]:
        text: str = normal(facts["debugfs/bufinfo"].ret)
        return text.rpartition("\n\nTotal")[0].split("\n\n")

    there, recorded = blocks(answers("debugfs", False)), blocks(RECORDED)
    assert len(there) >= 4
    assert there[0] == recorded[0]
    assert [block for block in there if block not in recorded] == []


@pytest.mark.parametrize("area", list(AREAS))
def test_every_question_that_is_asked_has_its_answer_on_record(area: str) -> None:
    assert RUNNING is not None, "this series was never asked; write its facts first"
    asked = answers(area, False)
    assert {name for name in asked if name not in RECORDED} == set(), {name: one.ret for name, one in asked.items() if "ABORTED" in name}


def test_a_guest_is_named_by_its_series_and_kind() -> None:
    assert [short_name(name) for name in ("6.12.117-uml", "6.12.117+deb12-amd64", "6.1.0-56-amd64", "7.3.4-oracle", "5.10.1-amd64")] == [
        "6.12-uml",
        "6.12",
        "6.1",
        "7.3-full",
        None,
    ]
