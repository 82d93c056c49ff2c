"""A command under a real kernel: it sees this machine's files read-only under a throw-away overlay, and is root.

The guest's `/` is the host's, through hostfs (user-mode Linux) or 9p (QEMU): the same paths, the same Python. What it writes goes to its
memory and vanishes. debugfs is mounted; `/run` and `/dev/shm` are its own and empty, so the tree must not be there.

A program in the guest tells the host what it is doing by a line ``@@NOW text`` on ``/dev/console``: the last one names what hung.
"""

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.kernel import needs
from tools.kernel.place import Kernel, Trouble, cache

_INIT = Path(__file__).parent / "init.sh"
# What the guest needs to see the host's files; then what is worth loading where it is a module.
_BASE_MODULES = ("virtio_pci", "netfs", "9pnet", "9pnet_virtio", "9p", "overlay", "virtio_console")
MODULES = ("udmabuf", "vgem", "vkms", "vivid", "virtio_gpu")
_KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "PYTHONPATH",
    "PYTHONWARNINGS",
    "VIRTUAL_ENV",
    "HYPOTHESIS_NO_PLUGINS",
    "PYTHONDONTWRITEBYTECODE",
)
_MEMORY_MIB = 768
TIMED_OUT, DIED = 124, 125


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, or ``TIMED_OUT`` or ``DIED``; the last line it sent as ``@@NOW``; the console's last lines."""

    status: int
    stdout: bytes
    stderr: bytes
    now: str
    console: list[str]
    dmesg: str


def _module(directory: Path, name: str) -> tuple[str, list[str]] | None:
    """A module's file and those it depends on; None where it is built in, or there is none."""
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, depends = line.partition(":")
        if Path(path).name.split(".ko")[0].replace("-", "_") == name.replace("-", "_"):
            return path, depends.split()
    return None


def _initrd(kernel: Kernel) -> Path:
    modules: list[str] = []
    directory = kernel.modules
    if directory is not None:
        for name in _BASE_MODULES:
            if (found := _module(directory, name)) is not None:
                modules += [path for path in [*reversed(found[1]), found[0]] if path not in modules]
    text = _INIT.read_text()
    stamp = str(kernel.image.stat().st_mtime_ns)
    key = hashlib.sha256("\0".join([text, stamp, *modules]).encode()).hexdigest()[:12]
    made = cache() / "initrd" / f"{kernel.name}-{key}.cpio"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for sub in ("bin", "dev", "proc", "sys", "mods", "host", "job", "ov", "root"):
            (root / sub).mkdir()
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        (root / "init").write_text(text)
        (root / "init").chmod(0o755)
        for path in modules:
            assert directory is not None
            shutil.copy(directory / path, root / "mods")
        (root / "mods" / "order").write_text("".join(Path(path).name + "\n" for path in modules))
        files = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        part = Path(f"{made}.{os.getpid()}")
        with part.open("wb") as out:
            subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files.encode(), stdout=out, check=True)
        part.rename(made)
    return made


def _user_mode(kernel: Kernel, initrd: Path, job: Path) -> list[str]:
    return [
        str(kernel.image),
        f"mem={_MEMORY_MIB}M",
        f"initrd={initrd}",
        *("rdinit=/init", "con=null", "con0=null,fd:1", "panic=-1", "quiet", "loglevel=4"),
        f"job.uml={job}",
        *("umid=u", f"uml_dir={job}/"),
    ]


