"""The command line: ``dmabuf COMMAND``, with one module for each command (:mod:`dmabuf.cli.app`).

Exit status: 0 done; 1 failed, with one line on stderr; 2 the command line makes no sense.
"""

from __future__ import annotations

import sys
import warnings

from dmabuf.errors import missing_extra

_EXTRA = ("click", "rich")  # of the extra `cli`


def main() -> None:
    """Run a command: the entry point of the installed script and of ``python -m dmabuf``."""
    try:
        from dmabuf.cli.app import app
    except ModuleNotFoundError as e:
        module = (e.name or "").partition(".")[0]
        if module not in _EXTRA:
            raise
        print(f"dmabuf: {missing_extra('cli', module)}", file=sys.stderr)
        sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # don't fail because of a terminal's encoding
    warnings.showwarning = _show
    app(prog_name="dmabuf")


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning without the line of code that emitted it."""
    text = str(message)
    print(text if text.startswith("dmabuf: ") else f"dmabuf: {text}", file=sys.stderr)
