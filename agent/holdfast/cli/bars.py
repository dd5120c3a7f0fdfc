"""Show the progress of long work: bars for images, layers, builds and what is waited for; lines without a terminal.

`apply`, `sync --wait` and `image pull` pass a status, or its part about images, again and again. rich is imported
only when there is something to draw: that takes longer than most commands.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.cli import render
from holdfast.cli.status import amount

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from holdfast.questions import Steps

Json = Mapping[str, Any]
Show = Callable[[Json], None]

MOST_LAYERS = 12  # bars: more of them scroll away
MOST_WAITS = 8
PATIENCE = 2.0  # seconds: what is waited for longer is shown


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Show]:
    """Yield a function that shows a status (its transfers, builds, unanswered and blockers, those that are given).

    Call it about ten times a second. Prints to standard error.
    """
    if quiet:
        yield lambda status: None
    elif sys.stderr.isatty():
        with _drawn() as show:
            yield show
    else:
        yield _Lines().show


def followed(steps: Steps, *, quiet: bool) -> Json:
    """Show transfers as they come, and return the last step, which is the result."""
    last: Json = {}
    with bars(quiet=quiet) as show:
        for last in steps:
            if "transfers" in last:
                show(last)
    return last


class _Shown:
    """Knows what keeps the node from its state, apart from images, once that has lasted for a moment."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def lasting(self, status: Json) -> list[str]:
        """What has been waited for for a while: registries that do not answer, then why the node is not converged."""
        unanswered = (each for each in status.get("unanswered", ()) if each["asking"])
        asked = (f"{each['ref']}: the registry does not answer" for each in unanswered)
        now = time.monotonic()
        self._since = {line: self._since.get(line, now) for line in (*asked, *status.get("blockers", ()))}
        return [line for line, since in self._since.items() if now - since >= PATIENCE]


class _Lines(_Shown):
    """Prints a line for each quarter of an image, each step of a build, and what is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[object, object] = {}
        self._building: set[tuple[str, float]] = set()

    def show(self, status: Json) -> None:
        for each in status.get("transfers", ()):
            if each["state"] == "pulling" and each["total"]:
                quarter = 4 * each["done"] // each["total"]
                self._tell((each["ref"], each["began"]), quarter, f"pulling {each['ref']}  {amount(each)}")
        builds = {(each["image"], each["began"]): each["error"] or each["step"] for each in status.get("builds", ())}
        for build, step in builds.items():
            self._tell(build, step, f"building {build[0]}  {step}".rstrip())
        for image, began in self._building - builds.keys():
            render.echo(f"building {image}  ended after {render.span(time.time() - began)}", err=True)
        self._building = set(builds)
        for line in self.lasting(status):
            self._tell(line, line, f"waiting: {line}")

    def _tell(self, subject: object, news: object, line: str) -> None:
        """Print a line if there is news of the subject."""
        if self._told.get(subject) != news:
            self._told[subject] = news
            render.echo(line, err=True)


@contextmanager
def _drawn() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TransferSpeedColumn
    from rich.text import Text

    class Amount(DownloadColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.total is not None else Text()

    class Speed(TransferSpeedColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.total is not None else Text()

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), Amount(binary_units=True), Speed())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Drawing(progress).show


class _Drawing(_Shown):
    """The bars of all that is under way; a bar is removed when its work is over."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._tasks: dict[object, TaskID] = {}

    def show(self, status: Json) -> None:
        seen = set()
        for key, name, done, total in self._bars(status):
            seen.add(key)
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[key], completed=done, total=total, description=render.plain(name))
        for key in self._tasks.keys() - seen:
            self._progress.remove_task(self._tasks.pop(key))

    def _bars(self, status: Json) -> Iterator[tuple[object, str, int, int | None]]:
        """Every bar: what it is of, its title, and how much of what is done."""
        for each in status.get("transfers", ()):
            image = (each["ref"], each["began"])
            if each["state"] == "resolving":
                yield image, f"{each['ref']}: asking", 0, None
                continue
            yield image, each["ref"], each["done"], each["total"]
            coming = [layer for layer in each["layers"] if layer["state"] == "pulling"]
            for layer in coming[:MOST_LAYERS]:
                yield (image, layer["digest"]), f"  {render.digest(layer['digest'])}", layer["done"], layer["total"]
        for each in status.get("builds", ()):
            told = f"failed: {each['error']}" if each["error"] else each["step"]
            yield (each["image"], each["began"], "build"), f"{each['image']}  {told}", 0, None
        for line in self.lasting(status)[:MOST_WAITS]:
            yield line, f"waiting: {line}", 0, None
