"""``dmabuf doctor``: what this machine has, and why a fast path is missing. The checks are in ``dmabuf.observe.machine``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from dmabuf.cli import data, show
from dmabuf.cli.show import safe
from dmabuf.observe import machine

_SHOWN = {machine.OK: ("OK", "green"), machine.WARNING: ("warning", "yellow"), machine.MISSING: ("missing", "yellow")}


@click.command()
@data.in_domain
@data.as_json
@click.pass_context
def command(ctx: click.Context, path: Path | None, as_json: bool) -> None:
    """Show what this machine has, and why a fast path is missing.

    A check that is not REQUIRED is about a device or a faster way, and the library works without it. The exit status is 1 only if something
    required is missing.
    """
    found = machine.checks(domain_path=path.absolute() if path else None)
    lost = [check for check in found if check.required and check.status == machine.MISSING]
    if as_json:
        data.print_json({"ok": not lost, "checks": [vars(check) for check in found]})
    else:
        grid = show.Grid("", "", "")
        for check in found:
            word, style = _SHOWN[check.status]
            if check in lost:
                word, style = "REQUIRED", "bold red"
            notes = [Text("→ ", "cyan").append(safe(check.remedy))] if check.remedy else []
            grid.row(Text(word, style), safe(check.name), safe(check.detail), notes=notes)
        out = show.console()
        grid.print(out)
        if lost:
            names = ", ".join(check.name for check in lost)
            out.print(Text(f"\ndmabuf can't work here: {names} missing.", "bold red"))
        else:
            out.print(Text("\nEverything required is here."))
    ctx.exit(1 if lost else 0)
