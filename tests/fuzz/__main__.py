"""``python -m tests.fuzz --count 1000000 [--seed 7] [TARGET…]``: that many inputs in all. Exit status 1: a fault was found."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("targets", nargs="*")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 20) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory(prefix="dmabuf-fuzz-", dir="/dev/shm") as directory:
        os.environ["DMABUF_DOMAIN"] = f"{directory}/d"
        from tests.fuzz.run import FaultError, run
        from tests.fuzz.targets import TARGETS

        names = given.targets or list(TARGETS)
        each, done = -(-given.count // len(names)), 0
        for name in names:
            try:
                took = run(name, each, seed)
            except FaultError as e:
                print(f"seed {seed}: {e}", file=sys.stderr)
                raise
            done += each
            print(f"{name}: {each} inputs in {took:.0f} s ({took / each * 1e6:.0f} µs each), seed {seed}", flush=True)
        print(f"{done} inputs, nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
