"""``Plan``: the stages of a pipeline with their options, checked as far as that is possible before their processes run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from dmabuf._native import STREAM_SLOTS
from dmabuf.pipe.words import Words, parsed, refused

MOST_WORKERS: Final = 16
RESTARTS: Final = 3  # of restart=on-failure without a number
_GROUPS: Final = 8  # of a stream
_READERS: Final = 32  # the same; each stage that gets every frame has one for the parent
_FUNCTION: Final = re.compile(r"[\w./-]+:[A-Za-z_][\w.]*")
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_PATTERN: Final = re.compile(r"%0?\d*d")

# The options of each kind of source and sink, beside those of every stage. A function's own are its keyword arguments.
SOURCES: Final = {
    "video": ("format", "size", "frames"),
    "images": ("format", "size", "frames", "rate"),
    "raw": ("format", "width", "height", "frames", "rate"),
    "camera": ("format", "size", "frames", "pixelformat"),
    "test": ("format", "size", "count", "rate"),
}
SINKS: Final = {"video": ("rate", "codec"), "images": ("start",), "raw": (), "null": (), "show": ("every",)}
_EVERY: Final = ("name", "kill_at")
_READS: Final = ("policy", "checksum")
_PRODUCES: Final = ("buffers", "when_full")


@dataclass
class Spec:
    """A stage.

    ``side``: "source", "function" or "sink". ``kind``: what of these, as "video". ``target``: its path or function. ``own``: the options of
    its kind. ``after``: the name of the stage whose frames it reads. ``restarts``: how often its processes may be started again.
    ``part``: the name under which a sink writes its file until it is complete.
    """

    name: str
    side: str
    kind: str
    target: str
    own: dict[str, str] = field(default_factory=dict)
    after: str | None = None
    workers: int = 1
    policy: str = "queue"
    buffers: int | None = None
    when_full: str = "wait"
    restarts: int = 0
    checksum: bool = False
    kill_at: int | None = None
    part: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it for a message."""
        return asdict(self)


@dataclass
class Plan:
    """A pipeline that makes sense, as far as its words say."""

    stages: list[Spec]

    def stage(self, name: str) -> Spec:
        """Return a stage by its name."""
        return next(spec for spec in self.stages if spec.name == name)

    def readers(self, name: str) -> list[Spec]:
        """Return the stages that read the frames of a stage."""
        return [spec for spec in self.stages if spec.after == name]

    def lanes(self, spec: Spec) -> bool:
        """Return True if each worker of a stage reads the frames of one worker of the stage before."""
        return spec.after is not None and spec.workers > 1 and self.stage(spec.after).workers > 1

    def way(self, spec: Spec) -> list[Spec]:
        """Return the stages with workers whose frames a stage merges, in the order in which frames pass them; none if it merges none."""
        found: list[Spec] = []
        while spec.after is not None and (before := self.stage(spec.after)).workers > 1 and (found or spec.workers == 1):
            found.insert(0, before)
            spec = before
        return found


def planned(words: Sequence[str]) -> Plan:
    """Return the plan of a command line.

    Raises:
        InvalidError: It makes no sense (EINVAL).
    """
    return checked(parsed(words))


def checked(stages: Sequence[Words]) -> Plan:
    """Return the plan of stages; see :func:`planned`."""
    read = {id(stage.after) for stage in stages if isinstance(stage.after, Words)}
    at = {stage.after for stage in stages if isinstance(stage.after, str)}
    plan, made = Plan([]), dict[int, Spec]()
    for stage in stages:
        spec = _spec(stage, first=stage.after is None, last=id(stage) not in read)
        spec.name = _unique(stage.options.get("name") or _named(spec), "name" in stage.options, (one.name for one in plan.stages), stage)
        made[id(stage)] = spec
        plan.stages.append(spec)
    for stage in stages:
        spec = made[id(stage)]
        if isinstance(stage.after, Words):
            spec.after = made[id(stage.after)].name
        elif stage.after is not None:
            if stage.after not in (one.name for one in plan.stages):
                names = ", ".join(one.name for one in plan.stages)
                raise refused(f"@{stage.after}", "no stage has this name", f"use one of: {names}; name=… names a stage")
            spec.after = stage.after
    for name in at:
        if plan.stage(name).side == "sink":
            raise refused(f"@{name}", "a sink gives no frames", "name the stage before it")
    return linked(plan)


