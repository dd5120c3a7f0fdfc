"""The logs of a container's instances, one after another → its output. Called by the API, and by `holdfast logs`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.runtime.logs import LogLine, follow, log_files, read


def output(
    logs: Sequence[Path], tail: int | None = None, since: float | None = None, stop: threading.Event | None = None
) -> Iterator[LogLine]:
    """Yield what all instances wrote, oldest instance first: the last tail lines, not before since.

    With stop, go on with the newest instance as it writes, until stop is set. Blocking.
    """
    if stop is None:
        yield from read([file for log in logs for file in log_files(log)], tail, since)
        return
    if not logs:
        return
    newest = logs[-1]
    left = None if tail is None else max(tail - sum(1 for _ in read(log_files(newest), tail, since)), 0)
    yield from read([file for log in logs[:-1] for file in log_files(log)], left, since)
    yield from follow(newest, stop, tail, since)
