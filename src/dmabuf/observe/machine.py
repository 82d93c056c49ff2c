"""The checks of ``dmabuf doctor``: what this machine has for the library, and how to get what is missing.

Each check tries the feature itself, and doesn't ask for a version. It leaves nothing behind, loads no module and makes no domain.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import operator
import os
import resource
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dmabuf._native import OwnedFd, hears_closes, owned, watch_add, watch_open, watch_read
from dmabuf.domain import peers, place, proved
from dmabuf.domain.limits import listed
from dmabuf.domain.records import reference_locks
from dmabuf.errors import DmaBufError, errno_name
from dmabuf.heap import budget, devices, udmabuf
from dmabuf.observe.units import size

OK, MISSING, WARNING = "ok", "missing", "warning"
_MIB = 1 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ROUNDS = 300  # wakes measured; some milliseconds
_SLOW_WAKE_NS = 25_000  # on a physical machine a futex wake between CPUs costs 3–10 µs


@dataclass(frozen=True)
class Check:
    """The result of one check.

    ``status``: ``"ok"``, ``"warning"`` (it works, but could be better) or ``"missing"``. ``required``: whether the library needs it;
    everything else is a fast path or a device. ``detail``: what was found, or why it is missing. ``remedy``: what to do, "" if nothing.
    """

    name: str
    status: str
    required: bool
    detail: str
    remedy: str = ""


def checks(
    *, domain_path: Path | None = None, dev: Path = Path("/dev"), proc: Path = Path("/proc"), parameters: Path = udmabuf.PARAMETERS
) -> list[Check]:
    """Run every check, the required ones first.

    ``domain_path``: None for this user's domain. ``dev``, ``proc``, ``parameters``: for tests.
    """
    found = [_kernel(), _proc(proc), _memfd(), _locks(proc), _domain(domain_path) if domain_path else _default_domain(), *_memory()]
    found += [_descriptors(), _inotify(), _deaths(), _namespace(proc), _pid_namespace(proc), _cpus()]
    found.append(_udmabuf(dev / "udmabuf", parameters))
    found.extend(_devices(dev, "dma_heap", "dma_heap/*", "dma-buf heaps", "use a kernel with CONFIG_DMABUF_HEAPS_SYSTEM"))
    found.extend(_devices(dev, "dri", "dri/card*", "GPU buffers", "load a GPU's driver, or: modprobe vgem", "dri/renderD*"))
    found.extend(_devices(dev, "video", "video*", "cameras", "load a camera's driver, or: modprobe vivid"))
    found.append(_extra("demo", ("av", "numpy"), "`dmabuf demo`"))
    return found


def _tried(name: str, attempt: Callable[[], str], remedy: str) -> Check:
    """Try a required feature."""
    try:
        return Check(name, OK, True, attempt())
    except OSError as e:
        return Check(name, MISSING, True, f"{errno_name(e.errno)}: {e.strerror}" if e.errno else str(e), remedy)


# ---- required ----


def _kernel() -> Check:
    name = os.uname()
    return Check("kernel", OK, True, f"{name.sysname} {name.release} {name.machine}")


def _proc(proc: Path) -> Check:
    def attempt() -> str:
        listed("doctor", str(proc / "self/fd"))
        others = sum(name.isdigit() for name in listed("doctor", str(proc)))
        return f"mounted at {proc}, shows {others} processes"

    return _tried("/proc", attempt, f"mount it: mount -t proc proc {proc}")


def _memfd() -> Check:
    def attempt() -> str:
        with owned(os.memfd_create, "dmabuf-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) as own:
            os.ftruncate(own.number, 4096)
            os.posix_fallocate(own.number, 0, 4096)
            fcntl.fcntl(own.number, fcntl.F_ADD_SEALS, _SEALS)
        return "memfd_create, with seals"

    return _tried("memfd", attempt, "use Linux 3.17 or newer, and a sandbox that allows memfd_create")


def _locks(proc: Path) -> Check:
    def attempt() -> str:
        if not os.path.exists(proc / "locks") and os.path.exists(proc / "self"):
            raise OSError(f"{proc} shows processes only, and not locks")
        with owned(os.memfd_create, "dmabuf-doctor", os.MFD_CLOEXEC) as own:
            os.ftruncate(own.number, 4096)
            if not own.set_lock(fcntl.F_RDLCK, 0):
                raise OSError("a lock on a new file is refused")
            with own.reopen() as other:
                if not other.get_lock(0):
                    raise OSError("a lock is not seen through a second description")
            # One pass may miss a lock while others come and go.
            if not any((own.dev, own.ino) in (reference_locks() or ()) for _ in range(3)):
                raise OSError(f"a lock is not seen in {proc}/locks")
        return f"open-file-description locks, seen in {proc}/locks"

    return _tried("OFD locks", attempt, "use Linux 3.15 or newer with CONFIG_FILE_LOCKING, and a /proc without subset=pid")


def _default_domain() -> Check:
    """Check the default domain's place, and the other one if the first never works, as the library does."""
    chosen = place.default_path()
    found = _domain(chosen)
    for path in place.default_places():
        if found.status == MISSING and found.remedy == proved.remedy() and path != chosen:
            other = _domain(path)
            if other.status == OK:
                return replace(other, detail=f"{other.detail}; not in {chosen}, because {found.detail}")
    return found


