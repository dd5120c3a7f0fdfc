"""Lanes: what runs side by side, and what does not.

Every app has a lane, and the node has one for what belongs to no app. A pass puts actions on lanes and goes on.
Threads take them up lane by lane in turn, so a hundred starts of one app hold up no restart of another. What is
heavy on the processor (a start) or on the disk (staging) is limited in number; what mostly waits (a stop) is not.
No two actions of one subject run at once. What has not begun when the next plan comes is forgotten, for that plan
says it again if it is still so: nothing is started that was meanwhile taken back.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from holdfast.observed import Subject
from holdfast.plan.actions import Action, StageGeneration, StartInstance

MANY = 128
STUCK = 30.0  # seconds after which a start waits for something that other starts need not wait for

log = structlog.get_logger("holdfast")


@dataclass
class _Gate:
    """A limit on one class of actions, and the lanes that wait at it, each with its queue.

    running: subject → when it began (monotonic). patience: after that many seconds, an action no longer counts.
    """

    limit: int
    patience: float = math.inf
    running: dict[Subject, float] = field(default_factory=dict)
    lanes: dict[str, deque[Action]] = field(default_factory=dict)

    def take(self) -> Action | None:
        """The next action of the lane whose turn it is; that lane goes to the end."""
        if not self.lanes or len(self.running) >= self.limit + MANY:
            return None
        now = time.monotonic()
        if sum(now - began < self.patience for began in self.running.values()) >= self.limit:
            return None
        lane, queue = next(iter(self.lanes.items()))
        action = queue.popleft()
        del self.lanes[lane]
        if queue:
            self.lanes[lane] = queue
        self.running[action.subject] = now
        return action

    def forget(self) -> list[Action]:
        """Empty every queue and return what was in them; the lanes keep their turns."""
        forgotten = [action for queue in self.lanes.values() for action in queue]
        for queue in self.lanes.values():
            queue.clear()
        return forgotten

    def close_up(self) -> None:
        """Let go of the lanes in which nothing waits any more."""
        self.lanes = {lane: queue for lane, queue in self.lanes.items() if queue}


class Lanes:
    """Calls work(action) in threads, and over(action) once its subject is free again. Thread-safe."""

    def __init__(
        self,
        work: Callable[[Action], None],
        over: Callable[[Action], None] = lambda action: None,
        *,
        starts: int | None = None,
        stages: int = 16,  # most of the time they wait for a registry
    ) -> None:
        self._work, self._over = work, over
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # told when an action is over
        self._subjects: set[Subject] = set()
        self._count = 0  # actions that are over
        self._done: dict[Subject, int] = {}  # → that count right after it, for what the last plan may not know
        self._closed = False
        self._gates = {
            "start": _Gate(starts or 2 * (os.cpu_count() or 2), STUCK),
            "stage": _Gate(stages),
            "other": _Gate(MANY),
        }
        self._threads = ThreadPoolExecutor(sum(gate.limit + MANY for gate in self._gates.values()), "lane")

    def look(self) -> tuple[frozenset[Subject], int]:
        """The subjects of what is queued or runs, and how many actions are over; ask before reading the host."""
        with self._lock:
            return frozenset(self._subjects), self._count

    def put(self, actions: Iterable[Action], seen: int) -> None:
        """Queue the actions of a plan in place of all that has not begun.

        seen: how many actions were over when the host was read for it; never less than in the call before. Left out
        is what is worked on, or was since: what was seen of its subject is no longer so.
        """
        with self._lock:
            for gate in self._gates.values():
                self._subjects.difference_update(action.subject for action in gate.forget())
            self._done = {subject: count for subject, count in self._done.items() if count > seen}
            for action in actions if not self._closed else ():
                if action.subject not in self._subjects and action.subject not in self._done:
                    self._subjects.add(action.subject)
                    self._gates[_class_of(action)].lanes.setdefault(action.app, deque()).append(action)
            for gate in self._gates.values():
                gate.close_up()
            self._dispatch()

    @property
    def busy(self) -> frozenset[Subject]:
        """The subjects of everything that is queued or runs."""
        with self._lock:
            return frozenset(self._subjects)

    def close(self, timeout: float | None = None) -> None:
        """Drop what is queued, wait timeout seconds at most for what runs; then it is left to itself."""
        with self._idle:
            self._closed = True
            for gate in self._gates.values():
                self._subjects.difference_update(action.subject for action in gate.forget())
                gate.close_up()
            self._idle.wait_for(lambda: not any(gate.running for gate in self._gates.values()), timeout)
            for gate in self._gates.values():
                for subject in gate.running:
                    log.warning("left unfinished", subject=subject)
        self._threads.shutdown(wait=False)

    def _dispatch(self) -> None:
        for gate in self._gates.values():
            while (action := gate.take()) is not None:
                self._threads.submit(self._run, action, gate)

    def _run(self, action: Action, gate: _Gate) -> None:
        try:
            self._work(action)
        except BaseException:  # the edge of a lane: the next look finds what came of it
            log.exception("action broke off", action=action.verb, subject=action.subject)
        finally:
            with self._lock:
                del gate.running[action.subject]
                self._count += 1
                self._subjects.discard(action.subject)
                self._done[action.subject] = self._count
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
