"""The lanes: what runs side by side, what waits, and what is forgotten."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ground import wait_for
from holdfast.node.lanes import Lanes
from holdfast.plan.actions import Action, RemoveInstance, StartInstance

PATIENCE = 10.0


def _start(app: str, container: str = "web", reason: str = "it is not there") -> StartInstance:
    return StartInstance(app=app, container=container, generation=1, reason=reason)


def _remove(app: str) -> RemoveInstance:
    return RemoveInstance(app=app, container="web", instance="i", reason="")  # type: ignore[arg-type]


class _Bench:
    """Lanes whose work waits until it is let go, and a record of what began."""

    def __init__(self) -> None:
        self.began: list[Action] = []
        self.over: list[str] = []
        self._free: set[str] = set()
        self._change = threading.Condition()
        self.lanes = Lanes(self._work, lambda action: self.over.append(action.subject), starts=1)

    def finish(self, subject: str) -> None:
        with self._change:
            self._free.add(subject)
            self._change.notify_all()
        _until(lambda: subject in self.over)

    def put(self, *actions: Action) -> None:
        self.lanes.put(actions, self.lanes.look()[1])

    def subjects(self) -> list[str]:
        return [action.subject for action in self.began]

    def close(self) -> None:
        with self._change:
            self._free = {"all"}
            self._change.notify_all()
        self.lanes.close()

    def _work(self, action: Action) -> None:
        with self._change:
            self.began.append(action)
            assert self._change.wait_for(lambda: self._free & {"all", action.subject}, PATIENCE)
            self._free.discard(action.subject)


@contextmanager
def _bench() -> Iterator[_Bench]:
    bench = _Bench()
    try:
        yield bench
    finally:
        bench.close()


def _until(true: Callable[[], object]) -> None:
    wait_for(true, "the lanes are so far")


def test_two_actions_of_one_subject_never_run_at_once() -> None:
    with _bench() as bench:
        bench.put(_start("shop"))
        bench.put(_remove("shop"))
        _until(lambda: bench.began)
        bench.finish("shop/web")
        bench.put(_remove("shop"))
        _until(lambda: len(bench.began) == 2)
        assert [type(action) for action in bench.began] == [StartInstance, RemoveInstance]


def test_what_was_decided_before_a_subject_was_last_worked_on_is_left_out() -> None:
    with _bench() as bench:
        _, stale = bench.lanes.look()
        bench.put(_start("shop"))
        bench.finish("shop/web")
        bench.lanes.put([_start("shop")], stale)
        assert bench.lanes.busy == frozenset()
        bench.put(_start("shop"))
        _until(lambda: len(bench.began) == 2)


def test_what_has_not_begun_gives_way_to_the_next_plan() -> None:
    with _bench() as bench:
        bench.put(_start("first"), _start("gone"), _start("shop", reason="old"))
        _until(lambda: bench.began)
        bench.put(_start("first"), _start("shop", reason="new"))
        assert bench.lanes.busy == {"first/web", "shop/web"}
        bench.finish("first/web")
        bench.finish("shop/web")
        assert [(action.subject, action.reason) for action in bench.began[1:]] == [("shop/web", "new")]


def test_a_lane_keeps_its_turn_when_a_plan_is_made_anew() -> None:
    with _bench() as bench:
        plan = [*(_start("many", f"c{n}") for n in range(3)), _start("one")]
        bench.put(*plan)
        _until(lambda: bench.began)
        bench.put(*plan[1:])
        bench.finish("many/c0")
        _until(lambda: len(bench.began) == 2)
        bench.put(*plan[1:])
        assert bench.subjects() == ["many/c0", "one/web"]


def test_a_crowd_of_starts_holds_up_no_removal() -> None:
    with _bench() as bench:
        bench.put(*(_start("many", f"c{n}") for n in range(20)), _remove("other"))
        bench.finish("other/web")
        _until(lambda: "many/c0" in bench.subjects())
        assert len(bench.began) == 2


def test_work_that_raises_frees_its_subject_and_is_told_of() -> None:
    over: list[str] = []

    def work(action: Action) -> None:
        raise RuntimeError("a bug")

    lanes = Lanes(work, lambda action: over.append(action.subject))
    lanes.put([_start("shop")], 0)
    _until(lambda: over)
    assert lanes.look() == (frozenset(), 1)
    lanes.close()


def test_a_start_that_is_stuck_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.node.lanes.STUCK", 0.0)
    with _bench() as bench:
        bench.put(_start("a"), _start("b"))
        _until(lambda: sorted(bench.subjects()) == ["a/web", "b/web"])


def test_work_that_exits_is_over_like_any_other() -> None:
    over = threading.Event()
    lanes = Lanes(lambda action: sys.exit(1), lambda action: over.set())
    lanes.put([_start("a")], 0)
    assert over.wait(PATIENCE)
    assert not lanes.busy
    lanes.close()


def test_closing_drops_what_is_queued_and_waits_for_what_runs() -> None:
    with _bench() as bench:
        bench.put(_start("first"), _start("second"))
        _until(lambda: bench.began)
        closing = threading.Thread(target=bench.lanes.close)
        closing.start()
        _until(lambda: bench.lanes.busy == {"first/web"})
        assert closing.is_alive()
        bench.finish("first/web")
        closing.join()
        assert bench.subjects() == ["first/web"]
        bench.put(_start("third"))
        assert bench.lanes.busy == frozenset()
