"""Finds the program of a container in its image, so that a missing one is told before anything is stopped.

Called by the node when it stages, with a look-up through the image's layers.
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Callable, Collection

from holdfast.errors import WrongState

Lookup = Callable[[str], int | None]


def find_executable(program: str, path: str, cwd: str, lookup: Lookup, mounts: Collection[str] = ()) -> str | None:
    """Find what execvp(3) would run: an absolute path, or None if it may lie in one of the mounts.

    path: the container's PATH. lookup: absolute path → st_mode of the file it leads to (links followed), None if
    there is none. mounts: what is mounted over the image, whose content is not known here. Raises WrongState.
    """
    hidden, obstacle = False, "no such file in the image" if "/" in program else "not found in the image's PATH"
    for candidate in _candidates(program, path, cwd):
        if any(candidate == mount or candidate.startswith(f"{mount.rstrip('/')}/") for mount in mounts):
            hidden = True
            continue
        mode = lookup(candidate)
        if mode is None:
            continue
        if stat.S_ISREG(mode) and mode & 0o111:
            return candidate
        obstacle = "is a directory" if stat.S_ISDIR(mode) else f"'{candidate}' is not executable (chmod +x)"
    if hidden:
        return None
    raise WrongState(f"exec '{program}': {obstacle}")


def _candidates(program: str, path: str, cwd: str) -> list[str]:
    folders = [""] if "/" in program else path.split(":")
    return [posixpath.normpath(posixpath.join(cwd, folder, program)) for folder in folders]
