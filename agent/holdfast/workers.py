"""Call functions that may not return, such as those of plugins, in threads; callers wait until a deadline only."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from holdfast.errors import TryAgain

BACKLOG = 10_000  # calls that a plugin may be behind

T = TypeVar("T")


class NoAnswer(TryAgain):
    """A plugin's code did not return in time; it is left running in a thread of its own."""


def answer_of(work: Callable[[], T], done: Future[T] | None = None) -> Future[T]:
    """Call work, and return a future that has what it returned or raised."""
    done = done or Future()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    return done


def failed(error: BaseException) -> Future[Any]:
    """The answer of a call that raised this."""
    done: Future[Any] = Future()
    done.set_exception(error)
    return done


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Call work in a daemon thread of this name. The future has what it returns or raises; it can't be cancelled."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()
    threading.Thread(target=answer_of, args=(work, done), name=name, daemon=True).start()
    return done


@dataclass(slots=True)
class _Calls:
    """What one thread has to call. now: the key that it is at, and since when (time.monotonic())."""

    todo: deque[tuple[str, Callable[[], Any]]]
    answers: dict[str, Future[Any]]
    over: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    now: tuple[str, float] | None = None
    left: bool = False  # by whoever waited


class Worker:
    """Calls functions that may not return, such as a plugin's, in a daemon thread, and waits until a deadline only.

    What is overdue goes on in its thread, and another thread does the rest. deadline: seconds for each function.
    """

    def __init__(self, name: str, deadline: float) -> None:
        self._name, self._deadline = name, deadline
        self._idle: list[queue.SimpleQueue[_Calls]] = []  # of threads that wait for work
        self._overdue: dict[str, str] = {}  # key → since when, as a clock time
        self._lock = threading.Lock()

    def call(self, work: Callable[[], T], key: str = "") -> T:
        """Return what work() returns, or raise what it raises. Raises NoAnswer as `call_all` has it."""
        return self.call_all({key: work})[key].result()

    def call_all(self, works: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
        """Call all, one after the other, and return what came of each: NoAnswer if it did not return in time.

        So it is after the deadline; and at once, while the last function that was called by the same key is overdue.
        """
        late = dict(self._overdue)
        answers: dict[str, Future[T]] = {key: _no_answer(late[key]) for key in works if key in late}
        todo = deque((key, work) for key, work in works.items() if key not in late)
        while todo:
            calls = _Calls(todo, answers)
            self._hand_over(calls)
            todo = self._wait(calls)
        return answers

    def _wait(self, calls: _Calls) -> deque[tuple[str, Callable[[], Any]]]:
        """Wait until all is done, or one is overdue; return what nobody does then."""
        rest = self._deadline
        while True:
            with suppress(queue.Empty):
                calls.over.get(timeout=rest)
                return deque()
            with self._lock:
                key, began = calls.now or ("", time.monotonic())
                rest = max(began + self._deadline - time.monotonic(), 0.0)
                if not rest and key not in calls.answers:
                    began_at = time.localtime(time.time() - self._deadline)
                    self._overdue[key] = since = time.strftime("%H:%M:%S", began_at)
                    calls.answers[key] = _no_answer(since)
                    calls.left = True
                    return calls.todo

    def _hand_over(self, calls: _Calls) -> None:
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(inbox,), name=self._name, daemon=True).start()
        inbox.put(calls)

    def _run(self, inbox: queue.SimpleQueue[_Calls]) -> None:
        while True:
            self._make(inbox.get())
            self._idle.append(inbox)

    def _make(self, calls: _Calls) -> None:
        while calls.todo:
            key, work = calls.todo.popleft()
            calls.now = key, time.monotonic()
            answer = answer_of(work)
            with self._lock:
                if calls.left:
                    self._overdue.pop(key, None)
                    return
                calls.answers[key] = answer
        calls.over.put(None)


def _no_answer(since: str) -> Future[Any]:
    return failed(NoAnswer(f"has not answered since {since}"))


class Teller:
    """A thread that calls what it is given, one after the other; it ends with the process."""

    def __init__(self, plugin: str) -> None:
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue(BACKLOG)
        threading.Thread(target=self._run, name=f"tell {plugin}", daemon=True).start()

    def tell(self, call: Callable[[], object]) -> bool:
        """Queue a call; False if there is no room."""
        with suppress(queue.Full):
            self._calls.put_nowait(call)
            return True
        return False

    def wait(self, timeout: float) -> bool:
        """Block until all that is queued has been called; False if it has not after timeout seconds."""
        over = threading.Event()
        return self.tell(over.set) and over.wait(timeout)

    def _run(self) -> None:
        while True:
            self._calls.get()()
