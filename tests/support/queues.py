"""What the tests of queues, pools and kept descriptors share."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import dmabuf
from tests.sharing.conftest import SIZE

METHODS = ["fork", "forkserver", "spawn"]


@contextlib.contextmanager
def running(process: Any) -> Iterator[Any]:
    process.start()
    yield process
    process.join()
    process.close()


def stamped(stamp: int, name: str | None = None) -> dmabuf.DmaBuf:
    buf = dmabuf.allocate(SIZE, name=name)
    with buf.write() as view:
        view[0] = stamp
    return buf


def stamp(buf: dmabuf.DmaBuf) -> int:
    with buf, buf.read() as view:
        return int(view[0])


def no_keepers() -> bool:
    """Reap the keepers that have ended, and return True if none is left. A test run looks after orphans."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    children = subprocess.run(["/bin/ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    return not [line for line in children.splitlines() if "kept.py" in line or "defunct" in line]
