"""Frames of a camera go through a GPU driver to another process; nobody copies a pixel.

    python examples/camera/frames.py [/dev/video0] [FRAMES]

The camera's driver fills buffers that are dma-bufs (V4L2, VIDIOC_EXPBUF). Each is imported by the driver of a DRM node (PRIME): vgem, and
vkms where it is loaded. vgem puts a fence on it that stands for work of a GPU. The buffer and a sync_file of what it still waits for go
over a socket to a second process, which makes a histogram once the "GPU" is done. A frame goes back to the camera when its reader is done.

Needs `modprobe vivid vgem` (or real devices) and the right to open them.
"""

import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import dmabuf
from dmabuf.drivers.camera import Camera
from dmabuf.drivers.drm import DrmNode


def histogram(sock: socket.socket) -> None:
    """The second process: one answer a frame, over the same socket."""
    try:
        while True:
            buf, work = dmabuf.recv(sock)
            with buf, work:
                pending = not work.is_signaled()
                sock.send(b"waiting" if pending else b"ready")
                with buf.read() as view:  # waits for the driver's fence and for the camera
                    counts = Counter(view)
                value, most = counts.most_common(1)[0]
                sock.send(f"{buf.ino} {pending} {work.is_signaled()} {len(counts)} {value} {most} {sum(counts.values())}".encode())
    except EOFError:
        pass


def main(path: str = "/dev/video0", frames: int = 5) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        reader = subprocess.Popen([sys.executable, __file__, "--reader", str(there.fileno())], pass_fds=[there.fileno()])
    with reader, here, ExitStack() as stack:
        camera = stack.enter_context(Camera(path))
        picture = camera.configure(160, 90, "RGB3")
        print(f"{camera.card}: {picture.width}x{picture.height} {picture.pixelformat}, {picture.size} bytes", flush=True)
        gpu = stack.enter_context(DrmNode.of("vgem"))
        display = None
        try:
            display = stack.enter_context(DrmNode.of("vkms"))
        except dmabuf.DmaBufError as e:
            print(f"no display: {e}")
        for buf in camera.start(4, name="frame"):
            print(f"{buf.name}: inode {buf.ino}, home {buf.home}, exporter {buf.exp_name}")
        for _ in range(frames):
            with camera.frame(timeout=20) as frame, gpu.import_buffer(frame.buf) as imported:
                if display is not None:
                    display.import_buffer(frame.buf).close()
                work = imported.add_fence(write=True)
                with frame.buf.export_sync_file() as fence:
                    dmabuf.send(here, frame.buf, fence)
                assert here.recv(100) == b"waiting"
                work.signal()
                ino, waited, done, values, value, most, total = here.recv(200).decode().split()
                print(
                    f"frame {frame.sequence} of inode {frame.buf.ino}: seen as inode {ino}, waited {waited}, done {done}; "
                    f"{values} values in {total} bytes, {value} most often ({most})",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reader"]:
        histogram(socket.socket(fileno=int(sys.argv[2])))
    else:
        main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
