"""Says what became of processes that a test knows by their number, and which ones a process has started."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ground import patient


def has_ended(pid: int) -> bool:
    """Whether a process has ended: one that nobody has waited for yet, a zombie, has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_ended(pid: int, seconds: float = 20.0) -> None:
    """Wait until a process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = select.select([handle], [], [], patient(seconds))[0]
    os.close(handle)
    assert ended, f"process {pid} has not ended within {seconds} s"


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a process a signal that ends it, and wait until it has ended: until then it passes for one that runs."""
    os.kill(pid, number)
    wait_ended(pid)


def children(pid: int) -> set[int]:
    """The processes that a process has started and not waited for yet."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found |= set(map(int, task.read_text().split()))
    return found


def descendants(pid: int) -> set[int]:
    """Those, and all that they have started."""
    found = children(pid)
    return found.union(*(descendants(child) for child in found))


def command_line(pid: int) -> bytes:
    """The command line of a process, empty once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def command_lines() -> Iterator[bytes]:
    """The command line of every process of this host."""
    for place in Path("/proc").glob("[0-9]*"):
        yield command_line(int(place.name))


def open_files(pid: int) -> set[str]:
    """What the descriptors of a process lead to, as proc(5) names it."""
    found = set[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it is closed by now
            found.add(str(link.readlink()))
    return found
