"""TOML text → data, and for every key path the line where it stands: what lets an error point at its cause.

`tomllib` reads the data and drops the positions, so a second, much smaller reader finds them, and only when somebody
asks: a document without faults is read once. Called by the two readers of TOML, `spec` and `config`.
"""

from __future__ import annotations

import codecs
import math
import re
import tomllib
from collections.abc import Iterator
from functools import cached_property
from itertools import count
from types import NoneType
from typing import Any

from holdfast.grammar.quantities import LARGEST

KeyPath = tuple[str | int, ...]

MAX_SIZE = 1024 * 1024
MAX_DEPTH = 64  # tables and lists within each other
LONGEST_KEY = 80  # characters of one part of a key path that an error shows

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")
# tomllib takes time that grows with the square of a dotted key's parts.
_LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}""", re.ASCII
)
_WHERE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


TOO_DEEP = "is nested too deeply"


class Unreadable(ValueError):
    """The text is not TOML. line and column count from 1; column 0 is unknown."""

    def __init__(self, message: str, line: int = 1, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class Document:
    """One TOML text, read: its data, and on demand the line of every key path."""

    def __init__(self, raw: bytes) -> None:
        """Read raw; raise Unreadable if it is not UTF-8, not TOML, or beyond one of the limits above."""
        if len(raw) > MAX_SIZE:
            raise Unreadable(f"{len(raw)} bytes are too many (expected at most {MAX_SIZE})")
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Unreadable("the file is UTF-16 (expected UTF-8)")
        raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            self.text = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start]
            line = before.count(b"\n") + 1
            column = error.start - (before.rfind(b"\n") + 1) + 1
            raise Unreadable(f"byte 0x{raw[error.start]:02x} is not UTF-8", line, column) from error
        if match := _LONG_KEY.search(self.text):
            line = self.text.count("\n", 0, match.start()) + 1
            raise Unreadable(f"a key of too many parts (expected at most {MAX_DEPTH})", line)
        try:
            self.data: dict[str, Any] = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise _unreadable(str(error), self.text) from error
        except RecursionError as error:
            raise Unreadable(TOO_DEEP) from error
        except ValueError as error:  # int() refuses thousands of digits
            raise Unreadable(f"a number is too large (expected at most {LARGEST})") from error
        for path, value in _scalars(self.data):
            if wrong := _unfit(value):
                raise Unreadable(f"{dotted(self.written(path))}: {wrong}", self.line(path))

    @classmethod
    def of(cls, text: str, data: dict[str, Any]) -> Document:
        """A document whose data is known already."""
        self = cls.__new__(cls)
        self.text, self.data = text, data
        return self

    def line(self, path: KeyPath) -> int:
        """Return the line of a key path, or of the nearest table around it in the text; 1 if there is none."""
        path = self.written(path)
        while path and path not in self._offsets:
            path = path[:-1]
        return self.text.count("\n", 0, self._offsets.get(path, 0)) + 1

    def written(self, path: KeyPath) -> KeyPath:
        """Return a path as the text has it: a name in a list becomes its index; short forms have no parts."""
        here: Any = self.data
        steps: list[str | int] = []
        for step in path:
            if not isinstance(here, dict | list | NoneType):
                break
            if isinstance(here, list) and isinstance(step, str):
                if step not in here:
                    break
                step = here.index(step)
            steps.append(step)
            try:
                here = here[step]
            except (KeyError, IndexError, TypeError):
                here = None
        return tuple(steps)

    @cached_property
    def _offsets(self) -> dict[KeyPath, int]:
        return _Places(self.text).found


def _scalars(data: dict[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every value that is no table or list, without recursion; raise Unreadable for too deep nesting."""
    todo: list[tuple[KeyPath, Any]] = [((), data)]
    while todo:
        path, value = todo.pop()
        match value:
            case dict() | list() if len(path) > MAX_DEPTH:
                raise Unreadable(TOO_DEEP)
            case dict():
                todo.extend(((*path, key), inner) for key, inner in value.items())
            case list():
                todo.extend(((*path, index), inner) for index, inner in enumerate(value))
            case _:
                yield path, value


