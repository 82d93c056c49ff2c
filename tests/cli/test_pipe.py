"""`dmabuf pipe`: whole pipelines of processes. A frame n of `test` (from 0) has 3 n in its first pixel, modulo 256."""

import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dmabuf
from dmabuf.pipe.outcome import Outcome, left_behind
from dmabuf.pipe.plan import Spec, planned
from dmabuf.pipe.process import Worker
from dmabuf.pipe.run import parts, run
from tests.cli.conftest import SCRIPT, Run
from tests.cli.stages import frames_in, make_clip

pytestmark = pytest.mark.usefixtures("forked_stages")

SMALL = "size=8x6 format=gray"
FIRSTS = "tests.cli.work:Firsts"


def ran(text: str, progress: Callable[[dict[str, int]], None] | None = None) -> Outcome:
    """Run a pipeline, of which nothing is left."""
    plan = planned(text.split())
    with parts(plan):
        outcome = run(plan, progress)
    assert left_behind(outcome.inos, outcome.pids) == []
    assert dmabuf.buffers() == []
    return outcome


def firsts(outcome: Outcome, name: str = "Firsts") -> Any:
    return outcome.stage(name).workers[0].result


def threes(*numbers: int) -> list[int]:
    return [3 * n % 256 for n in numbers]


def test_every_frame_goes_through_every_stage_in_order():
    outcome = ran(f"test count=20 {SMALL} ! tests.cli.work:inverted ! tests.cli.work:added amount=2 ! {FIRSTS} scale=2")
    assert outcome.failed is None
    assert firsts(outcome) == [2 * ((255 - 3 * n + 2) % 256) for n in range(20)]
    assert [stage.total("frames") for stage in outcome.stages] == [20] * 4
    assert [stage.lost for stage in outcome.stages] == [0] * 4
    assert [stage.total("copied") for stage in outcome.stages] == [20 * 48, 0, 20 * 48, 0]
    assert [stage.total("copied_between") for stage in outcome.stages] == [0] * 4
    assert [stage.total("shared") for stage in outcome.stages] == [0, 20 * 48, 20 * 48, 20 * 48]
    assert len({worker.pid for stage in outcome.stages for worker in stage.workers} | {os.getpid()}) == 5
    assert all(stage.total("cpu_ns") > 0 and stage.rate > 0 for stage in outcome.stages)


def test_function_may_change_shape_drop_frames_and_give_values():
    outcome = ran(f"test count=6 {SMALL} ! tests.cli.work:odd_only ! tests.cli.work:marked ! tests.cli.work:halved ! {FIRSTS}")
    assert firsts(outcome) == [[3 * n, {"first": 3 * n, "marked": "seen"}] for n in (1, 3, 5)]
    assert outcome.stage("Firsts").total("shared") == 3 * 12


def test_function_that_writes_may_refuse_a_frame_and_has_its_own_shape():
    outcome = ran(f"test count=4 {SMALL} ! tests.cli.work:odd_written ! tests.cli.work:mean ! {FIRSTS}")
    assert [first for first, _ in firsts(outcome)] == threes(1, 3)
    assert [round(meta["mean"] - first) for first, meta in firsts(outcome)] == [8, 8]  # x + 2 y of 8 x 6: 3.5 + 5
    outcome = ran(f"test count=2 {SMALL} ! tests.cli.work:mean_rows shape=6 dtype=float32 ! null")
    assert outcome.stage("null").total("shared") == 2 * 24


def test_frames_of_workers_come_in_order():
    outcome = ran(f"test count=30 {SMALL} ! tests.cli.work:odd_only workers=3 ! {FIRSTS}")
    assert firsts(outcome) == threes(*range(1, 30, 2))
    assert outcome.stage("odd_only").total("frames") == 30
    assert outcome.stage("odd_only").lost == 0


def test_workers_behind_workers_keep_the_order():
    outcome = ran(f"test count=20 {SMALL} ! tests.cli.work:odd_only workers=2 ! tests.cli.work:same workers=2 ! {FIRSTS}")
    assert firsts(outcome) == threes(*range(1, 20, 2))


def test_latest_gets_the_newest_and_no_frame_twice():
    outcome = ran(f"test count=300 size=8x6 format=gray16le ! tests.cli.work:same policy=latest workers=2 ! {FIRSTS}")
    same = outcome.stage("same")
    seen = firsts(outcome)
    assert seen[-1] == 3 * 299
    assert seen == sorted(set(seen))
    assert len(seen) == same.total("frames")
    assert same.total("frames") + same.lost == 300
    assert outcome.failed is None


