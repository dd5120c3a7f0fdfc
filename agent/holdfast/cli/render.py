"""Print text, tables and JSON: aligned columns without frames, colour only on a terminal.

Simple on purpose: to import a table library takes as long as all of `holdfast status`.

`echo` is the one place where text goes to a terminal. Names, messages and output of containers may contain control
sequences; `echo` escapes them, except for the colours of `paint`. Only the bytes of `logs` and `exec`, archives and
progress bars are printed elsewhere.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from itertools import chain, repeat, zip_longest

import click

from holdfast.grammar.quantities import about
from holdfast.questions import Json

GOOD, BUSY, BAD, QUIET = "green", "yellow", "red", "bright_black"

STATES = {  # those in other colours are bad
    GOOD: ("converged", "running", "completed", "good", "ok"),
    BUSY: ("changing", "waiting", "starting", "held", "stopped", "removing", "warn", "not converged"),
    None: ("", "-"),
}
COLOURS = {state: colour for colour, states in STATES.items() for state in states}
NO_LIMIT = 10_000  # columns
LEAST = 16  # columns that a remark is folded into

_SECRET = os.urandom(8).hex()  # marks our own colours; other text can't know it
_COLOUR = re.compile(f"(\x1b{_SECRET}\\[[0-9;]*m)")
#: What a terminal obeys or that turns the order of text: C0, DEL, C1, bidi controls, line separators.
_UNSAFE = (*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_IN_LINE = {code: chr(code).encode("unicode_escape").decode() for code in _UNSAFE}
_IN_TEXT = {code: shown for code, shown in _IN_LINE.items() if chr(code) not in "\t\n"}
_IN_JSON = {code: f"\\u{code:04x}" for code in _IN_TEXT}


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text: what would control the terminal is shown escaped, but for the colours of `paint`."""
    click.echo(terminal(text), err=err, nl=nl)


def terminal(text: str) -> str:
    """Text as `echo` prints it."""
    return plain(text, _IN_TEXT).replace(_SECRET, "")


def plain(text: str, unsafe: Mapping[int, str] = _IN_LINE) -> str:
    """Text for one line: line ends and tabs escaped, too, and lone surrogates, which can't be written."""
    parts = _COLOUR.split(text)
    parts[::2] = [part.translate(unsafe) for part in parts[::2]]
    return "".join(parts).encode(errors="backslashreplace").decode()


def json_text(value: object, indent: int | None = None) -> str:
    """JSON in which no character needs escaping to be printed."""
    import json

    text = json.dumps(value, indent=indent, ensure_ascii=False).translate(_IN_JSON)
    return text.encode(errors="backslashreplace").decode()


def _bare(text: str) -> str:
    """Text without the colours of `paint`."""
    return _COLOUR.sub("", text)


def paint(text: str, colour: str | None, *, bold: bool = False) -> str:
    """Colour text if standard output is a terminal and NO_COLOR (no-color.org) is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    style = click.style("", fg=colour, bold=bold or None, reset=False).replace("\x1b[", f"\x1b{_SECRET}[")
    return f"{style}{text}\x1b{_SECRET}[0m"


def state(word: str) -> str:
    """A state in its colour; what is neither good nor in progress is red."""
    return paint(word, COLOURS.get(word, BAD))


def width() -> int:
    """The width of the terminal, or what COLUMNS says; NO_LIMIT for anything else."""
    return terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else NO_LIMIT


def terminal_size() -> os.terminal_size:
    """The size of the terminal, or as COLUMNS and LINES say. As shutil has it, which takes long to import."""
    try:
        seen = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        seen = os.terminal_size((80, 24))
    said = [os.environ.get(name, "") for name in ("COLUMNS", "LINES")]
    sizes = [int(word) if word.isdigit() and int(word) else size for word, size in zip(said, seen, strict=True)]
    return os.terminal_size(sizes)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[Sequence[str]] = ()) -> None:
    """Print rows under a head, each followed by its notes.

    Columns are as wide as their cells, and one without any is left out. On a terminal that is narrower, cells are
    folded between words, the widest column first; columns that still find no room follow below their row, by name.
    """
    if not rows:
        return
    rows = [[plain(cell) for cell in row] for row in rows]
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    limit, below = width(), list[int]()
    while sum(widths := _widths(head, rows, kept, limit)) + 2 * (len(kept) - 1) > limit and len(kept) > 1:
        below.insert(0, kept.pop())
    _print_row([paint(head[column], QUIET) for column in kept], widths)
    for row, remarks in zip(rows, chain(notes, repeat(())), strict=False):
        _print_row([row[column] for column in kept], widths)
        moved = [f"{head[column].lower()}: {row[column]}" for column in below if row[column]]
        for remark in filter(None, [*moved, *remarks]):
            note(remark, indent=4)


def listing(
    found: Sequence[Json],
    columns: Mapping[str, Callable[[Json], str]],
    *,
    json: bool = False,
    empty: str = "",
    notes: Callable[[Json], Sequence[str]] = lambda _: (),
) -> None:
    """Print things as JSON, or as a table with a row for each. columns: head → cell. empty: printed for nothing."""
    if json:
        as_json(found)
    elif not found and empty:
        echo(empty)
    else:
        rows = [[cell(each) for cell in columns.values()] for each in found]
        table(list(columns), rows, [notes(each) for each in found])


def details(found: Json, *, json: bool) -> None:
    """Print all that is known of one thing, as JSON or as indented lines."""
    if json:
        as_json(found)
        return
    for line in pairs(found):
        echo(line)


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int], limit: int) -> list[int]:
    """The width of each column, so that all fit if lines are folded between words."""
    columns = [[head[column], *(_bare(row[column]) for row in rows)] for column in kept]
    widths = [max(map(len, cells)) for cells in columns]
    least = [max(len(word) for cell in cells for word in cell.split(" ")) for cells in columns]
    while (over := sum(widths) + 2 * (len(kept) - 1) - limit) > 0:
        widest = max(range(len(kept)), key=lambda place: widths[place] - least[place])
        if widths[widest] == least[widest]:
            break
        widths[widest] = max(least[widest], widths[widest] - over)
    return widths


def _print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print one row, on as many lines as its cells take."""
    folded = [_folded(cell, size) for cell, size in zip(cells, widths, strict=True)]
    for parts in zip_longest(*folded, fillvalue=""):
        padded = (part + " " * (size - len(_bare(part))) for part, size in zip(parts, widths, strict=True))
        echo("  ".join(padded).rstrip())


