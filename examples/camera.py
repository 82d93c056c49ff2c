"""A camera, a GPU and a second process on the same memory, with the kernel's own drivers and without a copy.

    python examples/camera.py [FRAMES]

Frames of vivid, the kernel's test camera, come in buffers that its driver exports as dma-bufs (VIDIOC_EXPBUF). vgem, the kernel's virtual
GPU (and vkms, where there is one), imports them by PRIME and works on each frame for a while, which its fence says. The buffer and a
sync_file of that fence go to a second process, which waits for the sync_file and counts the frame's grey values. The buffer goes back to
the camera when it has answered.

It needs a kernel with vivid and vgem, and the right to use them: modprobe vivid vgem; as root, `make test-kernel KERNEL=debian` runs it in
a guest.
"""

import contextlib
import glob
import multiprocessing
import os
import select
import socket
import sys
from collections import Counter
from multiprocessing.connection import Connection

import dmabuf
from dmabuf.drivers.camera import Camera
from dmabuf.drivers.drm import DrmNode, GemObject
from dmabuf.uapi import dma_buf

WIDTH, HEIGHT = 320, 240


def test_camera() -> Camera:
    """The first node of vivid that captures."""
    for path in sorted(glob.glob("/dev/video*")):
        try:
            camera = Camera(path)
        except OSError:
            continue
        if camera.driver == "vivid":
            return camera
        camera.close()
    sys.exit("no test camera here: modprobe vivid")


def gpus() -> list[DrmNode]:
    """vgem, and vkms where the kernel has it."""
    found = [DrmNode.of("vgem")]
    with contextlib.suppress(OSError):
        found.append(DrmNode.of("vkms"))
    return found


def histogram(buf: dmabuf.DmaBuf) -> dict[int, int]:
    """How often each grey value is in the picture, read where it is."""
    with buf.read() as view:
        return dict(Counter(view[: WIDTH * HEIGHT]))


def counts(sock: socket.socket, answers: Connection) -> None:
    """The second process: for each buffer, says whether its sync_file is pending, waits for it, and answers with inode and histogram."""
    while True:
        try:
            (buf,) = dmabuf.recv(sock)
        except EOFError:
            return
        _, (fence,), _, _ = socket.recv_fds(sock, 1, 1)
        waiting = select.poll()
        waiting.register(fence, select.POLLIN)
        with buf:
            answers.send("the GPU was at work" if not waiting.poll(0) else "the GPU was done")
            waiting.poll()
            os.close(fence)
            answers.send((buf.ino, histogram(buf)))


def show(frames: int) -> None:
    """Print a line for each frame."""
    ours, theirs = socket.socketpair()
    answers, theirs_to_answer = multiprocessing.Pipe(duplex=False)
    other = multiprocessing.get_context("spawn").Process(target=counts, args=(theirs, theirs_to_answer))
    with contextlib.ExitStack() as ending:
        camera = ending.enter_context(test_camera())
        nodes = [ending.enter_context(node) for node in gpus()]
        other.start()
        theirs.close()
        theirs_to_answer.close()
        picture = camera.configure(WIDTH, HEIGHT, "GREY")
        print(
            f"{camera.card} gives {picture.width}x{picture.height} {picture.pixelformat}; imported by {', '.join(n.driver for n in nodes)}"
        )
        imported: list[list[GemObject]] = []
        for buf in camera.start(3, name="camera"):
            imported.append([ending.enter_context(node.import_buffer(buf)) for node in nodes])
            assert all(gem.export().ino == buf.ino for gem in imported[-1]), "PRIME gives the same dma-buf back"
        for _ in range(frames):
            with camera.frame() as frame:
                fence = imported[frame.index][0].add_fence(write=True)
                with dma_buf.export_sync_file(frame.buf.fileno(), dma_buf.READ) as sync_file:
                    dmabuf.send(ours, frame.buf)
                    socket.send_fds(ours, [b"f"], [sync_file.number])
                first = answers.recv()
                fence.signal()  # the GPU is done
                ino, counted = answers.recv()
                same = ino == frame.buf.ino and counted == histogram(frame.buf)
                top = max(counted, key=counted.__getitem__)
                print(
                    f"frame {frame.sequence}: {first}, then counted {sum(counted.values())} pixels, most of them {top}; "
                    f"{'the same memory' if same else 'NOT THE SAME'}",
                    flush=True,
                )
        ours.close()
        other.join()


if __name__ == "__main__":
    show(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
