"""JSON that somebody else may have written: parsed strictly, and each value held against what it can be before it is used."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

LONGEST = 4096  # characters of a text, unless the caller says otherwise
HEX64, HEX128 = r"[0-9a-f]{16}", r"[0-9a-f]{32}"  # checksums


class Malformed(ValueError):  # noqa: N818
    """What was read is not what it should be; the message names the value, what was found and what is expected."""


def parse(content: bytes | bytearray | memoryview | str, finite: bool = True) -> Any:
    """JSON as the standard has it: no key twice and, where `finite`, no NaN and no Infinity."""
    try:
        text = content if isinstance(content, str) else bytes(content).decode()
        return json.loads(text, parse_constant=_no_number if finite else None, object_pairs_hook=_distinct)
    except Malformed:
        raise
    except RecursionError:
        raise Malformed("is nested too deeply for JSON of ours") from None
    except ValueError as error:
        raise Malformed(f"is no JSON ({error})") from None


def _no_number(name: str) -> NoReturn:
    raise Malformed(f"holds {name}, which is no number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("has a key twice")
    return found


def table(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise Malformed(f"{what} is {_shown(value)}, expected a table")
    return value


def rows(value: Any, what: str, count: int | None = None) -> list[Any]:
    if type(value) is not list or count not in (None, len(value)):
        raise Malformed(f"{what} is {_shown(value)}, expected a list" + (f" of {count}" if count is not None else ""))
    return value


def whole(value: Any, what: str, least: int = 0, most: int = 2**63 - 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Malformed(f"{what} is {_shown(value)}, expected a whole number from {least} to {most}")
    return value


def text(value: Any, what: str, pattern: str = "", longest: int = LONGEST) -> str:
    if type(value) is not str or len(value) > longest or any("\ud800" <= c <= "\udfff" for c in value):
        raise Malformed(f"{what} is {_shown(value)}, expected a text of {longest} characters at most")
    if pattern and not re.fullmatch(pattern, value):
        raise Malformed(f"{what} is {_shown(value)}, expected {pattern}")
    return value


def entry(of: dict[str, Any], name: str, what: str = "it") -> Any:
    if name not in of:
        raise Malformed(f"{what} has no {name}")
    return of[name]


def _shown(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
