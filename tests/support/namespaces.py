"""Programs in a user namespace and a PID namespace of their own, as in a container that shares a domain's directory."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

_UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


@functools.cache
def _allowed() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*_UNSHARE, "true"], check=False, capture_output=True).returncode


class Program:
    """A program that prints lines and reads lines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def line(self) -> str:
        """The next line that it prints; what it wrote to stderr if it has ended."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return self.process.stdout.readline().rstrip("\n") or self.process.stderr.read()

    def say(self, text: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def program(code: str, *, inside: bool = True) -> Iterator[Program]:
    """Run Python code for the block, in namespaces of its own unless not ``inside``, and skip the test where that isn't allowed."""
    if inside and not _allowed():
        pytest.skip("user namespaces are not allowed here")
    process = subprocess.Popen(
        [*(_UNSHARE if inside else ()), sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        yield Program(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        with contextlib.suppress(ChildProcessError):  # what it forked becomes a child of the test run, a subreaper
            while True:
                os.waitpid(-process.pid, 0)
