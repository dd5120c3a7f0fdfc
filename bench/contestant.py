"""What is asked of everyone who is measured: the same verbs, each in its own way. `run` calls them with a watch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

IMAGE = "bench:1"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a container has besides its process."""

    network: bool = False
    port: int | None = None
    volume: bool = False
    memory: int | None = None


NO_NETWORK = Shape()
BRIDGE = Shape(network=True)


def full(port: int) -> Shape:
    """Bridge, published port, volume, memory limit."""
    return Shape(network=True, port=port, volume=True, memory=64 * 2**20)


class Unsupported(Exception):
    """This one has no way to do that: the cell stays empty."""


class Contestant(Protocol):
    """Verbs block until the tool says that it is done, except where `up` needs no more than a file."""

    name: str

    def open(self) -> str:
        """Get ready (engine started, image there), and say which version this is."""
        ...

    def up(self, names: Sequence[str], shape: Shape) -> None:
        """Ask for these containers, all at once, in the way that this tool has for many."""

    def same(self) -> None:
        """Ask for what is there already."""

    def change(self, name: str) -> None:
        """Ask for one of them with another environment variable."""

    def pid(self, name: str) -> int:
        """The process of one container."""
        ...

    def show(self) -> None:
        """Print what runs, as a person would have it printed."""

    def down(self) -> None:
        """Take all of them away; return when they, their mounts and their networks are gone."""

    def standing(self) -> list[int]:
        """The processes that stand there to serve containers: engine and one or more per container."""
        ...

    def close(self) -> None:
        """Leave the host as it was."""


def quiet(*command: str | Path, timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a program and return what it prints; RuntimeError with what it had to say if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(map(str, command))}: not done after {timeout:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
