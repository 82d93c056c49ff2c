"""``python -m dmabuf``: the command line."""

from dmabuf.cli import main

main()
