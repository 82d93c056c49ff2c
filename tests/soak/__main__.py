"""``python -m tests.soak --seconds 3600 --seed 7``; without a seed one is made up. Exit status 1: a fault was found."""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.soak.supervisor import FaultError, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", default=None, help="what the processes do, and when they are killed")
    parser.add_argument("--longest", type=float, default=None, metavar="SECONDS", help="of an epoch, after which nothing may be left")
    given = parser.parse_args()
    seed = given.seed or secrets.token_hex(4)
    print(f"soak of {given.seconds:g} s, seed {seed}", flush=True)
    try:
        print(soak(given.seconds, seed, given.longest or min(20, max(3, given.seconds / 8))))
    except FaultError as e:
        print(f"seed {seed}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
