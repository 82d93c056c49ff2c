"""``python -m dmabuf``: the command line."""

from dmabuf.cli import main

if __name__ == "__main__":
    main()
