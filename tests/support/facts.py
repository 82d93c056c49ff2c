"""What real kernels answered: tests/kernel/facts, eight kernels from 6.1 to 7.3, asked by tests/kernel/questions.

A file is an area of questions; a question has its answers, each with the kernels that gave it (``on``). ``kernels.json`` says what the
kernels are. `FACTS` are the answers of one, the judge of the tests that compare with *the* kernel: 6.12 with every option on.
"""

import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "kernel" / "facts"
JUDGE = "6.12-full"


@dataclass(frozen=True)
class Fact:
    """One answer: `ret`, or the number of an `errno`, or the name of the `signal` that ended the asker."""

    id: str
    call: str
    ret: Any = None
    errno: int | None = None
    signal: str | None = None

    @property
    def answer(self) -> Any:
        """``ret``, or the name of the errno or signal."""
        if self.errno is not None:
            return errno.errorcode[self.errno]
        return self.signal if self.signal is not None else self.ret


def fact_of(name: str, call: str, answer: dict[str, Any]) -> Fact:
    """A fact from an answer in JSON."""
    number = getattr(errno, answer["errno"]) if "errno" in answer else None
    return Fact(name, call, answer.get("ret"), number, answer.get("signal"))


@cache
def kernels() -> dict[str, dict[str, str]]:
    """What was asked: the kernels by the short names that ``on`` uses."""
    found: dict[str, dict[str, str]] = json.loads((DIRECTORY / "kernels.json").read_text(encoding="utf-8"))
    return found


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(DIRECTORY.glob("*.json")):
        if path.name != "kernels.json":
            yield from json.loads(path.read_text(encoding="utf-8")).items()


@cache
def all_facts() -> dict[str, dict[str, Fact]]:
    """Every question, and its answers by kernel."""
    return {
        name: {on: fact_of(name, row["call"], answer) for answer in row["answers"] for on in answer["on"].split()} for name, row in _rows()
    }


def facts_of(kernel: str) -> dict[str, Fact]:
    """What one kernel answered, by question."""
    return {name: answers[kernel] for name, answers in all_facts().items() if kernel in answers}


def short_name(kernel: str) -> str | None:
    """The short name of a kernel of the cache, as ``6.12.117-uml``; None if no such series was asked."""
    series = ".".join(kernel.split(".")[:2]).split("-")[0]
    kind = "-uml" if kernel.endswith("-uml") else "-full" if kernel.endswith("-oracle") else ""
    return series + kind if series + kind in kernels() else None


FACTS = facts_of(JUDGE)


def facts(prefix: str) -> list[Fact]:
    """All facts of the judge whose id begins so; at least one, or the table has lost them."""
    found = [fact for fact in FACTS.values() if fact.id.startswith(prefix)]
    assert found, prefix
    return found


def fact_id(fact: Fact) -> str:
    """For `pytest.mark.parametrize(ids=…)`."""
    return fact.id
