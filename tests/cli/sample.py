"""A command for tests of the group."""

import errno

import click

from dmabuf.errors import fail, missing_extra


@click.command()
@click.argument("what")
def command(what: str) -> None:
    """A sample."""
    if what == "fail":
        raise fail(errno.ENODEV, "sample", "a device\n\x1b[31m", "plug it in")
    if what == "extra":
        raise missing_extra("demo", "av")
    if what == "builtin":
        raise PermissionError(errno.EACCES, "Permission denied", "/dev/sample")
    click.echo(what)