def _domain(path: Path) -> Check:
    """Check that the domain's directory belongs to this user, or can be made, and that a domain works there."""
    remedy = "make it yours with mode 0700, or name another directory in DMABUF_DOMAIN"
    given = "from DMABUF_DOMAIN" if os.environ.get("DMABUF_DOMAIN") == str(path) else "the default"
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        parent = path.parent
        if os.access(parent, os.W_OK | os.X_OK):
            return _place(parent, f"{path} ({given}): doesn't exist yet, made at first use", temporary=True)
        why = "can't be made in" if parent.is_dir() else "can't be made: there is no"
        return Check("domain", MISSING, True, f"{path} ({given}) {why} {parent}", "name a directory you can write to in DMABUF_DOMAIN")
    except OSError as e:
        return Check("domain", MISSING, True, f"{path} ({given}): {e.strerror}", remedy)
    if not stat.S_ISDIR(st.st_mode):
        return Check("domain", MISSING, True, f"{path} ({given}) is not a directory", remedy)
    if st.st_uid != os.geteuid() or stat.S_IMODE(st.st_mode) & ~stat.S_ISGID != 0o700:
        return Check(
            "domain", MISSING, True, f"{path} ({given}) belongs to {devices.user(st.st_uid)}, mode {stat.S_IMODE(st.st_mode):04o}", remedy
        )
    return _place(path, f"{path} ({given}): belongs to you")


def _place(path: Path, found: str, *, temporary: bool = False) -> Check:
    """Try what a domain needs of a directory. ``temporary``: in a directory of its own there, because ``path`` may be anybody's."""
    try:
        with tempfile.TemporaryDirectory(prefix=".dmabuf-", dir=path) if temporary else contextlib.nullcontext(path) as where:
            with owned(os.open, where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC) as directory:
                proof = proved.prove(directory.number, path)
    except DmaBufError as e:
        return Check("domain", MISSING, True, str(e).removesuffix(f"; {e.remedy}"), e.remedy or "")
    except OSError as e:
        return Check("domain", MISSING, True, f"{found}, but can't be tried: {e.strerror}", "name another directory in DMABUF_DOMAIN")
    locks = ", where a thread of each process keeps its lock" if proof.by_thread else ""
    return Check("domain", OK, True, f"{found}, on {proof.file_system}{locks}{_room(path)}")


def _room(path: Path) -> str:
    try:
        fs = os.statvfs(path)
    except OSError:
        return ""
    return f", {size(fs.f_bavail * fs.f_frsize)} free on its file system"