@pytest.mark.crash
@pytest.mark.parametrize("workers", [1, 2])
def test_latest_that_is_started_again_sees_no_frame_twice(workers):
    outcome = ran(
        f"test count=9 size=8x6 format=gray16le ! tests.cli.work:killed at=8 policy=latest workers={workers} restart=on-failure ! {FIRSTS}"
    )
    seen = firsts(outcome)
    assert outcome.failed is None
    assert seen == sorted(set(seen))
    assert sum(worker.restarts for worker in outcome.stage("killed").workers) == 1
    assert 24 not in seen


def test_two_branches_read_the_same_frames():
    outcome = ran(f"test count=8 {SMALL} ! tests.cli.work:inverted ! {FIRSTS} @test ! {FIRSTS} name=other checksum=yes")
    assert firsts(outcome) == [255 - 3 * n for n in range(8)]
    assert firsts(outcome, "other") == threes(*range(8))
    assert outcome.stage("other").workers[0].checksum is not None


def test_frames_reach_a_stage_that_drops_when_it_is_full():
    outcome = ran(f"test count=50 {SMALL} when_full=drop buffers=3 ! {FIRSTS}")
    assert len(firsts(outcome)) + outcome.stage("Firsts").lost == 50
    assert firsts(outcome)[-1] == 3 * 49


def test_a_function_may_be_the_source():
    outcome = ran(f"tests.cli.work:three ! {FIRSTS}")
    assert firsts(outcome) == [0, 1, 2]


# ---- failures ----


def test_crash_is_told_with_its_traceback_and_ends_the_others(tmp_path):
    output = tmp_path / "out.mp4"
    output.write_bytes(b"what was there before")
    outcome = ran(f"test {SMALL} ! tests.cli.work:broken at=4 ! tests.cli.work:same ! {output}")
    assert outcome.failed == "broken"
    worker = outcome.stage("broken").worst
    assert (worker.exit, worker.state, worker.text) == (1, "failed", "ValueError: this frame is broken")
    assert worker.traceback is not None
    assert worker.traceback.startswith("Traceback (most recent call last):\n")
    assert "tests/cli/work.py" in worker.traceback
    assert "dmabuf/pipe/" not in worker.traceback
    assert outcome.stage("broken").total("frames") == outcome.stage("out").total("frames") == 4
    assert [outcome.stage(name).state for name in ("test", "same", "out")] == ["done"] * 3
    assert outcome.outputs == []
    assert output.read_bytes() == b"what was there before"
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.crash
@pytest.mark.parametrize("killed", ["test", "same", "null"])
def test_killed_stage_is_told_and_the_others_end(killed):
    stages = {"test": f"test {SMALL}", "same": "tests.cli.work:same", "null": "null"}
    stages[killed] += " kill_at=5"
    outcome = ran(" ! ".join(stages.values()))
    assert outcome.failed == killed
    worst = outcome.stage(killed).worst
    assert (worst.exit, worst.state, worst.text) == (-signal.SIGKILL, "killed", "its process was killed by SIGKILL")
    assert worst.counts["frames"] == 5
    assert [stage.state for stage in outcome.stages if stage.spec.name != killed] == ["done", "done"]


@pytest.mark.crash
@pytest.mark.parametrize("workers", [1, 2])
def test_stage_that_is_started_again_loses_the_frame_that_it_had(workers):
    outcome = ran(f"test count=12 {SMALL} ! tests.cli.work:killed at=5 restart=on-failure workers={workers} ! {FIRSTS}")
    assert outcome.failed is None
    assert firsts(outcome) == threes(0, 1, 2, 3, 4, *range(6, 12))
    assert sum(worker.restarts for worker in outcome.stage("killed").workers) == 1
    assert outcome.stage("killed").lost == 1


@pytest.mark.crash
def test_worker_behind_a_worker_that_is_started_again_reads_the_same_one():
    stage = "tests.cli.work:same name=again workers=2 kill_at=2 restart=on-failure"  # each of the two dies in its third frame
    outcome = ran(f"test count=40 {SMALL} ! tests.cli.work:same workers=2 ! {stage} ! {FIRSTS}")
    again, seen = outcome.stage("again"), firsts(outcome)
    assert outcome.failed is None
    assert sum(worker.restarts for worker in again.workers) == again.lost >= 1
    assert seen == sorted(set(seen))
    assert len(seen) == 40 - again.lost


