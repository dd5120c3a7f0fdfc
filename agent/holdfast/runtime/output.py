"""Merge the logs of containers by time. Called by the API, and by `holdfast logs`."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from holdfast.runtime.inotify import CREATE, MODIFY, MOVED_TO, Inotify
from holdfast.runtime.logs import Cursor, LogLine, Wanted, read

_STOP_INTERVAL = 1.0  # seconds after which a follower notices that it has to stop

Sources = Sequence[tuple[str, Path]]  # the name of a container, "" where there is only one, and its log


def output(
    sources: Sources, wanted: Wanted | None = None, stop: threading.Event | None = None
) -> Iterator[LogLine | None]:
    """Yield what containers wrote, oldest first.

    With stop, follow them until it is set: whenever there is nothing more for now, yield None and wait.
    """
    wanted = wanted or Wanted()
    if stop is not None:
        yield from _followed(sources, wanted, stop)
    elif len(sources) == 1:
        yield from read(sources[0][1], wanted, sources[0][0])
    else:
        yield from heapq.merge(*(read(path, wanted, name) for name, path in sources), key=_moment)


def _followed(sources: Sources, wanted: Wanted, stop: threading.Event) -> Iterator[LogLine | None]:
    with ExitStack() as stack:
        watch = Inotify(MODIFY | MOVED_TO | CREATE)
        stack.callback(watch.close)
        missing = {folder for folder in {path.parent for _, path in sources} if not _watches(watch, folder)}
        cursors = [stack.enter_context(Cursor(path, wanted, name)) for name, path in sources]
        yield from heapq.merge(*(wanted.of(cursor.lines()) for cursor in cursors), key=_moment)
        while not stop.is_set() and not wanted.over:
            yield None
            for _ in watch.wait(_STOP_INTERVAL):
                pass
            missing = {folder for folder in missing if not _watches(watch, folder)}
            yield from heapq.merge(*(wanted.within(cursor.lines()) for cursor in cursors), key=_moment)


def _watches(watch: Inotify, folder: Path) -> bool:
    """Watch a folder and return True; if it does not exist yet, watch the nearest one above it and return False."""
    for place in (folder, *folder.parents):
        with suppress(FileNotFoundError):
            watch.add(place)
            return place == folder
    return False


def _moment(line: LogLine) -> float:
    return line.at
