"""How messages quote what people wrote, and what they suggest instead."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

LONGEST_MESSAGE = 600  # characters
LONGEST_WORD = 64  # characters of a word that something near is looked for to
MAX_KNOWN = 200  # words that are compared with it, because comparing takes time


def one_line(message: str) -> str:
    """Put a message on one line of bounded length: its start and its end.

    Values that it quotes can't break the line, or steer the terminal of whoever reads it.
    """
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def named(value: Any) -> str:
    """Say what TOML calls the kind of a value: `a string`, `a table`."""
    match value:
        case bool():
            return "a boolean"
        case str():
            return f"the string {value!r}" if len(value) < 60 else "a string"
        case int() | float():
            return f"the number {value}"
        case list() | tuple():
            return "a list"
        case _ if hasattr(value, "isoformat"):
            return "a date or time"
        case _:
            return "a table"


def shown(value: Any) -> str:
    """Quote a value as an error does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}'" if isinstance(value, str) else str(value) if isinstance(value, int | float) else named(value)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or ""."""
    from difflib import get_close_matches  # slow to import, and most runs have no errors

    near = get_close_matches(word[:LONGEST_WORD], list(islice(known, MAX_KNOWN)), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