@pytest.mark.crash
def test_source_and_last_stage_that_are_started_again_go_on():
    outcome = ran(f"test count=12 {SMALL} kill_at=4 restart=on-failure ! tests.cli.work:same ! null kill_at=7 restart=on-failure:1")
    assert outcome.failed is None
    assert [stage.total("frames") for stage in outcome.stages] == [11, 11, 10]
    assert [stage.worst.restarts for stage in outcome.stages] == [1, 0, 1]


@pytest.mark.crash
def test_stage_that_stands_still_after_a_failure_is_killed(monkeypatch):
    monkeypatch.setattr("dmabuf.pipe.run.GRACE_S", 0.2)
    outcome = ran(f"test {SMALL} ! tests.cli.work:stuck @test ! tests.cli.work:broken")
    assert outcome.failed == "broken"
    assert outcome.stage("stuck").state == "killed"
    assert [outcome.stage(name).worst.exit for name in ("stuck", "broken")] == [-signal.SIGKILL, 1]


def test_what_a_process_said_is_heard_although_it_left_messages_unread():
    """The kernel reports the unread message (ECONNRESET) before what was sent."""
    worker = Worker(Spec("f", "function", "function", "m:f"), 0, 0, SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
    worker.sock, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.tell("stop")
    dmabuf.send(there, meta={"op": "failed", "text": "why"})
    there.close()
    assert worker.hear() == ({"op": "failed", "text": "why"}, [])
    assert worker.hear() is None
    worker.close()


def test_restarts_are_counted_and_end():
    outcome = ran(f"test count=12 {SMALL} ! tests.cli.work:nothing_of_numbers restart=on-failure:2 ! null")
    assert outcome.failed == "nothing_of_numbers"
    worst = outcome.stage("nothing_of_numbers").worst
    assert worst.restarts == 2
    assert "return an array of NumPy, None, or what JSON can say" in worst.text
    assert worst.counts["taken"] == 3


def test_values_that_do_not_fit_beside_a_frame_are_an_error():
    outcome = ran(f"test count=1 {SMALL} ! tests.cli.work:talkative ! null")
    assert outcome.failed == "talkative"
    assert "return less than 4096 bytes of values" in outcome.stage("talkative").worst.text


def test_array_of_another_shape_is_an_error():
    outcome = ran(f"test count=3 {SMALL} ! tests.cli.work:shrinking ! null")
    assert outcome.failed == "shrinking"
    assert "its frames were 4x8 uint8, and now one is 2x8 uint8" in outcome.stage("shrinking").worst.text


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_all_stages_and_completes_the_file(number, tmp_path):
    output, sent = tmp_path / "out.mp4", []

    def interrupt(frames: dict[str, int]) -> None:
        if frames["out"] >= 3 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    outcome = ran(f"test {SMALL} ! tests.cli.work:same workers=2 ! {output}", interrupt)
    assert outcome.stopped_by == number
    assert outcome.failed is None
    frames = outcome.stage("out").total("frames")
    assert frames == outcome.stage("test").total("frames")
    assert outcome.outputs == [str(output)]
    assert frames_in(output) == frames
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_second_signal_kills_all_stages(tmp_path):
    def interrupt(frames: dict[str, int]) -> None:
        if frames["out"]:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    outcome = ran(f"test {SMALL} ! tests.cli.work:same ! {tmp_path / 'out.mp4'}", interrupt)
    assert outcome.stopped_by == signal.SIGINT
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("interpreters")
def test_ctrl_c_in_a_terminal_ends_with_130_and_a_playable_file(tmp_path, child):
    """Ctrl-C reaches every process of the foreground's group."""
    output = tmp_path / "out.mp4"
    words = [SCRIPT, "pipe", "test", "size=32x32", "!", "show", "every=0", "@test", "!", output]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("frame 1: 32x32x3 uint8, ")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err == "dmabuf: pipe: ended by SIGINT\n"
    assert f"written: {output}" in out
    assert frames_in(output) > 0


# ---- the command ----


def test_command_prints_a_table_and_what_was_written(run: Run, tmp_path):
    clip, output = make_clip(tmp_path / "clip.mp4", frames=6), tmp_path / "out.mkv"
    result = run("pipe", str(clip), "!", "tests.cli.work:inverted", "!", str(output))
    assert (result.status, result.err) == (0, "")
    head, *rows = result.lines
    assert head.split() == ["STAGE", "FRAMES", "FRAMES/S", "WAITED", "BLOCKED", "LOST", "CPU", "COPIED"]
    assert [row.split()[:2] for row in rows[:3]] == [["clip", "6"], ["inverted", "6"], ["out", "6"]]
    assert rows[3] == "copied between processes: 0 bytes; 108.0 KiB of frames were read where they were written"
    assert rows[4] == f"written: {output}"
    assert frames_in(output) == 6


def test_json_says_it_all(run: Run):
    result = run("pipe", "--json", "test", "count=4", "size=8x6", "format=gray", "!", FIRSTS, "checksum=yes")
    report = result.json
    assert result.status == report["exit"] == 0
    assert [stage["name"] for stage in report["stages"]] == ["test", "Firsts"]
    last = report["stages"][1]
    assert (last["frames"], last["lost"], last["copied_between_processes"], last["shared"]) == (4, 0, 0, 4 * 48)
    (worker,) = last["workers"]
    assert worker["result"] == threes(0, 1, 2, 3)
    rows, columns = np.mgrid[0:6, 0:8]
    digest = hashlib.sha256()
    for n in range(4):
        digest.update((columns + 2 * rows + 3 * n).astype(np.uint8).tobytes())
    assert worker["checksum"] == digest.hexdigest()
    assert json.loads(json.dumps(report)) == report


def test_failure_is_told_with_name_frame_and_traceback(run: Run):
    result = run("pipe", "test", "size=8x6", "!", "tests.cli.work:broken", "!", "null")
    assert result.status == 1
    *trace, last = result.err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert last == "dmabuf: pipe: stage broken failed in frame 4: ValueError: this frame is broken"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("no_such_module:f", "there is no module no_such_module (EINVAL); run it where the module is, or set PYTHONPATH"),
        ("tests.cli.work:nothing", "tests.cli.work has no nothing"),
        ("tests.cli.work:NOT_CALLABLE", "it is int, which can't be called"),
        ("tests.cli.work:added quantity=3", "no such option; its own are amount"),
        ("tests.cli.work:takes_two", "its parameter threshold has no value (EINVAL); write threshold=… after it"),
        ("no/such/file.py:f", "there is no file no/such/file.py"),
        ("tests.cli.work:added shape=3x4", "leave shape= and dtype= out, or give it a parameter out"),
    ],
)
def test_function_that_can_not_be_used_is_a_usage_error(run: Run, stage, words):
    result = run("pipe", "test", "!", *stage.split(), "!", "null")
    assert result.status == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_file_of_another_format_is_a_usage_error(run: Run, tmp_path):
    result = run("pipe", "test", "count=1", "!", str(tmp_path / "out.wav"))
    assert result.status == 2
    assert "a .wav file can't contain a video (EINVAL); choose an ending as .mp4 or .mkv" in result.err
    assert os.listdir(tmp_path) == []


