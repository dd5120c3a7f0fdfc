"""`10m` or `2026-11-21T07:30:00` → seconds: the arguments of --timeout, --since and --until."""

from __future__ import annotations

import math
import time
from datetime import datetime

import click

from holdfast.grammar.quantities import SECONDS, duration


class Seconds(click.ParamType[float]):
    """A duration as state files write it, or a number of seconds: 30s, 1m30s, 30."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return seconds(str(value))
        except ValueError:
            self.fail(f"'{value}' is not a duration (expected 30s, 1m30s or seconds)", param, ctx)


def seconds(text: str) -> float:
    """Read a duration, or a number of seconds. Raises ValueError."""
    if text.endswith(tuple(SECONDS)):
        return duration(text)
    found = float(text)
    if not 0 <= found < math.inf:
        raise ValueError(text)
    return found


class Moment(click.ParamType[float]):
    """A moment: a duration before now, an ISO 8601 time (local unless it says where), or seconds since the epoch."""

    name = "10m|TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        try:
            return moment(text, time.time())
        except ValueError:
            self.fail(
                f"'{text}' is not a moment (expected 10m, 2h, 2026-11-21T07:30:00 or epoch seconds)", param, ctx
            )


def moment(text: str, now: float) -> float:
    """Read a moment; raises ValueError. Several parts add up: 1h30m."""
    if text.endswith(tuple(SECONDS)):
        return now - seconds(text)
    try:
        found = float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
    if not math.isfinite(found):
        raise ValueError(text)
    return found
