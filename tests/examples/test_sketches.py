"""The programs in examples/ that need no device do their jobs, also when one of their processes is killed."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import run

EXAMPLES = Path(__file__).parents[2] / "examples"
SKETCHES = ("array_service", "camera_service", "motion", "recorder", "tensor_loader")


def output(name: str, where: Path, *arguments: str) -> str:
    """Return what an example prints. It has ended in order, and printed no warning and no traceback."""
    done: subprocess.CompletedProcess[str] = run((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), where, *arguments)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


@pytest.mark.parametrize("name", SKETCHES)
def test_sketch_is_short_and_lists_what_was_written_by_hand(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= 120
    assert f"    python examples/{name}.py" in docstring
    assert re.search(r"\n\nWritten by hand here:\n(- .+\n?)+", docstring)


def test_camera_gives_each_worker_the_last_frame(tmp_path: Path) -> None:
    found = re.fullmatch(
        r"fast: (\d+) of 12 frames, started 1 time\nslow: (\d+) of 12 frames, started 1 time\n",
        output("camera_service", tmp_path, "--frames=12"),
    )
    assert found
    assert 12 >= int(found[1]) > 0
    assert 12 > int(found[2]) > 0


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_camera_goes_on_when_worker_is_killed(name: str, tmp_path: Path) -> None:
    text = output("camera_service", tmp_path, "--frames=12", f"--kill={name}")
    assert re.search(rf"^{name}: \d+ of 12 frames, started 2 times$", text, re.MULTILINE)
    assert len(re.findall("started 1 time$", text, re.MULTILINE)) == 1


def test_camera_shows_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    assert "of 5 frames" in output("camera_service", tmp_path, "--frames=5", "--video=clip.mp4")


def test_trainer_learns_from_every_batch(tmp_path: Path) -> None:
    found = re.fullmatch(r"8 of 8 batches, loss (.+) to (.+)\n", output("tensor_loader", tmp_path, "--batches=8"))
    assert found
    assert float(found[2]) < float(found[1])


def test_trainer_loses_one_batch_when_worker_is_killed(tmp_path: Path) -> None:
    text = output("tensor_loader", tmp_path, "--batches=8", "--broken=100")
    assert re.fullmatch(r"a worker died; one batch is lost\n7 of 8 batches, loss .+\n", text)


def test_clients_get_their_arrays_timeouts_and_cancellations(tmp_path: Path) -> None:
    text = output("array_service", tmp_path, "--clients=2", "--requests=2")
    assert text == "1 canceled, 4 right, 1 timed out; 0 deaths\n"


def test_clients_get_their_arrays_when_worker_is_killed(tmp_path: Path) -> None:
    text = output("array_service", tmp_path, "--clients=2", "--requests=2", "--crash")
    assert text == "1 canceled, 4 right, 1 timed out; 1 deaths\n"


def test_recorder_plays_what_producer_made(tmp_path: Path) -> None:
    found = re.fullmatch(
        r"(\d+) of 12 frames made; the recorder ended\n(\d+) of (\d+) recorded frames played in .+ s\n",
        output("recorder", tmp_path, "--frames=12"),
    )
    assert found
    assert 0 < int(found[1]) == int(found[2]) == int(found[3])


def test_producer_goes_on_when_recorder_is_killed(tmp_path: Path) -> None:
    text = output("recorder", tmp_path, "--frames=12", "--kill")
    found = re.fullmatch(r"(\d+) of 12 frames made; the recorder died\n(\d+) of (\d+) recorded frames played in .+ s\n", text)
    assert found
    assert int(found[2]) == int(found[3]) < int(found[1])


def test_pipeline_draws_a_box_around_what_moves(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    video = np.zeros((5, 48, 64, 3), np.uint8)
    for n in range(5):
        video[n, 16:24, 8 * n : 8 * n + 8] = 255  # a square that moves by its width
    (tmp_path / "in.bin").write_bytes(video.tobytes())
    text = output("motion", tmp_path, "raw:in.bin,width=64,height=48", "raw:out.bin")
    expected = video.copy()
    for n in range(1, 5):  # every fourth pixel is compared: of the two squares, the columns from 8 n - 8 to 8 n + 4
        expected[n, [16, 20], 8 * n - 8 : 8 * n + 4] = (0, 255, 0)
        expected[n, 16:20, [8 * n - 8, 8 * n + 4]] = (0, 255, 0)
    assert (np.frombuffer((tmp_path / "out.bin").read_bytes(), np.uint8).reshape(video.shape) == expected).all()
    assert re.search(r"^Motion +5 .*\s+4$", text, re.MULTILINE)  # on a line of its own where a terminal is narrow
    assert re.search(r"^boxed +5 .*\s+3 workers$", text, re.MULTILINE)
    assert "written: out.bin" in text
