"""What ends next when everything is to end: dependents first, as when a commit takes all apps away."""

from __future__ import annotations

from dataclasses import replace

from holdfast.observed import Exit, History, Observed
from holdfast.plan.actions import StopInstance
from holdfast.plan.decide import decide
from holdfast.spec.model import Spec

REASON = "the host goes down"


def next_stops(observed: Observed, history: History, now: float) -> tuple[StopInstance, ...]:
    """The containers that may be asked to end now, because none that runs depends on them.

    That an earlier stop failed makes none wait.
    """
    plan = decide(Spec(), observed, replace(history, failures={}), now)
    return tuple(replace(each, reason=REASON) for each in plan.actions if isinstance(each, StopInstance))


def count_waves(observed: Observed, history: History, now: float) -> int:
    """How many times something has to be waited for until all have ended."""
    waves, ended = 0, Exit(0, asked=True)
    while leaving := {each.instance for each in next_stops(observed, history, now)}:
        waves += 1
        rest = (
            replace(each, phase="exited", exit=ended) if each.id in leaving else each for each in observed.instances
        )
        observed = replace(observed, instances=tuple(rest))
    return waves
