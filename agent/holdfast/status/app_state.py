"""(Spec, Observed, History, Plan) → Status: what the operator reads. Pure.

The daemon makes one at the end of each pass; `api` and `cli` hand its JSON on. The states and their laws:

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
    completed         its process ended well and its policy says that this is the end
    stopped           a person stopped it
    waiting           it was not started yet, because of what `reason` names
    missing           it should be there, and nothing is being done about it

The first row of the first table that is true is the app's state. The node is converged when every app is, the plan
is empty, nothing is under way or waits, and no state file has a problem. An unreachable source is shown, and changes
nothing of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from holdfast.observed import (
    Exit,
    Failure,
    Finding,
    Generation,
    History,
    Hold,
    Instance,
    Json,
    Limits,
    Observed,
    Subject,
    container_of,
)
from holdfast.plan.actions import Action, MarkGood, Plan, StartInstance
from holdfast.plan.reasons import left_alone
from holdfast.plan.restart import verdict
from holdfast.spec.model import DEFAULT_NETWORK, App, Container, Spec
from holdfast.status.actual import LimitsStatus, Published, by_address, limits_status, published_ports

AppState = Literal["removing", "invalid", "failed", "degraded", "changing", "waiting", "held", "converged"]
ContainerState = Literal[
    "running", "starting", "restarting", "failed", "exited", "completed", "stopped", "waiting", "missing"
]

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

    foreign: what on this host bears the agent's name and is not its own → why it is left alone.
    findings: what others did to the host that a person should know; what breaks something is a blocker, too.
    transfers, builds, unanswered: the images on their way (`images.transfers.Transfer.json`,
    `images.build.Builder.look`) and the questions that no registry answers (`images.transfers.Unanswered`), which the
    daemon fills in.
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
    """Say how the node stands.

    spec: None when no revision was read yet. source: its state as JSON (`source.SourceState`). plugins: those that
    failed, each with name and error. agent: version, pid and the like. trouble: what is wrong with the disk.
    """
    there, published = _by_app(observed), by_address(observed.published)
    apps = {
        name: _app(name, spec, there.get(name, {}), history, plan, observed, published)
        for name in _names(spec, there, history)
    }
    blockers = (
        *((trouble,) if trouble else ()),
        *_blockers(spec, source, apps, plan, observed.busy),
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
    )


def _commit(source: Json) -> dict[str, Any]:
    """Who said so, and when; {} for a source without authors."""
    if not source.get("author") and not source.get("message"):
        return {}
    told = {"id": source.get("revision"), "author": source.get("author"), "message": source.get("message")}
    return told | {"at": source.get("committed_at")}


def _names(spec: Spec | None, there: Iterable[str], history: History) -> list[str]:
    names = {*history.generations, *there}
    if spec:
        names |= set(spec.apps) | set(spec.broken.values())
    return sorted(names)


def _blockers(
    spec: Spec | None, source: Json, apps: Mapping[str, AppStatus], plan: Plan, busy: frozenset[Subject]
) -> Iterator[str]:
    if spec is None:
        yield f"no revision was read yet: {source.get('error') or 'the source was not asked so far'}"
    else:
        yield from (str(problem) for problem in spec.problems)
        told = {problem.path for problem in spec.problems}
        yield from (f"{path}: does not load" for path in spec.broken if path not in told)
    for name, app in apps.items():
        if app.state not in ("converged", "invalid"):
            yield f"{name}: {app.state}" + (f": {app.reason}" if app.reason else "")
    for subject, why in plan.waiting.items():
        if subject.app not in apps:
            yield f"{subject}: {why}"
    for action in plan.actions:
        if action.app not in apps:
            yield f"{action.subject}: {action.reason}"
    known = {action.subject for action in plan.actions} | plan.waiting.keys()
    for subject in sorted(busy - known):
        if subject.app not in apps:
            yield f"{subject} is being worked on"


def _app(
    name: str,
    spec: Spec | None,
    there: Mapping[str, list[Instance]],
    history: History,
    plan: Plan,
    observed: Observed,
    published: Published,
) -> AppStatus:
    generations = history.generations.get(name, ())
    wanted = spec.apps.get(name) if spec else None
    shown = wanted or (generations[-1].app if generations else None)
    containers = {
        container: _container(
            container_of(name, container), shown, there.get(container, []), history, plan, observed, published
        )
        for container in _containers(shown, there)
    }
    state, reason = _app_state(name, spec, containers, history, plan, observed.busy)
    current = _current(generations)
    failure = _failure(Subject("app", name), history, plan) if state == "failed" else None
    return AppStatus(
        state=state,
        reason=reason,
        failed_at=failure.at if failure else None,
        exit_code=failure.code if failure else None,
        path=shown.path if shown else next((p for p, n in spec.broken.items() if n == name), "") if spec else "",
        generation=current.number if current else None,
        revision=current.revision if current else "",
        containers=containers,
    )


def _containers(app: App | None, there: Mapping[str, list[Instance]]) -> list[str]:
    declared = list(app.containers) if app else []
    return [*declared, *sorted(there.keys() - set(declared))]


def _current(generations: Sequence[Generation]) -> Generation | None:
    running = [generation for generation in generations if generation.state in ("active", "good")]
    return next(reversed(running or list(generations)), None)


def _app_state(
    name: str,
    spec: Spec | None,
    containers: Mapping[str, ContainerStatus],
    history: History,
    plan: Plan,
    busy: frozenset[Subject],
) -> tuple[AppState, str]:
    broken = name in spec.broken.values() if spec else False
    wanted = spec.apps.get(name) if spec else None
    actions = [action for action in plan.actions if action.app == name]
    waiting = [f"{subject}: {why}" for subject, why in plan.waiting.items() if subject.app == name]
    if broken and not wanted:
        return "invalid", _broken_reason(name, spec)
    if spec and not wanted:
        return "removing", waiting[0] if waiting else "it is not in the revision any more"
    if failure := _failure(Subject("app", name), history, plan):
        return "failed", failure.error
    for container, status in containers.items():
        if status.state in DEGRADING:
            return "degraded", f"{container} {status.state}" + (f": {status.reason}" if status.reason else "")
    for container, status in containers.items():
        if faults := [fault for instance in status.instances for fault in instance.faults]:
            return "degraded", f"{container}: {faults[0]}"
    if actions:
        return "changing", next((a.reason for a in actions if not isinstance(a, MarkGood)), actions[0].reason)
    if in_hand := sorted(subject for subject in busy if subject.app == name):
        return "changing", f"{in_hand[0]} is being worked on"
    if waiting:
        return "waiting", waiting[0]
    if stopped := [container for container, status in containers.items() if status.state == "stopped"]:
        return "held", f"{', '.join(stopped)} stopped by hand"
    return "converged", ""


def _broken_reason(name: str, spec: Spec | None) -> str:
    paths = {path for path, broken in spec.broken.items() if broken == name} if spec else set()
    problems = [str(problem) for problem in spec.problems if problem.path in paths] if spec else []
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else f"{', '.join(sorted(paths))}: does not load"


def _failure(subject: Subject, history: History, plan: Plan) -> Failure | None:
    """The failure that a subject waits after, or that is being tried again; one of something else is outdated."""
    failure = history.failures.get(subject)
    if failure is None or subject in plan.waiting:
        return failure
    again = any(action.subject == subject and action.tried == failure.digest for action in plan.actions)
    return failure if again else None


def _by_app(observed: Observed) -> dict[str, dict[str, list[Instance]]]:
    """App → container → its instances, oldest first."""
    found: dict[str, dict[str, list[Instance]]] = {}
    for instance in sorted(observed.instances, key=lambda each: each.created_at):
        found.setdefault(instance.app, {}).setdefault(instance.container, []).append(instance)
    return found


def _container(
    subject: Subject,
    app: App | None,
    instances: Sequence[Instance],
    history: History,
    plan: Plan,
    observed: Observed,
    published: Published,
) -> ContainerStatus:
    want = app.containers.get(subject.name) if app else None
    hold = history.holds.get(subject)
    failure = _failure(subject, history, plan)
    actions = [action for action in plan.actions if action.subject == subject]
    state, reason, next_at = _container_state(
        want, instances, hold, failure, actions, _waits_for(subject, plan), plan.waiting.get(subject, "")
    )
    shown = want or (instances[-1].want if instances else Container())
    newer, digest = history.newer.get(subject), _digest(subject, shown, history)
    return ContainerStatus(
        state=state,
        reason=reason,
        image=shown.image or shown.rootfs or "",
        digest=digest,
        newer=newer.reference if newer and newer.image == shown.image and newer.digest != digest else "",
        ports=tuple(str(port) for port in shown.ports),
        published=published_ports(instances, published),
        next_at=next_at,
        held=hold,
        instances=tuple(_instance(each, history, observed.limits.get(each.id)) for each in instances),
    )


def _digest(subject: Subject, shown: Container, history: History) -> str:
    """What the newest generation that has the container as it is shown runs."""
    for generation in reversed(history.generations.get(subject.app, ())):
        staged = generation.app.containers.get(subject.name)
        if staged is not None and (staged.image, staged.rootfs) == (shown.image, shown.rootfs):
            return generation.images.get(subject.name, "")
    return ""


def _waits_for(subject: Subject, plan: Plan) -> str:
    """Why nothing is done about a container now: its own reason, its app's, or that its app is staged first."""
    app = Subject("app", subject.app)
    staging = next((action.reason for action in plan.actions if action.subject == app), "")
    return plan.waiting.get(subject) or plan.waiting.get(app) or staging