def _folded(text: str, size: int) -> list[str]:
    """Text on lines of a size, folded between words. What is folded loses its colours."""
    bare = _bare(text)
    if len(bare) <= size:
        return [text]
    import textwrap

    indent = " " * (len(bare) - len(bare.lstrip()))
    return textwrap.wrap(bare, size, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent) or [""]


def note(text: str, indent: int = 0, colour: str | None = QUIET) -> None:
    """Print a remark, folded at the terminal's edge with its indent kept."""
    room = width() - indent
    for part in _folded(plain(text), room if room >= LEAST else NO_LIMIT):
        echo(" " * indent + paint(part, colour))


class _Page(io.StringIO):
    """Text that is shown on a terminal at once."""

    def isatty(self) -> bool:
        return True


@contextmanager
def screen() -> Iterator[None]:
    """Replace what the terminal shows by what is printed in this block, as much as fits."""
    if not sys.stdout.isatty():
        yield
        return
    page = _Page()
    with redirect_stdout(page):
        yield
    lines, room = page.getvalue().splitlines(), terminal_size().lines - 1
    if len(lines) > room:
        left = len(lines) - room + 1
        lines = [*lines[: room - 1], terminal(paint(f"… {left} more lines", QUIET))]
    click.echo("\x1b[H\x1b[2J" + "\n".join(lines))


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
    """A number of bytes, or nothing."""
    return "" if count is None else about(count)


def digest(text: str, *, whole: bool = False) -> str:
    """The first digits of a digest, which are enough to tell images apart."""
    return text if whole else text.removeprefix("sha256:")[:12]


def counted(number: int, noun: str) -> str:
    """`1 change`, `2 changes`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def clock(at: float) -> str:
    """A moment in local time, to the millisecond, as it sorts."""
    moment = datetime.fromtimestamp(at, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond // 1000:03d}"


def as_json(value: object) -> None:
    """Print JSON as `--json` promises it: indented, keys in the order in which they are documented."""
    echo(json_text(value, indent=2))


def pairs(values: Mapping[str, object], indent: int = 0) -> Iterator[str]:
    """Nested JSON as indented `key: value` lines; empty values are left out."""
    pad = " " * indent
    for name, value in values.items():
        key = plain(str(name))
        match value:
            case _ if value in (None, "", {}, [], ()):
                continue
            case dict():
                yield f"{pad}{key}:"
                yield from pairs(value, indent + 2)
            case list() | tuple() if any(isinstance(each, (dict, list, tuple)) for each in value):
                yield f"{pad}{key}:"
                for each in value:
                    first, *more = list(
                        pairs(each, indent + 4) if isinstance(each, dict) else [plain(str(each))]
                    ) or [""]
                    yield f"{pad}  - {first.lstrip()}"
                    yield from more
            case list() | tuple():
                yield f"{pad}{key}: {plain(', '.join(map(str, value)))}"
            case bool():
                yield f"{pad}{key}: {'yes' if value else 'no'}"
            case float() if key == "at" or key.endswith("_at"):
                yield f"{pad}{key}: {clock(value)}"
            case _:
                yield f"{pad}{key}: {plain(str(value))}"
