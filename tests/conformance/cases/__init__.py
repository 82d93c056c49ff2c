"""One conformance suite, many judges: each question that the kernels were asked, asked of this library.

A *case* is a question's name and a function that does the same through our public API, with a `Bench` that makes buffers and fences. The
name has ``*`` where the recorded one has an exporter: such a case is compared with every exporter's answer. What real kernels answered is
in tests/kernel/facts. Every recorded question is a case, or has its reason in ``reasons.NO_MEANING``; every answer that differs is
explained in ``reasons.DIFFERENCES``, which says why we decided so.
"""

import importlib
import re
from typing import Any

from tests.conformance.cases.bench import CASES, Bench
from tests.support.facts import all_facts

for _area in ("sync", "name", "file", "mmap", "poll", "heap", "syncfile", "swsync"):
    importlib.import_module(f"tests.conformance.cases.{_area}")

EXPORTERS = ("heap:system", "heap:reserved", "heap:default_cma_region", "udmabuf", "vgem", "vkms", "vivid")


def case_of(question: str) -> str:
    """The case's name: the question's with ``*`` for its exporter."""
    area, _, rest = question.partition("/")
    for exporter in EXPORTERS:
        if rest.startswith(exporter + "-"):
            return f"{area}/*{rest.removeprefix(exporter)}"
    return question


def exporter_of(question: str) -> str | None:
    """The exporter whose answer it is; None where it is one for all."""
    rest = question.partition("/")[2]
    return next((exporter for exporter in EXPORTERS if rest.startswith(exporter + "-")), None)


def questions() -> dict[str, list[str]]:
    """The recorded questions of each case."""
    found: dict[str, list[str]] = {name: [] for name in CASES}
    for question in all_facts():
        if case_of(question) in found:
            found[case_of(question)].append(question)
    return found


def ask(name: str, bench: Bench) -> Any:
    """Our answer to a case: a value, or the name of an errno."""
    return normal(bench.answer(CASES[name]))


def normal(value: Any) -> Any:
    """An answer without what says nothing of the operation: the exporter's name, context numbers, inode and mount numbers."""
    if isinstance(value, str):
        value = re.sub(r"exp_name:\t[\w:]+", "exp_name:\tEXPORTER", value)
        value = re.sub(r"(ino|mnt_id):\t\d+", r"\1:\tN", value)
        value = re.sub(r"^sw_sync-python3?\d+-(\d+)$", r"DRIVER-TIMELINE-\1", value)
        return re.sub(r"^(sw_sync-python|vgem-unbound)N-N$", "DRIVER-TIMELINEN-N", value)
    if isinstance(value, list):
        return [normal(one) for one in value]
    if isinstance(value, dict):
        return {
            key: normal("TIMELINE" if one in ("python3", "python", "unbound") else "DRIVER" if one in ("sw_sync", "vgem") else one)
            for key, one in value.items()
        }
    return value