def _container_state(
    want: Container | None,
    instances: Sequence[Instance],
    hold: Hold | None,
    failure: Failure | None,
    actions: Sequence[Action],
    waits_for: str,
    held_up: str,
) -> tuple[ContainerState, str, float | None]:
    newest = instances[-1] if instances else None
    due = actions[0].reason if actions else ""
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
    return _after_exit(want, newest, held_up or waits_for)


def _after_exit(want: Container, instance: Instance, held_up: str) -> tuple[ContainerState, str, float | None]:
    follows = verdict(instance, want.restart_policy)
    match follows.kind:
        case "again" if held_up and not follows.at:
            return "waiting", held_up, None
        case "again":
            return "restarting", held_up or follows.reason, follows.at or None
        case "done":
            return "completed", "", None
        case "failed":
            return ("exited" if want.restart_policy.policy == "no" else "failed"), follows.reason, None


def _instance(instance: Instance, history: History, limits: Limits | None) -> InstanceStatus:
    ended = instance.exit if instance.phase != "running" else None
    newer = [
        each.newer.get(instance.container, "")
        for each in history.generations.get(instance.app, ())
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
        limits=limits_status(instance, limits),
        started_at=instance.started_at,
        exited_at=ended.at if ended else None,
        warnings=instance.warnings,
        faults=instance.faults + instance.drifted,
    )


def _addresses(instance: Instance) -> dict[str, str]:
    """Network → address. That on the app's default network goes by `bridge`, too, where nothing else does: there
    readers of the JSON found it when all apps shared the bridge."""
    own = instance.addresses.get(f"{instance.app}/{DEFAULT_NETWORK}")
    return {**instance.addresses, **({"bridge": own} if own and "bridge" not in instance.addresses else {})}
