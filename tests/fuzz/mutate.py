"""Random changes of valid input."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 64, 127, 128, 253, 254, 255, 256, 4095, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
NUMBERS += ((1 << 40) - 1, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def number(rng: random.Random) -> int:
    """Return a number that is at some edge, or any."""
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.getrandbits(64)


def changed(rng: random.Random, data: bytes, others: list[bytes] | None = None) -> bytes:
    """Return the bytes with some changes."""
    made = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        way = rng.randrange(8)
        at = rng.randrange(len(made) + 1)
        if way == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(made):
            made[at] = rng.randrange(256)
        elif way == 2:
            width = rng.choice((1, 2, 4, 8))
            at = at // width * width if rng.random() < 0.8 else at
            made[at : at + width] = (number(rng) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif way == 3:
            del made[at:]
        elif way == 4:
            del made[at : at + rng.choice((1, 4, 8, 16, 40, 80))]
        elif way == 5:
            piece = made[at : at + rng.choice((1, 8, 16, 40, 80))]
            made[at:at] = piece
        elif way == 6:
            made[at:at] = rng.randbytes(rng.choice((1, 4, 16, 80)))
        elif others:
            other = rng.choice(others)
            made[at:] = other[min(at, len(other)) :]
    return bytes(made)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return any value of JSON."""
    way = rng.randrange(9 if depth < 3 else 7)
    if way <= 1:
        return number(rng)
    if way == 2:
        return rng.choice((True, False, None, -1, 0.5, float("inf"), float("nan"), 1e308, -(1 << 70), 1 << 200))
    if way == 3:
        return rng.choice(("", "x", "\0", "x" * 255, "x" * 300, "begin", "\ud800", "ä" * 40))
    if way <= 6:
        return rng.randrange(4)
    if way == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(7))]
    return {rng.choice(("dev", "ino", "kind", "x")): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def body(rng: random.Random, sample: dict[str, Any]) -> dict[str, Any]:
    """Return a message's body, like the sample, with some fields changed, missing or added."""
    made = dict(sample)
    for name in list(made):
        way = rng.random()
        if way < 0.12:
            made[name] = value(rng)
        elif way < 0.17:
            del made[name]
    if rng.random() < 0.1:
        made[rng.choice(("holder", "long", "lost", "posts", "abandoned", "text", "x"))] = value(rng)
    return made
