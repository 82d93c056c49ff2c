"""The commands of ``python -m tools.kernel``."""

import argparse
import signal
import sys

from tools.kernel import guest, make, needs
from tools.kernel.place import Trouble, kernels

# Seconds for a whole guest. Emulated ones are several times slower; so is each of their tests, whose watchdogs are set accordingly.
_USER_MODE, _EMULATED = 2400, 7200
_WATCHDOGS = ("-o", "timeout=600", "-o", "faulthandler_timeout=1200")


def _run(wanted: str, command: list[str], timeout: float | None) -> int:
    kernel = make.kernel(wanted)
    outcome = guest.run(kernel, command, timeout=timeout or (_USER_MODE if kernel.user_mode else _EMULATED))
    sys.stdout.buffer.write(outcome.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(outcome.stderr)
    print(guest.explain(outcome), end="\n" if guest.explain(outcome) else "", file=sys.stderr)
    return outcome.status


def _test(wanted: str, arguments: list[str], timeout: float | None) -> int:
    """The tests of tests/kernel, in a guest; a dot for each that begins."""
    kernel = make.kernel(wanted)
    print(f"tests/kernel on Linux {kernel.name}", flush=True)
    shown = 0

    def progress(_: str) -> None:
        nonlocal shown
        shown += 1
        if shown % 25 == 0:
            print(f"\r  {shown} cases begun" if sys.stdout.isatty() else ".", end="", flush=True)

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel and not long"]
    command += [*(() if kernel.user_mode else _WATCHDOGS), *arguments]
    if not any(one.startswith("tests") for one in arguments):
        command.append("tests/kernel")
    outcome = guest.run(kernel, command, timeout=timeout or (_USER_MODE if kernel.user_mode else _EMULATED), progress=progress)
    print(flush=True)
    sys.stdout.buffer.write(outcome.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(outcome.stderr)
    if text := guest.explain(outcome):
        print(text, file=sys.stderr)
    return outcome.status


def main(arguments: list[str]) -> int:
    """Run a command; the status is that of what ran in the guest, 2 if the guest could not run it."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("test", "run tests/kernel in a guest"),
        ("run", "run a command in a guest"),
        ("prepare", "fetch or build a kernel"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("-k", "--kernel", default="uml", help="uml, debian, full, or a name of `list`")
        if name != "prepare":
            sub.add_argument("--timeout", type=float, help=f"seconds for the whole guest ({_USER_MODE}; under emulation {_EMULATED})")
            sub.add_argument("rest", nargs="*", help="after --: pytest's arguments, or the command")
    commands.add_parser("list", help="the kernels that are ready")
    given = parser.parse_args(arguments)
    if given.command == "list":
        print("\n".join(one.name for one in kernels()) or "none yet")
        return 0
    if reason := needs.check_machine():
        print(f"SKIPPED: {reason}")
        return 0
    # A guest ends with us: what ends us unwinds.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if given.command == "prepare":
            print(make.kernel(given.kernel).path)
            return 0
        return (_test if given.command == "test" else _run)(given.kernel, given.rest, given.timeout)
    except Trouble as trouble:
        print(f"dmabuf: {trouble}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
