"""When `apply` and its like stop waiting for a node, and what they say is in the way."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest

from holdfast.convergence import Wait, is_over, moving, obstacle, overdue
from holdfast.errors import Conflict, HoldfastError, NotFound, TryAgain, UnfitHost, Unreachable, WrongState
from holdfast.images.incoming.transfers import Transfers
from paper import NOW

PULLING = {"state": "pulling"}
ASKED = {"ref": "app:1", "since": NOW - 100, "asked": NOW - 1, "asking": 1}


def status(*apps: tuple[str, int | None], next_at: float | None = None, **more: Any) -> dict[str, Any]:
    """A node that is not converged, with apps by state and exit code."""
    given = {f"app{number}": {"state": state, "exit_code": code} for number, (state, code) in enumerate(apps)}
    quiet: dict[str, Any] = {"transfers": (), "builds": (), "unanswered": (), "problems": (), "findings": ()}
    return {"converged": False, "at": NOW, "next_at": next_at, "apps": given, **quiet, **more}


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "a node that is converged": (status(converged=True), True),
    "what is under way": (status(("changing", None), next_at=NOW), False),
    "what is under way, though another app has failed": (status(("failed", 65), ("changing", 0), next_at=NOW), False),
    "an app that was stopped by hand, and nothing else to do": (status(("held", None)), True),
    "a container that is down for good": (status(("degraded", None)), True),
    "a container that is started again soon": (status(("degraded", None), next_at=NOW + 5), False),
    "a container that is started again after the time is up": (status(("degraded", None), next_at=NOW + 50), True),
    "a state file that does not load": (status(("invalid", None), problems=("x.toml:1: no",)), True),
    "a failure that passes by itself": (status(("failed", 75), next_at=NOW + 5), False),
    "a failure that is tried again in vain": (status(("failed", 69), next_at=NOW + 5), True),
    "a failure that only a commit mends": (status(("failed", 65)), True),
    "an app that waits for the end of a job": (status(("waiting", None)), False),
    "an app that waits, beside one that has failed": (status(("waiting", None), ("failed", 65)), False),
    "a registry that does not answer": (status(("changing", None), next_at=NOW, unanswered=[ASKED]), True),
    "a registry that does not answer while another sends": (
        status(("changing", None), next_at=NOW, unanswered=[ASKED], transfers=[PULLING]),
        False,
    ),
}


@pytest.mark.parametrize(("found", "over"), CASES.values(), ids=CASES)
def test_nobody_waits_for(found: dict[str, Any], over: bool) -> None:
    assert is_over(found, began=NOW - 90, now=NOW, left=30, patience=60) is over
    assert is_over(found, began=NOW - 90, now=NOW, left=0, patience=60), "the time is up"


def test_the_time_stands_still_while_images_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    wait = Wait(10, patience=60)
    for passed, transfers, over in ((50, [PULLING], False), (9, [], False), (50, [PULLING], False), (2, [], True)):
        clock[0] += passed
        assert wait.is_over(status(("changing", None), next_at=NOW, transfers=transfers)) is over


def test_how_long_a_registry_is_waited_for_the_agent_says_unless_the_caller_does() -> None:
    asked = {**ASKED, "since": time.time() - 5, "asked": time.time()}
    found = status(("changing", None), next_at=NOW, unanswered=[asked], agent={"connect_timeout": 0.0})
    assert Wait(10).is_over(found)
    assert not Wait(10, patience=60).is_over(found)


def test_a_build_moves_until_it_has_failed() -> None:
    assert moving({"transfers": (), "builds": [{"error": ""}]})
    assert not moving({"transfers": [{"state": "resolving"}], "builds": [{"error": "exit 1"}]})


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (status(("failed", 65), ("failed", 69)), WrongState),
        (status(("failed", 69), ("converged", None)), UnfitHost),
        (status(("failed", 75)), TryAgain),
        (status(("failed", 73)), Conflict),
        (status(problems=("x.toml:1: no",)), WrongState),
        (status(findings=({"breaks": True},)), Conflict),
        (status(findings=({"breaks": False},)), TryAgain),
    ],
)
def test_what_somebody_must_mend_names_the_exit_code(found: dict[str, Any], kind: type[HoldfastError]) -> None:
    assert obstacle(found) is kind


def test_a_registry_that_does_not_answer_is_given_up_after_a_while_by_who_waits_for_it() -> None:
    transfers = Transfers()

    def overdue_at(seconds: float, began: float = 0.0) -> bool:
        found = transfers.unanswered()
        return bool(overdue(found, began or found[0]["since"], 60, found[0]["since"] + seconds)) if found else False

    with suppress(Unreachable), transfers.asked("app:1"):
        assert (overdue_at(59), overdue_at(61)) == (False, True)
        raise Unreachable("nobody listens there")
    assert transfers.unanswered()[0]["error"] == "nobody listens there"
    since = transfers.unanswered()[0]["since"]
    assert (overdue_at(61), overdue_at(61, since + 30)) == (True, False), "not asked since somebody began to wait"
    with suppress(NotFound), transfers.asked("app:1"):
        assert (overdue_at(61, since + 30), overdue_at(91, since + 30)) == (False, True)
        raise NotFound("an answer is an answer")
    assert transfers.unanswered() == []


def test_a_question_that_nobody_asks_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, now = Transfers(), time.time()
    with transfers.asked("slow:1"):
        with suppress(Unreachable), transfers.asked("old:1"):
            raise Unreachable("nobody listens there")
        monkeypatch.setattr(time, "time", lambda: now + 100_000)
        with transfers.asked("new:1"):
            assert [each["ref"] for each in transfers.unanswered()] == ["slow:1", "new:1"]
