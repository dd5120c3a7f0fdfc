"""The machine's small decisions: which failures are worth remembering."""

from __future__ import annotations

from holdfast.node.machine import outlived
from holdfast.observed import Subject
from holdfast.plan.actions import ForgetApp, Plan


def test_a_failure_is_remembered_as_long_as_anything_is_tried_for_its_subject() -> None:
    plan = Plan(actions=(ForgetApp(app="meant", reason=""),), waiting={Subject.parse("awaited"): "back-off"})
    failures = [Subject.parse(text) for text in ("meant", "awaited", "busy", "gone/web", "rootfs 1f")]
    assert outlived(failures, plan, frozenset({Subject.parse("busy")})) == {"gone/web", "rootfs 1f"}
