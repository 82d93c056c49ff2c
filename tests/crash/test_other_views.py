"""A domain's file is reached by another path, through another mount, or is a copy of another file."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain import place
from tests.support.mounts import mounted
from tests.support.places import FILE, in_process, inhabitant, left, refused, visit

pytestmark = pytest.mark.crash


@pytest.fixture
def where() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="views-", dir="/dev/shm") as directory:
        yield Path(directory) / "domain"


def identity(path: Path) -> bytes:
    with open(path / FILE, "rb") as f:
        return place.read_header(f.fileno())[0]


def alive(path: Path) -> int:
    domain = dmabuf.Domain.open(path)
    names = [record.name for record in dmabuf.buffers(domain=domain)]
    domain.leave()
    return names.count("inhabited")


def expect(count: int, path: Path) -> None:
    assert alive(path) == count


def test_directory_that_is_mounted_at_another_path_is_the_same_domain(where: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can mount")
    other = where.with_name("other")
    other.mkdir(mode=0o700)
    with inhabitant(where):
        if subprocess.run(["mount", "--bind", where, other], check=False, capture_output=True).returncode:
            pytest.skip("mounts are not allowed here")
        try:
            in_process(lambda: expect(1, other))
        finally:
            subprocess.run(["umount", other], check=True)


def test_directory_in_another_mount_namespace_is_the_same_domain(where: Path) -> None:
    if os.geteuid() or not hasattr(os, "unshare"):
        unshare = shutil.which("unshare")
        if os.geteuid() or unshare is None:
            pytest.skip("only root can make a namespace")
    other = where.with_name("other")
    other.mkdir(mode=0o700)
    script = "import sys, dmabuf; d = dmabuf.Domain.open(sys.argv[1]); print([b.name for b in dmabuf.buffers(domain=d)])"
    with inhabitant(where):
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'mount --bind "{where}" "{other}" && exec "$0" "$@"', sys.executable, "-c", script, other],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip("namespaces are not allowed here")
        assert done.stdout.strip() == "['inhabited']", done.stderr


def test_copy_of_a_domain_is_another_domain(where: Path) -> None:
    """As in an image of a container that was made while the domain was there."""
    copy = where.with_name("copy")
    with inhabitant(where):
        shutil.copytree(where, copy, ignore=lambda path, names: [n for n in names if n != FILE])
        copy.chmod(0o700)
        assert identity(copy) == identity(where)
        in_process(lambda: expect(0, copy))
        in_process(lambda: expect(1, where))
        assert identity(copy) != identity(where)
    in_process(lambda: visit(copy))
    assert left(copy) == [FILE]


def test_file_in_use_through_another_mount_is_enotsup(tmp_path: Path) -> None:
    """The layer below an overlay shows the same bytes, but not the locks."""
    with mounted("overlay", tmp_path / "merged", base=tmp_path) as path, inhabitant(path / "domain"):
        below = tmp_path / "upper" / "domain"
        before = identity(below)
        error = refused(below)
        assert error.errno == errno.ENOTSUP
        assert "another mount" in str(error)
        assert identity(below) == before
        in_process(lambda: expect(1, path / "domain"))


def test_header_names_its_own_file(where: Path) -> None:
    in_process(lambda: visit(where))
    st = (where / FILE).stat()
    with open(where / FILE, "rb") as f:
        assert struct.unpack("<QQ", os.pread(f.fileno(), 16, _native.OFF_DEV)) == (st.st_dev, st.st_ino)
