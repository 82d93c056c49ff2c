"""A kernel for the cache: built from Debian's linux-source, or Debian's image unpacked. Nothing is installed."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.kernel import needs
from tools.kernel.place import SERIES, Kernel, Trouble, alone, cache, kernels

_HERE = Path(__file__).parent
_ENDINGS = {"uml": "-uml", "full": "-oracle", "debian": "-amd64"}


def kernel(wanted: str) -> Kernel:
    """Return the kernel of that kind or name, and make it if need be. Raise Trouble if that fails."""
    found = _ready(wanted)
    if found is None:
        if wanted not in _ENDINGS:
            raise Trouble(f"no kernel {wanted!r}: uml, debian, full, or one of {', '.join(one.name for one in kernels()) or 'none yet'}")
        with alone():
            found = _ready(wanted)
            if found is None:
                needs.require(needs.NEEDS[wanted])
                found = _debian() if wanted == "debian" else _build(wanted)
    needs.require(needs.RUNS[found.user_mode])
    return found


def _ready(wanted: str) -> Kernel | None:
    ending = _ENDINGS.get(wanted)
    for one in reversed(kernels()):
        if one.name == wanted or (ending is not None and one.name.startswith(SERIES + ".") and one.name.endswith(ending)):
            return one
    return None


def _source() -> Path:
    """The kernel's source, unpacked."""
    source = cache() / "src" / SERIES
    if (source / "Makefile").is_file():
        return source
    package = needs.download(f"linux-source-{SERIES}", cache() / "debs")
    print(f"unpacking {package.name}", flush=True)
    part = cache() / "src" / f".{SERIES}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _run(["dpkg", "-x", str(package), str(part / "deb")], part)
    (part / "tree").mkdir()
    tar = part / "deb" / "usr" / "src" / f"linux-source-{SERIES}.tar.xz"
    _run(["tar", "-C", str(part / "tree"), "--strip-components=1", "-xf", str(tar)], part)
    shutil.rmtree(source, ignore_errors=True)
    (part / "tree").rename(source)
    shutil.rmtree(part)
    package.unlink()
    return source


def _build(wanted: str) -> Kernel:
    source = _source()
    arch = "um" if wanted == "uml" else "x86_64"
    build = cache() / "src" / f"build-{SERIES}-{arch}"
    build.mkdir(exist_ok=True)
    parts = ["dmabuf.config", "lean.config", *(["um.config"] if wanted == "uml" else [])]
    make = ["make", "-s", f"ARCH={arch}"]
    _run([*make, "-C", str(source), f"O={build}", "allnoconfig"], build)
    _run([str(source / "scripts/kconfig/merge_config.sh"), "-m", ".config", *(str(_HERE / part) for part in parts)], build)
    _run([*make, "-C", str(source), f"O={build}", "olddefconfig"], build)
    version = _run([*make, "-C", str(source), "kernelversion"], build).strip()
    targets = ["linux"] if wanted == "uml" else ["vmlinux"]  # QEMU starts vmlinux itself (PVH)
    print(f"building Linux {version} ({wanted}): minutes, once", flush=True)
    # Without -s, make says a line for each file: our progress.
    _run_watched(["make", f"-j{os.cpu_count() or 1}", f"ARCH={arch}", *targets, "modules"], build)
    made = cache() / "kernels" / f".{version}{_ENDINGS[wanted]}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _run([*make, f"INSTALL_MOD_PATH={made}", "modules_install"], build)
    for link in made.glob("lib/modules/*/build"):
        link.unlink()
    shutil.copy(build / ".config", made / "config")
    for image in ["linux"] if wanted == "uml" else ["vmlinux"]:
        _run(["objcopy", "--strip-debug", image, str(made / image)], build)
    return _done(made)


def _debian() -> Kernel:
    """Debian's image: ``linux-image-VERSION``; newer suites split it into linux-binary, linux-modules and linux-base."""
    pattern = rf"^linux-image-{re.escape(SERIES)}\.[0-9.]+\+deb[0-9]+-amd64$"
    image = needs.newest(pattern)
    if image is None:
        needs.update()
        image = needs.newest(pattern)
    if image is None:
        raise Trouble(f"apt's sources have no linux-image-{SERIES}: `apt-get update`, or add Debian's security suite")
    version = image.removeprefix("linux-image-")
    packages = [image]
    if needs.known(f"linux-binary-{version}"):
        packages += [f"linux-{part}-{version}" for part in ("binary", "modules", "base")]
    part = cache() / "kernels" / f".{version}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for package in packages:
        file = needs.download(package, cache() / "debs")
        _run(["dpkg", "-x", str(file), str(part / "x")], part)
        file.unlink()
    made = cache() / "kernels" / f".{version}"
    shutil.rmtree(made, ignore_errors=True)
    (made / "lib" / "modules").mkdir(parents=True)
    for name in ("vmlinuz", "config"):
        found = [*part.glob(f"x/boot/{name}-{version}"), *part.glob(f"x/usr/lib/modules/{version}/{name}")]
        shutil.copy(found[0], made / name)
    modules = made / "lib" / "modules" / version
    next(path for path in (part / "x/lib/modules" / version, part / "x/usr/lib/modules" / version) if path.is_dir()).rename(modules)
    for left in ("vmlinuz", "config", "System.map", "build", "source"):
        (modules / left).unlink(missing_ok=True)
    packed = sorted(modules.rglob("*.ko.xz"))
    print(f"unpacking {len(packed)} modules", flush=True)
    for start in range(0, len(packed), 50):
        _run(["xz", "-d", *map(str, packed[start : start + 50])], part)
    _run([needs.command("depmod"), "-b", str(made), version], part)
    shutil.rmtree(part)
    return _done(made)


def _done(made: Path) -> Kernel:
    """Under its own name only now: a directory without a dot is whole."""
    final = made.with_name(made.name.removeprefix("."))
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    print(f"kernel {final.name} is ready", flush=True)
    return Kernel(final)


def _run(argv: list[str], cwd: Path) -> str:
    told = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if told.returncode:
        raise Trouble(f"{' '.join(argv)[:200]} failed:\n{told.stdout[-4000:]}")
    return told.stdout


def _run_watched(argv: list[str], cwd: Path) -> None:
    """Run make, and show that it goes on: the count of files, and the last, in place on a terminal, else a line every 30 seconds."""
    last: list[str] = []
    count, shown, start = 0, time.monotonic(), time.monotonic()
    with subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            last = [*last[-60:], line]
            count += line.startswith("  ")
            now = time.monotonic()
            if now - shown >= (0.2 if sys.stdout.isatty() else 30):
                shown = now
                text = f"  {now - start:4.0f} s  {count:5d} steps  {line.strip()}"[:100]
                print(f"\r{text:<100}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)
    if sys.stdout.isatty():
        print()
    if running.returncode:
        raise Trouble(f"building the kernel failed in {cwd}:\n{''.join(last)}")
