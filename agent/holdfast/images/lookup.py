"""A stack of unpacked layers, read without mounting it: what overlayfs would show at a path.

`store.Image` and `node` look up users, entry points and volumes' first content here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import WrongState
from holdfast.images.unpack import MAX_LINKS, OPAQUE_XATTR, is_whiteout

LARGEST_READ = 8 << 20  # bytes of a file that the agent itself looks into


def find(layers: Sequence[Path], path: str) -> Path | None:
    """Where path of the stacked layers (lowest first) really lies; None when there is no such entry.

    Links are followed inside the stack; what a whiteout or an opaque directory hides is not there.
    """
    trail: list[list[Path]] = [list(reversed(layers))]
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            if len(trail) > 1:
                trail.pop()
            continue
        entries = _merged(trail[-1], name)
        if not entries:
            return None
        if entries[0].is_symlink():
            links += 1
            target = str(entries[0].readlink())
            if links > MAX_LINKS:
                return None
            if target.startswith("/"):
                del trail[1:]
            todo.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
        elif todo and not entries[0].is_dir():
            return None
        else:
            trail.append(entries)
    return trail[-1][0] if trail[-1] else None


def read_small(path: Path) -> bytes:
    """Read a file of an image that the agent itself looks into; raise WrongState for one that would fill memory."""
    with path.open("rb") as file:
        data = file.read(LARGEST_READ + 1)
    if len(data) > LARGEST_READ:
        raise WrongState(f"read {path.name!r} of the image: more than {LARGEST_READ} bytes")
    return data


def _merged(folders: Sequence[Path], name: str) -> list[Path]:
    """The entries that make up name in a merged directory, highest first: one file, or directories."""
    entries: list[Path] = []
    for folder in folders:
        entry = folder / name
        try:
            found = entry.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not stat.S_ISDIR(found.st_mode):
            return entries if entries or is_whiteout(found) else [entry]
        entries.append(entry)
        if _is_opaque(entry):
            break
    return entries


def _is_opaque(folder: Path) -> bool:
    try:
        return os.getxattr(folder, OPAQUE_XATTR, follow_symlinks=False) == b"y"
    except OSError:
        return False
