"""Decide whether it makes sense to wait longer for a node to converge. Pure, but for the clock of `Wait`.

`apply`, `sync --wait` and `bundle load --wait` look at one status after the other. They stop waiting when

    the node is converged,
    the time is up; it does not pass while images are pulled or built,
    a registry has not answered for `patience` seconds, and no image is coming from another, or
    nothing is under way, no app waits for another or for a job to end, and either
        nothing will be done by itself before the time is up, or
        what failed will fail again until somebody acts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from holdfast.errors import Conflict, HoldfastError, TryAgain, UnfitHost, WrongState
from holdfast.questions import Json


class Wait:
    """A wait for a node to converge. timeout: seconds. patience: for a registry, by default the agent's."""

    def __init__(self, timeout: float, patience: float | None = None) -> None:
        self.began = time.time()
        self._left, self._patience, self._looked = timeout, patience, time.monotonic()

    def is_over(self, status: Json) -> bool:
        """Whether there is nothing to wait for any longer; counts the time since it was last asked."""
        looked, self._looked = self._looked, time.monotonic()
        self._left -= 0.0 if moving(status) else self._looked - looked
        patience = status["agent"]["connect_timeout"] if self._patience is None else self._patience
        return is_over(status, began=self.began, now=time.time(), left=self._left, patience=patience)


def is_over(status: Json, *, began: float, now: float, left: float, patience: float) -> bool:
    """Whether there is nothing to wait for. began: when the wait began. left: seconds until the time is up."""
    if status["converged"] or left <= 0:
        return True
    if overdue(status["unanswered"], began, patience, now) and not moving(status):
        return True
    due, apps = status["next_at"], status["apps"].values()
    under_way = due is not None and due <= status["at"]
    if under_way or any(app["state"] == "waiting" for app in apps):
        return False
    lasting = any(app["exit_code"] not in (None, TryAgain.exit_code) for app in apps)
    return lasting or due is None or due - now >= left


def moving(status: Json) -> bool:
    """Whether an image is being pulled or built: a registry that is only asked may never answer."""
    pulls = any(each["state"] == "pulling" for each in status["transfers"])
    return pulls or any(not each["error"] for each in status["builds"])


def overdue(unanswered: Sequence[Json], began: float, patience: float, now: float) -> list[Json]:
    """Of questions without an answer, those that have been waited for longer than patience since `began`.

    What is not asked any more does not count: another commit may need it no longer.
    """
    return [
        each
        for each in unanswered
        if (each["asking"] or each["asked"] >= began) and now - max(each["since"], began) >= patience
    ]


def obstacle(status: Json) -> type[HoldfastError]:
    """The class of the error that keeps the node from its state, first one that needs somebody to act."""
    codes = {app["exit_code"] for app in status["apps"].values() if app["exit_code"] is not None}
    if status["problems"]:
        codes.add(WrongState.exit_code)
    if any(found["breaks"] for found in status["findings"]):
        codes.add(Conflict.exit_code)
    return next((kind for kind in (WrongState, UnfitHost, Conflict) if kind.exit_code in codes), TryAgain)
