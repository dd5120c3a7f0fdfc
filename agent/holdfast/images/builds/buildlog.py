"""Keep what a build says in its log, and tell in one line why it failed: the step, and what was said last."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.errors import HoldfastError, WrongState
from holdfast.images.builds.buildah import STEP, Failed
from holdfast.images.registry.faults import failure, fault_of, last_cause, message_of

RETRY = 60.0  # seconds; a build that failed is not tried again before, unless something else is committed
NOISE = re.compile(
    r"Error: |error running container: |.*: exit status|time=|--> |subprocess exited with |" + STEP.pattern
)
FULL = re.compile("no space left on", re.IGNORECASE)
LAST_LINES = 10  # of a log, in the event of a build that failed
LONGEST_STEP = 80  # characters of an instruction in an error
LONGEST_EVENT = 400  # characters of a line in an event
LOG_LIMIT = 16 << 20  # bytes of one log; what a build says beyond it is not kept


def failed(name: str, error: Failed, log: Path) -> HoldfastError:
    """Tell in one line why a build failed: the step, the end of the last error, and what the step said last. Pure."""
    begun = max((at for at, line in enumerate(error.output) if STEP.match(line)), default=-1)
    step = STEP.sub("", error.output[begun]) if begun >= 0 else ""
    reasons = [line.removeprefix("Error: ") for line in error.errors if line.startswith("Error: ")]
    reason = message_of((reasons or error.errors or error.output or [str(error)])[-1])
    cause = error.exceeded or last_cause(reason)
    if not error.exceeded and "exit status" in reason:
        cause = cause.rpartition(": ")[2]
        quiet, loud = (
            [line for line in lines if not NOISE.match(line)] for lines in (error.output[begun + 1 :], error.errors)
        )
        full = [line for line in (*quiet, *loud) if FULL.search(line)]
        if last := (full or loud or quiet)[-1:]:
            cause += f": {last[0].strip()[:LONGEST_EVENT]}"
    kind = fault_of(reason, (step,)).kind if "docker://" in reason else WrongState
    what = f"{step[:LONGEST_STEP]}{'…' if len(step) > LONGEST_STEP else ''}: " if step else ""
    message = f"build 'images.{name}': {what}{cause}{hint_of(cause)} (all of it is in {log})"
    return failure(kind, message, RETRY)


def hint_of(cause: str) -> str:
    """Say what to look at where a disk is full: buildah tells that in words alone."""
    return " (see 'holdfast system df')" if FULL.search(cause) else ""


class Log:
    """The file that the output of one build goes to. begun: called with each step. last: the lines that came last."""

    def __init__(self, path: Path, begun: Callable[[str], None] = lambda step: None) -> None:
        self.path, self._begun = path, begun
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._size = 0

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._file = self.path.open("w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def hear(self, line: str) -> None:
        """Take one line."""
        if self._size <= LOG_LIMIT:
            self._size += len(line) + 1
            self._file.write(f"{line}\n" if self._size <= LOG_LIMIT else "what follows is not kept\n")
            self._file.flush()
        line = line if len(line) <= LONGEST_EVENT else f"{line[:LONGEST_EVENT]}…"
        self.last.append(line)
        if STEP.match(line):
            self._begun(line)
