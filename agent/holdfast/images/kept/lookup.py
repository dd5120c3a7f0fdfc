"""Find what a container sees at a path, without mounting anything: in a stack of layers with mounts over it.

`Image` and `node` look up users, programs, mount points and volumes' first content here.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.errors import WrongState
from holdfast.images.unpacking.tree import MAX_LINKS, OPAQUE_XATTR, is_whiteout

LARGEST_READ = 8 << 20  # bytes of a file that the agent itself looks into

#: blocked: a step of the path is no directory, or its links lead in a circle. unknown: nobody knows before the start.
Kind = Literal["file", "directory", "missing", "blocked", "unknown"]


@dataclass(frozen=True, slots=True)
class Content:
    """What is mounted somewhere. what: in words, for messages.

    entries: where it lies on the host, highest layer first; () is an empty directory. known: whether what is in it
    can be told before the start. fixed: only another commit changes it. shared: others may put something there before
    the start. mode: of all its files, where the mount says so.
    """

    what: str
    entries: tuple[Path, ...] = ()
    directory: bool = True
    known: bool = True
    fixed: bool = False
    shared: bool = False
    read_only: bool = False
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a path leads to. path: inside the container, links followed. content: what it lies in.

    entries: where it lies on the host, highest layer first: one file, or directories.
    """

    path: str
    kind: Kind
    content: Content
    entries: tuple[Path, ...] = ()

    @property
    def mode(self) -> int:
        """Its st_mode as the container sees it; 0 when nothing is known to be there."""
        if not self.entries:
            return stat.S_IFDIR | 0o755 if self.kind == "directory" else 0
        mode = self.entries[0].lstat().st_mode
        return mode if self.content.mode is None else stat.S_IFMT(mode) | self.content.mode


class View:
    """Layers (lowest first), and what is mounted over them so far."""

    def __init__(self, layers: Sequence[Path], what: str = "the image") -> None:
        self.root = Content(what, tuple(reversed(layers)), fixed=True)
        self._mounts: dict[str, Content] = {}
        self._made: set[str] = set()  # directories that runtimes make to mount something there

    def mount(self, target: str, content: Content) -> None:
        """Mount content at target, its links followed, as runtimes do: what was mounted below it is hidden."""
        self.mount_at(self.resolve(target).path, content)

    def mount_at(self, path: str, content: Content) -> None:
        """Mount content at a path that `resolve` has found: no step of it is a link."""
        hidden = [each for each in self._mounts if each == path or each.startswith(f"{path}/")]
        for each in hidden:
            del self._mounts[each]
        self._made = {each for each in self._made if not each.startswith(f"{path}/")}
        self._mounts[path] = content
        while (path := posixpath.dirname(path)) != "/":
            self._made.add(path)

    def resolve(self, path: str) -> Found:
        """Find what path leads to, links followed inside; what a whiteout or an opaque directory hides is missing."""
        trail = [Found("/", "directory", self.root, self.root.entries)]
        todo = _steps(path)
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                del trail[max(1, len(trail) - 1) :]
                continue
            found = self._step(trail[-1], name)
            is_link = found.kind == "file" and found.entries and found.entries[0].is_symlink()
            if is_link and found.path not in self._mounts:
                links += 1
                if links > MAX_LINKS:
                    return Found(found.path, "blocked", found.content)
                target = str(found.entries[0].readlink())
                if target.startswith("/"):
                    del trail[1:]
                todo.extend(_steps(target))
            elif found.kind == "directory":
                trail.append(found)
            elif found.kind == "file" and not todo:
                return found
            elif found.kind == "file":
                return Found(found.path, "blocked", found.content, found.entries)
            else:
                rest = posixpath.normpath(posixpath.join(found.path, *reversed(todo)))
                return Found(rest, found.kind, found.content)
        return trail[-1]

    def _step(self, folder: Found, name: str) -> Found:
        """Find an entry of a directory, without following it."""
        path = f"{folder.path}/{name}" if folder.path != "/" else f"/{name}"
        mounted = self._mounts.get(path)
        if mounted is not None:
            return Found(path, "directory" if mounted.directory else "file", mounted, mounted.entries)
        entries, directory = _merged(folder.entries, name)
        if entries:
            return Found(path, "directory" if directory else "file", folder.content, tuple(entries))
        if path in self._made:
            return Found(path, "directory", folder.content)
        return Found(path, "missing" if folder.content.known else "unknown", folder.content)


def find(layers: Sequence[Path], path: str) -> Path | None:
    """Find where a path of the stacked layers (lowest first) lies on the host; None if there is no such entry."""
    found = View(layers).resolve(path)
    return found.entries[0] if found.kind in ("file", "directory") and found.entries else None


def read_small(path: Path) -> bytes:
    """Read a file of an image that the agent itself looks into; raise WrongState for one that would fill memory."""
    with path.open("rb") as file:
        data = file.read(LARGEST_READ + 1)
    if len(data) > LARGEST_READ:
        raise WrongState(f"read {path.name!r} of the image: more than {LARGEST_READ} bytes")
    return data


def _steps(path: str) -> list[str]:
    """Split a path into its steps, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _merged(folders: Sequence[Path], name: str) -> tuple[list[Path], bool]:
    """Find the entries that make up name in a merged directory, highest first: one file, or directories (True)."""
    entries: list[Path] = []
    for folder in folders:
        try:
            found = os.lstat(f"{folder}/{name}")  # a path of its own only for what is there
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            continue
        entry = folder / name
        if not stat.S_ISDIR(found.st_mode):
            return (entries, True) if entries or is_whiteout(found) else ([entry], False)
        entries.append(entry)
        if _is_opaque(entry):
            break
    return entries, True


def _is_opaque(folder: Path) -> bool:
    try:
        return os.getxattr(folder, OPAQUE_XATTR, follow_symlinks=False) == b"y"
    except OSError:
        return False
