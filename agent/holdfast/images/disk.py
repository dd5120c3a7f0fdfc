"""Lock the image store's files against threads and processes, and write files whole or not at all."""

from __future__ import annotations

import fcntl
import math
import os
import threading
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.errors import UnfitHost
from holdfast.files import sync_folder
from holdfast.grammar.quantities import about

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000  # linux/fs.h, on 64 bits


class Locks:
    """flock(2) by name, against threads and processes alike; a lock file is in the way of nothing.

    lasting: names whose file stays when nobody holds it.
    """

    def __init__(self, folder: Path, lasting: frozenset[str]) -> None:
        self.folder = folder
        self.lasting = lasting

    @contextmanager
    def hold(self, name: str, *, shared: bool = False, wait: float = math.inf) -> Iterator[bool]:
        """Hold the lock while the block runs; yields whether it is held. wait: seconds after which it is not."""
        path = self.folder / f"{name}.lock"
        descriptor = open_lock(path, wait, shared=shared)
        if descriptor < 0:
            yield False
            return
        try:
            yield True
        finally:
            if name not in self.lasting:
                path.unlink(missing_ok=True)
            os.close(descriptor)


def open_lock(path: Path, wait: float = math.inf, *, shared: bool = False) -> int:
    """Open and lock a file, which its holder may delete; -1 where it is not had within wait seconds."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not lock(descriptor, wait, shared=shared):
            os.close(descriptor)
            return -1
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # a former holder has deleted it meanwhile


def lock(descriptor: int, wait: float = math.inf, *, shared: bool = False) -> bool:
    """Lock an open file (flock(2)), waiting for so many seconds at most; says whether it is locked."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if wait == math.inf:
        fcntl.flock(descriptor, mode)
        return True
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait <= 0:
            return False
    else:
        return True
    # flock(2) knows no time limit. Once the descriptor is closed, what the thread gets late is let go at once.
    waiter = threading.Thread(target=fcntl.flock, args=(descriptor, mode), name="lock", daemon=True)
    waiter.start()
    waiter.join(wait)
    return not waiter.is_alive()


def check_room(place: Path, needed: int, least: int, what: str) -> None:
    """Raise UnfitHost unless so many bytes can be written to a disk of which least are to stay free."""
    system = os.statvfs(place)
    free = system.f_bavail * system.f_frsize
    if free < needed + least:
        error = UnfitHost(
            f"{what}: not enough space in '{place}': {about(free)} free, about {about(needed)} needed, and "
            f"{about(least)} are to stay free (min_free in [images] of agent.toml; 'holdfast system prune' makes "
            "room)"
        )
        error.retry, error.wait = True, 60.0
        raise error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power failure."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def spread(folder: Path) -> None:
    """Have ext4 choose a block group for each directory that will be made in folder, by its name (chattr +T).

    What is in such a directory lies in its group, else in folder's. A group in which many inodes were deleted in the
    last minutes gives out each new one at 20 to 30 times the cost, as an image that is pulled after another one
    was collected would find; and layers that are unpacked side by side would wait for one group's lock. Other file
    systems go without.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):
        flags = array("i", (0, 0))
        fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, flags)
        if not flags[0] & FS_TOPDIR_FL:
            flags[0] |= FS_TOPDIR_FL
            fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, flags)
    os.close(descriptor)
