"""Signals, as signal(7) names them: `TERM`, `SIGTERM` and 15 are one, and so are SIGRTMIN+N and SIGRTMAX-N."""

from __future__ import annotations

import re
import signal

from holdfast.grammar.quantities import number as is_number
from holdfast.words import suggestion


def canonical(value: str | int) -> str:
    """Return the name of a signal: SIGTERM; SIGRTMIN+N and SIGRTMAX-N stay as they are."""
    text = str(value).upper()
    if is_number(text) and (name := name_of(int(text))):
        return name
    text = text if text.startswith("SIG") else f"SIG{text}"
    if not _number(text):
        near = suggestion(text, signal.Signals.__members__) or " (expected a name as SIGTERM, or its number)"
        raise ValueError(f"'{value}' is not a signal{near}")
    return text


def number_of(value: str | int) -> int:
    """Return the number of a signal, however it is written."""
    return _number(canonical(value))


def name_of(number: int) -> str:
    """Return the name of a signal, "" if none has that number."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def _number(name: str) -> int:
    """Return the number of a canonical name; 0 if there is no such signal."""
    match = re.fullmatch(r"(\w+?)(?:([+-])(\d{1,2}))?", name, re.ASCII)
    base = signal.Signals.__members__.get(match[1]) if match else None
    if match is None or base is None:
        return 0
    found = base + int(f"{match[2] or '+'}{match[3] or 0}")
    real_time = signal.SIGRTMIN <= min(base, found) <= max(base, found) <= signal.SIGRTMAX
    return found if real_time or not match[2] else 0
