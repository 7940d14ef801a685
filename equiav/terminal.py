"""What a command says: whole lines, whatever the width, and nothing in them that a terminal would obey."""

from __future__ import annotations

from typing import Any


def say(text: str) -> None:
    print(plain(text))


def plain(text: Any) -> str:
    """Names and labels are a store's word: what is not to be seen is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
