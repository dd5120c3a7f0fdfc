"""The table `restart_policy` of a container, as a person writes it. Part of the tables of `authored`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from holdfast.tables import Duration, Table


class RestartTable(Table):
    """When an exited container runs again, and how long each try waits."""

    policy: Annotated[Literal["no", "on-failure", "always", "unless-stopped"], Field(description="as for restart")]
    max_attempts: Annotated[int | None, Field(ge=1, description="on-failure: give up after so many in a row")] = None
    delay: Annotated[Duration, Field(description="before the second restart; the first is immediate")] = 0.1
    factor: Annotated[float, Field(ge=1, description="each further one waits so many times longer")] = 2.0
    max_delay: Annotated[Duration, Field(description="no try waits longer than this")] = 60.0
    reset_after: Annotated[Duration, Field(description="running this long forgets earlier failures")] = 10.0
    jitter: Annotated[float, Field(ge=0, le=1, description="share of the delay that is random")] = 0.1

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.max_attempts is not None and self.policy != "on-failure":
            yield "max_attempts", f"does not apply to policy '{self.policy}' (expected policy on-failure)"
        if self.max_delay < self.delay:
            yield "max_delay", f"{self.max_delay:g}s is less than delay (expected at least {self.delay:g}s)"
