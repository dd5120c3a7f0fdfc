"""Waits for files to be written, made or moved in folders (inotify(7))."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from holdfast.syscalls import call

MODIFY, MOVED_TO, CREATE, OVERFLOW, IGNORED = 0x2, 0x80, 0x100, 0x4000, 0x8000


class Inotify:
    """Folders that are watched. One thread waits; any may add.

    overflowed: whether events were lost, because nobody waited for too long. Whoever cares resets it.
    """

    def __init__(self, events: int) -> None:
        self._events = events
        self.overflowed = False
        self._folders: dict[int, Path] = {}
        self._fd = call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK, about="inotify")
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)

    def add(self, folder: Path) -> int:
        """Watch a folder and return the number of the watch; raises OSError if that can't be."""
        watch = call("inotify_add_watch", self._fd, os.fsencode(folder), self._events, about=folder)
        self._folders[watch] = folder
        return watch

    def remove(self, watch: int) -> Path | None:
        """End a watch; return its folder, None if the kernel has ended it. Events that have come are dropped."""
        folder = self._folders.pop(watch, None)
        with suppress(OSError):  # the kernel has ended it
            call("inotify_rm_watch", self._fd, watch)
        return folder

    def wait(self, timeout: float | None) -> Iterator[tuple[Path, str]]:
        """Sleep until something happens, or timeout (seconds); yield folder and name, "" where the folder is gone."""
        data = b""
        if self._poller.poll(None if timeout is None else timeout * 1000):
            with suppress(BlockingIOError):
                data = os.read(self._fd, 65536)
        while data:
            watch, mask, _, size = struct.unpack_from("iIII", data)
            self.overflowed |= bool(mask & OVERFLOW)
            name, data = data[16 : 16 + size].rstrip(b"\0"), data[16 + size :]
            folder = self._folders.pop(watch, None) if mask & IGNORED else self._folders.get(watch)
            if folder is not None:
                yield folder, "" if mask & IGNORED else os.fsdecode(name)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)
