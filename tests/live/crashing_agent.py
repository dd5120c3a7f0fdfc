"""An agent that is killed at a chosen boundary: right after the n-th write or effect of one of its actions.

`live.boundaries` says what a boundary is, and is the part that runs in the agent's process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground import patient
from live import forkserver


@dataclass(frozen=True, slots=True)
class Boundary:
    """The n-th boundary of an action (`StartInstance shop/web`), the first time that it is done in a run."""

    action: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.action}, after {self.number}: {self.what}"


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended: killed at the boundary, or with a status. boundaries: all that it came past."""

    killed: bool
    status: Mapping[str, Any]
    boundaries: tuple[Boundary, ...] = field(repr=False)


class CrashingAgent:
    """Converges once per call of `run`, in a process of its own, which is forked with everything imported."""

    def __init__(self, config: Path) -> None:
        self._config, self._home = config, config.parent

    def run(self, kill: Boundary | None = None, *, kill_after: float | None = None, timeout: float = 20) -> Run:
        """Converge, or be killed on the way: at a boundary, or after seconds. AssertionError when the agent fails."""
        words = [str(self._config), str(patient(timeout)), *((kill.action, str(kill.number)) if kill else ())]
        with (self._home / "agent.log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
            descriptors = nothing.fileno(), log.fileno(), log.fileno()
            process = forkserver.start(words, os.environ, descriptors, program="boundaries")
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        assert code in (0, -signal.SIGKILL), (self._home / "agent.log").read_text()[-4000:]
        lines = (self._home / "trace").read_text().splitlines()
        crossed = tuple(Boundary(action, int(number), what) for action, number, what in map(_split, lines))
        status = json.loads((self._home / "status.json").read_text()) if code == 0 else {}
        return Run(code != 0, status, crossed)


def _split(line: str) -> list[str]:
    return line.split("\t")
