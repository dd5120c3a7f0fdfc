"""What is mounted, as proc_pid_mountinfo(5) lists it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One mount. Its line is read when somebody asks: a thousand containers have thousands of mounts."""

    line: str

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
    def kind(self) -> str:
        """The type of the file system."""
        return self._tail[0]

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


def mount_points(*kinds: str, of: Path | None = None) -> Iterator[MountPoint]:
    """Every mount of this mount namespace, or those of some kinds, read at once. of: another process's mountinfo."""
    wanted = tuple(f"{kind} " for kind in kinds) or ""
    for line in (of or MOUNTINFO).read_text(errors="surrogateescape").splitlines():
        if line.partition(" - ")[2].startswith(wanted):
            yield MountPoint(line)


def unescaped(field: str) -> str:
    """A field of mountinfo or fstab(5): octal escapes stand for what would end it."""
    if "\\" not in field:  # as nearly always
        return field
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
