"""A small file system for what a container may write to below the run root. Called by node.

It holds hosts, hostname, resolv.conf and copies of files of the revision (`Host.files`). The run root is usually the
host's /run, in which every other container needs room, too. The bundle is outside of it, out of reach.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from holdfast.errors import explained
from holdfast.syscalls import MS_NODEV, MS_NOSUID, MS_REMOUNT, is_mounted, mount, unmount

ROOM, ENTRIES = 4 << 20, 1024  # bytes and files that a container may add
_ENOUGH = "size=1t,nr_inodes=1000000"  # while only the agent writes; a tmpfs without limits can't get one later


def renew(place: Path) -> None:
    """Mount an empty file system at place, without a limit for now. Raises UnfitHost.

    Who has the previous one mounted keeps it.
    """
    remove(place)
    place.mkdir(mode=0o700, exist_ok=True)
    _mount(place, 0, _ENOUGH)


def bound(place: Path) -> None:
    """Limit it to twice what is there, plus ROOM. Raises UnfitHost."""
    found = os.statvfs(place)
    used, entries = (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree
    _mount(place, MS_REMOUNT, f"size={2 * used + ROOM},nr_inodes={2 * entries + ENTRIES}")


def make_room(place: Path, size: int, entries: int = 0) -> None:
    """Make room for size bytes in so many files of the agent, even if the container filled it. Raises UnfitHost."""
    if not is_mounted(place):  # an earlier version began this run
        return
    found = os.statvfs(place)
    blocks = max(0, size // found.f_frsize + 1 + entries - found.f_bfree)  # a file begins a block of its own
    files = max(0, entries - found.f_ffree)
    if blocks or files:
        size = (found.f_blocks + blocks) * found.f_frsize
        _mount(place, MS_REMOUNT, f"size={size},nr_inodes={found.f_files + files}")


def remove(place: Path) -> None:
    """Unmount it, even while it is in use; succeed when it is not there. Raises UnfitHost."""
    with explained(f"unmount '{place}'"):
        unmount(place, lazily=True)
    with suppress(OSError):  # gone, or an earlier version keeps copies there
        place.rmdir()


def _mount(place: Path, flags: int, options: str) -> None:
    with explained(f"mount a file system at '{place}'"):
        mount("holdfast", place, "tmpfs", flags | MS_NOSUID | MS_NODEV, f"{options},mode=700")