def _inotify() -> Check:
    """Check that the end of a buffer is noticed when it comes."""
    remedy = "allow inotify in the sandbox, or raise fs.inotify.max_user_instances"
    try:
        with owned(os.memfd_create, "dmabuf-doctor", os.MFD_CLOEXEC) as own:
            watch = watch_open()
            watch_add(watch, own.number, own.dev, own.ino)
        with watch:
            noticed = bool(watch_read(watch))
    except OSError as e:
        return Check("inotify", MISSING, False, f"the end of a buffer is noticed later ({e.strerror})", remedy)
    if not noticed:
        return Check("inotify", MISSING, False, "the end of a buffer is noticed later (no event comes)", remedy)
    return Check("inotify", OK, False, "the end of a buffer is noticed at once")


def _deaths() -> Check:
    """Check how a waiter hears that a process died. The file system of the domain may still make a difference."""
    slow = "a waiting process looks for deaths 25 times a second, because it can't hear of them"
    remedy = "allow close_range and inotify in the sandbox, or raise fs.inotify.max_user_instances"
    try:
        with owned(os.memfd_create, "dmabuf-doctor", os.MFD_CLOEXEC) as own:
            heard = hears_closes(own.number)
    except OSError as e:
        return Check("deaths", WARNING, False, f"{slow} ({errno_name(e.errno or 0)}: {e.strerror})", remedy)
    if not heard:
        return Check("deaths", WARNING, False, f"{slow} (no event comes)", "use a kernel with CONFIG_INOTIFY_USER")
    return Check("deaths", OK, False, "a waiting process hears of them at once (inotify), and looks for them twice a second")


# ---- limits ----


def _memory() -> Iterator[Check]:
    """Check how much an allocation may take now, and by which limit."""
    here = budget.Budget()
    try:
        room, rooms = here.least(), here.groups()
    except OSError as e:
        remedy = e.remedy if isinstance(e, DmaBufError) and e.remedy else "mount /proc"
        yield Check("memory", MISSING, True, str(e).removesuffix(f"; {remedy}"), remedy)
        return
    status = OK if room.left >= 64 * _MIB else WARNING
    yield Check("memory", status, False, f"{size(max(0, room.left))} can be allocated: {room.limit}", "" if status == OK else room.remedy)
    if rooms:
        path, left = min(rooms.items(), key=lambda r: r[1].left)
        yield Check("cgroup", OK if left.left >= 64 * _MIB else WARNING, False, f"{size(max(0, left.left))} left in {path}", "")
    else:
        yield Check("cgroup", OK, False, "no memory limit")


def _descriptors() -> Check:
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:
        return Check("descriptors", WARNING, False, "a filter of system calls (seccomp) hides the limit", "allow prlimit64 in the sandbox")
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if soft == resource.RLIM_INFINITY:
        return Check("descriptors", OK, False, "unlimited")
    status = WARNING if soft < 1024 else OK
    more = hard == resource.RLIM_INFINITY or soft < hard
    remedy = f"ulimit -n {most}" if more else ""
    return Check("descriptors", status, False, f"{soft} a process (hard limit {most}); every open buffer takes one", remedy)


