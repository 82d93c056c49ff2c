"""``dmabuf pipe``: a pipeline of processes, each a stage, joined by streams of frames (docs/pipe.md).

Exit status: 0 done; 1 a stage failed or was killed; 2 the pipeline makes no sense; 130 or 143 ended by SIGINT or SIGTERM, in order.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dmabuf.cli import data, show
from dmabuf.cli.app import Failure
from dmabuf.cli.show import safe
from dmabuf.errors import InvalidError, missing_extra
from dmabuf.observe.units import size

if TYPE_CHECKING:
    from dmabuf.pipe.outcome import Outcome, StageOutcome
    from dmabuf.pipe.plan import Plan
    from dmabuf.pipe.run import Progress


class Unusable(Failure):
    """A pipeline that makes no sense, in one line."""

    exit_code = 2


STDERR: Final = 2  # where the stages of a pipeline print to whose own output is JSON


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="SOURCE ! STAGE [OPTION=VALUE]… ! SINK", type=click.UNPROCESSED)
@data.as_json
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table.")
def command(words: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Run a pipeline of processes that hand frames on without copying them.

    \b
      dmabuf pipe video.mp4 ! mymodule:edges ! mymodule:detect workers=2 policy=latest ! out.mp4
      dmabuf pipe camera ! show
      dmabuf pipe test count=100 ! m:f ! null @test ! out-%05d.png

    \b
    Sources: a video, 'frames/*.png', raw:PATH,width=W,height=H, camera[:PATH], test, MODULE:FUNCTION
    Stages:  MODULE:FUNCTION or FILE.py:FUNCTION, called with the array of each frame
    Sinks:   a video, out-%05d.png, raw:PATH, null, show
    @NAME begins another branch with the frames of that stage.

    \b
    Options of all stages: name, kill_at. Of what reads: policy=queue|latest, checksum=yes.
    Of what makes frames: buffers, when_full=wait|drop. Of functions: workers, their own.
    restart=never|on-failure[:N] of all but files. docs/pipe.md has the rest.
    """
    if importlib.util.find_spec("numpy") is None:
        raise missing_extra("video", "numpy")
    from dmabuf.pipe.plan import planned
    from dmabuf.pipe.run import parts, run

    try:
        plan = planned(words)
        with parts(plan), _progress(plan, hidden=as_json or quiet) as progress:
            outcome = run(plan, progress, stdout=STDERR if as_json else None)
    except InvalidError as e:
        if e.operation != "pipe":
            raise
        raise Unusable(str(e)) from None
    status = _status(outcome)
    if as_json:
        data.print_json(report(outcome) | {"exit": status})
    elif not quiet:
        print_table(outcome)
    print_failures(outcome)
    raise SystemExit(status)


def _status(outcome: Outcome) -> int:
    if outcome.stopped_by:
        return 128 + outcome.stopped_by
    if outcome.failed is None:
        return 0
    return 2 if outcome.stage(outcome.failed).worst.usage else 1


@contextlib.contextmanager
def _progress(plan: Plan, *, hidden: bool) -> Iterator[Progress | None]:
    """Yield what shows the frames of each stage in one line on stderr, if that is a terminal."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if hidden or not console.is_terminal or any(spec.kind == "show" for spec in plan.stages):
        yield None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update(frames: dict[str, int]) -> None:
            line = "  ".join(f"{name} {count}" for name, count in frames.items())
            live.update(Text(safe(line), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield update


def print_failures(outcome: Outcome) -> None:
    """Say on stderr which stages failed, with the traceback of the user's code."""
    if outcome.stopped_by:
        click.echo(f"dmabuf: pipe: ended by {signal.Signals(outcome.stopped_by).name}", err=True)
    first = [stage for stage in outcome.stages if stage.spec.name == outcome.failed]
    for stage in [*first, *(stage for stage in outcome.stages if stage not in first and stage.state == "failed")]:
        worker = stage.worst
        if worker.usage:
            click.echo(f"dmabuf: {safe(worker.text)}", err=True)
            continue
        if worker.traceback:
            click.echo(worker.traceback.rstrip(), err=True)
        where = f"in frame {worker.counts['taken']}" if worker.counts["taken"] else "before the first frame"
        again = f", after {worker.restarts} restarts" if worker.restarts else ""
        click.echo(f"dmabuf: pipe: stage {safe(stage.spec.name)} failed {where}{again}: {safe(worker.text)}", err=True)


def report(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome for programs (docs/pipe.md)."""
    return {
        "seconds": outcome.seconds,
        "failed": outcome.failed or None,
        "signal": outcome.stopped_by or None,
        "outputs": outcome.outputs,
        "buffers": outcome.buffers,
        "buffer_bytes": outcome.buffer_bytes,
        "stages": [stage_json(stage) for stage in outcome.stages],
    }


def stage_json(stage: StageOutcome) -> dict[str, Any]:
    """Return a stage for programs."""
    return {
        "name": stage.spec.name,
        "target": stage.spec.target,
        "state": stage.state,
        "frames": stage.total("frames"),
        "frames_per_second": stage.rate,
        "waits": stage.total("waits"),
        "wait_seconds": stage.total("wait_ns") / 1e9,
        "blocks": stage.total("blocks"),
        "block_seconds": stage.total("block_ns") / 1e9,
        "lost": stage.lost,
        "cpu_seconds": stage.total("cpu_ns") / 1e9,
        "copied": stage.total("copied"),
        "copied_between_processes": stage.total("copied_between"),
        "shared": stage.total("shared"),
        "workers": [
            {
                "pid": worker.pid,
                "exit": worker.exit,
                "state": worker.state,
                "text": worker.text,
                "traceback": worker.traceback,
                "frames": worker.counts["frames"],
                "restarts": worker.restarts,
                "result": worker.result,
                "checksum": worker.checksum,
            }
            for worker in stage.workers
        ],
    }


def grid_of(outcome: Outcome) -> show.Grid:
    """Return the table of stages."""
    grid = show.Grid("STAGE", "FRAMES", "FRAMES/S", "WAITED", "BLOCKED", "LOST", "CPU", "COPIED", "", right=tuple(range(1, 8)))
    for stage in outcome.stages:
        notes = [] if stage.state == "done" else [stage.state]
        restarts = sum(worker.restarts for worker in stage.workers)
        notes += [f"{len(stage.workers)} workers"] if len(stage.workers) > 1 else []
        notes += [f"{restarts} restart{'s' * (restarts > 1)}"] if restarts else []
        notes += [str(worker.result) for worker in stage.workers if worker.result is not None]
        notes += [f"sha256 {worker.checksum}" for worker in stage.workers if worker.checksum is not None]
        grid.row(
            safe(stage.spec.name),
            str(stage.total("frames")),
            f"{stage.rate:.1f}" if stage.rate else "–",
            f"{stage.total('wait_ns') / 1e9:.2f} s",
            f"{stage.total('block_ns') / 1e9:.2f} s",
            str(stage.lost),
            f"{stage.total('cpu_ns') / 1e9:.2f} s",
            size(stage.total("copied")),
            safe(", ".join(notes)),
        )
    return grid


def print_table(outcome: Outcome) -> None:
    """Print the table of stages, and what was written."""
    out = show.console()
    grid_of(outcome).print(out)
    copied = sum(stage.total("copied_between") for stage in outcome.stages)
    shared = sum(stage.total("shared") for stage in outcome.stages)
    out.print(f"copied between processes: {copied} bytes; {size(shared)} of frames were read where they were written")
    for path in outcome.outputs:
        out.print(f"written: {safe(path)}")
