"""The rounds of a preview → steps in words, grouped by app: what `holdfast plan` prints. Pure.

Several actions on one container are one step to a person: stop, remove and start are "replace". A step stands where
the last of its actions stands, so reading down is the order in which things come to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, assert_never

from holdfast.observed import Finding, Json
from holdfast.plan.actions import (
    Action,
    Effect,
    Live,
    MarkGood,
    Plan,
    Record,
    RemoveInstance,
    Replace,
    Signal,
    StartInstance,
    StopInstance,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)


@dataclass(slots=True)
class Step:
    """One line of a plan: verb and object in words, why, and the actions that carry it out."""

    verb: str
    object: str
    reason: str
    round: int
    subject: str
    changes: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)


def plan_json(
    rounds: Sequence[Plan],
    problems: Sequence[object] = (),
    foreign: Mapping[str, str] | None = None,
    findings: Sequence[Finding] = (),
    images: Mapping[str, Sequence[Json]] | None = None,
    hints: Sequence[str] = (),
) -> dict[str, Any]:
    """The value that `holdfast plan --json` prints.

    empty: nothing to do. apps: name → steps; what belongs to the node itself is last, under "". waiting and drift:
    subject → why, as far as no round of the preview does something about it. problems: what is wrong with the state
    files. foreign: what on this host bears the name and is left alone → why. findings: what others did to
    the host. images: app → what it needs that is not here (`node.needs`). hints: what is not wrong in the state files
    and may not be what somebody meant.
    """
    steps: dict[tuple[str, str], Step] = {}
    apps: dict[str, list[Step]] = {}
    for number, action in _actions(rounds):
        key = (action.app, action.subject)
        if (step := steps.pop(key, None)) is None:
            step = Step(verb="", object="", reason=action.reason, round=number, subject=action.subject)
        else:
            apps[action.app].remove(step)
        steps[key] = step
        apps.setdefault(action.app, []).append(step)
        _extend(step, action, number)
    order = sorted(apps, key=lambda name: (not name, name))
    last = rounds[-1] if rounds else Plan()
    done = {action.subject for _, action in _actions(rounds)}
    return {
        "empty": not steps,
        "rounds": sum(not plan.empty for plan in rounds),
        "apps": {name: [_step_json(step) for step in apps[name]] for name in order},
        "waiting": {subject: why for subject, why in last.waiting.items() if subject not in done},
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


def _extend(step: Step, action: Action, number: int) -> None:
    verb, name = action.words
    step.verb = _merged(step, action) if step.actions else verb
    step.object = name
    step.round = number
    if isinstance(action, WriteFirewall | WriteNames):
        step.reason = action.reason  # it is the last one that stays
    step.actions.append(action.verb)
    if isinstance(action, UpdateInstance):
        step.changes.extend(f"{change} ({_effect(change.effect)})" for change in action.changes)


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


def _effect(effect: Effect) -> str:
    match effect:
        case Live():
            return "applied live"
        case Record():
            return "noted"
        case Signal(name=name):
            return f"signal {name}"
        case Replace():
            return "replaces it"
        case _:
            assert_never(effect)


def _step_json(step: Step) -> Mapping[str, Any]:
    return {
        "verb": step.verb,
        "object": step.object,
        "reason": step.reason,
        "round": step.round,
        "subject": step.subject,
        "changes": step.changes,
        "actions": step.actions,
    }
