"""A plain directory → Revision: the tree is listed each time, and only what changed is read.

`reconcile` calls `current` at the start of every pass. A pass that was triggered reads only the files that the watch
named. Other passes list the tree, which also finds what the watch missed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from types import MappingProxyType

from holdfast.errors import HoldfastError, TryAgain, UnfitHost, explained, reason
from holdfast.runtime.mountpoints import FSTAB, Mounted, unmounted
from holdfast.source import revision
from holdfast.source.mounts import REMEDY, lies_on, lost
from holdfast.source.watch import DirectoryWatch
from holdfast.workers import NoAnswer, Worker

ATTEMPTS = 8
PATIENCE = 10.0  # seconds for a file system to answer, which may be that of a server that is gone
# File systems stamp with the kernel's tick (up to 10 ms at HZ=100), and only when a write begins: within this time
# of its stamp, a file may change further without showing it.
RACY_NS = 100_000_000
GITMODULES = ".gitmodules"
NO_SUBMODULE = "a git submodule that is not checked out (git submodule update --init)"
REPLACING = "..replacing"  # at the top of a tree that is half of one and half of another, see `source.replace`


# What tells one state of a file from another without reading it: mtime and ctime (ns), size, inode, device.
# A plain tuple, because an unchanged tree costs little more than making and comparing these.
Stamp = tuple[int, int, int, int, int]
Found = tuple[str, str, os.stat_result]  # a file's relative path, where it really is, its status
NO_FILE = "a socket, a pipe or a device"
LEADS_OUT = "a symbolic link that leads out of the state directory"


@dataclass(frozen=True, slots=True)
class Content:
    """A file as it was read. settled: it was old enough that any later write must change the stamp."""

    stamp: Stamp
    data: bytes
    digest: bytes
    settled: bool
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Aside:
    """What a tree has and its revision does not have; see `Revision`."""

    left_out: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Listing:
    """A tree without its content: relative path → where the file really is, and its stamp. root: which directory
    (device, inode) it was when the listing began: another may take its place while it is read. real: its path."""

    root: tuple[int, int] = (0, 0)
    real: str = ""
    files: dict[str, tuple[str, Stamp]] = field(default_factory=dict)
    aside: Aside = field(default_factory=Aside)


class DirectorySource:
    """The state in a directory of this host, which may be a symbolic link, and may be replaced at any time."""

    def __init__(self, path: Path | str, debounce: float = 0.02) -> None:
        """debounce: seconds of quiet to wait for after a plain write, so that half a save is not acted on."""
        self._path = os.path.abspath(path)  # absolute, but its links unresolved: they may flip
        self._debounce = debounce
        self._lock = threading.Lock()
        self._reader = reader_of(self._path)
        self._listing = Listing()
        self._settled = False
        self._known: dict[str, Content] = {}
        self._lines: dict[str, bytes] = {}  # what each file adds to the digest, in order
        self._places: set[str] = set()  # where the files really are
        self._revision: revision.Revision | None = None
        self._lies_on: revision.LiesOn = {}
        self._watch: DirectoryWatch | None = None
        self._watched = (0, 0)  # which directory is watched
        self._state = revision.SourceState(kind="directory", url=self._path)

    def remember(self, place: revision.LiesOn) -> None:
        """Take over which mounts the last revision lay on, when another process read it."""
        self._lies_on = place

    def current(self, *, light: bool = False) -> revision.Revision:
        """Read what changed since the last call; see Source.current."""
        with self._lock:
            before = self._revision
            touched = self._watch.touched() if self._watch else None
            try:
                try:
                    revision = self._revision if light and touched is not None and not self._state.error else None
                    if revision and touched:
                        revision = self._reader.call(lambda: self._edited(touched))
                    revision = revision or self._reader.call(self._read)
                except NoAnswer as error:
                    silent = f"read '{self._path}': its file system {error} (what runs stays)"
                    raise TryAgain(silent) from error
            except HoldfastError as error:
                self._state = replace(self._state, error=str(error), failures=self._state.failures + 1)
                raise
            if revision is not before or self._state.error:
                self._state = replace(self._state, revision=revision.id, fetched_at=time.time(), error="", failures=0)
            return revision

    def newest(self) -> revision.Revision:
        """What is in the directory now; see Source.newest."""
        return self.current()

    def refresh(self, *, accept_rewrite: bool = False) -> None:
        """Do nothing: a directory is always here."""

    def watch(self, wake: Callable[[str], None]) -> revision.Watch:
        """Watch the tree, and every link and folder on the way to it; see Source.watch.

        Raises UnfitHost when the host has no inotify instance or watch left: only the slow pass sees changes then.
        """

        def begin() -> DirectoryWatch:
            self._watched = identity(self._path) if os.path.isdir(self._path) else (0, 0)
            return DirectoryWatch(self._path, wake, self._debounce)

        right = "raise fs.inotify.max_user_watches, max_user_instances"
        with explained(f"watch '{self._path}'", UnfitHost, right):
            try:
                self._watch = self._reader.call(begin)
            except NoAnswer as error:
                raise UnfitHost(f"watch '{self._path}': its file system {error}") from error
        return self._watch

    def state(self) -> revision.SourceState:
        return self._state

    def _read(self) -> revision.Revision:
        for _ in range(ATTEMPTS):
            try:
                listing = self._list()
                if listing.root != self._listing.root:
                    check_mounted(self._path)
                if self._revision is not None and self._settled and listing == self._listing:
                    return self._revision
                known = {path: self._content(path, *where) for path, where in listing.files.items()}
                place = self._place(listing)
                check_whole(self._path)
                if identity(self._path) != listing.root:
                    continue
            except (FileNotFoundError, NotADirectoryError, Torn):
                continue  # it changed while it was read: look again
            except OSError as error:
                raise UnfitHost(f"read '{error.filename}': {reason(error)}") from error
            if self._watch and listing.root != self._watched:  # inotify does not tell of a mount
                self._watched = listing.root
                self._watch.look_again()
            self._revision = self._revise(listing, known, place)
            return self._revision
        raise TryAgain(f"read '{self._path}': it keeps changing while it is read")

    def _edited(self, touched: set[str]) -> revision.Revision | None:
        """The last revision with the new contents of these files; None if more than that has changed."""
        last, real = self._revision, self._listing.real
        assert last is not None
        fresh: dict[str, Content] = {}
        check_whole(self._path)
        for file in touched:
            path = file[len(real) + 1 :]
            known = self._known.get(path)
            if known is None and not os.path.lexists(file):  # it came and went
                continue
            if known is None or self._listing.files[path][0] != file or path not in last.files:
                return None
            try:
                fresh[path] = content = read_file(file)
            except (OSError, Torn):
                return None
            if content.executable != known.executable or revision.is_lfs_pointer(content.data):
                return None
        if len(self._places) != len(self._listing.files) or GITMODULES in map(os.path.basename, fresh):
            return None  # a file has several names
        check_whole(self._path)
        fresh = {path: each for path, each in fresh.items() if each.digest != self._known[path].digest}
        if fresh:
            self._known = {**self._known, **fresh}
            self._lines.update({path: digest_line(path, each) for path, each in fresh.items()})
            files = {**last.files, **{path: each.data for path, each in fresh.items()}}
            self._settled = False  # the next listing reads them again
            self._revision = replace(last, id=self._id(), files=MappingProxyType(files))
        return self._revision

    def _list(self) -> Listing:
        try:
            return list_tree(self._path)
        except NoDirectory as error:
            if gone := lost(self._path, self._lies_on, {}).get(""):
                raise NoDirectory(f"read '{self._path}': no such directory, and {gone} (what runs stays)") from error
            raise

    def _place(self, listing: Listing) -> revision.LiesOn:
        """Which mounts a tree lies on. A folder whose mount is gone is left out.

        Raises TryAgain when that is the whole tree, Torn and OSError when one has just gone.
        """
        state = [where for path, where in listing.files.items() if path.endswith(".toml")]
        here = lies_on(listing.real, [real for real, _ in state])
        if any(stamp_of(os.stat(real))[3:] != stamp[3:] for real, stamp in state):
            raise Torn(listing.real)
        gone = lost(self._path, self._lies_on, here)
        if "" in gone:
            raise TryAgain(f"read '{self._path}': it has no state file, and {gone['']} (what runs stays; {REMEDY})")
        for folder, change in gone.items():
            listing.aside.left_out[folder] = f"a folder without state files since {change} ({REMEDY})"
        return {**{folder: self._lies_on[folder] for folder in gone}, **here}

    def _content(self, path: str, real: str, stamp: Stamp) -> Content:
        known = self._known.get(path)
        if known is not None and known.settled and known.stamp == stamp:
            return known
        content = read_file(real)
        if content.stamp != stamp:  # perhaps of another tree than the one that was listed
            raise Torn(path)
        return content

    def _revise(self, listing: Listing, known: dict[str, Content], place: revision.LiesOn) -> revision.Revision:
        before, self._known = self._known, known
        moved, self._lies_on = place != self._lies_on, place
        self._listing, self._places = listing, {real for real, _ in listing.files.values()}
        self._settled = all(content.settled for content in known.values())
        last, left_out = self._revision, {**listing.aside.left_out, **not_checked_out(known)}
        inner = (each for each in submodules_of(top_of(listing.real)) if within(each, listing.real))
        seen = (path[len(listing.real) + 1 :] for path in inner)
        left_out |= {path: NO_SUBMODULE for path in seen if not below(known, path)}
        ignored = frozenset(listing.aside.ignored)
        if last is not None and last.left_out == left_out and alike(before, known):
            same = not moved and last.ignored == ignored
            return last if same else replace(last, lies_on=place, ignored=ignored)
        files = {path: known[path].data for path in sorted(known) if path not in left_out}
        self._lines = {path: digest_line(path, known[path]) for path in sorted(known)}
        return revision.Revision(
            id=self._id(),
            files=MappingProxyType(files),
            left_out=MappingProxyType(left_out),
            url=self._path,
            executable=frozenset(path for path in files if known[path].executable),
            lies_on=place,
            ignored=ignored,
        )

    def _id(self) -> str:
        """The name of the revision: the start of a digest of all paths, contents and modes."""
        return f"dir:{hashlib.sha256(b''.join(self._lines.values())).hexdigest()[:12]}"


@cache
def reader_of(path: str) -> Worker:
    """The thread that reads a directory, for all sources that a process makes of it: one at most is stuck."""
    return Worker("state", PATIENCE)


class NoDirectory(TryAgain):
    """There is no directory where the state should be."""


class Torn(Exception):
    """A file was written to while it was read."""


def alike(one: dict[str, Content], other: dict[str, Content]) -> bool:
    """Whether both hold the same files with the same content."""
    return one.keys() == other.keys() and all(
        one[path] is content or (one[path].digest, one[path].executable) == (content.digest, content.executable)
        for path, content in other.items()
    )


def digest_line(path: str, content: Content) -> bytes:
    """What a file adds to the digest of its tree."""
    return os.fsencode(path) + b"\0" + content.digest + (b"x" if content.executable else b"")


def not_checked_out(known: dict[str, Content]) -> dict[str, str]:
    """What a git clone lacks, and why: pointers instead of files, submodules that are empty folders."""
    missing = {path: revision.NO_LFS for path, content in known.items() if revision.is_lfs_pointer(content.data)}
    for path in (path for path in known if path.rpartition("/")[2] == GITMODULES):
        places = (path.removesuffix(GITMODULES) + submodule for submodule in submodules(known[path].data))
        missing |= {place: NO_SUBMODULE for place in places if not below(known, place)}
    return missing


def below(known: Iterable[str], folder: str) -> bool:
    """Whether any of these paths is in a folder."""
    return any(path.startswith(f"{folder}/") for path in known)


def within(path: str, folder: str) -> bool:
    """Whether a path is a folder or in it."""
    return f"{path}/".startswith(f"{folder}/")


def submodules(text: bytes) -> Iterator[str]:
    """The folders that a .gitmodules names."""
    for name in re.findall(rb"(?m)^\s*path\s*=\s*(.+?)\s*$", text):
        yield os.fsdecode(name)


def top_of(folder: str) -> str:
    """The git clone that a folder (without links) lies in, else the folder itself."""
    above = (folder, *map(str, Path(folder).parents))
    return next((path for path in above if os.path.lexists(f"{path}/.git")), folder)


def submodules_of(top: str) -> Iterator[str]:
    """The folders of the submodules of a git clone, checked out or not."""
    with suppress(OSError, Torn, HoldfastError):
        for name in submodules(read_file(os.path.realpath(f"{top}/{GITMODULES}")).data):
            yield f"{top}/{name}"


def read_file(path: str) -> Content:
    """Read a whole file in one state; raises Torn if it changes meanwhile."""
    # O_NONBLOCK: if it has become a FIFO meanwhile, open(2) must not wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        # A folder on the way may have become a link since it was listed: what is outside must not be read.
        if not stat.S_ISREG(status.st_mode) or os.readlink(f"/proc/self/fd/{handle}") != path:
            raise Torn(path)
        revision.check_size(path, status.st_size, 1)
        settled = max(status.st_mtime_ns, status.st_ctime_ns) + RACY_NS < time.time_ns()
        data = file.read()
        if len(data) != status.st_size or not (settled or file.seek(0) or file.read() == data):
            raise Torn(path)
        stamp = stamp_of(status)
        if stamp_of(os.fstat(handle)) != stamp:
            raise Torn(path)
    return Content(stamp, data, hashlib.sha256(data).digest(), settled, bool(status.st_mode & 0o111))


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def list_tree(root: str) -> Listing:
    """List the regular files under root, following links that stay inside it.

    Raises NoDirectory when root is none, WrongState when it holds too much, OSError.
    """
    real = os.path.realpath(root)
    if not os.path.isdir(real):
        found = "not a directory" if os.path.lexists(root) else "no such directory"
        raise NoDirectory(f"read '{root}': {found} (what runs stays)")
    check_whole(real)
    root_id, walk = identity(real), Walk(real)
    files = {path: (where, stamp_of(status)) for path, where, status in walk.folder(real, "", (real,))}
    revision.check_size(root, sum(stamp[2] for _, stamp in files.values()), len(files))
    return Listing(root_id, real, files, walk.aside)


def identity(folder: str) -> tuple[int, int]:
    """Device and inode, which differ for another directory of the same name."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def check_mounted(path: str) -> None:
    """Raise TryAgain for a directory on a file system that is not mounted yet, or not any more: it looks empty."""
    if missing := unmounted(path, Mounted.now()):
        raise TryAgain(f"read '{path}': {missing} is not mounted, which {FSTAB} names (what runs stays)")


