"""Parts of a directory → what a revision would hold of them. For `holdfast check FILE`: nothing else is read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from itertools import count

from holdfast.errors import TryAgain
from holdfast.source.directory import (
    NO_SUBMODULE,
    Aside,
    Content,
    Torn,
    below,
    not_checked_out,
    read_file,
    submodules_of,
    walk,
    walk_link,
    within,
)
from holdfast.source.revision import check_size, is_noise


@dataclass(slots=True)
class Part:
    """Some files and folders, by the names that they were asked for with."""

    files: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    executable: set[str] = field(default_factory=set)

    def add(self, top: str, name: str, *, without: str = "") -> None:
        """Read a file or folder, if it is there; its links may lead to where top is, and no farther.

        without: the ending of files that are not to be read.
        Raises WrongState for what is too large, TryAgain for what does not hold still, OSError.
        """
        aside, place = Aside(), os.path.abspath(name)
        found = {} if self._is_outside(top, name) else dict(self._list(top, place, name, aside))
        found = {path: where for path, where in found.items() if not (without and path.endswith(without))}
        check_size(name, sum(status.st_size for _, status in found.values()), len(found))
        try:
            known = {path: read_file(real) for path, (real, _) in found.items()}
        except Torn as error:
            raise TryAgain(f"read '{name}': it keeps changing while it is read") from error
        self._lack_submodules(top, place, name, known)
        self.left_out |= {**aside.left_out, **not_checked_out(known)}
        self.ignored |= aside.ignored
        for path, content in known.items():
            if path not in self.left_out:
                self.files[path] = content.data
                self.executable |= {path} if content.executable else set()

    def _is_outside(self, top: str, name: str) -> bool:
        """Whether a folder on the way to a name is a link that leads out, or has a name that no revision has."""
        steps = name.split("/")
        for length in range(1, len(steps) + 1):
            way = "/".join(steps[:length])
            if is_noise(steps[length - 1]) and steps[length - 1] not in ("..", "."):
                self.ignored.add(way)
                return True
            real = os.path.realpath(way or "/")
            if length < len(steps) and os.path.islink(way) and not f"{real}/".startswith(f"{top}/"):
                self.left_out[way] = "a symbolic link that leads out of the state directory"
                return True
        return False

    def _list(self, top: str, place: str, name: str, aside: Aside) -> list[tuple[str, tuple[str, os.stat_result]]]:
        if os.path.islink(place):
            walked = walk_link(top, place, name, (top,), aside, count())
        elif os.path.isdir(place):
            real = os.path.realpath(place)
            walked = walk(top, real, f"{name}/" if name else "", (top, real), aside, count())
        elif os.path.exists(place):
            status = os.stat(place)
            if not stat.S_ISREG(status.st_mode):
                aside.left_out[name] = "a socket, a pipe or a device"
                return []
            return [(name, (os.path.realpath(place), status))]
        else:
            return []
        return [(path, (real, status)) for path, real, status in walked]

    def _lack_submodules(self, top: str, place: str, name: str, known: dict[str, Content]) -> None:
        for submodule in submodules_of(top):
            if within(submodule, place):
                seen = name + submodule[len(place) :] if name else submodule[len(place) + 1 :]
                if not below(known, seen):
                    self.left_out[seen] = NO_SUBMODULE
            elif within(place, submodule) and not known:
                self.left_out[name] = NO_SUBMODULE
