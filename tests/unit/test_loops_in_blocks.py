"""No loop stands in a block that must be left in order, if CPython leaves the loop's jump backwards out of the block.

Signal handlers run at such jumps. Where a loop ends with a condition, the compilers of CPython 3.12 and 3.13 put the jump behind what the
table of exception handlers covers. What a handler raises there passes by the ``finally`` or the ``__exit__``, and a lock stays locked. A
loop in a function of its own, which the block calls, has no such place.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "dmabuf"
# Where nothing is lost: the thread runs no signal handlers (disk, server), the process ends (doctor's child), or what the block owns is
# closed with its object.
FINE = {
    "core/buffer/backing_kernel.py:KernelBacking.wait_kernel_async",
    "core/sync/eventfd_notice.py:EventfdNotice.advance",
    "devices/disk.py:DiskDevice._transfer",
    "domain/holders.py:_maps",
    "heap/budget.py:_read",
    "heap/memfd.py:reserved",
    "observe/machine.py:_wake_ns",
    "sharing/client.py:Client._undone",
    "sharing/sealed.py:sealed",
    "sharing/server.py:Server._greeted",
}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="the compiler of CPython 3.11 covers the jump")


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def uncovered(code: CodeType) -> bool:
    """Whether a jump backwards is outside of a handler that both the loop's head and what stands before the jump are inside of."""
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    steps = list(dis.get_instructions(code))
    place = {step.offset: i for i, step in enumerate(steps)}

    def guards(target: int) -> bool:
        names = [step.opname for step in steps[place[target] :][:3]]
        return names[0] == "PUSH_EXC_INFO" and "CALL_INTRINSIC_1" not in names

    def handlers(offset: int) -> set[int]:
        return {entry.target for entry in entries if entry.start <= offset < entry.end and guards(entry.target)}

    for i, step in enumerate(steps):
        if step.opname == "JUMP_BACKWARD" and step.positions is not None and step.positions.lineno is not None:
            before = set().union(*(handlers(earlier.offset) for earlier in steps[max(0, i - 2) : i]))
            if (before - handlers(step.offset)) & handlers(step.argval):
                return True
    return False


def places(text: str, name: str) -> Iterator[str]:
    for code in codes(compile(text, name, "exec")):
        if uncovered(code):
            yield f"{name}:{code.co_qualname}"


def test_such_a_loop_is_found() -> None:
    text = "def f(lock, xs):\n    with lock:\n        for x in xs:\n            if x.a == 1:\n                return x\n"
    assert list(places(text, "t")) == ["t:f"]


def test_loop_in_a_function_of_its_own_is_fine() -> None:
    text = "def f(lock, xs):\n    with lock:\n        return g(xs)\n\ndef g(xs):\n    for x in xs:\n        if x.a:\n            return x\n"
    assert list(places(text, "t")) == []


def test_blocks_of_the_library_have_no_such_loop() -> None:
    found = {
        place for path in SOURCE.rglob("*.py") for place in places(path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix())
    }
    assert found - FINE == set()
