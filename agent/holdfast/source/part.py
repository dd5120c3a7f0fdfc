"""Parts of a directory → what a revision would hold of them. For `holdfast check FILE`: nothing else is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from holdfast.errors import TryAgain
from holdfast.source import directory
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
        walk, place = directory.Walk(top), os.path.abspath(name)
        listed = () if self._is_outside(top, name) else self._list(walk, place, name)
        found = [each for each in listed if not (without and each[0].endswith(without))]
        check_size(name, sum(status.st_size for _, _, status in found), len(found))
        try:
            known = {path: directory.read_file(real) for path, real, _ in found}
        except directory.Torn as error:
            raise TryAgain(f"read '{name}': it keeps changing while it is read") from error
        self._lack_submodules(top, place, name, known)
        self.left_out |= {**walk.aside.left_out, **directory.not_checked_out(known)}
        self.ignored |= walk.aside.ignored
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
                self.left_out[way] = directory.LEADS_OUT
                return True
        return False

    def _list(self, walk: directory.Walk, place: str, name: str) -> Iterator[directory.Found]:
        real = os.path.realpath(place)
        if os.path.islink(place):
            yield from walk.link(place, name, (walk.root,))
        elif os.path.isdir(place):
            yield from walk.folder(real, f"{name}/" if name else "", (walk.root, real))
        elif os.path.isfile(place):
            yield name, real, os.stat(place)
        elif os.path.exists(place):
            walk.aside.left_out[name] = directory.NO_FILE

    def _lack_submodules(self, top: str, place: str, name: str, known: dict[str, directory.Content]) -> None:
        for submodule in directory.submodules_of(top):
            if directory.within(submodule, place):
                seen = name + submodule[len(place) :] if name else submodule[len(place) + 1 :]
                if not directory.below(known, seen):
                    self.left_out[seen] = directory.NO_SUBMODULE
            elif directory.within(place, submodule) and not known:
                self.left_out[name] = directory.NO_SUBMODULE
