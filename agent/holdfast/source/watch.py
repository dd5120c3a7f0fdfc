"""inotify events of a directory → wakes: at once for a file renamed into place, after a short quiet for plain writes.

Watched are the folders of the tree, every folder on the way to it (a link there may flip, the directory may be
replaced), and what links in both lead through. Events only cost or save time: a pass that follows from one looks at
the files that were named, and the passes that follow from nothing look at the whole tree.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from holdfast.runtime import inotify as on
from holdfast.runtime.inotify import Event, Inotify
from holdfast.source.revision import is_noise

GONE = on.DELETE_SELF | on.MOVE_SELF
NAMES = GONE | on.CREATE | on.MOVED_TO | on.MOVED_FROM | on.DELETE
CONTENT = NAMES | on.CLOSE_WRITE | on.MODIFY | on.ATTRIB

LONGEST_QUIET = 25  # times the debounce: a file that is written all the time must not put the wake off for ever
MOST_LINKS = 40  # as path_resolution(7) allows


class Step(NamedTuple):
    """One name looked up while a path is resolved: where, which, and whether it settles where the path leads."""

    folder: str
    name: str
    decides: bool


class DirectoryWatch:
    """Watches a tree in a thread of its own.

    Raises OSError when inotify has no instance or watch left (fs.inotify in sysctl(8)).
    """

    def __init__(self, path: str, wake: Callable[[str], None], debounce: float) -> None:
        self._path = path
        self._wake = wake
        self._debounce = debounce
        self._lock = threading.Lock()
        self._due: tuple[float, str] | None = None  # when the pending wake is due (monotonic), and why
        self._latest_at = 0.0
        self._woken_at = 0.0
        self._touched: set[str] | None = None  # files since somebody asked; None: it may be anything
        self._covered = False
        self._closed = False
        self._content: frozenset[int] = frozenset()  # watches of the folders of the tree
        self._steps: frozenset[tuple[int, str]] = frozenset()
        self._watched: dict[int, str] = {}
        self._inotify = Inotify()
        try:
            self._cover()
        except OSError:
            self._inotify.close()
            raise
        self._thread = threading.Thread(target=self._run, name="holdfast-watch", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        self._look_again("asked to look", 0.0)

    def look_again(self) -> None:
        """Find anew what there is to watch, soon, and wake then."""
        self._look_again("it is another directory", self._debounce)

    def _look_again(self, reason: str, seconds: float) -> None:
        self._lose_track()
        with self._lock:
            self._due = time.monotonic() + seconds, reason
            if not self._closed:
                self._inotify.interrupt()

    def touched(self) -> set[str] | None:
        """The files of the tree that something has happened to since the last call; None when it may be more."""
        with self._lock:
            found, self._touched = self._touched, set()
            return found if self._covered and not self._closed else None

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inotify.interrupt()
        self._thread.join()
        self._inotify.close()

    def _run(self) -> None:
        while not self._closed:
            due = self._due
            for event in self._inotify.events(None if due is None else max(due[0] - time.monotonic(), 0.0)):
                self._hear(event)
            if (due := self._due) is not None and due[0] <= time.monotonic():
                self._fire(due[1])

    def _hear(self, event: Event) -> None:
        watch, mask, name = event
        if mask & on.OVERFLOW:
            self._lose_track()
            self._settle("too many changes to count")
        if (folder := self._watched.get(watch)) is None:
            return
        if mask & on.IGNORED:  # the folder is gone, or what was mounted there
            self._lose_track()
            return
        decides = bool(mask & GONE) or (watch, name) in self._steps
        if not decides and (watch not in self._content or is_noise(name)):
            return
        if decides or mask & on.ISDIR or (mask & (on.CREATE | on.MOVED_TO) and os.path.islink(f"{folder}/{name}")):
            self._covered = False
        self._note(f"{folder}/{name}" if name and self._covered else None)
        reason = f"{name or self._path} changed"
        if mask & on.MOVED_TO and time.monotonic() - self._woken_at > self._debounce:
            self._fire(reason)
        else:
            self._settle(reason)

    def _lose_track(self) -> None:
        self._covered = False
        self._note(None)

    def _note(self, file: str | None) -> None:
        with self._lock:
            if file is None or self._touched is None:
                self._touched = None
            else:
                self._touched.add(file)

    def _settle(self, reason: str) -> None:
        """Wake when nothing more happens for the debounce time."""
        now = time.monotonic()
        with self._lock:
            if self._due is None:
                self._latest_at = now + LONGEST_QUIET * self._debounce
            self._due = min(now + self._debounce, self._latest_at), reason

    def _fire(self, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._due, self._woken_at = None, time.monotonic()
        if not self._covered:
            try:
                self._cover()
            except OSError as error:  # no watch left: the slow pass sees what we can't, the operator sees this
                reason = f"watch '{error.filename or self._path}': {error.strerror}"
        self._wake(reason)

    # Which folders to watch.

    def _cover(self) -> None:
        """Watch what there is to watch by now, until looking again finds nothing new."""
        before: object = None
        while before != (found := self._survey()):
            before = found
            self._covered = True  # before adding: what others see meanwhile takes it back
            self._apply(*found)

    def _survey(self) -> tuple[dict[str, int], frozenset[tuple[str, str]], frozenset[str]]:
        """What to watch (folder → mask), the lookups that decide where links lead, and the folders of the tree."""
        masks: dict[str, int] = {}
        steps: set[tuple[str, str]] = set()
        inner: set[str] = set()
        ways = [self._path]
        root = os.path.realpath(self._path)
        if os.path.isdir(root):
            collect(root, root, inner, ways)
        for step in (step for way in ways for step in resolve(way)):
            masks[step.folder] = masks.get(step.folder, 0) | (NAMES if step.decides else GONE)
            if step.decides:
                steps.add((step.folder, step.name))
        masks.update(dict.fromkeys(inner, CONTENT))
        return masks, frozenset(steps), frozenset(inner)

    def _apply(self, masks: dict[str, int], steps: frozenset[tuple[str, str]], inner: frozenset[str]) -> None:
        watches: dict[str, int] = {}
        for folder, mask in masks.items():
            with suppress(FileNotFoundError, NotADirectoryError):  # gone again: the next survey differs
                watches[folder] = self._inotify.watch(folder, mask | on.ONLYDIR | on.MASK_ADD)
        stale, self._watched = self._watched, {watch: folder for folder, watch in watches.items()}
        self._steps = frozenset((watches[folder], name) for folder, name in steps if folder in watches)
        self._content = frozenset(watches[folder] for folder in inner if folder in watches)
        for watch in stale.keys() - self._watched.keys():
            self._inotify.remove(watch)


def collect(root: str, folder: str, inner: set[str], ways: list[str]) -> None:
    """Add to inner the folders under folder that hold files of the tree, and to ways its symbolic links."""
    if folder in inner:
        return
    inner.add(folder)
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_noise(entry.name)]
    except OSError:
        return  # gone, or not ours to read: `current` says so
    for entry in found:
        if entry.is_symlink():
            collect_link(root, entry.path, inner, ways)
        elif entry.is_dir(follow_symlinks=False):
            collect(root, entry.path, inner, ways)


def collect_link(root: str, link: str, inner: set[str], ways: list[str]) -> None:
    real = os.path.realpath(link)
    if not real.startswith(root + "/"):
        return
    ways.append(link)
    if os.path.isdir(real):
        collect(root, real, inner, ways)
    else:
        inner.add(os.path.dirname(real))  # not collected: only this file of it is in the tree


def resolve(path: str) -> Iterator[Step]:
    """Yield the lookups that path_resolution(7) does for path, up to the first name that is missing."""
    pending = path.split("/")[::-1]
    here, links = "/", 0
    while pending:
        name = pending.pop()
        if name == "..":
            here = os.path.dirname(here)
        if name in ("", ".", ".."):
            continue
        step = os.path.join(here, name)
        try:
            linked = stat.S_ISLNK(os.lstat(step).st_mode)
            target = os.readlink(step) if linked else ""
        except OSError:
            yield Step(here, name, decides=True)
            return
        yield Step(here, name, decides=linked or not pending)
        if not linked:
            here = step
        elif (links := links + 1) > MOST_LINKS:
            return
        else:
            here = "/" if target.startswith("/") else here
            pending.extend(target.split("/")[::-1])