def _unfit(value: Any) -> str:
    """Say why a value can't be stored as JSON or given to the kernel; "" if it can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a number to count with (expected a finite one)"
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return f"the number is too large (expected at most {LARGEST})"
    if isinstance(value, str) and "\0" in value:
        return "holds the character NUL, which ends a text for the kernel (leave it out)"
    return ""


def dotted(path: KeyPath) -> str:
    """Write a key path as a person does: `containers.web.ports[0]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if _BARE_KEY.fullmatch(step) else f'"{step}"'
            name = name if len(name) <= LONGEST_KEY else f"{name[:LONGEST_KEY]}…"
            text += f".{name}" if text else name
    return text


def _unreadable(message: str, text: str) -> Unreadable:
    """Take the position out of the text of tomllib's error."""
    match = _WHERE.search(message)
    line, column = match.groups() if match and match[1] else (text.count("\n") + 1, 0)
    words = _WHERE.sub("", message)
    return Unreadable(words[:1].lower() + words[1:], int(line), int(column))


class _Places:
    """Walks over valid TOML (tomllib has read it) and notes where each key path begins."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.lengths: dict[KeyPath, int] = {}  # of arrays of tables
        table: KeyPath = ()
        while self.skip(_BLANK) < len(text):
            table = self.header() if text[self.at] == "[" else self.pair(table)

    def skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at

    def header(self) -> KeyPath:
        start = self.at
        many = self.text.startswith("[[", start)
        self.at += 2 if many else 1
        steps = self.key()
        self.at += 2 if many else 1
        table = self.inside(steps[:-1]) + steps[-1:]
        if many:
            self.lengths[table] = self.lengths.get(table, 0) + 1
        table = self.inside(steps)
        self.note(table, start)
        return table

    def inside(self, steps: tuple[str, ...]) -> KeyPath:
        """Return the path of a header's steps; in an array of tables, the last table is meant."""
        path: KeyPath = ()
        for step in steps:
            path = (*path, step)
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
        return path

    def pair(self, table: KeyPath) -> KeyPath:
        """Read one `key = value`; return the table, which stays the current one."""
        self.skip(_SPACE)
        start = self.at
        path = table + self.key()
        self.note(path, start)
        self.at += 1  # the equals sign
        self.value(path)
        return table

    def key(self) -> tuple[str, ...]:
        """Read the parts of a dotted key; stop behind it and the white space that follows."""
        steps: list[str] = []
        while True:
            start = self.skip(_SPACE)
            if self.text[start] in "\"'":
                steps += tomllib.loads(f"{self.text[start : self.skip(_STRING)]} = 0")
            else:
                steps.append(self.text[start : self.skip(_BARE_KEY)])
            if self.skip(_SPACE) >= len(self.text) or self.text[self.at] != ".":
                return tuple(steps)
            self.at += 1

    def value(self, path: KeyPath) -> None:
        self.skip(_SPACE)
        match self.text[self.at]:
            case "[" | "{" as opening:
                self.inner(path, opening)
            case '"' | "'":
                self.skip(_STRING)
            case _:
                self.skip(_SCALAR)

    def inner(self, path: KeyPath, opening: str) -> None:
        """Read an array, or an inline table."""
        self.at += 1
        for index in count():
            if self.text[self.skip(_BLANK)] in "]}":
                break
            if opening == "{":
                self.pair(path)
            else:
                self.note((*path, index), self.at)
                self.value((*path, index))
            if self.text[self.skip(_BLANK)] == ",":
                self.at += 1
        self.at += 1

    def note(self, path: KeyPath, at: int) -> None:
        """Note where a path starts; tables around it that have no place of their own start there, too."""
        self.found[path] = at
        for length in range(1, len(path)):
            self.found.setdefault(path[:length], at)
