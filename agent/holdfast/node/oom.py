"""Report processes that the kernel killed because memory was short while their container runs on.

conmon makes a file when that happens (`runtime.conmon.OOM_FILE`). Reported kills are counted, so that a later end of
the container is not taken for an OOM kill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from holdfast.errors import HoldfastError
from holdfast.node.filewatch import FileWatch
from holdfast.runtime.conmon import OOM_FILE, Run, Runtime
from holdfast.runtime.inotify import CREATE

SETTLE = 2.0  # seconds within which a container ends if the kill hit it, or if it ends because of its child


class OomWatch:
    """Calls tell(instance, kills) when processes of an instance were killed and the instance runs on."""

    def __init__(
        self, runtime: Runtime, run_of: Callable[[str], Run | None], tell: Callable[[str, int], None]
    ) -> None:
        self._runtime, self._run_of, self._tell = runtime, run_of, tell
        self._judged: set[str] = set()
        self._watch = FileWatch(CREATE, self._made)
        self.close = self._watch.close

    def add(self, instance: str) -> None:
        """Watch a running instance, and check what happened before. Idempotent."""
        place = self._runtime.record(instance)
        self._watch.add(place)
        if (place / OOM_FILE).exists():
            self._made(place, OOM_FILE)

    def _made(self, folder: Path, name: str) -> None:
        if name == OOM_FILE and folder.name not in self._judged:
            self._judged.add(folder.name)
            threading.Thread(target=self._judge, args=(folder.name,), name="oom", daemon=True).start()

    def _judge(self, instance: str) -> None:
        """Wait a moment: if the instance ends, its end is reported as an OOM kill anyway."""
        try:
            run = self._run_of(instance)
            outlives = run is not None and self._runtime.outlives(run, SETTLE)
            self._judged.discard(instance)  # before the count: a later kill makes the file again
            if outlives and (kills := self._runtime.tell_oom_kills(instance)):
                self._tell(instance, kills)
        except (HoldfastError, OSError):
            self._judged.discard(instance)  # it was removed meanwhile
