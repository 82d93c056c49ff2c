"""Sources, sinks and functions of pipelines, in one process."""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dmabuf
from dmabuf.errors import DmaBufError, DmaBufTimeout, ExtraMissingError, InvalidError
from dmabuf.pipe import sinks, sources
from dmabuf.pipe.function import Work
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.output import Head
from dmabuf.pipe.plan import Spec, planned
from tests.cli.stages import av, make_clip
from tests.support.lazy import Lazy

pictures = Lazy("dmabuf.pipe.pictures")


def source_of(text: str) -> Any:
    return sources.opened(planned([*text.split(), "!", "null"]).stages[0])


def all_of(source: Any, skip: int = 0) -> list[Any]:
    found = []
    with contextlib.closing(source):
        for item in source.items(skip):
            array = np.empty(source.kind.shape, source.kind.dtype)
            source.put(item, array)
            found.append(array)
    return found


def write_all(spec: Spec, kind: Kind, arrays: list[Any]) -> None:
    sink = sinks.opened(spec)
    with contextlib.closing(sink):
        sink.begin(kind)
        for n, array in enumerate(arrays, 1):
            sink.put(array, Head(n, 0, 0, {}))


def gradient(height: int, width: int, *channels: int) -> Any:
    rows, columns, *rest = np.indices((height, width, *channels))
    return (rows * 3 + columns * 2 + sum(part * 60 for part in rest)).astype(np.uint8)


# ---- sources ----


def test_test_source_counts_in_each_pixel():
    rows, columns = np.mgrid[0:3, 0:4]
    frames = all_of(source_of("test size=4x3 count=90 format=gray"))
    assert len(frames) == 90
    assert (frames[89] == (columns + 2 * rows + 3 * 89) % 256).all()
    (color,) = all_of(source_of("test size=4x3 count=1"))
    assert (color == ((columns + 2 * rows)[..., None] + [0, 85, 170]) % 256).all()
    assert [int(frame[0, 0]) for frame in all_of(source_of("test size=4x3 count=5 format=gray"), skip=3)] == [9, 12]


def test_video_source_gives_what_was_encoded(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=4)
    with av.open(str(clip)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    source = source_of(str(clip))
    assert (source.kind.shape, source.kind.format, source.kind.rate, source.kind.total) == ((48, 64, 3), "rgb24", "25", 4)
    assert all((a == b).all() for a, b in zip(all_of(source), expected, strict=True))
    assert len(all_of(source_of(f"{clip} frames=3"), skip=1)) == 2


@pytest.mark.parametrize("format", ["gray", "yuv420p", "bgr24", "rgba", "gray16le"])
def test_video_source_converts(tmp_path, format):
    clip = make_clip(tmp_path / "clip.mp4", frames=1)
    with av.open(str(clip)) as container:
        first = next(container.decode(video=0))
    expected = first.to_ndarray()[:48] if format == "gray" else first.to_ndarray(format=format)
    (frame,) = all_of(source_of(f"{clip} format={format}"))
    assert frame.shape == expected.shape
    assert (frame == expected).all()
    assert all_of(source_of(f"{clip} format={format} size=32x24"))[0].shape[1] == 32


def test_images_come_in_the_order_of_their_names(tmp_path):
    arrays = [gradient(5, 7, 3) + np.uint8(n) for n in range(3)]
    write_all(Spec("", "sink", "images", str(tmp_path / "out-%02d.png"), {"start": "8"}), Kind((5, 7, 3), "uint8", "rgb24"), arrays)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-08.png", "out-09.png", "out-10.png"]
    found = all_of(source_of(f"{tmp_path}/out-*.png"))
    assert all((a == b).all() for a, b in zip(found, arrays, strict=True))
    assert (all_of(source_of(f"{tmp_path}/out-09.png"))[0] == arrays[1]).all()


def test_raw_file_is_frames_one_after_the_other(tmp_path):
    arrays = [gradient(6, 4) + np.uint8(n) for n in range(3)]
    path = tmp_path / "frames.bin"
    write_all(Spec("", "sink", "raw", str(path), part=str(path)), Kind((6, 4), "uint8", "gray"), arrays)
    assert path.read_bytes() == b"".join(array.tobytes() for array in arrays)
    found = all_of(source_of(f"raw:{path},width=4,height=6,format=gray"), skip=1)
    assert all((a == b).all() for a, b in zip(found, arrays[1:], strict=True))


def test_function_yields_arrays_of_any_type():
    source = source_of("tests.cli.work:three")
    assert (source.kind.shape, source.kind.dtype, source.kind.format) == ((2, 3), "float32", None)
    assert [float(frame[0, 0]) for frame in all_of(source)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raw:{}/frames.bin,width=4 ! null", "nothing says its height"),
        ("raw:{}/none.bin,width=4,height=4", "No such file or directory"),
        ("raw:{}/frames.bin,width=4,height=5,format=yuv420p", "yuv420p of 4x5, an odd size"),
        ("{}/*.none", "there is no such file (EINVAL); quote the pattern"),
        ("{}/frames.bin", "it is not a video that FFmpeg can open"),
        ("test format=nv12", "it has no such frames"),
        ("test rate=0", "it is no number of frames per second"),
        ("test size=4", "it is not a size"),
        ("tests.cli.work:no_array", "it yielded int, no array of numbers"),
        ("tests.cli.work:NOT_CALLABLE", "it is int, which can't be called"),
        ("camera:/dev/none", "/dev/none"),
    ],
)
def test_source_that_can_not_be_used_says_why(tmp_path, text, words):
    (tmp_path / "frames.bin").write_bytes(b"x" * 100)
    with pytest.raises(DmaBufError) as caught:
        source_of(text.format(tmp_path).removesuffix(" ! null"))
    assert words in str(caught.value)


