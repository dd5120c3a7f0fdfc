"""inotify events of a directory → wakes: at once for a file renamed into place, after a short quiet for plain writes.

Built on watchdog's inotify descriptor and not on its observer: the observer pairs renames through a queue and two
more threads, and is deaf to what happens on the way to its root (a flipped link, a directory replaced).
Events only cost or save time: a pass that follows from one looks at the files that were named, and the passes that
follow from nothing look at the whole tree.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, InotifyFD, Mask, WatchDescriptor

from holdfast.source.revision import is_noise

ON = InotifyConstants
GONE = ON.IN_DELETE_SELF | ON.IN_MOVE_SELF
NAMES = GONE | ON.IN_CREATE | ON.IN_MOVED_TO | ON.IN_MOVED_FROM | ON.IN_DELETE
CONTENT = NAMES | ON.IN_CLOSE_WRITE | ON.IN_MODIFY | ON.IN_ATTRIB

LONGEST_QUIET = 25  # times the debounce: a file that is written all the time must not put the wake off for ever
MOST_LINKS = 40  # as path_resolution(7) allows


class Step(NamedTuple):
    """One name looked up while a path is resolved: where, which, and whether it settles where the path leads."""

    folder: str
    name: str
    decides: bool


class DirectoryWatch:
    """Watches a tree, every folder on the way to it, and what links in both lead through.

    Raises OSError when inotify has no instance or watch left (fs.inotify in sysctl(8)).
    """

    def __init__(self, path: str, wake: Callable[[str], None], debounce: float) -> None:
        self._path = path
        self._wake = wake
        self._debounce = debounce
        self._changed = threading.Condition()
        self._quiet_at: float | None = None  # when the pending wake is due, monotonic
        self._latest_at = 0.0
        self._woken_at = 0.0
        self._reason = ""
        self._touched: set[str] | None = None  # files since somebody asked; None: it may be anything
        self._covered = False
        self._closed = False
        self._covering = threading.Lock()
        self._content: frozenset[WatchDescriptor] = frozenset()
        self._steps: frozenset[tuple[WatchDescriptor, bytes]] = frozenset()
        self._watched: dict[WatchDescriptor, str] = {}
        self._round = 0
        self._inotify = InotifyFD()
        self._inotify.start()
        try:
            self._cover()
        except OSError:
            self._inotify.stop()
            raise
        self._quiet = threading.Thread(target=self._wait_quiet, name="holdfast-watch", daemon=True)
        self._quiet.start()

    def poke(self) -> None:
        self._covered = False
        self._note(None)
        self._fire("asked to look")

    def look_again(self) -> None:
        """Find anew what there is to watch, soon and in a thread of the watch, and wake then."""
        self._covered = False
        self._note(None)
        self._settle("it is another directory")

    def touched(self) -> set[str] | None:
        """The files of the tree that something has happened to since the last call; None when it may be more."""
        with self._changed:
            found, self._touched = self._touched, set()
            return found if self._covered and not self._closed else None

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._inotify.stop()
        self._inotify.join()
        self._quiet.join()

    # Called by InotifyFD, on its thread.

    def on_event(self, event: InotifyEvent) -> None:
        decides = bool(event.mask & GONE) or (event.wd, event.name) in self._steps
        name = os.fsdecode(event.name)
        if not decides and (event.wd not in self._content or is_noise(name)):
            return
        folder = self._watched.get(event.wd)
        if decides or event.is_directory or self._is_new_link(event):
            self._covered = False
        self._note(f"{folder}/{name}" if folder and name and self._covered else None)
        reason = f"{name or self._path} changed"
        if event.is_moved_to and time.monotonic() - self._woken_at > self._debounce:
            self._fire(reason)
        else:
            self._settle(reason)

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        self._covered = False
        self._note(None)

    def on_queue_overflow(self) -> None:
        self._covered = False
        self._note(None)
        self._settle("too many changes to count")

    def _note(self, file: str | None) -> None:
        with self._changed:
            if file is None or self._touched is None:
                self._touched = None
            else:
                self._touched.add(file)

    def _is_new_link(self, event: InotifyEvent) -> bool:
        folder = self._watched.get(event.wd)
        new = folder is not None and bool(event.mask & (ON.IN_CREATE | ON.IN_MOVED_TO))
        return new and os.path.islink(os.path.join(folder or "", os.fsdecode(event.name)))

    # Waking.

    def _settle(self, reason: str) -> None:
        """Wake when nothing more happens for the debounce time."""
        now = time.monotonic()
        with self._changed:
            if self._quiet_at is None:
                self._latest_at = now + LONGEST_QUIET * self._debounce
                self._changed.notify()
            self._quiet_at = min(now + self._debounce, self._latest_at)
            self._reason = reason

    def _wait_quiet(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                if self._quiet_at is None or self._quiet_at > now:
                    self._changed.wait(None if self._quiet_at is None else self._quiet_at - now)
                    continue
                reason = self._reason
            self._fire(reason)

    def _fire(self, reason: str) -> None:
        with self._changed:
            if self._closed:
                return
            self._quiet_at = None
            self._woken_at = time.monotonic()
        if not self._covered:
            try:
                self._cover()
            except OSError as error:  # no watch left: the slow pass sees what we can't, the operator sees this
                reason = f"watch '{error.filename or self._path}': {error.strerror}"
        self._wake(reason)

    # Which folders to watch.

    def _cover(self) -> None:
        """Watch what there is to watch by now, until looking again finds nothing new."""
        with self._covering:
            before: object = None
            while before != (found := self._survey()):
                before = found
                self._covered = True  # before adding: an event that comes meanwhile takes it back
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
        stale = [(wd, CallbackId(self._round)) for wd in self._watched]
        self._round += 1  # the new callbacks stand beside the old ones until all are there: no event falls between
        wds = {folder: wd for folder, mask in masks.items() if (wd := self._add(folder, mask)) is not None}
        self._watched = {wd: folder for folder, wd in wds.items()}
        self._steps = frozenset((wds[folder], os.fsencode(name)) for folder, name in steps if folder in wds)
        self._content = frozenset(wds[folder] for folder in inner if folder in wds)
        self._inotify.remove_callbacks(stale)

    def _add(self, folder: str, mask: int) -> WatchDescriptor | None:
        try:
            return self._inotify.add_callback(
                os.fsencode(folder), Mask(mask | ON.IN_ONLYDIR), self, CallbackId(self._round)
            )
        except (FileNotFoundError, NotADirectoryError):
            return None  # gone again: the next survey differs


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
