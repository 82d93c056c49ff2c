"""What a real kernel answered: tests/conformance/kernel_facts.json."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[1] / "conformance" / "kernel_facts.json"


@dataclass(frozen=True)
class Fact:
    """One answer: `ret`, or the number of an `errno`."""

    id: str
    call: str
    ret: Any = None
    errno: int | None = None


def _load() -> dict[str, Fact]:
    rows = json.loads(_FILE.read_text(encoding="utf-8"))["facts"]
    found = (Fact(row["id"], row["call"], row.get("ret"), getattr(errno, row["errno"]) if "errno" in row else None) for row in rows)
    return {fact.id: fact for fact in found}


FACTS = _load()


def facts(prefix: str) -> list[Fact]:
    """All facts whose id begins so; at least one, or the table has lost them."""
    found = [fact for fact in FACTS.values() if fact.id.startswith(prefix)]
    assert found, prefix
    return found


def fact_id(fact: Fact) -> str:
    """For `pytest.mark.parametrize(ids=…)`."""
    return fact.id