def test_raw_file_that_ends_in_a_frame_says_so(tmp_path):
    (tmp_path / "frames.bin").write_bytes(b"x" * 100)
    with pytest.raises(InvalidError, match="it ends 28 bytes before the end of a frame"):
        all_of(source_of(f"raw:{tmp_path}/frames.bin,width=8,height=8,format=gray"))


# ---- the camera ----


class FakeFrame:
    """A frame of the driver: its buffer is given back at the end of the block."""

    broken, used = False, 32

    def __init__(self, buf: dmabuf.DmaBuf) -> None:
        self.buf = buf

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeCamera:
    """What `CameraSource` asks of a camera, which has three frames, and none at the second question."""

    def __init__(self, path: str) -> None:
        self.picture = SimpleNamespace(width=4, height=2, pixelformat=path.rpartition("/")[2], pitch=16)
        self.buf = dmabuf.allocate(4096)
        self._n = 0

    def configure(self, width: int, height: int, pixelformat: str) -> Any:
        self.picture = SimpleNamespace(width=width, height=height, pixelformat=pixelformat, pitch=16)
        return self.picture

    def start(self, count: int) -> None:
        pass

    def frame(self, timeout: float) -> Any:
        self._n += 1
        if self._n == 2:
            raise DmaBufTimeout(110, "none")
        with self.buf.write() as view:
            for row in range(2):
                view[16 * row : 16 * row + 12] = bytes(range(12 * row + self._n, 12 * row + 12 + self._n))
        return FakeFrame(self.buf)

    def close(self) -> None:
        self.buf.close()


@pytest.fixture
def fake_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmabuf.pipe.camera.Camera", FakeCamera)


@pytest.mark.usefixtures("fake_camera")
@pytest.mark.parametrize(("pixelformat", "format"), [("RGB3", "rgb24"), ("BGR3", "bgr24")])
def test_camera_frames_are_copied_without_their_padding(pixelformat, format):
    source = source_of(f"camera:/dev/{pixelformat} frames=2")
    assert (source.kind.shape, source.kind.format) == ((2, 4, 3), format)
    turns = []
    with contextlib.closing(source):
        for item in source.items(0):
            turns.append(None)
            if item is not None:
                turns[-1] = np.empty((2, 4, 3), np.uint8)
                source.put(item, turns[-1])
    assert turns[1] is None
    assert [int(turn[1, 0, 0]) for turn in (turns[0], turns[2])] == [13, 15]
    assert (turns[0].ravel() == np.arange(1, 25)).all()


def test_compressed_camera_frames_are_decoded(tmp_path, fake_camera, monkeypatch):
    write_all(
        Spec("", "sink", "images", str(tmp_path / "out%d.jpg")), Kind((16, 16, 3), "uint8", "rgb24"), [np.full((16, 16, 3), 77, np.uint8)]
    )
    data = (tmp_path / "out1.jpg").read_bytes()
    broken = iter((data[:3], data))  # the driver may give a frame that it has not filled

    def frame(self: FakeCamera, timeout: float) -> FakeFrame:
        made, content = FakeFrame(self.buf), next(broken)
        with self.buf.write() as view:
            view[: len(content)] = content
        made.used = len(content)
        return made

    monkeypatch.setattr(FakeCamera, "frame", frame)
    source = source_of("camera:/dev/MJPG size=16x16")
    with contextlib.closing(source):
        array = np.empty(source.kind.shape, np.uint8)
        source.put(next(source.items(0)), array)
    assert (source.kind.shape, source.kind.format) == ((16, 16, 3), "rgb24")
    assert abs(array.astype(int) - 77).max() <= 5


@pytest.mark.usefixtures("fake_camera")
def test_camera_format_that_is_unknown_is_refused():
    with pytest.raises(InvalidError, match=r"its frames are ABCD .*ask for another format: pixelformat= one of RGB3"):
        source_of("camera:/dev/ABCD")


