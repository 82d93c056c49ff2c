"""A camera, a GPU and a second process on the same memory, with the kernel's own drivers and without a copy.

    python examples/camera.py [FRAMES]

The driver of vivid, the kernel's test camera, fills buffers and exports them as dma-bufs (VIDIOC_EXPBUF). vgem, the kernel's virtual GPU
(and vkms, where there is one), imports them by PRIME and works on each frame for a while; its fence says when it is done. A second process
receives the buffer and a sync_file of that fence, waits for the sync_file, and counts the gray values of the frame. When it has answered,
the buffer goes back to the camera.

The example needs a kernel with vivid and vgem (`modprobe vivid vgem`), and the permission to use them. `make test-kernel KERNEL=debian`
runs it in a guest.
"""

import contextlib
import glob
import json
import select
import socket
import subprocess
import sys
from collections import Counter

import dmabuf
from dmabuf.drivers.camera import Camera
from dmabuf.drivers.drm import DrmNode, GemObject

WIDTH, HEIGHT = 320, 180


def test_camera() -> Camera:
    """Return the first node of vivid that captures."""
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
    """Return vgem, and vkms if the kernel has it."""
    found = [DrmNode.of("vgem")]
    with contextlib.suppress(OSError):
        found.append(DrmNode.of("vkms"))
    return found


def histogram(buf: dmabuf.DmaBuf, pixels: int) -> dict[int, int]:
    """Return how often each gray value is in the picture, read in place."""
    with buf.read() as view:
        return dict(Counter(view[:pixels]))


def counts(sock: socket.socket, pixels: int) -> None:
    """Run the second process: for each buffer, print whether the GPU is still at work, wait for it, and print inode and histogram."""
    print("ready", flush=True)
    while True:
        try:
            buf, done = dmabuf.recv(sock)
        except EOFError:
            return
        with buf, done:
            print("the GPU was done" if done.is_signaled() else "the GPU was at work", flush=True)
            select.select([done], [], [])
            print(json.dumps([buf.ino, histogram(buf, pixels)]), flush=True)


def show(frames: int) -> None:
    """Print a line for each frame."""
    with contextlib.ExitStack() as ending:
        camera = ending.enter_context(test_camera())
        nodes = [ending.enter_context(node) for node in gpus()]
        picture = camera.configure(WIDTH, HEIGHT, "GREY")
        pixels = picture.width * picture.height
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, "--counts", str(theirs.fileno()), str(pixels)]
            other = ending.enter_context(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True))
        ending.callback(camera.stop)  # in case the other process waits for a frame that is being filled
        ending.enter_context(ours)  # closed first, which ends the other process
        assert other.stdout is not None
        other.stdout.readline()  # wait until it has started, because a fence of vgem lasts 10 s only
        print(
            f"{camera.card} gives {picture.width}x{picture.height} {picture.pixelformat}; imported by {', '.join(n.driver for n in nodes)}"
        )
        imported: list[list[GemObject]] = []
        for buf in camera.start(3, name="camera"):
            imported.append([ending.enter_context(node.import_buffer(buf)) for node in nodes])
            for gem in imported[-1]:
                with gem.export() as again:
                    assert again.ino == buf.ino, "PRIME gives the same dma-buf back"
        for _ in range(frames):
            with camera.frame() as frame:
                fence = imported[frame.index][0].add_fence(write=True)
                with frame.buf.export_sync_file() as done:
                    assert done.kernel, "the kernel's own sync_file"
                    dmabuf.send(ours, frame.buf, done)
                first = other.stdout.readline().rstrip()
                fence.signal()  # the GPU is done
                ino, found = json.loads(other.stdout.readline())
                counted = {int(value): count for value, count in found.items()}
                same = ino == frame.buf.ino and counted == histogram(frame.buf, pixels)
                top = max(counted, key=counted.__getitem__)
                print(
                    f"frame {frame.sequence}: {first}, then counted {sum(counted.values())} pixels, most of them {top}; "
                    f"{'the same memory' if same else 'NOT THE SAME'}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--counts"]:
        counts(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    else:
        show(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
