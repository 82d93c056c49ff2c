"""File systems that a test mounts, where it may."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(kind: str, at: Path, options: str = "mode=0700", base: Path | None = None) -> Iterator[Path]:
    """Mount a file system for the block, and skip the test where that isn't allowed. ``base``: directory for the layers of an overlay."""
    if os.geteuid():
        pytest.skip("only root can mount")
    at.mkdir(mode=0o700, exist_ok=True)
    if kind == "overlay":
        assert base is not None
        layers = [base / name for name in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir()
        options = ",".join(f"{layer.name}dir={layer}" for layer in layers)
    if subprocess.run(["mount", "-t", kind, "-o", options, "none", at], check=False, capture_output=True).returncode:
        pytest.skip(f"mounts of {kind} are not allowed here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)  # objects of the test may still have files of it open
