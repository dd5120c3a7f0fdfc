"""What is mounted, as proc_pid_mountinfo(5) lists it."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
CHANGED = select.POLLPRI | select.POLLERR


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One mount. The rest of its line is read when somebody asks: a thousand containers have thousands of mounts.

    kind: the type of the file system.
    """

    line: str
    kind: str

    @property
    def id(self) -> int:
        return int(self.line.partition(" ")[0])

    @property
    def device(self) -> str:
        """The file system, as major:minor."""
        return self.line.split(" ", 3)[2]

    @property
    def root(self) -> str:
        """Which folder of the file system is mounted."""
        return unescaped(self.line.split(" ", 4)[3])

    @property
    def point(self) -> str:
        """Where it is mounted."""
        return unescaped(self.line.split(" ", 5)[4])

    @property
    def source(self) -> str:
        return unescaped(self._tail[1])

    @property
    def options(self) -> str:
        """The options of the file system."""
        return self._tail[2]

    @property
    def what(self) -> str:
        """What is mounted, as findmnt(8) writes it (`/dev/sdb1[/folder]`)."""
        return self.source + (f"[{self.root}]" if self.root != "/" else "")

    @property
    def _tail(self) -> list[str]:
        return self.line.partition(" - ")[2].split(" ", 2)


class MountTable:
    """The mounts of the mount namespace that this process is in. Thread-safe.

    They are read again when the kernel says that they have changed (poll, proc_pid_mountinfo(5)): to list three
    thousand takes it 20 ms.
    """

    def __init__(self, path: Path = MOUNTINFO) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._whose: tuple[int, str] | None = None
        self._poll, self._file = select.poll(), -1
        self._points: tuple[MountPoint, ...] = ()

    def points(self) -> tuple[MountPoint, ...]:
        """Every mount: the same object until one comes, goes or changes."""
        whose = os.getpid(), os.readlink("/proc/self/ns/mnt")  # noqa: PTH115 - in every pass
        with self._lock:
            if whose != self._whose:  # the file tells of the namespace that it was opened in, once
                self._open()
                self._whose = whose
            elif not self._poll.poll(0):
                return self._points
            self._points = read_points(self._path)
            return self._points

    def _open(self) -> None:
        if self._file >= 0:
            self._poll.unregister(self._file)
            os.close(self._file)
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._poll.register(self._file, CHANGED)


OURS = MountTable()


def mount_points(*kinds: str) -> Sequence[MountPoint]:
    """Every mount of this mount namespace, or those of some kinds."""
    points = OURS.points()
    return [each for each in points if each.kind in kinds] if kinds else points


def read_points(path: Path) -> tuple[MountPoint, ...]:
    """The mounts that a mountinfo file lists, read at once."""
    lines = path.read_text(errors="surrogateescape").splitlines()
    return tuple(MountPoint(line, line.partition(" - ")[2].partition(" ")[0]) for line in lines)


def unescaped(field: str) -> str:
    """A field of mountinfo or fstab(5): octal escapes stand for what would end it."""
    if "\\" not in field:  # as nearly always
        return field
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