def test_arrays_that_are_no_pictures_can_not_be_a_video(run: Run, tmp_path):
    result = run("pipe", "tests.cli.work:three", "!", str(tmp_path / "out.mp4"))
    assert result.status == 1
    assert "frames of 2x3 float32 are no pictures (EINVAL); give it uint8 arrays" in result.err


def test_sink_that_can_not_be_written_is_a_usage_error(run: Run, tmp_path):
    result = run("pipe", "test", "!", str(tmp_path / "none" / "out.mp4"))
    assert result.status == 2
    assert "No such file or directory (EINVAL); name a file in a directory that you may write" in result.err


def test_raw_frames_go_into_a_pipe_and_nothing_takes_its_place(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    outcome = ran(f"test count=2 {SMALL} ! raw:{path}")
    rows, columns = np.mgrid[0:6, 0:8]
    expected = b"".join((columns + 2 * rows + 3 * n).astype(np.uint8).tobytes() for n in range(2))
    assert os.read(reading, 1000) == expected
    os.close(reading)
    assert outcome.outputs == [str(path)]
    assert path.is_fifo()


def test_video_is_not_written_into_a_pipe(run: Run, tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    result = run("pipe", "test", "!", str(tmp_path / "fifo.mp4"))
    assert result.status == 2
    assert "it is not a file (EINVAL); name a file" in result.err


def test_source_is_never_overwritten(run: Run, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    before = clip.read_bytes()
    result = run("pipe", str(clip), "!", str(Path(tmp_path, ".", "clip.mp4")))
    assert result.status == 2
    assert "it would overwrite the source" in result.err
    assert clip.read_bytes() == before
