"""A page of docs that is made: written, or with ``--check`` only compared."""

from pathlib import Path


def up_to_date(page: Path, text: str, arguments: list[str]) -> bool:
    """Write the page; with ``--check`` among the arguments write nothing, and tell whether it has this text."""
    if "--check" in arguments:
        return page.is_file() and page.read_text(encoding="utf-8") == text
    page.write_text(text, encoding="utf-8")
    return True