def _namespace(proc: Path) -> Check:
    try:
        inside = (proc / "self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return Check("user namespace", OK, False, "the kernel has none")
    if inside:
        return Check("user namespace", OK, False, "a separate one: buffers are shared with processes of the same uid outside of it, too")
    return Check("user namespace", OK, False, "the machine's")


def _pid_namespace(proc: Path) -> Check:
    """Check whether processes of the domain can reach each other through /proc."""
    try:
        inside = os.stat(proc / "self/ns/pid").st_ino != peers.FIRST_NAMESPACE
    except OSError:
        return Check("pid namespace", OK, False, "the kernel has none")
    if inside:
        return Check(
            "pid namespace", OK, False, "a separate one: processes outside of it open buffers by name by asking this one (a thread)"
        )
    return Check("pid namespace", OK, False, "the machine's; a process whose buffers containers open by name calls dmabuf.serve()")


def _cpus() -> Check:
    """Check how many CPUs there are, and what it costs to wake a process on another one."""
    usable = sorted(os.sched_getaffinity(0))
    count = f"{len(usable)} of {os.cpu_count()} CPUs usable"
    try:
        same = _wake_ns(usable[0], usable[0])
        other = _wake_ns(usable[0], usable[-1]) if len(usable) > 1 else None
    except OSError as e:
        return Check("cpus", OK, False, f"{count}; waking a process can't be measured ({e.strerror or e})")
    if other is None:
        return Check("cpus", OK, False, f"{count}; waking a process on it takes {same / 1000:.1f} µs")
    text = f"{count}; waking a process takes {same / 1000:.1f} µs on the same CPU, {other / 1000:.1f} µs on another"
    if other > _SLOW_WAKE_NS:
        return Check(
            "cpus", WARNING, False, text, "run partners on one CPU (taskset), or avoid deep idle states; a virtual machine may be the cause"
        )
    return Check("cpus", OK, False, text)


def _wake_ns(here: int, there: int) -> int:
    """Return the nanoseconds of one wake (half a round trip over two pipes) between processes on two CPUs, the median of many."""
    before = os.sched_getaffinity(0)
    # One call of C, in which no signal handler can raise.
    pipes = list(map(OwnedFd, itertools.chain.from_iterable(map(operator.call, (os.pipe, os.pipe)))))
    there_r, here_w, here_r, there_w = (own.number for own in pipes)
    with warnings.catch_warnings():
        # Python warns of a fork with other threads. This child only makes system calls until it ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:  # it ends without exit handlers, and without flushing buffers
        try:
            pipes[1].close()
            os.sched_setaffinity(0, {there})
            while os.read(there_r, 1):
                os.write(there_w, b"x")
        finally:
            os._exit(0)
    pipes[0].close()
    pipes[3].close()
    try:
        os.sched_setaffinity(0, {here})
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter_ns()
            os.write(here_w, b"x")
            if not os.read(here_r, 1):
                raise OSError("the other process ended")
            times.append(time.perf_counter_ns() - start)
    finally:
        pipes[1].close()
        pipes[2].close()
        os.sched_setaffinity(0, before)
        os.waitpid(child, 0)
    return sorted(times)[len(times) // 2] // 2


# ---- devices: fast paths, none required ----


def _devices(dev: Path, name: str, pattern: str, gives: str, remedy: str, *more: str) -> list[Check]:
    nodes = [node for one in (pattern, *more) for node in sorted(dev.glob(one))]
    if nodes:
        return [_device(node, str(node.relative_to(dev)), gives, remedy) for node in nodes]
    return [Check(name, MISSING, False, f"no {dev}/{pattern}: no {gives}", remedy)]


def _device(node: Path, name: str, gives: str, remedy: str) -> Check:
    found = devices.examine(node, gives, remedy)
    return Check(name, OK if found.usable else MISSING, False, found.detail, found.remedy)


def _udmabuf(node: Path, parameters: Path) -> Check:
    found = _device(node, "udmabuf", udmabuf.GIVES, udmabuf.REMEDY)
    limits = udmabuf.limits(parameters)
    if found.status != OK or limits.size is None:
        return found
    ranges = "" if limits.ranges is None else f" of at most {limits.ranges & 0xFFFFFFFF} ranges"  # -1 lifts it: compared as unsigned
    return replace(found, detail=f"{found.detail}; up to {size(limits.size)} a buffer{ranges} ({parameters})")


def _extra(extra: str, modules: tuple[str, ...], gives: str) -> Check:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        remedy = f"pip install 'dmabuf[{extra}]' (in a clone: pip install '.[{extra}]')"
        return Check(f"extra {extra}", MISSING, False, f"{', '.join(absent)} not installed: no {gives}", remedy)
    return Check(f"extra {extra}", OK, False, f"installed: {gives}")
