"""Container output: bounded while it is written, read and followed.

A log is a file in conmon's k8s-file format, `TIME STREAM TAG TEXT`, where TAG is F for a whole line and P for a part
of one; rows with the tag R, which `begin` writes, say that another run begins. When a file is full, conmon begins a
new one in its place (conmon(8), --log-size-max): the size is bounded whether an agent runs or not. What was full is
kept by its second name, FILE.0, which becomes FILE.1 (the newest), FILE.2 and so on in `roll`.
"""

from __future__ import annotations

import base64
import codecs
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.files import names_in

LINE = 64 << 10  # bytes after which an unfinished line is yielded in pieces
_BLOCK = 256 << 10  # bytes that are read at once from the end backwards
_WHOLE_LINE = re.compile(rb"\n\S+ \S+ F")  # begins with a byte that is found fast: rows have 8 KiB


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of output, or a piece of one. time: RFC 3339, as conmon wrote it. target: the container.

    partial: the next piece of this stream continues the same line.
    """

    time: str
    stream: str
    data: bytes
    partial: bool = False
    target: str = ""

    @property
    def at(self) -> float:
        """The time in seconds since the epoch."""
        return datetime.fromisoformat(self.time).timestamp()

    @property
    def text(self) -> str:
        """The line as text; bytes that are not UTF-8 are replaced."""
        return self.data.decode(errors="replace")

    def json(self) -> dict[str, Any]:
        """The line as the API returns it; with the bytes in base64 where they are not UTF-8."""
        value = {"time": self.time, "stream": self.stream, "text": self.text, "partial": self.partial}
        if self.text.encode() != self.data:
            value["base64"] = base64.b64encode(self.data).decode()
        return {"target": self.target, **value} if self.target else value


def line_of(value: Mapping[str, Any]) -> LogLine:
    """The line that `LogLine.json` wrote."""
    data = base64.b64decode(value["base64"]) if "base64" in value else str(value["text"]).encode()
    return LogLine(value["time"], value["stream"], data, value["partial"], value.get("target", ""))


# -- the writer's side ---------------------------------------------------------------------------------------


def begin(log_path: Path, max_size: int, max_files: int) -> int:
    """Prepare a log for another run; return the size at which conmon begins a new file.

    All files together take at most max_size * max_files, including the one that `roll` has not seen yet.
    """
    full = max(max_size * max_files // (max_files + 1), 1)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    roll(log_path, max_files)
    if _size(log_path) > full // 2:
        log_path.unlink()  # it has its second name
        roll(log_path, max_files)
    with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab") as file:
        if file.tell():
            file.write(f"{datetime.now(UTC).isoformat()} - R \n".encode())
    roll(log_path, max_files)
    return max(full - _size(log_path), 1)


def roll(log_path: Path, max_files: int) -> None:
    """Number the file that conmon has left, delete what exceeds max_files, and give the new file a second name.

    It can be repeated after a crash.
    """
    held = _older(log_path, 0)
    inode = _inode(log_path)
    if inode is not None and _inode(held) == inode:
        return
    if held.exists():
        for file in _numbered(log_path):
            if _number(file) + 1 < max_files:
                file.rename(_older(log_path, _number(file) + 1))
            else:
                file.unlink(missing_ok=True)
    with suppress(OSError):  # without the second name less is kept, but the container runs
        os.link(log_path, held)


def keep(log_path: Path, max_size: int, max_files: int, reopen: Callable[[], None]) -> None:
    """Do what `roll` does. A conmon with no limit, or a larger one, is made to begin a new file by `reopen`."""
    roll(log_path, max_files)
    if _size(log_path) > max_size:
        reopen()


def log_files(log_path: Path) -> list[Path]:
    """The files of a log that exist, oldest first; a file with two names once."""
    return list({inode: file for file, inode in _inodes(log_path)}.values())


def _inodes(log_path: Path) -> list[tuple[Path, int]]:
    """Every name of a log's files with its inode, the oldest file first."""
    names = (*_numbered(log_path), log_path)
    return [(file, inode) for file in names if (inode := _inode(file)) is not None]


def _numbered(log_path: Path) -> list[Path]:
    """The files with a number, the oldest first."""
    form = re.compile(rf"{re.escape(log_path.name)}\.[0-9]+")
    names = filter(form.fullmatch, names_in(log_path.parent))
    return sorted(map(log_path.with_name, names), key=_number, reverse=True)


def _older(log_path: Path, number: int) -> Path:
    return log_path.with_name(f"{log_path.name}.{number}")


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _inode(file: Path) -> int | None:
    with suppress(FileNotFoundError):
        return file.stat().st_ino
    return None


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


# -- the reader's side ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines are asked for: the last `tail` of each log, written between `since` and `until`."""

    tail: int | None = None
    since: float | None = None
    until: float | None = None

    def of(self, lines: Iterable[LogLine]) -> Iterator[LogLine]:
        """Select the lines of a log that are asked for."""
        found = self.within(lines)
        return found if self.tail is None else iter(deque(found, maxlen=self.tail))

    def within(self, lines: Iterable[LogLine]) -> Iterator[LogLine]:
        """Select the lines that were written between since and until."""
        if self.since is not None:
            lines = (line for line in lines if line.at >= (self.since or 0))
        if self.until is not None:
            lines = (line for line in lines if line.at <= (self.until or 0))
        return iter(lines)

    @property
    def over(self) -> bool:
        """Whether no future line is asked for."""
        return self.until is not None and time.time() > self.until


