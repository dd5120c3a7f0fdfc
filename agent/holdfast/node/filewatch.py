"""Hears of files in folders at once: one thread, one inotify. Nothing is polled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.runtime.inotify import Inotify


class FileWatch:
    """Calls handle(folder, name) from its thread for each of these events (`runtime.inotify`)."""

    def __init__(self, events: int, handle: Callable[[Path, str], None]) -> None:
        self._events, self._handle = events, handle
        self._watch: Inotify | None = None
        self._lock = threading.Lock()
        self._closed = False

    def add(self, folder: Path) -> None:
        """Watch a folder, if it is there and there are watches left. Idempotent; one made anew is another."""
        with self._lock, suppress(OSError):
            if self._closed:
                return
            if self._watch is None:
                self._watch = Inotify(self._events)
                threading.Thread(target=self._serve, args=(self._watch,), name="files", daemon=True).start()
            self._watch.add(folder)

    def close(self) -> None:
        """Call nobody any more; the thread ends with the process."""
        self._closed = True

    def _serve(self, watch: Inotify) -> None:
        while not self._closed:
            for folder, name in watch.wait(None):
                if name and not self._closed:
                    self._handle(folder, name)
