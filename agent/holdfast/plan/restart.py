"""What follows the end of a process: the restart policy as a pure function of the exit and the clock.

    how it ended                        no      on-failure      always, unless-stopped
    exit 0                              done    done            again
    any other exit, signal, OOM         failed  again           again
    nobody saw it end                   again   again           again
    we stopped it, and no longer hold   again   again           again
    the host went down                  again*  again           again

* where no policy was written; `restart = "no"` in the state file means never twice, not even after a reboot.
"again" is at once the first time, then after delay * factor ** n with jitter, never more than max_delay; a run of
reset_after seconds forgets earlier failures; max_attempts in a row is where it gives up. `always` and
`unless-stopped` are alike here: what a person stops stays stopped, across restarts of the agent and the host.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from holdfast.observed import Exit, Instance
from holdfast.spec.model import RestartPolicy


@dataclass(frozen=True, slots=True)
class Verdict:
    """again: run it at `at` (in the past: now) as the streak-th restart in a row. done, failed: leave it."""

    kind: Literal["again", "done", "failed"]
    reason: str
    at: float = 0.0
    streak: int = 0


def verdict(instance: Instance, policy: RestartPolicy) -> Verdict:
    """Say what follows the end of an instance that no person holds."""
    ended = instance.exit or Exit(code=None)
    if instance.host_went_down:
        if policy.once:
            return Verdict("failed", 'it ran when the host went down (restart = "no")')
        return Verdict("again", "it ran when the host went down")
    if ended.asked:
        return Verdict("again", "it was stopped and is wanted")
    if ended.code == 0 and policy.policy in ("no", "on-failure"):
        return Verdict("done", "completed")
    if policy.policy == "no" and ended.code is not None:
        return Verdict("failed", f'{ended} (restart = "no")')
    streak = 0 if _ran(instance, ended) >= policy.reset_after else instance.streak
    if policy.max_attempts is not None and streak >= policy.max_attempts:
        return Verdict("failed", f"gave up after {streak} restarts in a row: it {ended}")
    attempt = streak + 1
    limit = f" of {policy.max_attempts}" if policy.max_attempts is not None else ""
    reason = f"it {ended}; restart {attempt}{limit} in a row"
    return Verdict("again", reason, at=ended.at + wait_before(policy, attempt, instance.id), streak=attempt)


def wait_before(policy: RestartPolicy, attempt: int, salt: str) -> float:
    """Seconds before the attempt-th restart in a row. Jitter is drawn from salt: one question, one answer."""
    if attempt <= 1:
        return 0.0
    try:
        wait = min(policy.delay * policy.factor ** (attempt - 2), policy.max_delay)
    except OverflowError:
        wait = policy.max_delay
    draw = hashlib.sha256(f"{salt}:{attempt}".encode()).digest()
    share = int.from_bytes(draw[:4], "big") / 2**32
    return min(wait * (1 + policy.jitter * (2 * share - 1)), policy.max_delay)


def _ran(instance: Instance, ended: Exit) -> float:
    return ended.at - instance.started_at if instance.started_at else 0.0
