"""The rounds of a preview → steps in words, grouped by app: what `holdfast plan` prints. Pure.

Several actions on one container are one step to a person: stop, remove and start are "replace". A step is placed
where its last action is, so reading down is the order in which things come to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from holdfast.observed import Finding, Json
from holdfast.plan.actions import (
    Action,
    MarkGood,
    Plan,
    RemoveInstance,
    StartInstance,
    StopInstance,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a plan: verb and object in words, why, and the actions that carry it out."""

    verb: str
    object: str
    reason: str
    round: int
    subject: str
    changes: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()


def plan_json(
    rounds: Sequence[Plan],
    problems: Sequence[object] = (),
    foreign: Mapping[str, str] | None = None,
    findings: Sequence[Finding] = (),
    images: Mapping[str, Sequence[Json]] | None = None,
    hints: Sequence[str] = (),
) -> dict[str, Any]:
    """The value that `holdfast plan --json` prints.

    empty: nothing to do. apps: name → steps; those of the node itself are last, under "". waiting and drift:
    subject → why, unless a round of the preview does something about it. problems: what is wrong with the state
    files. foreign: what on this host has the agent's name and is left alone → why. findings: what others did to
    the host. images: app → images that it needs and that are not here (`node.needs`). hints: what is not wrong in
    the state files, but may not be what was meant.
    """
    steps: dict[str, tuple[str, Step]] = {}
    last = rounds[-1] if rounds else Plan()
    for number, action in _actions(rounds):
        _, earlier = steps.pop(action.subject, ("", None))
        steps[action.subject] = action.app, _extended(earlier, action, number)
    apps: dict[str, list[Json]] = {app: [] for app in sorted({app for app, _ in steps.values() if app})}
    for app, step in steps.values():
        apps.setdefault(app, []).append(asdict(step))
    return {
        "empty": not steps,
        "rounds": sum(not plan.empty for plan in rounds),
        "apps": apps,
        "waiting": {subject: why for subject, why in last.waiting.items() if subject not in steps},
        "drift": dict(rounds[0].drift) if rounds else {},
        "problems": [str(problem) for problem in problems],
        "foreign": dict(foreign or {}),
        "findings": [asdict(finding) for finding in findings],
        "hints": list(hints),
        "images": {app: list(needs) for app, needs in (images or {}).items()},
    }


def _actions(rounds: Sequence[Plan]) -> Iterator[tuple[int, Action]]:
    """Every action that changes something, with its round, from 1. To note that an app is good changes nothing."""
    for number, plan in enumerate(rounds, start=1):
        yield from ((number, action) for action in plan.actions if not isinstance(action, MarkGood))


def _extended(step: Step | None, action: Action, number: int) -> Step:
    """A step with one more action, which is the last one so far."""
    verb, name = action.words
    changes = action.changes if isinstance(action, UpdateInstance) else ()
    first = step or Step(verb, name, action.reason, number, action.subject)
    derived = isinstance(action, WriteFirewall | WriteNames)  # written several times: what is written last stays
    return replace(
        first,
        verb=_merged(step, action) if step else verb,
        object=name,
        reason=action.reason if derived else first.reason,
        round=number,
        changes=(*first.changes, *(f"{change} ({change.effect})" for change in changes)),
        actions=(*first.actions, action.verb),
    )


def _merged(step: Step, action: Action) -> str:
    """The verb of a step that is carried out by several actions, this one being the last."""
    match action:
        case StartInstance(instance=None) if "StopInstance" in step.actions or "RemoveInstance" in step.actions:
            return "replace"
        case StartInstance():
            return "restart" if "StopInstance" in step.actions else step.verb
        case RemoveInstance():
            return "replace" if "StartInstance" in step.actions else "remove"
        case StopInstance():
            return "replace" if "StartInstance" in step.actions else step.verb
        case _:
            return step.verb
