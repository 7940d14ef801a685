"""What a command says: whole lines, whatever the width, and nothing in them that a terminal would obey."""

from __future__ import annotations

from typing import Any

LONGEST = 2000  # characters of a line


def say(text: str) -> None:
    print(plain(text))


def plain(text: Any) -> str:
    """Names and labels are a store's word: what is not to be seen is written as an escape."""
    whole = str(text)
    short = whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}... ({len(whole):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
