"""Where kernels, sources and packages are kept: outside of the tree, and safe to delete."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path

SERIES = "6.12"  # a long-term series that Debian 12 and 13 both package


class Trouble(Exception):
    """What the caller can do about it, in a line."""


def cache() -> Path:
    """The directory of everything that is fetched or built."""
    named = os.environ.get("DMABUF_KERNEL_CACHE")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dmabuf-oracle"


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time fetches and builds; the others wait and find it done. The kernel drops the lock of one that is killed."""
    cache().mkdir(parents=True, exist_ok=True)
    fd = os.open(cache() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        flock(fd, LOCK_EX)
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Kernel:
    """A directory of ``kernels/``: ``linux`` (user-mode), or ``vmlinux`` or ``vmlinuz`` for QEMU; ``config``; ``lib/modules/VERSION``."""

    path: Path

    @property
    def name(self) -> str:
        """As ``6.12.117-uml``."""
        return self.path.name

    @property
    def image(self) -> Path:
        """The file that boots. Raise Trouble if there is none."""
        for name in ("linux", "vmlinux", "vmlinuz"):
            if (self.path / name).exists():
                return self.path / name
        raise Trouble(f"no kernel image in {self.path}: remove that directory and run `make test-kernel` again")

    @property
    def user_mode(self) -> bool:
        """Is it a program of this machine?"""
        return self.image.name == "linux"

    @property
    def modules(self) -> Path | None:
        """``lib/modules/VERSION``; None where all is built in."""
        return next(iter(sorted((self.path / "lib" / "modules").glob("*"))), None)


def kernels() -> list[Kernel]:
    """Those that are ready, the newest last. A name that begins with a dot is of one that is being made."""
    found = [Kernel(path) for path in (cache() / "kernels").glob("[!.]*") if path.is_dir()]
    return sorted(found, key=lambda one: ([int(number) for number in re.findall(r"\d+", one.name)], one.name))
