"""Sizes and times for people."""

from __future__ import annotations


def size(count: int) -> str:
    """Return a number of bytes with about three digits and a unit."""
    value, units = float(count), iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    if value < 1024:
        return f"{count} B"
    unit = ""
    while value >= 1023.95:
        value, unit = value / 1024, next(units, "EiB")
        if unit == "EiB":
            break
    return f"{value:.1f} {unit}"


def age(ns: int) -> str:
    """Return a time span in its largest unit. A negative one (the clock was set back) is 0."""
    seconds = max(0, ns) / 1e9
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