def _emulated(kernel: Kernel, initrd: Path, job: Path) -> list[str]:
    # A TSC that the guest calibrates while the host is busy may run at several times its speed; the emulated HPET does not.
    clock = "tsc=reliable no_timer_check clocksource=hpet"
    host = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
    return [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", f"{_MEMORY_MIB}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        # A GPU for its sync objects, which vgem and vkms have not.
        *("-device", "virtio-gpu-pci"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init mitigations=off nokaslr {clock}"),
        *("-virtfs", host, "-virtfs", f"local,path={job},mount_tag=job,security_model=none"),
    ]


def _script(kernel: Kernel, command: list[str], environment: dict[str, str]) -> str:
    kept = {name: value for name, value in os.environ.items() if name in _KEPT} | environment | {"DMABUF_KERNEL": kernel.name}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in kept.items()]
    return "".join(lines) + f"cd {shlex.quote(os.getcwd())} 2>/dev/null || cd /\nexec {shlex.join(command)}\n"


def run(
    kernel: Kernel,
    command: list[str],
    *,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run a command in a guest, in this directory. ``timeout``: seconds, for the guest as a whole. ``progress`` gets each ``@@NOW``.

    Raise Trouble if QEMU or busybox is missing. A guest that dies has the status ``DIED``, and its console says why.
    """
    initrd = _initrd(kernel)
    job, lock = _job()
    try:
        (job / "run.sh").write_text(_script(kernel, command, environment or {}))
        (job / "modules").write_text(" ".join(MODULES) + "\n")
        (job / "moddir").write_text(f"{kernel.path}\n")
        argv = _user_mode(kernel, initrd, job) if kernel.user_mode else _emulated(kernel, initrd, job)
        return _watch(argv, job, timeout, progress)
    finally:
        shutil.rmtree(job, ignore_errors=True)
        os.close(lock)


def _job() -> tuple[Path, int]:
    """A directory for what host and guest tell each other, locked. Those that nobody locks are of runs that were killed: removed."""
    jobs = cache() / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    for old in jobs.glob("job-*"):
        with contextlib.suppress(OSError):
            fd = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if any(old.iterdir()):  # an empty one is being made
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(fd)
    job = Path(tempfile.mkdtemp(prefix="job-", dir=jobs))
    lock = os.open(job, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return job, lock


def _watch(argv: list[str], job: Path, timeout: float, progress: Callable[[str], None]) -> Outcome:
    console: list[str] = []
    now = ""
    # User-mode Linux keeps its memory in a mapped, executable file. The /dev/shm of a container is often too small for it, or noexec.
    environment = dict(os.environ)
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    if shm is None or shm.f_bavail * shm.f_frsize < _MEMORY_MIB << 20 or shm.f_flag & os.ST_NOEXEC:
        environment["TMPDIR"] = str(job)
    needs.command(argv[0])
    guest = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )

    def read() -> None:
        nonlocal now
        assert guest.stdout is not None
        for line in guest.stdout:
            text = line.decode(errors="replace").rstrip("\r\n")
            if text.startswith("@@NOW "):
                now = text.removeprefix("@@NOW ")
                progress(now)
            else:
                console.append(text)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    timed_out = False
    try:
        guest.wait(timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        # User-mode Linux runs the guest's programs as children of its own.
        if guest.poll() is None:
            os.killpg(guest.pid, signal.SIGKILL)
            guest.wait()
    reader.join()  # all who held the pipe are gone
    assert guest.stdout is not None
    guest.stdout.close()

    def left(name: str) -> bytes:
        return (job / name).read_bytes() if (job / name).exists() else b""

    status = left("rc").strip()
    code = int(status) if status.isdigit() else TIMED_OUT if timed_out else DIED
    return Outcome(code, left("stdout"), left("stderr"), now, console[-40:], left("dmesg").decode(errors="replace"))


def explain(outcome: Outcome) -> str:
    """What went wrong with the guest itself, for people; empty if nothing did."""
    if outcome.status not in (TIMED_OUT, DIED):
        return ""
    what = "did not end in time" if outcome.status == TIMED_OUT else "died"
    return "\n".join([f"the guest {what}; the last it began: {outcome.now or 'to start'}", *("  " + line for line in outcome.console)])


__all__ = ["DIED", "TIMED_OUT", "Outcome", "Trouble", "explain", "run"]