def read(log_path: Path, wanted: Wanted | None = None, target: str = "") -> Iterator[LogLine]:
    """Yield the lines of a log that are asked for, parts joined."""
    wanted = wanted or Wanted()
    with Cursor(log_path, wanted, target) as cursor:
        yield from wanted.of(cursor.lines(last=True))


class Cursor:
    """A position in a log, which moves from file to file."""

    def __init__(self, log_path: Path, wanted: Wanted, target: str = "") -> None:
        self._path = log_path
        self._rest = b""
        self._joiner = _Joiner(target)
        self._file: BinaryIO | None = None
        first, offset = _start(log_files(log_path), None if wanted.since is not None else wanted.tail)
        if first is not None:
            with suppress(FileNotFoundError):
                self._file = first.open("rb")
                self._file.seek(offset)

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def lines(self, *, last: bool = False) -> Iterator[LogLine]:
        """Yield what has been written, an unfinished line too. last: this is the last call."""
        for row in self._rows():
            yield from self._joiner.add(row)
        yield from self._joiner.rest(last=last)

    def _rows(self) -> Iterator[bytes]:
        """Yield every whole row that has been written."""
        while True:
            following = self._following()  # before reading: a file is complete when the next one exists
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
        """Open the file after the current one; the oldest there is when the current one is gone."""
        current = os.fstat(self._file.fileno()).st_ino if self._file is not None else None
        while True:
            seen = _inodes(self._path)
            places = [place for place, (_, inode) in enumerate(seen) if inode == current]
            left = seen[places[-1] + 1 :] if places else seen
            if not left:
                return None
            file, inode = left[0]
            with suppress(FileNotFoundError):
                opened = file.open("rb")
                if os.fstat(opened.fileno()).st_ino == inode and _inodes(self._path) == seen:
                    return opened
                opened.close()  # files were renamed meanwhile: this may be one that was already read


def _start(files: list[Path], tail: int | None) -> tuple[Path | None, int]:
    """The file, and the offset in it, after which there are `tail` whole lines with all of their parts."""
    if tail is None or not files:
        return (files[0] if files else None), 0
    left = tail
    for file in reversed(files):
        with suppress(FileNotFoundError):
            offset, found = _backwards(file, left)
            if offset is not None:
                return file, offset
            left -= found
    return files[0], 0


def _backwards(file: Path, count: int) -> tuple[int | None, int]:
    """The offset of the last `count` whole lines of a file, None if it has no more, and how many it has."""
    found = 0
    with file.open("rb") as source:
        end = source.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            source.seek(start)
            data = source.read(end - start)
            skipped = data.find(b"\n") + 1 if start else 0
            rows = [match.start() for match in _WHOLE_LINE.finditer(b"\n" + data, skipped)]
            if found + len(rows) > count:
                before = data.find(b"\n", rows[len(rows) - (count - found) - 1]) + 1
                return start + (before or len(data)), count
            found += len(rows)
            end = start + skipped
    return None, found


@dataclass(slots=True)
class _Open:
    """A line that has no end yet, as far as it was not yielded."""

    time: str
    data: bytearray = field(default_factory=bytearray)


class _Joiner:
    """Joins the parts of lines, separately for stdout and stderr, up to LINE bytes."""

    def __init__(self, target: str = "") -> None:
        self._target = target
        self._open: dict[str, _Open] = {}

    def add(self, row: bytes) -> Iterator[LogLine]:
        """Add one row of a log; yield what it completes."""
        fields = row.rstrip(b"\n").lstrip(b"\0").split(b" ", 3)  # a power cut may leave zeros
        if len(fields) < 3 or fields[2][:1] not in (b"F", b"P", b"R"):
            return  # torn by a crash of the host
        time, stream, tag = (each.decode(errors="replace") for each in fields[:3])
        try:
            datetime.fromisoformat(time)
        except ValueError:
            return
        if tag.startswith("R"):  # it finishes the lines that a run has left unfinished
            yield from (self._line(stream, line) for stream, line in self._open.items())
            self._open.clear()
            return
        line = self._open.setdefault(stream, _Open(time))
        if not line.data:
            line.time = time
        line.data += fields[3] if len(fields) > 3 else b""
        if tag.startswith("F"):
            yield self._line(stream, self._open.pop(stream))
        elif len(line.data) >= LINE:
            yield from self._piece(stream, line)

    def rest(self, *, last: bool) -> Iterator[LogLine]:
        """Yield what there is of unfinished lines."""
        for stream, line in self._open.items():
            yield from self._piece(stream, line, whole=last)

    def _piece(self, stream: str, line: _Open, *, whole: bool = False) -> Iterator[LogLine]:
        """Yield what there is of a line; an incomplete character waits for its last byte, unless whole."""
        data = bytes(line.data)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(data)
        cut = len(data) - (0 if whole else len(decoder.getstate()[0]))
        if cut:
            yield LogLine(line.time, stream, data[:cut], partial=True, target=self._target)
        line.data = bytearray(data[cut:])

    def _line(self, stream: str, line: _Open) -> LogLine:
        return LogLine(line.time, stream, bytes(line.data), target=self._target)
