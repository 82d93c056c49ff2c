"""``dmabuf heaps``: the heaps, the default first."""

from __future__ import annotations

import click
from rich.text import Text

from dmabuf.cli import data, show
from dmabuf.cli.show import safe
from dmabuf.heap.recommended import heaps


@click.command()
@data.as_json
def command(as_json: bool) -> None:
    """List the heaps, in the order in which they are recommended."""
    found = heaps()
    best = next((heap.name for heap in found if heap.unavailable is None), None)
    if as_json:
        data.print_json({"heaps": [vars(heap) | {"recommended": heap.name == best} for heap in found]})
        return
    grid = show.Grid("HEAP", "STATE", "ABOUT")
    for heap in found:
        state = Text("default" if heap.name == best else "usable", "green") if heap.unavailable is None else Text("not here", "yellow")
        notes = [Text(safe(heap.unavailable), "yellow")] if heap.unavailable else []
        grid.row(safe(heap.name), state, safe(heap.about), notes=notes)
    grid.print(show.console())
