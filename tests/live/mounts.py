"""Mounts that a test makes, which are gone at its end."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path


class Mounts:
    """Makes mounts in the host's mount namespace; see the fixture `mounts`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def tmpfs(self, point: Path, name: str = "disk", options: str = "rw") -> None:
        """Mount a new, empty file system."""
        self._mount("-t", "tmpfs", "-o", options, name, str(point))

    def bind(self, folder: Path, point: Path) -> None:
        self._mount("--bind", str(folder), str(point))

    def gone(self, point: Path) -> None:
        """Unmount what is on top."""
        subprocess.run(["umount", str(point)], check=True)

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words], check=True)
        self._stack.callback(subprocess.run, ["umount", "-l", words[-1]], check=False, stderr=subprocess.DEVNULL)
