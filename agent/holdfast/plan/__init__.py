"""(Spec, Observed, History, now) → Plan. Pure: `decide` is the heart, `preview` the whole road."""

from holdfast.plan.actions import Action, Change, Outcome, Plan
from holdfast.plan.decide import decide
from holdfast.plan.preview import preview

__all__ = ["Action", "Change", "Outcome", "Plan", "decide", "preview"]
