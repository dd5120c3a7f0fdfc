"""Configure the log: on standard error, plain, and never a reason to stop working."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TextIO

import structlog

from holdfast.cli import render

WARNING = 30  # a level, as in `logging`


def log_to_stderr(*, only_warnings: bool = False) -> None:
    """Write the log to standard error: standard output is for what was asked.

    only_warnings: leave out what is no fault, for commands that are not asked to do what the log tells.
    Tracebacks are plain: prettier ones would print local variables, and those may hold secrets.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(WARNING if only_warnings else 0),
        logger_factory=lambda *_: Printer(),
        processors=[
            plain_values,
            structlog.processors.add_log_level,
            *([] if _in_journal() else [structlog.processors.TimeStamper("%Y-%m-%d %H:%M:%S", utc=False)]),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain_traceback),
        ],
    )


class Printer:
    """Prints the lines of the log; if they can't be written (a full disk, a closed pipe), the work continues."""

    def msg(self, line: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it was closed
            sys.stderr.buffer.write(f"{line}\n".encode(errors="backslashreplace"))
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = msg


def plain_values(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Escape what would control a terminal in a line of the log (a structlog processor)."""
    return {key: render.plain(value) if isinstance(value, str) else value for key, value in event.items()}


def plain_traceback(out: TextIO, failure: Any) -> None:
    """Write a traceback without colours and without what would control a terminal."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, failure)
    out.write(render.terminal(text.getvalue()))


def _in_journal() -> bool:
    """Whether standard error is systemd's journal, which has the time of every line itself (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    if not device:
        return False
    found = os.fstat(sys.stderr.fileno())
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
