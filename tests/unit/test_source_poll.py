"""The polling of a git source: it goes on, whatever a refresh meets."""

from __future__ import annotations

import threading
from typing import Any, cast

from holdfast.errors import TryAgain
from holdfast.source.git import GitPoll
from holdfast.source.revision import SourceState


class _Broken:
    """A source whose refresh fails in every way, and says when it is asked."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.failures = iter((RuntimeError("a bug"), OSError("no space"), TryAgain("no answer")))

    def refresh(self) -> None:
        self.asked.release()
        for failure in self.failures:
            raise failure

    def state(self) -> SourceState:
        return SourceState(kind="git", url="u")

    def plan_next(self, pause: float) -> None:
        assert pause > 0

    def interrupt(self) -> None:
        """Nothing of it is ever under way."""


def test_polling_goes_on_after_a_failure_that_nobody_foresaw() -> None:
    source = _Broken()
    poll = GitPoll(cast(Any, source), lambda reason: None, 1000.0)
    try:
        for _ in range(4):
            assert source.asked.acquire(timeout=10)
            poll.poke()
    finally:
        poll.close()
