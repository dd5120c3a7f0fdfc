"""Numbers the files of logs as soon as conmon leaves them.

Without it a container that writes much would fill several files before the next look, and only the newest be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.node.filewatch import FileWatch
from holdfast.runtime.inotify import MOVED_TO
from holdfast.runtime.logs import roll


class LogKeeper:
    """Sees to the logs in the folders that are added; where none can be watched, they wait for the next look.

    max_files: how many files a log is to keep, None if nobody knows it.
    """

    def __init__(self, max_files: Callable[[Path], int | None]) -> None:
        self._max_files = max_files
        self._watch = FileWatch(MOVED_TO, self._roll)
        self.add, self.close = self._watch.add, self._watch.close

    def _roll(self, folder: Path, name: str) -> None:
        if name.endswith(".log") and (kept := self._max_files(folder / name)) is not None:
            with suppress(OSError):  # the next look tries again
                roll(folder / name, kept)
