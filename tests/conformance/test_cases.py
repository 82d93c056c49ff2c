"""Every question that the kernels were asked: we answer the same, or the difference is explained, or the question has no meaning for us."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest

from tests.conformance import cases
from tests.conformance.cases.bench import CASES, Bench
from tests.conformance.cases.reasons import DIFFERENCES, NO_MEANING, no_meaning
from tests.support.facts import all_facts
from tools import conformance

QUESTIONS = cases.questions()


def compared(name: str, ours: Any) -> Iterator[tuple[str, str, bool, Any]]:
    """(question, kernel, is our answer the kernel's, the kernel's) for all that a case is compared with."""
    for question in QUESTIONS[name]:
        for kernel, fact in all_facts()[question].items():
            theirs = cases.normal(fact.answer)
            yield question, kernel, theirs == ours, theirs


@pytest.mark.parametrize("name", list(CASES))
def test_we_answer_as_the_kernels_or_say_why_not(name: str) -> None:
    ours = cases.ask(name, Bench())
    unexplained = [
        f"{question} on {kernel}: {theirs!r}"
        for question, kernel, same, theirs in compared(name, ours)
        if not same and not any(one.covers(question, kernel) for one in DIFFERENCES)
    ]
    assert not unexplained, f"ours is {ours!r}"
    # An explanation that nothing needs any more is a promise that nobody keeps.
    for one in DIFFERENCES:
        for pattern in one.questions:
            covered = [
                same
                for question, kernel, same, _ in compared(name, ours)
                if fnmatchcase(question, pattern) and one.covers(question, kernel)
            ]
            assert not covered or not all(covered), f"{pattern} is not different: {one.why}"


def test_every_question_is_a_case_or_has_its_reason_and_not_both() -> None:
    for question in all_facts():
        is_case, why = cases.case_of(question) in CASES, no_meaning(question)
        assert is_case != bool(why), f"{question}: {why}"
    unneeded = [pattern for pattern in NO_MEANING if not any(fnmatchcase(question, pattern) for question in all_facts())]
    assert unneeded == []


def test_every_case_has_its_question() -> None:
    assert [name for name, found in QUESTIONS.items() if not found] == []


def test_every_explanation_is_of_a_case() -> None:
    asked = [question for found in QUESTIONS.values() for question in found]
    for one in DIFFERENCES:
        for pattern in one.questions:
            assert any(fnmatchcase(question, pattern) for question in asked), pattern


def test_the_page_of_conformance_is_up_to_date() -> None:
    answers = {name: cases.ask(name, Bench()) for name in CASES}
    assert conformance.PAGE.read_text(encoding="utf-8") == conformance.page(answers), "run `python -m tools.conformance`"


def test_there_are_at_least_500_cases() -> None:
    assert sum(len(found) for found in QUESTIONS.values()) >= 500
