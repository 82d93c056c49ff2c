"""The group of commands. A new command is a module with a ``command``, and one line in ``COMMANDS``.

A command's module is imported when the command is used. A module that isn't installed is not listed. A command that fails raises
``DmaBufError`` or another ``OSError``, which becomes one line on stderr and exit status 1.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
from typing import IO, Any

import click

from dmabuf.cli.show import safe
from dmabuf.errors import ExtraMissingError

COMMANDS = {
    "ls": "dmabuf.cli.ls",
    "info": "dmabuf.cli.info",
    "doctor": "dmabuf.cli.doctor",
    "heaps": "dmabuf.cli.heaps",
    "pipe": "dmabuf.cli.pipe",
    "demo": "dmabuf.cli.demo",
    "bench": "dmabuf.cli.bench",
}


class Failure(click.ClickException):
    """A failed command, in one line. Exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it with the prefix of every message."""
        click.echo(f"dmabuf: {safe(self.message)}", file=file, err=True)


class Commands(click.Group):
    """Commands by the name of their module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the installed commands, in the table's order."""
        return [name for name, module in COMMANDS.items() if importlib.util.find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module. Return None if there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found = importlib.import_module(COMMANDS[cmd_name]).command
        assert isinstance(found, click.Command)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn its errors into one line."""
        try:
            return super().invoke(ctx)
        except (OSError, ExtraMissingError) as e:
            if isinstance(e, OSError) and e.errno == errno.EPIPE:
                raise  # the reader of the output has closed it
            raise Failure(str(e)) from e


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("dmabuf"), prog_name="dmabuf")
def app() -> None:
    """See and use the dma-bufs that processes of this machine share.

    Every command takes --json where a program reads its output. DMABUF_DOMAIN names the directory of the domain.
    """
