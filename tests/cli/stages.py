"""Stages of pipelines for tests: forks of a zygote that has FFmpeg, instead of fresh interpreters; and the functions that they run."""

import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.children import Parent, Spawn
from tests.support.lazy import Lazy

av = Lazy("av")
program = Lazy("dmabuf.pipe.stage")


def prepare() -> None:
    """Import what most stages need, in the zygote."""
    for module in (av, program, Lazy("dmabuf.pipe.pictures"), Lazy("dmabuf.cli.demo_work")):
        module()


def a_stage(parent: Parent) -> int:
    _, (fd,), _, _ = socket.recv_fds(parent.sock, 1, 1)
    return program.main(fd)


class ForkedStage:
    """What a pipeline asks of a stage's `subprocess.Popen`, of a child of the test."""

    def __init__(self, child: Spawn, sock: socket.socket, stdout: Any) -> None:
        self._child = child(a_stage)
        self._status: int | None = None
        self.pid, self.kill = self._child.pid, self._child.kill
        socket.send_fds(self._child.sock, [b"1"], [sock.fileno()])
        sock.close()

    def wait(self) -> int:
        if self._status is None:
            try:
                self._status = self._child.result()
            except EOFError:
                self._status = self._child.wait()
        return self._status


# ---- videos ----


def make_clip(path: Path, *, width: int = 64, height: int = 48, frames: int = 20) -> Path:
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


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
