"""Find the file system that a path of the host should be on, and whether it is mounted.

A bind whose source is below a mount point that is not mounted would write to the disk underneath. fstab(5) says what
should be mounted, mountinfo what is. `lacking` and `unmounted` are called in every pass, so they touch no file system
that might not answer, like that of a server which is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from holdfast.files import held
from holdfast.mounts import MountPoint, mount_points, unescaped
from holdfast.spec.model import Mount

FSTAB = Path("/etc/fstab")
#: File systems on this host's own disks and memory. Others may wait for a server or a process that is gone.
LOCAL = frozenset(
    (
        *("bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "jfs", "nilfs2", "ntfs3"),
        *("reiserfs", "squashfs", "udf", "vfat", "xfs", "zfs"),
        *("devtmpfs", "overlay", "proc", "ramfs", "rootfs", "sysfs", "tmpfs"),
    )
)
AUTOMOUNT = "autofs"  # stands where a file system is mounted on demand
MOST_LINKS = 40
_cache: tuple[tuple[int, int, int], tuple[str, ...]] = ((0, 0, 0), ())


class Mounted:
    """What this host has mounted, read when it is first needed: most binds need no look at it."""

    _newest: ClassVar[tuple[Sequence[MountPoint], dict[int, MountPoint], dict[str, MountPoint]]] = (), {}, {}

    @classmethod
    def now(cls) -> Mounted:
        """What is mounted now."""
        return cls()

    @cached_property
    def points(self) -> Sequence[MountPoint]:
        """Every mount: the same object until that changes."""
        return mount_points()

    @property
    def by_id(self) -> dict[int, MountPoint]:
        """Every mount, by its id."""
        return self._indexed()[1]

    @property
    def at(self) -> dict[str, MountPoint]:
        """The topmost mount at each point."""
        return self._indexed()[2]

    def _indexed(self) -> tuple[Sequence[MountPoint], dict[int, MountPoint], dict[str, MountPoint]]:
        newest = Mounted._newest
        if newest[0] is not self.points:
            newest = self.points, {each.id: each for each in self.points}, {each.point: each for each in self.points}
            Mounted._newest = newest
        return newest

    def covering(self, path: str) -> MountPoint | None:
        """The mount that a path without links is on, judged by mount points."""
        return next((self.at[above] for above in _above(path) if above in self.at), None)


def mount_id(path: str) -> int:
    """The id of the mount that a path of this host is on. Raises OSError."""
    with held(os.open(path, os.O_PATH | os.O_CLOEXEC)) as handle:
        lines = Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def lacking(mount: Mount, mounted: Mounted) -> str:
    """Why a bind must not be made now, "" if it may: the file system of its source is not mounted."""
    if mount.kind != "bind" or mount.require_mount is False:
        return ""
    missing = unmounted(mount.source, mounted)
    if missing:
        return f"{missing} is not mounted, which {FSTAB} names and '{mount.source}' is on"
    above = _above(real_path(mount.source, mounted)) if mount.require_mount else ()
    if mount.require_mount and not any(point in mounted.at for point in above if point != "/"):
        return f"nothing is mounted at or above '{mount.source}' (require_mount = true)"
    return ""


def unmounted(path: str, mounted: Mounted) -> str:
    """The mount point of fstab that a path is below, if it is not mounted; "" otherwise."""
    points = fstab_points()
    if not points:
        return ""
    real = real_path(path, mounted)
    meant = (point for point in points if _covers(point, path) or _covers(point, real))
    return next((point for point in meant if point not in mounted.at), "")


def real_path(path: str, mounted: Mounted) -> str:
    """Resolve links as os.path.realpath does, but none on file systems that are not LOCAL."""
    real, left, links = "", path.split("/")[::-1], 0
    while left:
        name = left.pop()
        step = os.path.normpath(f"{real}/{name}")
        here = mounted.at.get(step) if step != "/" else None
        if links > MOST_LINKS or (here is not None and here.kind not in LOCAL):
            return os.path.normpath("/".join((step, *left[::-1])))
        try:
            target = os.readlink(step)  # noqa: PTH115 - of every mount, in every pass
        except OSError:  # no link, or nothing at all
            real = step.rstrip("/")
            continue
        links += 1
        left.extend(target.split("/")[::-1])
        real = "" if target.startswith("/") else real
    return real or "/"


def mount_point(real: str) -> str:
    """The mount point that a path without links is below. Raises OSError."""
    id, found = mount_id(real), real
    for above in _above(real):
        if mount_id(above) != id:
            return found
        found = above
    return "/"


def fstab_points() -> tuple[str, ...]:
    """The mount points below / in fstab; the file is read again when it has changed."""
    global _cache
    try:
        found = FSTAB.stat()
        key = found.st_mtime_ns, found.st_size, found.st_ino
        if _cache[0] != key:
            _cache = key, tuple(_points(FSTAB.read_text(errors="surrogateescape").splitlines()))
    except OSError:  # there is no fstab
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
    """A path, and every folder above it."""
    while path != "/":
        yield path
        path = path.rpartition("/")[0] or "/"
    yield "/"
