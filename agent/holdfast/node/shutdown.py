"""The end of all containers, because the host goes down: as a commit would end them, within a total time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from holdfast.errors import HoldfastError
from holdfast.node.context import Context
from holdfast.node.observe import observe
from holdfast.node.stop import stop_instance
from holdfast.observed import Exit, Observed
from holdfast.plan.actions import StopInstance
from holdfast.plan.shutdown import REASON, count_waves, next_stops
from holdfast.runtime import cgroup

MANY = 128  # stops at a time
SIGKILLED = 2.0  # seconds that a process has to be gone after SIGKILL


def shut_down(context: Context, total: float, beat: Callable[[float], None] = lambda left: None) -> list[str]:
    """Stop every container, dependents first, each by its own signal and grace; return a line for each that failed.

    What can't be stopped keeps nothing else running.

    total: seconds for all of it. What is left of them is shared by the waves that are still to come, so that a
    long grace of the first takes nothing from the last, which mostly are the databases. beat: told now and then how
    much of the time is left.
    """
    deadline = time.monotonic() + total
    observe(context, lambda id, run: False)  # notes what has ended by itself since an agent looked
    history, failed = context.store.history(), dict[str, str]()
    in_hand: dict[Future[None], StopInstance] = {}
    begun: dict[str, float] = {}  # instance → when its stop began, monotonic
    with ThreadPoolExecutor(MANY, "stop") as pool:
        while True:
            taken = {action.instance for action in in_hand.values()} | failed.keys()
            # What not even SIGKILL has ended: what it depends on does not wait for it any longer.
            ends = {each.instance: begun.get(each.instance, math.inf) + each.grace for each in in_hand.values()}
            lost = {id for id, end in ends.items() if time.monotonic() > end + SIGKILLED} | failed.keys()
            there = tuple(each for each in context.store.instances.values() if each.id not in lost)
            observed, now = Observed(at=time.time(), instances=there), time.time()  # what else is here goes with them
            waves = count_waves(observed, history, now)
            left = max(deadline - time.monotonic(), 0.0)
            beat(left)
            for action in next_stops(observed, history, now):
                if action.instance not in taken:
                    share = replace(action, grace=min(action.grace, left / max(waves, 1)))
                    in_hand[pool.submit(_stop, context, share, begun)] = share
            if not in_hand:
                return list(failed.values())
            for done in wait(in_hand, 1.0, FIRST_COMPLETED).done:
                action = in_hand.pop(done)
                if (error := done.exception()) is not None:
                    failed[action.instance] = f"{action.subject}: {error}"
                    context.store.event("failed", action.subject, str(error), verb=action.verb, reason=REASON)


def _stop(context: Context, action: StopInstance, begun: dict[str, float]) -> None:
    began = begun[action.instance] = time.monotonic()
    run = context.run_of(action.instance)
    if run is None or not context.runtime.alive(run):  # by itself, just now
        observe(context, lambda id, run: False)
        instance = context.store.instances.get(action.instance)
        if instance is None or instance.phase != "running":
            return
    try:
        cgroup.thaw(context.runtime.cgroup(action.instance))
    except HoldfastError as error:
        context.store.event("failed", action.subject, str(error), verb=action.verb, reason=REASON)
    detail = stop_instance(context, action)
    instance = context.store.instances.get(action.instance)
    if instance is not None and instance.phase != "running":
        ended = replace(instance.exit or Exit(None, asked=True), host_went_down=True)
        context.store.change_instance(instance.id, exit=ended)
    took = round(time.monotonic() - began, 4)
    context.store.event("stopped", action.subject, REASON, verb=action.verb, reason=REASON, took=took, **detail)
