"""Threads that call what may not return, such as a plugin's code: who asks waits until a deadline, or not."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from holdfast.errors import TryAgain

BACKLOG = 10_000  # calls that a plugin may be behind

T = TypeVar("T")


class NoAnswer(TryAgain):
    """A plugin's code did not return in time; it is left running in a thread of its own."""


_Calls = deque[tuple[Callable[[], Any], Future[Any]]]  # what is still to be called


class Worker:
    """Calls functions that may not return, such as a plugin's, in a daemon thread, and waits until a deadline only.

    What is overdue goes on in its thread, and another thread does the rest. deadline: seconds for each function.
    """

    def __init__(self, name: str, deadline: float) -> None:
        self._name, self._deadline = name, deadline
        self._idle: list[queue.SimpleQueue[_Calls]] = []  # of threads that wait for work
        self._overdue: dict[str, str] = {}  # key → since when, as a clock time

    def call(self, work: Callable[[], T], key: str = "") -> T:
        """Return what work() returns, or raise what it raises. Raises NoAnswer as `call_all` has it."""
        return self.call_all({key: work})[key].result()

    def call_all(self, works: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
        """Call all, one after the other, and return what came of each: it is done, or NoAnswer.

        So it is after the deadline; and at once, while the last function that was called by the same key is overdue.
        """
        late = dict(self._overdue)
        answers: dict[str, Future[T]] = {key: Future() for key in works}
        calls = deque((work, answers[key]) for key, work in works.items() if key not in late)
        self._hand_over(calls)
        for key, answer in answers.items():
            if key not in late:
                asked = time.time()
                with suppress(TimeoutError):
                    answer.exception(self._deadline)
                if answer.done():
                    continue
                late[key] = self._give_up(key, answer, asked)
                self._hand_over(deque(_taken(calls)))
            answers[key] = Future()
            answers[key].set_exception(NoAnswer(f"has not answered since {late[key]}"))
        return answers

    def _give_up(self, key: str, answer: Future[Any], asked: float) -> str:
        self._overdue[key] = since = time.strftime("%H:%M:%S", time.localtime(asked))
        answer.add_done_callback(lambda _: self._overdue.pop(key, None))
        return since

    def _hand_over(self, calls: _Calls) -> None:
        if not calls:
            return
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(inbox,), name=self._name, daemon=True).start()
        inbox.put(calls)

    def _run(self, inbox: queue.SimpleQueue[_Calls]) -> None:
        while True:
            for work, answer in _taken(inbox.get()):
                try:
                    answer.set_result(work())
                except BaseException as error:
                    answer.set_exception(error)
            self._idle.append(inbox)


def _taken(calls: _Calls) -> Iterator[tuple[Callable[[], Any], Future[Any]]]:
    """Take one after the other, until none is left: another thread may take what is left of them meanwhile."""
    with suppress(IndexError):
        while True:
            yield calls.popleft()


class Teller:
    """A thread that calls what it is given, one after the other; it ends with the process."""

    def __init__(self, plugin: str) -> None:
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue(BACKLOG)
        threading.Thread(target=self._run, name=f"tell {plugin}", daemon=True).start()

    def tell(self, call: Callable[[], object]) -> bool:
        """Queue a call; False if there is no room."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def wait(self, timeout: float) -> bool:
        """Block until all that is queued has been called; False if it has not after timeout seconds."""
        over = threading.Event()
        return self.tell(over.set) and over.wait(timeout)

    def _run(self) -> None:
        while True:
            self._calls.get()()
