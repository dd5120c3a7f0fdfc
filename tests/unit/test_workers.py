"""Functions that may not return: the caller goes on, the others are called, and no thread is left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from ground import wait_for
from holdfast.workers import NoAnswer, Worker


def threads_of(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def raised_by(answer: Future[Any]) -> BaseException | None:
    try:
        answer.result()
    except BaseException as error:
        return error
    return None


def until_it_answers(worker: Worker) -> None:
    wait_for(
        lambda: not isinstance(raised_by(worker.call_all({"hangs": lambda: 7})["hangs"]), NoAnswer), "it answers"
    )


def test_all_are_called_one_after_the_other_in_one_thread() -> None:
    worker, seen = Worker("row", 10), list[tuple[str, int]]()
    works = {key: partial(lambda key: seen.append((key, threading.get_ident())), key) for key in "abc"}
    answers = worker.call_all(works)
    assert [answer.result() for answer in answers.values()] == [None] * 3
    assert [key for key, _ in seen] == ["a", "b", "c"]
    assert len({thread for _, thread in seen}) == 1
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_what_one_raises_hinders_no_other() -> None:
    answers: Mapping[str, Future[Any]] = Worker("raises", 10).call_all(
        {"bad": lambda: 1 // 0, "exit": partial(exit, 1), "good": lambda: 1}
    )
    assert isinstance(raised_by(answers["bad"]), ZeroDivisionError)
    assert isinstance(raised_by(answers["exit"]), SystemExit)
    assert answers["good"].result() == 1


def test_what_hangs_is_left_behind_and_the_rest_is_called() -> None:
    worker, released = Worker("hangs", 0.5), threading.Event()
    works = {"first": lambda: 1, "hangs": lambda: int(released.wait(60)), "last": lambda: 3}
    answers = worker.call_all(works)
    assert (answers["first"].result(), answers["last"].result()) == (1, 3)
    with pytest.raises(NoAnswer, match="has not answered since"):
        answers["hangs"].result()
    began = time.monotonic()
    again = worker.call_all(works)
    assert isinstance(raised_by(again["hangs"]), NoAnswer)
    assert again["last"].result() == 3
    assert time.monotonic() - began < 30, "what hangs already is not waited for"
    with pytest.raises(NoAnswer):
        worker.call(lambda: 1, "hangs")
    assert worker.call(lambda: 5, "other") == 5
    released.set()
    until_it_answers(worker)


def test_a_function_that_hangs_again_and_again_leaves_no_threads_over() -> None:
    worker, name = Worker("again", 0.01), "again"
    for _ in range(20):
        released = threading.Event()
        assert isinstance(raised_by(worker.call_all({"hangs": partial(released.wait, 60)})["hangs"]), NoAnswer)
        released.set()
        until_it_answers(worker)
    assert threads_of(name) <= 3


def test_callers_at_the_same_time_do_not_wait_for_each_other() -> None:
    worker, meet = Worker("meet", 10), threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(worker.call, partial(meet.wait, 10), str(number)) for number in range(3)]
        assert sorted(each.result() for each in asked) == [0, 1, 2]
