"""(Spec, Observed, History, Plan) → Status: what the operator reads. Pure.

The daemon makes one of each pass that somebody asks about; `api` and `cli` pass its JSON on. The states:

    an app is …  when                                                                  what follows
    removing     it is not in the revision any more, and something of it is still here  it is taken away
    invalid      its state file does not load                                           its last good generation stays
    failed       what is asked for now can't be staged: an image, a driver, a file      what ran before runs on
    degraded     a container that should run does not, or something of it is missing    it is restarted, or given up
    changing     the plan has actions for it, or one is under way                        they are carried out
    waiting      it waits for another app, a dependency or a moment                     it goes on when that comes
    held         a person stopped a container of it by hand                             `holdfast release` ends that
    converged    none of these                                                          nothing

    a container is …  when
    running           its process runs
    starting          it is about to be started, or being made
    restarting        its process ended, or its start failed, and another try is due (back-off)
    failed            its process ended too often, or its start can't succeed: only a change helps
    exited            its process ended badly and its policy says no
    completed         its process ended well and is not to run again
    stopped           a person stopped it
    waiting           it was not started yet, because of what `reason` names
    missing           it should be there, and nothing is being done about it

The first row of the first table that applies is the app's state. The node is converged when every app is, the plan
is empty, nothing is under way or waits, and no state file has a problem. A source that can't be reached is shown, and
does not change that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from holdfast.observed import (
    Exit,
    Failure,
    Finding,
    History,
    Hold,
    Instance,
    Json,
    Observed,
    Subject,
    container_of,
)
from holdfast.plan.actions import MarkGood, Plan, StartInstance
from holdfast.plan.reasons import left_alone
from holdfast.plan.restart import verdict
from holdfast.spec.model import DEFAULT_NETWORK, App, Container, Spec
from holdfast.status.actual import LimitsStatus, by_address, limits_status, published_ports

AppState = Literal["removing", "invalid", "failed", "degraded", "changing", "waiting", "held", "converged"]
ContainerState = Literal[
    "running", "starting", "restarting", "failed", "exited", "completed", "stopped", "waiting", "missing"
]

T = TypeVar("T")
DEGRADING: frozenset[ContainerState] = frozenset({"restarting", "failed", "exited", "missing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One run of a container. image: as it was committed then, or what was newer; digest: of what that stood for.

    exit_code is 128 + signal after a signal; None while it runs or when nobody saw it.
    """

    id: str
    generation: int
    image: str
    digest: str
    state: str
    pid: int | None
    restarts: int
    exit_code: int | None
    signal: int | None
    oom: bool
    addresses: Mapping[str, str]
    limits: LimitsStatus
    started_at: float | None
    exited_at: float | None
    warnings: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStatus:
    """One container of an app. next_at: when it is started again after a failure. held: by whom and since when.

    image: as it is committed. digest: of what was staged for that, "" as long as nothing is. newer: what a registry
    has by now, by name, tag and digest; "" for nothing newer, and where it is not asked (update_image).
    ports: as they are asked for. published: as the firewall publishes them; None when it does not say.
    """

    state: ContainerState
    reason: str
    image: str
    digest: str
    newer: str
    ports: tuple[str, ...]
    published: tuple[str, ...] | None
    next_at: float | None
    held: Hold | None
    instances: tuple[InstanceStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppStatus:
    """One app. generation and revision are those of what runs (or of the newest try, when nothing runs).

    failed_at, exit_code: of the last try, where the state is failed; the code is the error's (`errors`).
    """

    state: AppState
    reason: str
    failed_at: float | None
    exit_code: int | None
    path: str
    generation: int | None
    revision: str
    containers: Mapping[str, ContainerStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The node as a person reads it. blockers: why it is not converged, a line each; empty when it is.

    foreign: what on this host has the agent's name and is not its own → why it is left alone.
    findings: what others did to the host that a person should know; what breaks something is a blocker, too.
    next_at: when something is done next; `at` while something is, None if nothing will be until something changes.
    transfers, builds, unanswered: the images that are being pulled (`Transfer.json`) or built (`Builder.look`), and
    the requests that no registry answers (`Unanswered`). The daemon fills them in.
    """

    node: str
    at: float
    converged: bool
    blockers: tuple[str, ...]
    revision: str
    commit: Json
    source: Json
    problems: tuple[str, ...]
    plugins: tuple[Json, ...]
    apps: Mapping[str, AppStatus]
    waiting: Mapping[str, str]
    drift: Mapping[str, str]
    foreign: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    agent: Json = field(default_factory=dict)
    next_at: float | None = None
    transfers: tuple[Json, ...] = ()
    builds: tuple[Json, ...] = ()
    unanswered: tuple[Json, ...] = ()

    def json(self) -> dict[str, Any]:
        """The value that `holdfast status --json` prints."""
        return asdict(self)


def make_status(
    *,
    spec: Spec | None,
    observed: Observed,
    history: History,
    plan: Plan,
    source: Json,
    node: str = "",
    plugins: Iterable[Json] = (),
    agent: Json | None = None,
    trouble: str = "",
) -> Status:
    """Make the status of the node.

    spec: None when no revision was read yet. source: its state as JSON (`source.SourceState`). plugins: those that
    failed, each with name and error. agent: version, pid and the like. trouble: what is wrong with the disk.
    """
    facts = _Facts(spec, observed, history, plan)
    apps = facts.apps()
    blockers = (
        *((trouble,) if trouble else ()),
        *facts.blockers(apps, source),
        *(str(finding) for finding in observed.findings if finding.breaks),
    )
    return Status(
        node=node,
        at=observed.at,
        converged=not blockers,
        blockers=blockers,
        revision=str(source.get("revision") or ""),
        commit=_commit(source),
        source=dict(source),
        problems=tuple(str(problem) for problem in spec.problems) if spec else (),
        plugins=tuple(plugins),
        apps=apps,
        waiting={str(subject): why for subject, why in plan.waiting.items()},
        drift=dict(plan.drift),
        foreign=left_alone(observed),
        findings=observed.findings,
        agent=dict(agent or {}),
        next_at=observed.at if plan.actions or observed.busy else plan.wake_at,
    )


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _commit(source: Json) -> dict[str, Any]:
    """Who made the commit, and when; {} for a source without authors."""
    if not source.get("author") and not source.get("message"):
        return {}
    names = {"id": "revision", "author": "author", "message": "message", "at": "committed_at"}
    return {name: source.get(key) for name, key in names.items()}


class _Facts:
    """All that a status is made from. of_app, of_subject: the plan's actions; waiting: its lines, by app."""

    def __init__(self, spec: Spec | None, observed: Observed, history: History, plan: Plan) -> None:
        self.spec, self.unread = spec or Spec(), spec is None
        self.observed, self.history, self.plan = observed, history, plan
        self.published = by_address(observed.published)
        self.of_app = _grouped((action.app, action) for action in plan.actions)
        self.of_subject = _grouped((action.subject, action) for action in plan.actions)
        self.waiting = _grouped((subject.app, f"{subject}: {why}") for subject, why in plan.waiting.items())
        self.broken = _grouped((app, path) for path, app in self.spec.broken.items())

    def apps(self) -> dict[str, AppStatus]:
        """The status of each app that is asked for, is here, or is remembered."""
        oldest_first = sorted(self.observed.instances, key=lambda each: each.created_at)
        there = _grouped((instance.app, instance) for instance in oldest_first)
        names = {*self.history.generations, *there, *self.spec.apps, *self.broken}
        return {
            name: self._app(name, _grouped((each.container, each) for each in there.get(name, ())))
            for name in sorted(names)
        }

    def blockers(self, apps: Mapping[str, AppStatus], source: Json) -> Iterator[str]:
        """Why the node is not converged, a line each."""
        if self.unread:
            yield f"no revision was read yet: {source.get('error') or 'the source was not read so far'}"
        yield from (str(problem) for problem in self.spec.problems)
        told = {problem.path for problem in self.spec.problems}
        yield from (f"{path}: does not load" for path in self.spec.broken if path not in told)
        for name, app in apps.items():
            if app.state not in ("converged", "invalid"):
                yield f"{name}: {app.state}" + (f": {app.reason}" if app.reason else "")
        waiting, actions = self.plan.waiting, self.plan.actions
        yield from (f"{subject}: {why}" for subject, why in waiting.items() if subject.app not in apps)
        yield from (f"{action.subject}: {action.reason}" for action in actions if action.app not in apps)
        known = {action.subject for action in actions} | waiting.keys()
        rest = (subject for subject in sorted(self.observed.busy - known) if subject.app not in apps)
        yield from (f"{subject} is being worked on" for subject in rest)

    def _app(self, name: str, there: Mapping[str, Sequence[Instance]]) -> AppStatus:
        generations = self.history.generations.get(name, ())
        wanted = self.spec.apps.get(name)
        shown = wanted or (generations[-1].app if generations else App(name=name, path=""))
        containers = {
            container: self._container(container_of(name, container), shown, there.get(container, ()))
            for container in (*shown.containers, *sorted(there.keys() - shown.containers.keys()))
        }
        state, reason, failure = self._app_state(name, wanted, containers)
        running = [generation for generation in generations if generation.state in ("active", "good")]
        current = next(reversed(running or generations), None)
        return AppStatus(
            state=state,
            reason=reason,
            failed_at=failure.at if failure else None,
            exit_code=failure.code if failure else None,
            path=shown.path or self.broken.get(name, [""])[0],
            generation=current.number if current else None,
            revision=current.revision if current else "",
            containers=containers,
        )

    def _app_state(
        self, name: str, wanted: App | None, containers: Mapping[str, ContainerStatus]
    ) -> tuple[AppState, str, Failure | None]:
        """The first row of the module's table that is true, and why; the failure, if it is that."""
        if wanted or self.unread:
            if failure := self._failure(Subject("app", name)):
                return "failed", failure.error, failure
            return *self._wanted_state(name, containers), None
        if paths := self.broken.get(name):
            problems = [str(problem) for problem in self.spec.problems if problem.path in paths]
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            return "invalid", problems[0] + more if problems else f"{', '.join(sorted(paths))}: does not load", None
        return "removing", self.waiting.get(name, ["it is not in the revision any more"])[0], None

    def _wanted_state(self, name: str, containers: Mapping[str, ContainerStatus]) -> tuple[AppState, str]:
        """As `_app_state`, of an app that is asked for and was staged."""
        actions, waiting = self.of_app.get(name, ()), self.waiting.get(name, ())
        for container, status in containers.items():
            if status.state in DEGRADING:
                return "degraded", f"{container} {status.state}" + (f": {status.reason}" if status.reason else "")
        for container, status in containers.items():
            if faults := [fault for instance in status.instances for fault in instance.faults]:
                return "degraded", f"{container}: {faults[0]}"
        if actions:
            return "changing", next((a.reason for a in actions if not isinstance(a, MarkGood)), actions[0].reason)
        if busy := sorted(subject for subject in self.observed.busy if subject.app == name):
            return "changing", f"{busy[0]} is being worked on"
        if waiting:
            return "waiting", waiting[0]
        if stopped := [container for container, status in containers.items() if status.state == "stopped"]:
            return "held", f"{', '.join(stopped)} stopped by hand"
        return "converged", ""

    def _failure(self, subject: Subject) -> Failure | None:
        """The failure that a subject waits after, or that is being tried again; one of something else is outdated."""
        failure = self.history.failures.get(subject)
        if failure is None or subject in self.plan.waiting:
            return failure
        again = any(each.tried == failure.digest for each in self.of_subject.get(subject, ()))
        return failure if again else None

    def _container(self, subject: Subject, app: App, instances: Sequence[Instance]) -> ContainerStatus:
        want = app.containers.get(subject.name)
        state, reason, next_at = self._container_state(subject, want, instances)
        shown = want or (instances[-1].want if instances else Container())
        newer, digest = self.history.newer.get(subject), self._digest(subject, shown)
        return ContainerStatus(
            state=state,
            reason=reason,
            image=shown.image or shown.rootfs or "",
            digest=digest,
            newer=newer.reference if newer and newer.image == shown.image and newer.digest != digest else "",
            ports=tuple(str(port) for port in shown.ports),
            published=published_ports(instances, self.published),
            next_at=next_at,
            held=self.history.holds.get(subject),
            instances=tuple(self._instance(instance) for instance in instances),
        )

    def _digest(self, subject: Subject, shown: Container) -> str:
        """The image of the newest generation that has the container as it is shown."""
        for generation in reversed(self.history.generations.get(subject.app, ())):
            staged = generation.app.containers.get(subject.name)
            if staged is not None and (staged.image, staged.rootfs) == (shown.image, shown.rootfs):
                return generation.images.get(subject.name, "")
        return ""

    def _container_state(
        self, subject: Subject, want: Container | None, instances: Sequence[Instance]
    ) -> tuple[ContainerState, str, float | None]:
        """The state of a container, why, and when it is started again."""
        newest = instances[-1] if instances else None
        hold, failure = self.history.holds.get(subject), self._failure(subject)
        actions = self.of_subject.get(subject, ())
        due = actions[0].reason if actions else ""
        waits_for = self._waits_for(subject)
        if any(instance.phase == "running" for instance in instances):
            return "running", due or (failure.error if failure else ""), failure.retry_at if failure else None
        if hold and hold.kind == "stopped":
            return "stopped", f"stopped by {hold.by or 'hand'}", None
        if failure:
            return ("failed" if failure.retry_at is None else "restarting"), failure.error, failure.retry_at
        if actions and isinstance(actions[-1], StartInstance):
            return "starting", due, None
        if newest is None:
            return ("waiting" if waits_for else "starting" if due else "missing"), waits_for or due, None
        if newest.phase == "creating":
            return "starting", due, None
        if want is None:
            return "exited", due or str(newest.exit or Exit(None)), None
        return _after_exit(want, newest, self.plan.waiting.get(subject) or waits_for)

    def _waits_for(self, subject: Subject) -> str:
        """Why nothing is done about a container now: its own reason, its app's, or that its app is staged first."""
        app = Subject("app", subject.app)
        staging = next((action.reason for action in self.of_subject.get(app, ())), "")
        return self.plan.waiting.get(subject) or self.plan.waiting.get(app) or staging

    def _instance(self, instance: Instance) -> InstanceStatus:
        ended = instance.exit if instance.phase != "running" else None
        newer = [
            each.newer.get(instance.container, "")
            for each in self.history.generations.get(instance.app, ())
            if each.number == instance.generation and each.images.get(instance.container) == instance.image
        ]
        return InstanceStatus(
            id=instance.id,
            generation=instance.generation,
            image=(newer[0] if newer else "") or instance.want.image or instance.want.rootfs or "",
            digest=instance.image,
            state=instance.phase,
            pid=instance.pid if instance.phase == "running" else None,
            restarts=instance.restarts,
            exit_code=ended.code if ended else None,
            signal=ended.signal if ended else None,
            oom=ended.oom if ended else False,
            addresses=_addresses(instance),
            limits=limits_status(instance, self.observed.limits.get(instance.id)),
            started_at=instance.started_at,
            exited_at=ended.at if ended else None,
            warnings=instance.warnings,
            faults=instance.faults + instance.drifted,
        )


def _after_exit(want: Container, instance: Instance, waits_for: str) -> tuple[ContainerState, str, float | None]:
    follows = verdict(instance, want.restart_policy)
    match follows.kind:
        case "again" if waits_for and not follows.at:
            return "waiting", waits_for, None
        case "again":
            return "restarting", waits_for or follows.reason, follows.at or None
        case "done":
            return "completed", "", None
        case "failed":
            return ("exited" if want.restart_policy.policy == "no" else "failed"), follows.reason, None


def _addresses(instance: Instance) -> dict[str, str]:
    """Network → address. The one on the app's default network is also called `bridge`, where nothing else is: readers
    of the JSON found it there when all apps shared the bridge."""
    own = instance.addresses.get(f"{instance.app}/{DEFAULT_NETWORK}")
    return {**instance.addresses, **({"bridge": own} if own and "bridge" not in instance.addresses else {})}
