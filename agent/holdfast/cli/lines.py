"""Print the output of containers to standard output and standard error, byte for byte."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterable, Sequence

from holdfast.cli import render
from holdfast.runtime.logs import LogLine

NAMES = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_green")


def show(lines: Iterable[LogLine | None], *, timestamps: bool, follow: bool) -> None:
    """Print lines as they were written, those of several containers after their names; None: nothing for now."""
    if follow:
        end_when_unread()
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    begun: set[str] = set()  # the streams of a single container that are in the middle of a line
    for line in lines:
        if line is None:
            flush()
            continue
        out = streams.get(line.stream, sys.stdout.buffer)
        if line.stream not in begun:
            out.write(_start(line, timestamps).encode())
        out.write(line.data)
        if not line.partial or line.target:
            out.write(b"\n")
            begun.discard(line.stream)
        else:
            begun.add(line.stream)
    flush()


def show_json(lines: Iterable[LogLine | None], targets: Sequence[str]) -> None:
    """Print each line as JSON, with the name of its container."""
    for line in lines:
        if line is None:
            sys.stdout.flush()
        else:
            render.echo(render.json_text({"target": targets[0], **line.json()}))


def _start(line: LogLine, timestamps: bool) -> str:
    """What goes before a line."""
    name = render.paint(line.target, NAMES[sum(line.target.encode()) % len(NAMES)]) + "  " if line.target else ""
    when = render.paint(render.clock(line.at), render.QUIET) + "  " if timestamps else ""
    return render.terminal(name + when)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def end_when_unread() -> None:
    """End this process when its output has no reader any more, even if nothing is written."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # reports only that the reader has gone

    def watch() -> None:
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, name="reader", daemon=True).start()
