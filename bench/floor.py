"""What every ratio is divided by, built into a temporary directory and run in the same minute.

`run`: the C programs of limits.c. `extension_round_trip`: what CPython reaches with the smallest C extension and nothing around it
(floor_ext.c). `bare_hand_over`: what Python's own socket and mmap modules reach.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from bench.peers import cpus, median_us, peer, pinned


@cache
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="dmabuf-bench-"))


def _build(source: str, target: str, *flags: str) -> Path:
    where = _directory() / target
    subprocess.run(
        [os.environ.get("CC", "gcc"), "-O2", *flags, "-o", str(where), str(Path(__file__).with_name(source)), "-lpthread"], check=True
    )
    return where


@cache
def _program() -> str:
    return str(_build("limits.c", "limits"))


@cache
def extension() -> Any:
    where = _build("floor_ext.c", "_floor.so", "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}")
    spec = importlib.util.spec_from_file_location("_floor", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(test: str, *arguments: str) -> float:
    """Median round trip of one test of limits.c, in µs."""
    done = subprocess.run([_program(), test, *arguments], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["rtt"]["p50"])


def extension_round_trip(rounds: int = 3000) -> float:
    """Ping-pong of two Python processes on one CPU through the smallest C extension, median in µs."""
    floor = extension()
    here, there = cpus(False)
    words = mmap.mmap(-1, mmap.PAGESIZE)
    ping = ctypes.addressof(ctypes.c_char.from_buffer(words))
    pong = ping + 64

    def body(sock: socket.socket) -> None:
        for i in range(1, rounds + 1):
            floor.wait_ge(ping, i)
            floor.bump(pong)
        sock.recv(1)

    samples = []
    clock = time.perf_counter_ns
    with peer(body, there), pinned(here):
        for i in range(1, rounds + 1):
            start = clock()
            floor.bump(ping)
            floor.wait_ge(pong, i)
            samples.append(clock() - start)
    return median_us(samples[rounds // 10 :])


def bare_hand_over(size: int, rounds: int = 1500) -> float:
    """`limits scm` in Python with nothing but the socket, mmap and os modules, on one CPU, median in µs."""
    here, there = cpus(False)

    def body(sock: socket.socket) -> None:
        for _ in range(rounds):
            _, control, _, _ = sock.recvmsg(64, 64, socket.MSG_CMSG_CLOEXEC)
            fd = int.from_bytes(control[0][2], "little")
            view = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            if view[0] + view[size - 1] != 2:
                raise RuntimeError("wrong bytes")
            view.close()
            os.close(fd)
            sock.send(b"a")
        sock.recv(1)

    fd = os.memfd_create("bare")
    os.ftruncate(fd, size)
    os.pwrite(fd, b"\1", 0)
    os.pwrite(fd, b"\1", size - 1)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))]
    samples = []
    clock = time.perf_counter_ns
    with peer(body, there) as sock, pinned(here):
        for _ in range(rounds):
            start = clock()
            sock.sendmsg((b"x" * 64,), control)
            sock.recv(8)
            samples.append(clock() - start)
    os.close(fd)
    return median_us(samples[rounds // 10 :])


def clean() -> None:
    """Remove what was built."""
    if _directory.cache_info().currsize:
        shutil.rmtree(_directory())
