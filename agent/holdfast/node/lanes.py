"""Lanes: what runs side by side, and what does not.

Every app has a lane, and the node has one for what belongs to no app. A pass puts actions on lanes and goes on.
Threads take them up lane by lane in turn, so a hundred starts of one app hold up no restart of another. What is
heavy on the processor (a start) or on the disk (staging) is limited in number; what mostly waits (a stop) is not.
No two actions of one subject run at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from holdfast.plan.actions import Action, StageGeneration, StartInstance

MANY = 128


@dataclass
class _Gate:
    """A limit on one class of actions, and the lanes that wait at it, each with its queue."""

    limit: int
    running: int = 0
    lanes: dict[str, deque[Action]] = field(default_factory=dict)

    def take(self) -> Action | None:
        """The next action of the lane whose turn it is; that lane goes to the end."""
        if self.running >= self.limit or not self.lanes:
            return None
        lane, queue = next(iter(self.lanes.items()))
        action = queue.popleft()
        del self.lanes[lane]
        if queue:
            self.lanes[lane] = queue
        self.running += 1
        return action


class Lanes:
    """Calls work(action) in threads, and over(action) once its subject is free again. Thread-safe."""

    def __init__(
        self,
        work: Callable[[Action], None],
        over: Callable[[Action], None] = lambda action: None,
        *,
        starts: int | None = None,
        stages: int = 4,
    ) -> None:
        self._work, self._over = work, over
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._subjects: set[str] = set()
        self._done: dict[str, float] = {}  # subject → when the last action on it was over
        self._closed = False
        self._gates = {
            "start": _Gate(starts or 2 * (os.cpu_count() or 2)),
            "stage": _Gate(stages),
            "other": _Gate(MANY),
        }
        self._threads = ThreadPoolExecutor(sum(gate.limit for gate in self._gates.values()), "lane")

    def put(self, action: Action, seen: float) -> bool:
        """Queue an action that was decided on what was seen then (time.time()).

        False if one of the same subject is queued, runs, or was done since: then what was seen is no longer so.
        """
        with self._lock:
            if self._closed or action.subject in self._subjects or self._done.get(action.subject, 0.0) >= seen:
                return False
            self._done.pop(action.subject, None)
            self._subjects.add(action.subject)
            self._gates[_class_of(action)].lanes.setdefault(action.app, deque()).append(action)
            self._dispatch()
            return True

    @property
    def busy(self) -> frozenset[str]:
        """The subjects of everything that is queued or runs."""
        with self._lock:
            return frozenset(self._subjects)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Block until nothing is queued or runs; False if it still is after timeout seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._subjects, timeout)

    def close(self) -> None:
        """Drop what is queued, wait for what runs."""
        with self._lock:
            self._closed = True
            for gate in self._gates.values():
                for queue in gate.lanes.values():
                    self._subjects -= {action.subject for action in queue}
                gate.lanes.clear()
        self._threads.shutdown(wait=True)

    def _dispatch(self) -> None:
        for gate in self._gates.values():
            while (action := gate.take()) is not None:
                self._threads.submit(self._run, action, gate)

    def _run(self, action: Action, gate: _Gate) -> None:
        try:
            self._work(action)
        finally:
            with self._idle:
                gate.running -= 1
                self._subjects.discard(action.subject)
                self._done[action.subject] = time.time()
                if not self._closed:
                    self._dispatch()
                self._idle.notify_all()
            self._over(action)


def _class_of(action: Action) -> str:
    match action:
        case StartInstance():
            return "start"
        case StageGeneration():
            return "stage"
        case _:
            return "other"
