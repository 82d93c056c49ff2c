"""The words of a pipeline: ``video.mp4 ! mymodule:edges workers=2 ! out.mp4 @video ! mymodule:count``.

A chain of stages is joined by ``!``. A stage is its target and then options, ``key=value``. A word that begins with ``@`` begins another
chain with the frames of the stage that it names.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from dmabuf.errors import DmaBufError, fail


@dataclass
class Words:
    """A stage as it was written. ``after``: the stage that it reads, a str for one that ``@`` names; None for the first of a chain."""

    target: str
    options: dict[str, str] = field(default_factory=dict)
    after: Words | str | None = None


def refused(what: str, happened: str, remedy: str) -> DmaBufError:
    """Return the error of a pipeline that makes no sense."""
    return fail(errno.EINVAL, "pipe", what, remedy, what=happened)


def parsed(words: Sequence[str]) -> list[Words]:
    """Return the stages of a pipeline in the order in which they are written.

    Raises:
        InvalidError: The words make no pipeline (EINVAL).
    """
    stages: list[Words] = []
    before: Words | str | None = None
    joined = True  # the next word is the target of a stage
    for word in words:
        if word == "!":
            if joined:
                raise refused("!", "no stage before it" if before is None else "two ! in a row", "write a stage between two !")
            joined = True
        elif word.startswith("@") and not (joined and before is not None):
            if not word[1:]:
                raise refused(word, "it names no stage", "write @ and the name of a stage")
            before, joined = word[1:], False
        elif joined:
            stages.append(_stage(word, before))
            before, joined = stages[-1], False
        elif isinstance(before, str):
            raise refused(f"@{before} {word}", "no ! before the next stage", f"write: @{before} ! {word}")
        else:
            assert before is not None
            _add_option(before, word)
    if joined:
        what = "a pipeline" if not stages else "!"
        raise refused(what, "no stage after it" if stages else "it has no stages", "write: dmabuf pipe SOURCE ! STAGE ! SINK")
    if isinstance(before, str):
        raise refused(f"@{before}", "nothing reads it", f"write: @{before} ! STAGE")
    return stages


def _stage(word: str, before: Words | str | None) -> Words:
    made = Words(word, after=before)
    if word.startswith("raw:"):  # raw:PATH,width=640,height=480: its options may stand behind commas
        made.target, *options = word.split(",")
        for option in options:
            _add_option(made, option)
    return made


def _add_option(stage: Words, word: str) -> None:
    key, sign, value = word.partition("=")
    if not sign or not key.isidentifier():
        raise refused(f"{stage.target} {word}", "it is not an option", f"write key=value, or ! before the next stage: ! {word}")
    if key in stage.options:
        raise refused(f"{stage.target} {word}", f"{key}= was given already", "give each option once")
    stage.options[key] = value