def linked(plan: Plan) -> Plan:
    """Check how the stages of a plan read each other, and say how many buffers each stream has.

    Raises:
        InvalidError: It makes no sense (EINVAL).
    """
    for spec in plan.stages:
        _check_links(plan, spec)
    return plan


def _check_links(plan: Plan, spec: Spec) -> None:
    before: Spec | None = spec
    seen = set()
    while before is not None and before.after is not None:
        if before.name in seen:
            raise refused(spec.name, "its frames come from itself", "let a chain begin with a source")
        seen.add(before.name)
        before = plan.stage(before.after)
    readers = plan.readers(spec.name)
    if spec.side == "source" and not readers:
        raise refused(spec.target, "nothing reads it", f"write: dmabuf pipe {spec.target} ! STAGE")
    if len(readers) > _GROUPS:
        raise refused(spec.name, f"{len(readers)} stages read it", f"let at most {_GROUPS} stages read one")
    places = sum(1 + (1 if plan.lanes(one) else one.workers) for one in readers)
    if places > _READERS:
        raise refused(spec.name, f"it needs {places} readers, and a stream has {_READERS}", "give the stages that read it fewer workers")
    if spec.after is not None and spec.workers > 1 and plan.stage(spec.after).workers not in (1, spec.workers):
        what = f"it has {spec.workers} workers, and {spec.after} before it {plan.stage(spec.after).workers}"
        raise refused(spec.name, what, "give both the same number, or put a stage with one worker between them")
    # The newest frame is never overwritten, and each process that works on one holds one.
    need = 2 + sum(1 if plan.lanes(one) else one.workers for one in readers)
    if spec.buffers is None:
        spec.buffers = min(STREAM_SLOTS, max(4, need))
    elif readers and spec.buffers < need - 1:
        raise refused(f"{spec.name} buffers={spec.buffers}", f"its readers are {need - 2} processes", f"use buffers={need} or more")


def _spec(stage: Words, *, first: bool, last: bool) -> Spec:
    spec = _recognized(stage.target, first=first)
    if spec.side == "sink" and not last:
        raise refused(stage.target, "a sink gives no frames, and a stage follows it", "put it last; @NAME begins another branch")
    allowed = [*_EVERY]
    if spec.side != "source":
        allowed += _READS
    if spec.side != "sink":
        allowed += _PRODUCES
    restartable = spec.side != "sink" or spec.kind in ("images", "null", "show")
    if restartable:
        allowed.append("restart")
    if spec.side == "function":
        allowed.append("workers")
    own = None if spec.kind == "function" else (SOURCES if spec.side == "source" else SINKS)[spec.kind]
    for key, value in stage.options.items():
        if key in allowed:
            _OPTIONS[key](spec, value, f"{stage.target} {key}={value}")
        elif key == "restart" and not restartable:
            raise refused(f"{stage.target} restart=", "a file that was begun can't be continued", "leave it out")
        elif (key in _OPTIONS and own is None) or (own is not None and key not in own):
            names = ", ".join(sorted([*allowed, *(own or ())]))
            raise refused(f"{stage.target} {key}={value}", f"a {_words(spec)} has no such option", f"use one of: {names}")
        else:
            spec.own[key] = value
    if spec.policy == "latest" and spec.checksum:
        raise refused(stage.target, "checksum= of frames of which some are left out", "leave checksum= or policy=latest out")
    return spec


def _words(spec: Spec) -> str:
    return spec.kind if spec.kind == "function" else f"{spec.kind} {spec.side}"


def _recognized(target: str, *, first: bool) -> Spec:
    """Return the kind of a stage by its target."""
    side = "source" if first else "sink"
    kinds: Iterable[str] = SOURCES if first else SINKS
    word, colon, rest = target.partition(":")
    if word == "raw" and colon:
        if not rest:
            raise refused(target, "it names no file", f"write {target}PATH")
        return Spec("", side, "raw", rest)
    if word == "camera":
        if not first:
            raise refused(target, "a camera gives frames and takes none", "put it first")
        return Spec("", side, "camera", rest or "/dev/video0")
    if target in ("test", "null", "show"):
        if target not in kinds:
            place = "first" if target == "test" else "after a stage"
            raise refused(target, f"it is a {'source' if target == 'test' else 'sink'}", f"put it {place}")
        return Spec("", side, target, target)
    if colon and _FUNCTION.fullmatch(target):
        return Spec("", "source" if first else "function", "function", target)
    if colon and not Path(target).parent.is_dir():
        raise refused(target, "it is neither a function nor a file", "write MODULE:FUNCTION, FILE.py:FUNCTION, or the path of a file")
    return Spec("", side, *_file(target, first=first))


