"""Reads the limits of cgroups again only where somebody has written to a file of theirs since (inotify(7)).

A thousand containers have ten thousand such files, and to read them all takes half a second.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from holdfast.observed import Limits
from holdfast.runtime import cgroup
from holdfast.runtime.inotify import MODIFY, Inotify

ALLOWED = Path("/proc/sys/fs/inotify/max_user_watches")
SHARE = 4  # others of this user watch files, too: we take no more than this part of what the kernel allows


@dataclass(frozen=True, slots=True)
class _Known:
    """run: whose limits these are; the next run has a new cgroup of the same path."""

    run: object
    watches: tuple[int, ...]
    snapshot: dict[str, str]
    limits: Limits


class LimitsWatch:
    """What is in the files of limits of instances' cgroups, as of the last `hear`. Thread-safe."""

    def __init__(self, allowed: Path = ALLOWED) -> None:
        self._allowed = allowed
        self._lock = threading.Lock()
        self._inotify: Inotify | None = None
        self._left = 0  # watches that may still be made
        self._paths: dict[Path, str] = {}  # folder that is watched → cgroup
        self._known: dict[str, _Known] = {}

    def hear(self, paths: Collection[str]) -> None:
        """Take in what was written since. Forget all cgroups but these: the kernel tells of none that is removed."""
        with self._lock:
            self._hear()
            for path in self._known.keys() - set(paths):
                self._forget(path)

    def read(self, path: str, run: object) -> tuple[dict[str, str], Limits]:
        """Return the snapshot of a cgroup and its limits. run: what tells one life of it from the next."""
        with self._lock:
            known = self._known.get(path)
            if known is None or known.run != run:
                self._forget(path)
                watches = self._watch(path)  # before the files are read: what is written meanwhile is heard of
                found = cgroup.snapshot(path)
                known = _Known(run, watches, found, cgroup.limits_of(found))
                if watches:
                    self._known[path] = known
            return known.snapshot, known.limits

    def _hear(self) -> None:
        """Forget the cgroups that somebody has written to, or all if the kernel had too much to tell."""
        if self._inotify is None:
            return
        while heard := list(self._inotify.wait(0)):
            for folder, _ in heard:
                self._forget(self._paths.pop(folder, ""))
        if self._inotify.overflowed:
            self._inotify.overflowed = False
            for path in list(self._known):
                self._forget(path)

    def _watch(self, path: str) -> tuple[int, ...]:
        """Watch the folders of a cgroup; return no watches where there are not enough for all."""
        folders = cgroup.limit_folders(path)
        watches: list[int] = []
        try:
            if self._inotify is None:
                self._inotify = Inotify(MODIFY)
                self._left = int(self._allowed.read_text()) // SHARE
            for folder in folders if len(folders) <= self._left else ():
                watches.append(self._inotify.add(folder))
                self._left -= 1
                self._paths[folder] = path
        except OSError:
            self._end(watches)
            return ()
        return tuple(watches)

    def _forget(self, path: str) -> None:
        if known := self._known.pop(path, None):
            self._end(known.watches)

    def _end(self, watches: Collection[int]) -> None:
        for watch in watches:
            assert self._inotify is not None
            if folder := self._inotify.remove(watch):
                self._paths.pop(folder, None)
            self._left += 1
