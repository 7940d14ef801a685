"""Ways for a run to end before its last step that are nobody's mistake. The status tells a launcher which."""

from __future__ import annotations


class Ending(Exception):  # noqa: N818
    status: int


class Terminated(Ending):
    """Asked to end by SIGTERM. What was done is saved; start again to go on."""

    status = 143


class Interrupted(Terminated):
    """As by SIGTERM, from the keyboard."""

    status = 130


class Superseded(Ending):
    """Another start of this run has taken over. Do not start this one again."""

    status = 144


class Stalled(Ending):
    """No step in too long a time, on this rank or another."""

    status = 145


class Unsaved(Ending):
    """No save has succeeded in too long a time. Start again, where it can save."""

    status = 146
