"""Make docs/conformance.md: the library's answers beside those of four series of kernels, with every difference explained.

    python -m tools.conformance            asks the cases of tests/conformance/cases, and writes docs/conformance.md
    python -m tools.conformance --check    1 when it is not up to date

Differences and their reasons are data: tests/conformance/cases/reasons.py.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conformance import cases
from tests.conformance.cases.bench import CASES, Bench
from tests.conformance.cases.reasons import DIFFERENCES, NO_MEANING, no_meaning
from tests.support.facts import all_facts, kernels
from tools.pages import up_to_date

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conformance.md"
SERIES = ("6.1", "6.12", "6.18", "7.3")
AREAS = {
    "sync": "CPU access: DMA_BUF_IOCTL_SYNC, `buf.sync()`",
    "name": "Names: DMA_BUF_SET_NAME, `buf.name`",
    "file": "The descriptor: lseek, fdinfo, references",
    "mmap": "Mappings: mmap, `buf.mmap()`",
    "poll": "Waiting: poll, `buf.poll()`, `buf.poll_fd()`, sync files",
    "heap": "Allocation: DMA_HEAP_IOCTL_ALLOC, `dmabuf.allocate()`, and access modes",
    "syncfile": "Sync files: SYNC_IOC_*, EXPORT_SYNC_FILE, IMPORT_SYNC_FILE",
    "swsync": "Software timelines: sw_sync",
    "limits": "Limits",
    "debugfs": "Texts of debugfs",
}


def shown(value: Any) -> str:
    """An answer in a cell."""
    text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)
    return "`" + text.replace("|", "\\|") + "`"


def _cell(questions: list[str], series: str, ours: Any) -> str:
    """Return what one series answered: ``=`` as the library, ``–`` not asked, else the answer, with the exporter if they differ."""
    answers: dict[str, list[str]] = {}
    for question in questions:
        for kernel, fact in all_facts()[question].items():
            if kernel.partition("-")[0] == series:
                theirs = cases.normal(fact.answer)
                whose = answers.setdefault("=" if theirs == ours else shown(theirs), [])
                exporter = cases.exporter_of(question) or kernel
                if exporter not in whose:
                    whose.append(exporter)
    if not answers:
        return "–"
    if len(answers) == 1:
        return next(iter(answers))
    return "; ".join(answer if answer == "=" else f"{answer} ({', '.join(whose)})" for answer, whose in answers.items())


def _notes(questions: list[str], ours: Any) -> str:
    found = []
    for number, one in enumerate(DIFFERENCES, 1):
        differs = (
            one.covers(question, kernel) and cases.normal(fact.answer) != ours
            for question in questions
            for kernel, fact in all_facts()[question].items()
        )
        if any(differs):
            found.append(f"[{number}](#differences)")
    return " ".join(found)


def _operation(name: str, questions: list[str]) -> str:
    call = next(iter(all_facts()[questions[0]].values())).call
    exporter = cases.exporter_of(questions[0])
    call = call.removeprefix(f"{exporter}: ").replace("|", "\\|").replace("\n", "\\n")
    return f"{call} <sub>{name.partition('/')[2].removeprefix('*-').replace('|', chr(92) + '|')}</sub>"


def page(answers: dict[str, Any]) -> str:
    """Return the text of docs/conformance.md for the library's answers by case."""
    asked = cases.questions()
    compared = sum(len(all_facts()[question]) for found in asked.values() for question in found)
    count = sum(len(found) for found in asked.values())
    lines = [
        "# Conformance",
        "",
        f"Eight kernels were asked {len(all_facts())} questions by raw system calls, with good and bad arguments. {count} of the questions",
        f"apply to this library. They are {len(CASES)} cases, each compared with every exporter that was asked: {compared} answers in all.",
        "Every answer of the library that differs has a note that says why. The questions that don't apply are listed at the end.",
        "",
        "`python -m tools.conformance` makes this page, on the home `memfd` (plain memory). `make test` compares the answers again, and",
        "`make test-kernel` checks that a real kernel still gives the recorded ones.",
        "",
        "`=` means that all kernels of the series, with all their exporters (system, reserved and default CMA heap, udmabuf, vgem, vkms,",
        "vivid), answer as the library does. `–` means that they were not asked. Otherwise the cell has the answer, with the exporter or",
        "build if they differ.",
        "",
        "| kernel | its version and build |",
        "|---|---|",
        *(f"| {short} | {about['release']} {about['version']}: {about['how']} |" for short, about in kernels().items()),
        "",
    ]
    assert {name.partition("/")[0] for name in CASES} == set(AREAS)
    for area, title in AREAS.items():
        names = [name for name in CASES if name.startswith(area + "/")]
        lines += [f"## {title}", "", "| operation | dmabuf | " + " | ".join(SERIES) + " | note |", "|---" * (len(SERIES) + 3) + "|"]
        for name in names:
            cells = [_cell(asked[name], series, answers[name]) for series in SERIES]
            notes = _notes(asked[name], answers[name])
            lines.append(f"| {_operation(name, asked[name])} | {shown(answers[name])} | {' | '.join(cells)} | {notes} |")
        lines.append("")
    lines += ["## Differences", ""]
    for number, one in enumerate(DIFFERENCES, 1):
        where = "" if one.kernels == "*" else f" ({one.kernels})"
        lines.append(f"{number}. {', '.join(f'`{pattern}`' for pattern in one.questions)}{where}: {one.why}")
    lines += ["", "## Questions that don't apply", "", "| questions | how many | why |", "|---|---|---|"]
    reasons = Counter(no_meaning(question) for question in all_facts() if cases.case_of(question) not in CASES)
    for why, number in reasons.most_common():
        patterns = [pattern.replace("|", "\\|") for pattern, reason in NO_MEANING.items() if reason == why]
        lines.append(f"| {', '.join(f'`{pattern}`' for pattern in patterns)} | {number} | {why} |")
    return "\n".join(lines).replace("docs/homes.md", "[homes.md](homes.md)") + "\n"


def ours() -> dict[str, Any]:
    """Return the library's answers, asked now."""
    return {name: cases.ask(name, Bench()) for name in CASES}


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    with tempfile.TemporaryDirectory() as directory:
        # A domain of its own, without the buffers of other processes, and gone afterwards.
        os.environ.setdefault("DMABUF_DOMAIN", directory)
        text = page(ours())
    return int(not up_to_date(PAGE, text, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
