"""Container output: rotating, reading and following what conmon writes.

A log is a file in conmon's k8s-file format, `TIME STREAM TAG TEXT`, where TAG is F for a whole line and P for a part
of one, with its older parts beside it as FILE.1 (the newest), FILE.2 and so on. The agent rotates; the CLI reads.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO

_WHOLE_LINE = re.compile(rb"^\S+ \S+ F", re.MULTILINE)
_STOP_INTERVAL = 1.0  # seconds in which a follower notices that it is to stop

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of output. time: RFC 3339, as conmon wrote it. partial: the program did not end the line (yet)."""

    time: str
    stream: str
    text: str
    partial: bool = False

    @property
    def at(self) -> float:
        """The time in seconds since the epoch."""
        return datetime.fromisoformat(self.time).timestamp()


def rotate(log_path: Path, max_size: int, max_files: int, reopen: Callable[[], None]) -> bool:
    """Move a log of max_size bytes or more out of the way, keep max_files in all; whether it did so.

    reopen makes conmon open log_path anew: what it writes until then goes to the moved file, so nothing is lost.
    An earlier rotation that was cut off before its reopen is finished.
    """
    try:
        if log_path.stat().st_size < max_size:
            return False
    except FileNotFoundError:
        if _older(log_path, 1).exists():
            reopen()
        return False
    for file in log_files(log_path):
        if file != log_path and _number(file) >= max_files - 1:
            file.unlink(missing_ok=True)
    for number in range(max_files - 2, 0, -1):
        with suppress(FileNotFoundError):
            _older(log_path, number).rename(_older(log_path, number + 1))
    if max_files > 1:
        log_path.rename(_older(log_path, 1))
    else:
        log_path.unlink()
    reopen()
    return True


def log_files(log_path: Path) -> list[Path]:
    """The files of a log that exist, oldest first."""
    try:
        names = [entry for entry in log_path.parent.iterdir() if entry.name.startswith(f"{log_path.name}.")]
    except FileNotFoundError:
        return []
    older = sorted((entry for entry in names if entry.suffix[1:].isdecimal()), key=_number, reverse=True)
    return [*older, *((log_path,) if log_path.exists() else ())]


def read(paths: Iterable[Path], tail: int | None = None, since: float | None = None) -> Iterator[LogLine]:
    """Yield the lines of a log's files (oldest file first), parts joined: the last tail ones, not before since."""
    files = list(paths)
    joiner = _Joiner()
    lines = (line for row in _rows(_enough(files, tail)) for line in joiner.add(row))
    yield from _selected(_chained(lines, joiner.rest), tail, since)


def follow(
    log_path: Path, stop: threading.Event, tail: int | None = None, since: float | None = None
) -> Iterator[LogLine]:
    """Yield what `read` would, then each line as it is written, over rotations, until stop is set.

    Blocking: sleeps in inotify(7) while nothing is written.
    """
    joiner, cursor = _Joiner(), _Cursor(log_path, tail)
    with cursor, _Watch(log_path.parent) as watch:
        yield from _selected((line for row in cursor.rows() for line in joiner.add(row)), tail, since)
        while not stop.is_set():
            watch.wait(_STOP_INTERVAL)
            fresh = (line for row in cursor.rows() for line in joiner.add(row))
            yield from _selected(fresh, None, since)


def _older(log_path: Path, number: int) -> Path:
    return log_path.with_name(f"{log_path.name}.{number}")


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _chained(lines: Iterable[LogLine], rest: Callable[[], Iterator[LogLine]]) -> Iterator[LogLine]:
    yield from lines
    yield from rest()


def _selected(lines: Iterable[LogLine], tail: int | None, since: float | None) -> Iterator[LogLine]:
    if since is not None:
        lines = (line for line in lines if line.at >= since)
    return iter(lines) if tail is None else iter(deque(lines, maxlen=tail))


def _enough(files: list[Path], tail: int | None) -> list[Path]:
    """The newest files that hold tail whole lines between them, oldest first."""
    if tail is None:
        return files
    taken: list[Path] = []
    for file in reversed(files):
        if tail <= 0:
            break
        taken.insert(0, file)
        with suppress(FileNotFoundError):
            tail -= len(_WHOLE_LINE.findall(file.read_bytes()))
    return taken


def _rows(files: Iterable[Path]) -> Iterator[bytes]:
    for path in files:
        with suppress(FileNotFoundError), path.open("rb") as file:
            yield from file


class _Joiner:
    """Joins the parts of lines, separately for stdout and stderr."""

    def __init__(self) -> None:
        self._parts: dict[str, LogLine] = {}

    def add(self, row: bytes) -> Iterator[LogLine]:
        """Take one row of a log; yield the line that it completes, if it does."""
        fields = row.decode(errors="replace").rstrip("\n").split(" ", 3)
        if len(fields) < 3 or fields[2][:1] not in ("F", "P"):
            return  # torn by a crash of the host
        time, stream, tag, text = (*fields, "")[:4]
        begun = self._parts.pop(stream, None)
        line = LogLine(begun.time if begun else time, stream, (begun.text if begun else "") + text)
        if tag.startswith("F"):
            yield line
        else:
            self._parts[stream] = line

    def rest(self) -> Iterator[LogLine]:
        """Yield what never was ended."""
        for line in self._parts.values():
            yield LogLine(line.time, line.stream, line.text, partial=True)
        self._parts.clear()


class _Cursor:
    """A place in a log that moves on from file to file as they are rotated."""

    def __init__(self, log_path: Path, tail: int | None) -> None:
        self._path = log_path
        self._rest = b""
        self._file: BinaryIO | None = None
        for first in islice(_enough(log_files(log_path), tail), 1):
            with suppress(FileNotFoundError):
                self._file = first.open("rb")

    def __enter__(self) -> _Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def rows(self) -> Iterator[bytes]:
        """Yield every whole row up to what is written by now."""
        while True:
            following = self._following()  # before reading: what is written to a file ends before the next begins
            if self._file is not None:
                yield from self._drain(self._file)
            if following is None:
                return
            if self._file is not None:
                self._file.close()
            self._file, self._rest = following, b""

    def _drain(self, file: BinaryIO) -> Iterator[bytes]:
        for row in file:
            self._rest += row
            if self._rest.endswith(b"\n"):
                whole, self._rest = self._rest, b""
                yield whole

    def _following(self) -> BinaryIO | None:
        """Open the file after the current one; the oldest there is when the current one was rotated away."""
        current = os.fstat(self._file.fileno()).st_ino if self._file is not None else None
        while files := log_files(self._path):
            inodes = [_inode(file) for file in files]
            if current in inodes:
                files = files[inodes.index(current) + 1 :]
            try:
                opened = files[0].open("rb") if files else None
            except FileNotFoundError:
                return None
            if opened is None or os.fstat(opened.fileno()).st_ino != current:
                return opened
            opened.close()  # the current one, under another name: it was rotated between two of these steps
        return None


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return -1


class _Watch:
    """Waits for anything to be written or moved in a folder (inotify(7))."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        events = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), events) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def wait(self, timeout: float) -> None:
        """Sleep until something happens, or timeout (seconds)."""
        if self._poller.poll(timeout * 1000):
            with suppress(BlockingIOError):
                os.read(self._fd, 65536)
