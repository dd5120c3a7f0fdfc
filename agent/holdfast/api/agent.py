"""What the API needs of an agent: an answer to every question, and two that wait in the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod

from holdfast.questions import Json, Questions


class Agent(Questions, ABC):
    """Answers questions. Its methods may block and are called in threads, except for the coroutines."""

    @abstractmethod
    async def wait_sync(self, accept_rewrite: bool) -> Json:
        """Answer `sync`. Many may wait for it at once, so it must not block a thread for each."""

    @abstractmethod
    async def wait_events(self, after: int) -> None:
        """Return when there is an event with a seq above `after`; safe to cancel."""