def check_whole(root: str) -> None:
    """Raise TryAgain for a tree that is being replaced, or was when the host lost its power."""
    if os.path.lexists(f"{root}/{REPLACING}"):
        hint = "what runs stays; if that broke off, load it again"
        raise TryAgain(f"read '{root}': it is being replaced by a bundle ({hint})")


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk through the tree below root (without links), which notes what it leaves out."""

    root: str
    aside: Aside = field(default_factory=Aside)
    visits: Iterator[int] = field(default_factory=count)

    def folder(self, folder: str, prefix: str, chain: tuple[str, ...]) -> Iterator[Found]:
        """Yield each file under folder, which is seen as prefix from root. chain: the folders that it is in."""
        if len(chain) > revision.MAX_DEPTH:
            self.aside.left_out[prefix] = f"a folder within {revision.MAX_DEPTH} others"
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                revision.check_visits(self.root, next(self.visits))
                path = prefix + entry.name
                if revision.is_noise(entry.name):
                    self.aside.ignored.add(path)
                elif entry.is_symlink():
                    yield from self.link(entry.path, path, chain)
                elif entry.is_dir(follow_symlinks=False):
                    yield from self.folder(entry.path, path + "/", (*chain, entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield path, entry.path, entry.stat(follow_symlinks=False)
                else:
                    self.aside.left_out[path] = NO_FILE

    def link(self, link: str, path: str, chain: tuple[str, ...]) -> Iterator[Found]:
        """The same for a symbolic link: what it leads to appears under the link's own name."""
        real = os.path.realpath(link)
        if not real.startswith(self.root + "/"):
            self.aside.left_out[path] = LEADS_OUT
        elif real in chain:
            self.aside.left_out[path] = "a symbolic link to a folder that it is in"
        elif not os.path.exists(real):
            self.aside.left_out[path] = "a symbolic link that leads nowhere"
        elif os.path.isdir(real):
            yield from self.folder(real, path + "/", (*chain, real))
        elif stat.S_ISREG((status := os.stat(real)).st_mode):
            yield path, real, status
        else:
            self.aside.left_out[path] = f"a symbolic link to {NO_FILE}"
