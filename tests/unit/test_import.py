"""``import dmabuf`` costs little and touches nothing: programs that only might use it pay nothing for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOK = """
import os, pathlib, sys, threading

maps = pathlib.Path("/proc/self/maps")

def descriptors():
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}

def tasks():
    return len(os.listdir("/proc/self/task"))

before = descriptors(), tasks(), threading.enumerate()
CODE
after = descriptors(), tasks(), threading.enumerate()
assert after == before, (before, after)
shared = [line for line in maps.read_text().splitlines() if "domain-" in line]
assert not shared, shared
"""

# What a program may do before its first call, and to be told what there is.
CODES = ["import dmabuf", "from dmabuf import *", "import dmabuf; help(dmabuf.DmaBuf)", "import dmabuf; dir(dmabuf)"]


@pytest.mark.parametrize("code", CODES)
def test_import_starts_no_thread_opens_no_descriptor_maps_no_domain(tmp_path: Path, code: str) -> None:
    domain = tmp_path / "domain"
    done = subprocess.run(
        [sys.executable, "-c", LOOK.replace("CODE", code)],
        env={**os.environ, "DMABUF_DOMAIN": str(domain), "PAGER": "cat"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    assert not domain.exists()
