"""What fetching, building and running a kernel needs of the machine, by Debian package; installed when we are root."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from tools.kernel.place import Trouble

# Debian package: a command or a header that shows it is there.
_BOOT = {"busybox-static": "/bin/busybox", "cpio": "cpio", "kmod": "modprobe"}
_FETCH = {"xz-utils": "xz", "dpkg": "dpkg"}
_BUILD = {
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "rsync": "rsync",
    "libelf-dev": "/usr/include/libelf.h",
    "libssl-dev": "/usr/include/openssl/ssl.h",
}
_EMULATE = {"qemu-system-x86": "qemu-system-x86_64"}
NEEDS = {"uml": _BOOT | _FETCH | _BUILD, "full": _BOOT | _FETCH | _BUILD | _EMULATE, "debian": _BOOT | _FETCH | _EMULATE}
# What an installed kernel needs to run: nothing is built.
RUNS = {True: _BOOT, False: _BOOT | _EMULATE}
# The system's programs too, for who has no /sbin in his path.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def check_machine() -> str | None:
    """Why no kernel can run here; None if one can."""
    if platform.machine() not in ("x86_64", "amd64"):
        return f"the kernels that judge are x86-64 programs; this is {platform.machine()}"
    return None


def command(name: str) -> str:
    """Return the path of a program. Raise Trouble if it is missing."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise Trouble(f"{name} not found")
    return found


def _present(sign: str) -> bool:
    return Path(sign).exists() if sign.startswith("/") else shutil.which(sign, path=_PATH) is not None


def require(packages: dict[str, str]) -> None:
    """Install what is missing, as root. Any other user gets Trouble that names what to install."""
    missing = [package for package, sign in packages.items() if not _present(sign)]
    if not missing:
        return
    line = "apt-get install --no-install-recommends " + " ".join(missing)
    if os.geteuid() != 0 or not _present("apt-get"):
        raise Trouble(f"this machine lacks what a kernel needs; as root: {line}")
    print(f"installing {' '.join(missing)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qy", "-o", "Dpkg::Use-Pty=0", "install", "--no-install-recommends", *missing]
    if subprocess.run(install, env=environment, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        update()
        if subprocess.run(install, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            raise Trouble(f"could not install what a kernel needs: {line}")
    still = [package for package in missing if not _present(packages[package])]
    if still:
        raise Trouble(f"installed, and yet not found: {' '.join(still)}")


def download(package: str, into: Path) -> Path:
    """Return the file of a Debian package, from apt's sources, without installing it. Raise Trouble if that fails."""
    have = sorted(into.glob(f"{package}_*.deb"))
    if have:
        return have[-1]
    if not _present("apt-get"):
        raise Trouble(f"{package} comes from Debian, and there is no apt-get here")
    into.mkdir(parents=True, exist_ok=True)
    print(f"downloading {package}", flush=True)
    # Into a directory of its own first: a download that was cut off is not a package.
    part = into / f".{package}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    fetch = ["apt-get", "-q", "download", package]
    if subprocess.run(fetch, cwd=part, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        update()
        if subprocess.run(fetch, cwd=part, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            raise Trouble(
                f"could not download {package}: `apt-get update`, or add the Debian suite that has it (security) to apt's sources"
            )
    (found,) = part.glob("*.deb")
    kept = found.rename(into / found.name)
    part.rmdir()
    return kept


def update() -> None:
    """Fetch apt's lists again, if this user may: a machine that was just made has none, or old ones."""
    if os.geteuid() == 0:
        subprocess.run(["apt-get", "-q", "update"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def known(package: str) -> bool:
    """Do apt's lists have it?"""
    told = subprocess.run(["apt-cache", "show", package], capture_output=True, stdin=subprocess.DEVNULL)
    return told.returncode == 0 and bool(told.stdout)


def newest(pattern: str) -> str | None:
    """The package of the highest version whose name matches apt's pattern; None without any."""
    told = subprocess.run(["apt-cache", "search", "--names-only", pattern], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    names = [line.split()[0] for line in told.stdout.splitlines() if line]
    return max(
        names, key=lambda name: [int(part) for part in name.replace("-", ".").replace("+", ".").split(".") if part.isdigit()], default=None
    )
