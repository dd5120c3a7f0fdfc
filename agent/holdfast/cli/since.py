"""`10m` or `2026-11-21T07:30:00` → seconds: the arguments of --timeout, --since and --until."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime

import click

from holdfast.grammar.quantities import SECONDS, duration


class Seconds(click.ParamType[float]):
    """An argument that a function reads as seconds. expected: what is right, for an error."""

    def __init__(self, name: str, read: Callable[[str], float], expected: str) -> None:
        self.name, self._read, self._expected = name, read, expected

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else self._read(str(value))
        except ValueError:
            self.fail(f"'{value}' is not understood (expected {self._expected})", param, ctx)


def seconds(text: str) -> float:
    """Read a duration as state files write it, or a number of seconds: 30s, 1m30s, 30. Raises ValueError."""
    if text.endswith(tuple(SECONDS)):
        return duration(text)
    found = float(text)
    if not 0 <= found < math.inf:
        raise ValueError(text)
    return found


def moment(text: str, now: float) -> float:
    """Read a duration before now, an ISO 8601 time (local unless it has a zone), or seconds since the epoch.

    Raises ValueError.
    """
    if text.endswith(tuple(SECONDS)):
        return now - seconds(text)
    try:
        found = float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
    if not math.isfinite(found):
        raise ValueError(text)
    return found


DURATION = Seconds("duration", seconds, "30s, 1m30s or seconds")
MOMENT = Seconds(
    "10m|TIME", lambda text: moment(text, time.time()), "10m, 2h, 2026-11-21T07:30:00 or seconds since the epoch"
)