def _file(target: str, *, first: bool) -> tuple[str, str]:
    path, suffix = Path(target), Path(target).suffix.lower()
    if first:
        if any(c in target for c in "*?["):
            return "images", target
        if not path.is_file():
            remedy = "begin with a file, a pattern of images, camera, raw:PATH, test, or MODULE:FUNCTION"
            raise refused(target, "it is no source: there is no such file", remedy)
        return ("images" if suffix in _IMAGES else "video"), target
    if _PATTERN.search(path.name):
        if suffix not in _IMAGES:
            raise refused(target, f"images can't be written as {suffix or 'a name without an ending'}", f"use one of {', '.join(_IMAGES)}")
        return "images", target
    if suffix in _IMAGES:
        raise refused(target, "one image for all frames", f"number the images: {path.with_name(path.stem + '-%05d' + suffix)}")
    if not suffix:
        raise refused(target, "it is neither a function, nor a file to write", "write MODULE:FUNCTION, or name a file, as out.mp4")
    return "video", target


def _named(spec: Spec) -> str:
    if spec.kind == "function":
        return spec.target.rpartition(":")[2].rpartition(".")[2]
    if spec.kind in ("null", "show", "test", "camera", "raw"):
        return spec.kind
    return Path(spec.target).stem if spec.kind == "video" else "images"


def _unique(name: str, given: bool, names: Iterable[str], stage: Words) -> str:
    taken = set(names)
    if given and (name in taken or not name.isprintable() or name.startswith("@") or not name):
        raise refused(f"{stage.target} name={name}", "it is no name, or another stage has it", "give each stage a name of its own")
    unique, n = name, 2
    while unique in taken:
        unique, n = f"{name}-{n}", n + 1
    return unique


# ---- options ----


def number(text: str, what: str, *, low: int, high: int | None = None) -> int:
    """Return a number in words. Raise ``InvalidError`` if it is none, or out of range."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        span = f"{low} or more" if high is None else f"{low} to {high}"
        raise refused(what, "it is not such a number", f"use a number: {span}")
    return value


def chosen(text: str, what: str, among: Sequence[str]) -> str:
    """Return a word that is one of some. Raise ``InvalidError`` if it is none."""
    if text not in among:
        raise refused(what, "there is no such choice", f"use one of: {', '.join(among)}")
    return text


def sized(text: str, what: str) -> tuple[int, int]:
    """Return (width, height) of WIDTHxHEIGHT. Raise ``InvalidError`` if it is none."""
    width, x, height = text.partition("x")
    if not x:
        raise refused(what, "it is not a size", "write WIDTHxHEIGHT, as 640x480")
    return number(width, what, low=1), number(height, what, low=1)


def _set_restart(spec: Spec, text: str, what: str) -> None:
    word, colon, count = text.partition(":")
    if word == "on-failure":
        spec.restarts = number(count, what, low=1) if colon else RESTARTS
    elif text != "never":
        raise refused(what, "there is no such choice", "use never, on-failure, or on-failure:N")


def _setter(field: str, convert: Callable[[str, str], Any]) -> Callable[[Spec, str, str], None]:
    def put(spec: Spec, text: str, what: str) -> None:
        setattr(spec, field, convert(text, what))

    return put


_OPTIONS: Final[dict[str, Callable[[Spec, str, str], None]]] = {
    "name": _setter("name", lambda text, what: text),
    "kill_at": _setter("kill_at", lambda text, what: number(text, what, low=0)),
    "policy": _setter("policy", lambda text, what: chosen(text, what, ("queue", "latest"))),
    "checksum": _setter("checksum", lambda text, what: chosen(text, what, ("yes", "no")) == "yes"),
    "buffers": _setter("buffers", lambda text, what: number(text, what, low=2, high=STREAM_SLOTS)),
    "when_full": _setter("when_full", lambda text, what: chosen(text, what, ("wait", "drop"))),
    "workers": _setter("workers", lambda text, what: number(text, what, low=1, high=MOST_WORKERS)),
    "restart": _set_restart,
}


def part_of(path: str) -> str:
    """Return the name under which a file is written until it is complete: beside it, with its ending."""
    whole = Path(path)
    return str(whole.with_name(f".{whole.stem}.{os.getpid()}.part{whole.suffix}"))
