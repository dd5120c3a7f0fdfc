"""Numbers the files of logs as soon as conmon leaves them: one thread, one inotify. Nothing is polled.

Without it a container that writes much would fill several files before the next look, and only the newest be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.runtime.inotify import MOVED_TO, Inotify
from holdfast.runtime.logs import roll


class LogKeeper:
    """Watches the folders that are added. max_files: how many files a log is to keep, None if nobody knows it."""

    def __init__(self, max_files: Callable[[Path], int | None]) -> None:
        self._max_files = max_files
        self._watch: Inotify | None = None
        self._known: set[Path] = set()
        self._lock = threading.Lock()
        self._closed = False

    def add(self, folder: Path) -> None:
        """Watch a folder, if there are watches left: without one, its logs wait for the next look. Idempotent."""
        if folder in self._known:
            return
        with self._lock, suppress(OSError):
            if self._closed:
                return
            if self._watch is None:
                self._watch = Inotify(MOVED_TO)
                threading.Thread(target=self._serve, args=(self._watch,), name="logs", daemon=True).start()
            self._watch.add(folder)
            self._known.add(folder)

    def close(self) -> None:
        """Stop rolling; the thread ends with the process."""
        self._closed = True

    def _serve(self, watch: Inotify) -> None:
        while not self._closed:
            for folder, name in watch.wait(None):
                if not name:
                    self._known.discard(folder)
                elif name.endswith(".log") and (kept := self._max_files(folder / name)) is not None:
                    with suppress(OSError):  # the next look tries again
                        roll(folder / name, kept)
