"""JSON of the API → lines on a terminal: aligned columns without frames, colour only where a terminal shows it.

Plain on purpose: to import a table library takes as long as the rest of `holdfast status` together.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, repeat

import click

GOOD, BUSY, BAD, QUIET = "green", "yellow", "red", "bright_black"

COLOURS = {
    "converged": GOOD,
    "running": GOOD,
    "completed": GOOD,
    "good": GOOD,
    "ok": GOOD,
    "changing": BUSY,
    "waiting": BUSY,
    "starting": BUSY,
    "held": BUSY,
    "stopped": BUSY,
    "removing": BUSY,
    "warn": BUSY,
    "not converged": BUSY,
}
NOT_STATES = frozenset({"", "-"})


def paint(text: str, colour: str | None, *, bold: bool = False) -> str:
    """Colour text if standard output is a terminal and NO_COLOR (no-color.org) is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour, bold=bold or None)


def state(word: str) -> str:
    """A state in its colour; what is neither good nor on its way is red."""
    return paint(word, COLOURS.get(word, None if word in NOT_STATES else BAD))


def width() -> int | None:
    """How wide lines may be: as the terminal, or as COLUMNS says; None for neither, and no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[Sequence[str]] = ()) -> None:
    """Print rows under a head, each followed by its notes.

    Columns are as wide as their cells, a column without any is left out, and the last one is folded at the
    terminal's edge.
    """
    if not rows:
        return
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [[paint(head[column], QUIET) for column in kept], *([row[column] for column in kept] for row in rows)]
    widths = [max(len(click.unstyle(line[place])) for line in lines) for place in range(len(kept))]
    left = sum(widths[:-1]) + 2 * (len(kept) - 1)
    limit = width()
    for line, remarks in zip(lines, chain([()], notes, repeat(())), strict=False):
        start = "".join(_padded(cell, size) + "  " for cell, size in zip(line, widths[:-1], strict=False))
        for number, part in enumerate(_folded(line[-1], limit - left if limit else None)):
            click.echo(((start if number == 0 else " " * left) + part).rstrip())
        for remark in filter(None, remarks):
            note(remark, indent=4)


def note(text: str, indent: int = 0, colour: str | None = QUIET) -> None:
    """Print a remark, folded at the terminal's edge with its indent kept."""
    limit = width()
    for part in _folded(text, limit - indent if limit else None):
        click.echo(" " * indent + paint(part, colour))


def clear() -> None:
    """Empty the terminal, if there is one."""
    if sys.stdout.isatty():
        click.echo("\x1b[H\x1b[2J", nl=False)


def _padded(cell: str, size: int) -> str:
    return cell + " " * (size - len(click.unstyle(cell)))


def _folded(text: str, limit: int | None) -> list[str]:
    plain = click.unstyle(text)
    if limit is None or len(plain) <= limit or limit < 16:
        return [text]
    return textwrap.wrap(plain, limit, break_long_words=False, break_on_hyphens=False) or [""]


def ago(at: float | None, now: float | None = None) -> str:
    """How long ago a moment was: `3m ago`; "" for none, `now` for less than a second."""
    if at is None:
        return ""
    passed = (time.time() if now is None else now) - at
    if abs(passed) < 1:
        return "now"
    return f"{span(passed)} ago" if passed > 0 else f"in {span(-passed)}"


def span(seconds: float) -> str:
    """A duration in its largest whole unit: 42s, 3m, 5h, 12d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def size(count: float | None) -> str:
    """A number of bytes with a binary unit: 512B, 1.5KiB, 10MiB."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g}{unit}"
        count /= 1024
    return f"{count:.3g}TiB"


def clock(at: float) -> str:
    """A moment in local time, to the millisecond, as it sorts."""
    moment = datetime.fromtimestamp(at, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond // 1000:03d}"


def as_json(value: object) -> None:
    """Print JSON as `--json` promises it: indented, keys in the order in which they are documented."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def pairs(values: dict[str, object], indent: int = 0) -> Iterator[str]:
    """Nested JSON as indented `key: value` lines; empty values are left out."""
    pad = " " * indent
    for key, value in values.items():
        match value:
            case None | "":
                continue
            case dict() | list() if not value:
                continue
            case dict():
                yield f"{pad}{key}:"
                yield from pairs(value, indent + 2)
            case list() if all(not isinstance(entry, (dict, list)) for entry in value):
                yield f"{pad}{key}: {', '.join(str(entry) for entry in value)}"
            case list():
                yield f"{pad}{key}:"
                for entry in value:
                    lines = list(pairs(entry, indent + 4)) if isinstance(entry, dict) else [f"{pad}    {entry}"]
                    yield f"{pad}  - {lines[0].lstrip()}"
                    yield from lines[1:]
            case bool():
                yield f"{pad}{key}: {'yes' if value else 'no'}"
            case float() if key == "at" or key.endswith("_at"):
                yield f"{pad}{key}: {clock(value)}"
            case _:
                yield f"{pad}{key}: {value}"
