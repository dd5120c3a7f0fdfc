"""Which file system a path of the host is meant to be on, and whether that is mounted.

A bind whose source lies below a mount point that is not mounted would write to the disk underneath. fstab(5) says
what is meant to be mounted, /proc/self/mountinfo what is; nothing here touches the file systems themselves, which
may not answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.spec.model import Mount

FSTAB = Path("/etc/fstab")
MOUNTINFO = Path("/proc/self/mountinfo")
_cache: tuple[tuple[int, int, int], tuple[str, ...]] = ((0, 0, 0), ())


@dataclass(frozen=True, slots=True)
class Mounted:
    """The mount points of this host, read at one moment and only if somebody asks."""

    _read: list[frozenset[str]]

    @classmethod
    def now(cls) -> Mounted:
        return cls([])

    def __contains__(self, point: str) -> bool:
        if not self._read:
            self._read.append(frozenset(unescaped(line.split(" ", 5)[4]) for line in _lines(MOUNTINFO)))
        return point in self._read[0]


@dataclass(frozen=True, slots=True)
class MountedAt:
    """One mount: where it is, and what is mounted there, as findmnt(8) writes it (`/dev/sdb1[/folder]`)."""

    point: str
    what: str


def mounts() -> dict[int, MountedAt]:
    """What is mounted now, by mount id; of automount points only what is mounted on them."""
    found = {}
    for line in _lines(MOUNTINFO):
        id, _, _, root, point, *rest = line.split(" ")
        kind, what = rest[rest.index("-") + 1 :][:2]
        if kind != "autofs":
            part = f"[{unescaped(root)}]" if root != "/" else ""
            found[int(id)] = MountedAt(unescaped(point), unescaped(what) + part)
    return found


def mount_id(path: str) -> int:
    """The id of the mount that a path of this host lies on. Raises OSError."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = _lines(Path(f"/proc/self/fdinfo/{handle}"))
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(handle)


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="surrogateescape").splitlines()


def lacking(mount: Mount, mounted: Mounted) -> str:
    """Why a bind must not be made now: what its source is meant to lie on is not mounted. "" if it may be made."""
    if mount.kind != "bind" or mount.require_mount is False:
        return ""
    missing = unmounted(mount.source, mounted)
    if missing:
        return f"{missing} is not mounted, which {FSTAB} names and '{mount.source}' lies on"
    above = _above(os.path.realpath(mount.source)) if mount.require_mount else ()
    if mount.require_mount and not any(point in mounted for point in above if point != "/"):
        return f"nothing is mounted at or above '{mount.source}' (require_mount = true)"
    return ""


def unmounted(path: str, mounted: Mounted) -> str:
    """The mount point of fstab that a path lies on, if it is not mounted; "" otherwise."""
    points = fstab_points()
    if not points:
        return ""
    real = os.path.realpath(path)
    meant = (point for point in points if _covers(point, path) or _covers(point, real))
    return next((point for point in meant if point not in mounted), "")


def mount_point(path: str) -> str:
    """The mount point that a path lies on, as far as device numbers tell: "/" where they do not differ."""
    real = os.path.realpath(path)
    device = Path(real).stat().st_dev
    found = real
    for above in _above(real):
        if Path(above).stat().st_dev != device:
            return found
        found = above
    return "/"


def fstab_points() -> tuple[str, ...]:
    """The mount points that fstab names below /, read again when the file has changed."""
    global _cache
    try:
        found = FSTAB.stat()
        key = found.st_mtime_ns, found.st_size, found.st_ino
        if _cache[0] != key:
            _cache = key, tuple(_points(FSTAB.read_text(errors="surrogateescape").splitlines()))
    except OSError:  # there is none, as in many containers and images
        return ()
    return _cache[1]


def _points(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        fields = line.split()
        if len(fields) >= 3 and not fields[0].startswith("#"):
            point = os.path.normpath(unescaped(fields[1]))
            if point.startswith("/") and point != "/" and fields[2] != "swap":
                yield point


def _covers(point: str, path: str) -> bool:
    return path == point or path.startswith(f"{point}/")


def _above(path: str) -> Iterator[str]:
    """A path, and every folder that it lies in."""
    return map(str, (Path(path), *Path(path).parents))


def unescaped(field: str) -> str:
    """A field of fstab or mountinfo: octal escapes for what would end it."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