@pytest.mark.usefixtures("fake_camera")
def test_camera_is_asked_for_a_format():
    with contextlib.closing(source_of("camera:/dev/ABCD size=8x2 pixelformat=GREY")) as source:
        assert (source.kind.shape, source.kind.format) == ((2, 8), "gray")


# ---- sinks ----


@pytest.mark.parametrize("format", ["gray", "rgb24", "rgba", "yuv420p"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_video_has_the_pictures_that_it_was_given(tmp_path, format, suffix):
    kind = pictures.kind_of(16, 16, format, "10", None, "x")
    flat = np.full(kind.shape, 120, np.uint8)
    path = tmp_path / f"out{suffix}"
    write_all(Spec("", "sink", "video", str(path), part=str(path)), kind, [flat, flat])
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 10
        frames = list(container.decode(video=0))
    assert len(frames) == 2
    luma = frames[1].to_ndarray()[:16, :16].astype(int)
    expected = 120 if format in ("gray", "yuv420p") else 16 + 120 * 219 / 255  # ITU-R BT.601, limited range
    assert abs(luma - expected).max() <= 3


def test_video_of_odd_size_loses_a_row_and_a_column(tmp_path):
    path = tmp_path / "out.mp4"
    write_all(Spec("", "sink", "video", str(path), part=str(path)), Kind((7, 9, 3), "uint8", "rgb24"), [gradient(7, 9, 3)])
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.width, frame.height) == (8, 6)


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "tif"])
def test_images_of_each_kind_are_what_was_given(tmp_path, suffix):
    write_all(
        Spec("", "sink", "images", str(tmp_path / f"out%d.{suffix}")), Kind((8, 8, 3), "uint8", "rgb24"), [np.full((8, 8, 3), 99, np.uint8)]
    )
    (found,) = all_of(source_of(f"{tmp_path}/out1.{suffix}"))
    assert abs(found.astype(int) - 99).max() <= 2
    assert [path.name for path in tmp_path.iterdir()] == [f"out1.{suffix}"]


def test_show_prints_a_line_of_numbers(capsys):
    show = sinks.opened(Spec("", "sink", "show", "show", {"every": "0"}))
    show.begin(Kind((2, 2), "uint8"))
    show.put(np.array([[0, 1], [2, 5]], np.uint8), Head(7, 0, 0, {"detect": [1, 2]}))
    line = capsys.readouterr().out
    assert line.startswith("frame 7: 2x2 uint8, ")
    assert line.endswith(" ms old, mean 2.00, from 0 to 5, detect [1, 2]\n")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec("", "sink", "show", "show", {"every": "often"}), "it is not a number of seconds"),
        (Spec("", "sink", "images", "none/out%d.png"), "no files can be made there"),
        (Spec("", "sink", "images", "out%d.png", {"start": "-1"}), "it is not such a number"),
        (Spec("", "sink", "video", "out.mp4", {"codec": "none"}, part="out.mp4"), "FFmpeg has no such codec"),
        (Spec("", "sink", "video", "out.mp4", {"rate": "fast"}, part="out.mp4"), "it is no number of frames per second"),
        (Spec("", "sink", "video", "out.none", part="out.none"), "choose an ending as .mp4 or .mkv"),
    ],
)
def test_sink_that_can_not_be_used_says_why(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidError) as caught:
        sinks.opened(spec)
    assert words in str(caught.value)


# ---- functions ----


def result_of(target: str, frame: Any, **options: str) -> tuple[Any, ...]:
    found = Work(target, options)(frame, {})
    return found.goes_on, found.array, found.value


def test_function_of_c_without_a_signature_is_called_with_the_frame():
    goes_on, array, value = result_of("numpy:array", np.arange(3))
    assert (goes_on, list(array), value) == (True, [0, 1, 2], None)


def test_options_are_values_of_python_or_words():
    assert Work("tests.cli.work:added", {"amount": "3"})(np.zeros(2, np.uint8), {}).array.tolist() == [3, 3]
    assert Work("tests.cli.work:Firsts", {"scale": "2"}).close() == []


def test_file_of_python_is_loaded_by_its_path(tmp_path):
    (tmp_path / "edges_here.py").write_text("def twice(frame):\n    return frame * 2\n")
    assert result_of(f"{tmp_path}/edges_here.py:twice", np.array([4]))[1].tolist() == [8]


def test_error_inside_of_a_module_is_told_as_it_is(tmp_path):
    (tmp_path / "broken_here.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_at_all"):
        Work(f"{tmp_path}/broken_here.py:f", {})


def test_missing_av_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "dmabuf.pipe.pictures", raising=False)
    monkeypatch.delattr("dmabuf.pipe.pictures", raising=False)
    with pytest.raises(ExtraMissingError, match=r"import av: it is not installed; install it with: pip install 'dmabuf\[video\]'"):
        source_of(__file__)
