"""Waits for files to be written, made or moved in folders (inotify(7))."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from holdfast.syscalls import call

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x100, 0x200, 0x400, 0x800
OVERFLOW, IGNORED, ONLYDIR, MASK_ADD, ISDIR = 0x4000, 0x8000, 1 << 24, 1 << 29, 1 << 30
LONGEST = 2**31 - 1  # milliseconds that poll(2) can wait: 24 days


class Event(NamedTuple):
    """Something that happened in a folder. watch: what `add` returned for it. name: "" for the folder itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """Folders that are watched. One thread waits; any may add.

    overflowed: whether events were lost, because nobody waited for too long. Whoever cares resets it.
    """

    def __init__(self, events: int = 0) -> None:
        self._events = events
        self.overflowed = False
        self._folders: dict[int, Path] = {}
        self._fd = call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK, about="inotify")
        self._interrupted = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        for each in (self._fd, self._interrupted):
            self._poller.register(each, select.POLLIN)

    def add(self, folder: Path) -> int:
        """Watch a folder and return the number of the watch; raises OSError if that can't be."""
        watch = self.watch(os.fspath(folder), self._events)
        self._folders[watch] = folder
        return watch

    def watch(self, folder: str, events: int) -> int:
        """Watch a folder for some events, and return the number of the watch; raises OSError if that can't be."""
        return call("inotify_add_watch", self._fd, os.fsencode(folder), events, about=folder)

    def remove(self, watch: int) -> Path | None:
        """End a watch; return the folder that was added. `wait` drops events of it that have come already."""
        with suppress(OSError):  # the kernel has ended it
            call("inotify_rm_watch", self._fd, watch)
        return self._folders.pop(watch, None)

    def wait(self, timeout: float | None) -> Iterator[tuple[Path, str]]:
        """Sleep until something happens, or timeout (seconds); yield folder and name, "" where the folder is gone."""
        for watch, mask, name in self.events(timeout):
            folder = self._folders.pop(watch, None) if mask & IGNORED else self._folders.get(watch)
            if folder is not None:
                yield folder, name

    def events(self, timeout: float | None) -> Iterator[Event]:
        """Sleep until something happens, timeout (seconds) is over or `interrupt` is called; yield what happened."""
        data = b""
        if self._poller.poll(None if timeout is None else min(timeout * 1000, LONGEST)):
            with suppress(BlockingIOError):
                os.eventfd_read(self._interrupted)
            with suppress(BlockingIOError):
                data = os.read(self._fd, 65536)
        while data:
            watch, mask, _, size = struct.unpack_from("iIII", data)
            self.overflowed |= bool(mask & OVERFLOW)
            name, data = data[16 : 16 + size].rstrip(b"\0"), data[16 + size :]
            yield Event(watch, mask, os.fsdecode(name))

    def interrupt(self) -> None:
        """Have `events` return at once, this time or, where nobody waits, the next."""
        os.eventfd_write(self._interrupted, 1)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)
        os.close(self._interrupted)
