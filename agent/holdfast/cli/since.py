"""`10m` or `2026-11-21T07:30:00` → seconds since the epoch: the argument of --since."""

from __future__ import annotations

import re
import time
from datetime import datetime

import click

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


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
    if "".join(match.group() for match in SPAN.finditer(text)) == text != "":
        return now - sum(float(number) * SECONDS[unit] for number, unit in SPAN.findall(text))
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
