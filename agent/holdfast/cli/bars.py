"""Images on their way, drawn while they come: a bar for each layer and one in all; plain lines where nobody looks.

`apply` and `image pull` hand in what `images.transfers` counts, again and again. rich is imported only when there is
something to draw: that takes longer than most commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.cli import render

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Json = Mapping[str, Any]
Show = Callable[[Sequence[Json]], None]

MOST_LAYERS = 12  # bars: more of them scroll away


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Show]:
    """Yield what draws a list of `Transfer.json`; call it every tenth of a second or so. On stderr, always."""
    if quiet:
        yield lambda transfers: None
    elif sys.stderr.isatty():
        with _drawn() as show:
            yield show
    else:
        yield _Lines().show


class _Lines:
    """A line when an image begins to come, and one for each quarter of it."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, float], int] = {}

    def show(self, transfers: Sequence[Json]) -> None:
        for each in transfers:
            total = each["total"]
            if each["state"] != "pulling" or not total:
                continue
            quarter, key = 4 * each["done"] // total, (each["ref"], each["began"])
            if self._told.get(key, -1) < quarter:
                self._told[key] = quarter
                render.echo(f"pulling {each['ref']}  {amount(each)}", err=True)


def amount(transfer: Json) -> str:
    """How much of an image has come, in words."""
    layers = [layer for layer in transfer["layers"] if layer["state"] != "here"]
    done = sum(layer["state"] == "done" for layer in layers)
    share = f"{render.size(transfer['done'])} of {render.size(transfer['total'])}"
    return f"{share}, {done} of {len(layers)} layers"


@contextmanager
def _drawn() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Drawing(progress).show


class _Drawing:
    """The bars of all transfers under way; those of one that is over go."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[tuple[str, float, str], TaskID] = {}

    def show(self, transfers: Sequence[Json]) -> None:
        seen = set()
        for each in transfers:
            image = (each["ref"], each["began"])
            if each["state"] == "resolving":
                seen.add(self._bar((*image, ""), f"{each['ref']}: asking", 0, None))
                continue
            seen.add(self._bar((*image, ""), each["ref"], each["done"], each["total"]))
            coming = [layer for layer in each["layers"] if layer["state"] == "pulling"]
            for layer in coming[:MOST_LAYERS]:
                name = f"  {layer['digest'].removeprefix('sha256:')[:12]}"
                seen.add(self._bar((*image, layer["digest"]), name, layer["done"], layer["total"]))
        for key in self._tasks.keys() - seen:
            self._progress.remove_task(self._tasks.pop(key))

    def _bar(self, key: tuple[str, float, str], name: str, done: int, total: int | None) -> tuple[str, float, str]:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[key], completed=done, total=total, description=render.plain(name))
        return key
