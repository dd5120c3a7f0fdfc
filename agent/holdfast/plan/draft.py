"""The world on the draft while one plan is made. Used by `decide` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from holdfast.observed import Exit, Failure, Generation, History, Hold, Instance, Observed, Subject, VolumeState
from holdfast.plan.actions import Action, Plan
from holdfast.plan.memory import Containers, Memory
from holdfast.plan.restart import Verdict


@dataclass
class PlanDraft:
    """Indexes over the world, and what has been decided so far. memory: what was at rest in the plan before."""

    observed: Observed
    history: History
    now: float
    memory: Memory = field(default_factory=Memory)
    targets: dict[str, Generation] = field(default_factory=dict)
    without_generation: set[str] = field(
        default_factory=set
    )  # apps that have no generation yet: neither held nor removed
    actions: list[Action] = field(default_factory=list)
    subjects: set[Subject] = field(default_factory=set)  # of these actions
    waiting: dict[Subject, str] = field(default_factory=dict)
    drift: dict[str, str] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)
    stays_for: Mapping[str, list[str]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    builds: bool = False  # whether an app is to be built that needs the network of builds
    joining: Mapping[str, int] = field(default_factory=dict)  # network → how many containers are to join it
    outdated: set[str] = field(default_factory=set)  # containers that are about to be replaced

    def __post_init__(self) -> None:
        self.by_app: Mapping[str, Containers] = self.memory.index.by_app
        self.volumes: dict[str, list[VolumeState]] = {}  # app → its volumes that are there
        for volume in self.observed.volumes.values():
            self.volumes.setdefault(volume.id.partition("/")[0], []).append(volume)

    @property
    def said(self) -> tuple[int, ...]:
        """How much has been decided so far: the same number twice, and nothing was decided between."""
        return (
            len(self.actions), len(self.waiting), len(self.drift), len(self.wakes), len(self.outdated), self.builds,
        )  # fmt: skip

    def offer(self, action: Action) -> None:
        """Put an action on the plan, unless the same was tried and its time has not come (rule 8).

        One action per subject: the first one offered goes, the next look finds what is left.
        """
        if action.subject in self.subjects:
            return
        failure = self.history.failures.get(action.subject)
        if failure is not None and failure.digest == action.tried and not self._due(action, failure):
            return
        self.subjects.add(action.subject)
        self.actions.append(action)

    def _due(self, action: Action, failure: Failure) -> bool:
        if failure.retry_at is None:
            self.waiting[action.subject] = f"{failure.error} (waits for a change)"
            return False
        if failure.retry_at <= self.now or self.ahead(failure):
            return True
        tries = f"tried {failure.count} times" if failure.count > 1 else "tried once"
        self.waiting[action.subject] = f"{failure.error} ({tries})"
        self.wakes.append(failure.retry_at)
        return False

    def ahead(self, past: Failure | Exit | Hold | None) -> bool:
        """Whether something past is dated in the future: the clock was set back since, and no wait counts by it."""
        return past is not None and past.at > self.now

    @property
    def known_apps(self) -> set[str]:
        """The apps that have an instance or a generation."""
        return self.by_app.keys() | self.history.generations.keys()

    @cached_property
    def in_use(self) -> frozenset[str]:
        """The networks that instances are attached to."""
        return frozenset(network for each in self.observed.instances for network in each.want.networks)

    def newest(self, app: str, container: str) -> Instance | None:
        """The instance of a container that counts: the one made last."""
        found = self.by_app.get(app, {}).get(container)
        return found[-1] if found else None

    def plan(self) -> Plan:
        """What has been decided."""
        return Plan(tuple(self.actions), self.waiting, self.drift, min(self.wakes, default=None))
