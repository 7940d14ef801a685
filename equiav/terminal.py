"""What a command says: whole lines, whatever the width, and nothing in them that a terminal would obey."""

from __future__ import annotations

import re
from typing import Any

LONGEST = 2000  # characters of a line
SECRETS = re.compile(
    r"(://)[^/\s]*@|([?&][\w-]*(?:token|signature|credential|secret|key|sig)[\w-]*=)[^&\s]+", re.IGNORECASE
)


def masked(text: str) -> str:
    """Without what an address has for its reader alone."""
    return SECRETS.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)


def say(text: str) -> None:
    print(plain(text))


def plain(text: Any) -> str:
    """Names and labels are a store's word: what is not to be seen is written as an escape."""
    whole = str(text)
    short = whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}... ({len(whole):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
