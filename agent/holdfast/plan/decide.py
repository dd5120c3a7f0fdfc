"""The heart: one look at the world, and what to do next.

A plan holds everything that can be done *now*, side by side; what has to wait is named with its reason and is found
again by the next look. Nothing here does anything, reads a clock or knows where a value came from.

The rules, in the order in which they are applied:

 1. An app is brought to a generation only when that generation is staged: images on disk, drivers consulted.
    Until then, and when staging fails, the app is held at the generation it has.
 2. A state file that does not load, or a source that can't be read, is no reason to touch an app: as 1.
 3. An app that the revision no longer names is taken away: dependents first, then networks; volumes stay
    unless they say otherwise.
 4. A container starts when its networks stand and what it depends on has been reached, in its own app and in
    the apps that its app depends on. One that merely exited is started again without asking that a second time.
 5. A difference costs no more than it must: live where the kernel allows it, noted where only the agent reads it,
    a new container for the rest; and the old one runs until its successor could start.
 6. An exit is answered by the restart policy.
 7. What a person did by hand overrules the commit until it is released, and is shown as drift.
 8. What failed is tried again when its time has come, and not before; what can't succeed waits for a change.
 9. The firewall and the hosts files are a function of what is there. What bears our name and has no receipt goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.observed import FirewallWant, Generation, History, Hold, Instance, Observed
from holdfast.plan.actions import (
    Action,
    Change,
    EnsureNetwork,
    ForgetApp,
    MarkGood,
    Plan,
    RemoveInstance,
    RemoveNetwork,
    RemoveOrphan,
    RemoveVolume,
    StageGeneration,
    StartInstance,
    StopInstance,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)
from holdfast.plan.derived import all_names, firewall_want
from holdfast.plan.diff import changes, mounted_files, replaces
from holdfast.plan.restart import Verdict, verdict
from holdfast.spec.model import App, Container, Network, Spec, digest_of

DEFAULT_STOP_SIGNAL = "SIGTERM"
UNMANAGED = frozenset({"none", "host"})


def decide(spec: Spec | None, observed: Observed, history: History, now: float) -> Plan:
    """Say what to do next. spec None: the source can't be read, so every app stays at its generation."""
    desk = _Desk(observed, history, now)
    desk.targets = dict(_targets(spec, desk))
    for app in desk.targets:
        _hold_app(app, desk)
    for app in sorted(_known_apps(desk) - desk.targets.keys() - desk.unplaced):
        _remove_app(app, desk)
    _networks(desk)
    _derived(desk)
    for orphan in observed.orphans:
        desk.offer(
            RemoveOrphan(
                app="", receipt=orphan, reason=f"{orphan.kind} {orphan.id} bears our name and belongs to nothing"
            )
        )
    return desk.plan()


@dataclass
class _Desk:
    """The world on the desk while one plan is made: indexes over it, and what has been decided so far."""

    observed: Observed
    history: History
    now: float
    targets: dict[str, Generation] = field(default_factory=dict)
    unplaced: set[str] = field(default_factory=set)  # apps that have no generation yet: neither held nor removed
    actions: list[Action] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    drift: dict[str, str] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)  # containers that are about to be replaced

    def __post_init__(self) -> None:
        self.by_app: dict[str, dict[str, list[Instance]]] = {}
        self.users: dict[str, list[Instance]] = {}
        for instance in sorted(self.observed.instances, key=lambda each: (each.created_at, each.id)):
            self.by_app.setdefault(instance.app, {}).setdefault(instance.container, []).append(instance)
            for network in instance.want.networks:
                self.users.setdefault(network, []).append(instance)

    def offer(self, action: Action) -> None:
        """Put an action on the plan, unless the same was tried and its time has not come (rule 8)."""
        failure = self.history.failures.get(action.subject)
        if failure is None or failure.digest != action.tried:
            self.actions.append(action)
        elif failure.retry_at is None:
            self.waiting[action.subject] = f"{failure.error} (waits for a change)"
        elif failure.retry_at > self.now:
            tries = f"tried {failure.count} times" if failure.count > 1 else "tried once"
            self.waiting[action.subject] = f"{failure.error} ({tries})"
            self.wakes.append(failure.retry_at)
        else:
            self.actions.append(action)

    def newest(self, app: str, container: str) -> Instance | None:
        found = self.by_app.get(app, {}).get(container)
        return found[-1] if found else None

    def plan(self) -> Plan:
        return Plan(tuple(self.actions), self.waiting, self.drift, min(self.wakes, default=None))


# -- which generation an app is held at (rules 1 and 2) ------------------------------------------------------


def _targets(spec: Spec | None, desk: _Desk) -> Iterator[tuple[str, Generation]]:
    history = desk.history
    if spec is None:
        yield from _current_of(history.generations, desk)
        return
    stuck = set(spec.broken.values()) - spec.apps.keys()
    yield from _current_of(stuck, desk)
    for name in stuck:
        desk.waiting[name] = "its state file does not load; it stays as it is"
    for name, app in spec.apps.items():
        found = _staged(app, history) or _current(history.generations.get(name, ()))
        if found is None or found.app.digest != app.digest:
            desk.offer(StageGeneration(app=name, spec=app, reason=_stage_reason(found)))
        if found is None:
            desk.unplaced.add(name)
        else:
            yield name, found


def _current_of(names: Iterable[str], desk: _Desk) -> Iterator[tuple[str, Generation]]:
    for name in sorted(names):
        found = _current(desk.history.generations.get(name, ()))
        if found is None:
            desk.unplaced.add(name)
        else:
            yield name, found


def _staged(app: App, history: History) -> Generation | None:
    """The generation made of exactly this app, if it is the newest or the one in force."""
    known = history.generations.get(app.name, ())
    for generation in (*known[-1:], _current(known)):
        if generation is not None and generation.app.digest == app.digest:
            return generation
    return None


def _current(known: tuple[Generation, ...]) -> Generation | None:
    return next((each for each in reversed(known) if each.state != "staged"), None)


def _stage_reason(current: Generation | None) -> str:
    return "the app is new" if current is None else f"its state differs from generation {current.number}"


# -- an app that is wanted -----------------------------------------------------------------------------------


def _hold_app(app: str, desk: _Desk) -> None:
    generation = desk.targets[app]
    before = len(desk.actions)
    settled = True
    for name in _in_order(generation.app.containers):
        settled &= _hold_container(generation, name, desk)
    for name in list(desk.by_app.get(app, {})):
        if name not in generation.app.containers:
            settled = False
            _retire(app, name, "the state no longer names it", desk)
    settled &= len(desk.actions) == before
    if settled:
        _drop_volumes(app, generation.app, desk)
        if generation.state != "good":
            desk.offer(MarkGood(app=app, generation=generation.number, reason="every container runs as committed"))


def _hold_container(generation: Generation, name: str, desk: _Desk) -> bool:
    """Decide about one container; True when it is as it should be."""
    app, want = generation.app.name, generation.app.containers[name]
    key, instance = f"{app}/{name}", desk.newest(app, name)
    hold = desk.history.holds.get(key)
    if hold is not None:
        desk.drift[key] = _held(key, hold)
    for older in desk.by_app.get(app, {}).get(name, ())[:-1]:
        _take_away(older, "a newer instance stands in its place", desk)
    if instance is None:
        if hold is None or hold.kind != "stopped":
            _start(generation, name, "it is not there", desk)
        return False
    if instance.phase == "creating":
        desk.offer(
            RemoveInstance(app=app, container=name, instance=instance.id, reason="its start was interrupted half way")
        )
        return False
    found = changes(instance, want, generation.images.get(name, ""), mounted_files(generation.app, want))
    found += _network_changes(instance, generation, desk)
    if replaces(found):
        desk.outdated.add(key)
        return _replace(instance, generation, found, hold, desk)
    if found:
        _update(instance, generation.number, found, _update_reason(found, instance), desk)
    if instance.phase == "running":
        return _hold_running(instance, generation, hold, desk) and not found
    return _hold_exited(instance, generation, hold, desk) and not found


def _hold_running(instance: Instance, generation: Generation, hold: Hold | None, desk: _Desk) -> bool:
    if hold is not None and hold.kind == "stopped":
        _stop(instance, f"stopped by hand{_by(hold)}", desk)
    elif hold is not None and hold.kind == "restarted" and (instance.started_at or 0.0) < hold.at:
        _stop(instance, f"restarted by hand{_by(hold)}", desk)
    elif instance.faults:
        _stop(instance, "; ".join(instance.faults), desk)
    elif instance.drifted:
        _update(instance, generation.number, (), "; ".join(instance.drifted), desk)
    else:
        return True
    return False


def _hold_exited(instance: Instance, generation: Generation, hold: Hold | None, desk: _Desk) -> bool:
    key = instance.key
    if hold is not None and hold.kind == "stopped":
        return True
    if hold is not None and (instance.started_at or 0.0) < hold.at:
        _start(generation, instance.container, f"{hold.kind} by hand{_by(hold)}", desk, again=instance)
        return False
    answer = verdict(instance, generation.app.containers[instance.container].restart_policy)
    desk.verdicts[instance.id] = answer
    match answer.kind:
        case "done":
            return True
        case "failed":
            desk.waiting[key] = answer.reason
        case "again" if answer.at > desk.now:
            desk.waiting[key] = f"back-off: {answer.reason}"
            desk.wakes.append(answer.at)
        case "again":
            _start(generation, instance.container, answer.reason, desk, again=instance, streak=answer.streak)
    return False


def _start(
    generation: Generation, name: str, reason: str, desk: _Desk, *, again: Instance | None = None, streak: int = 0
) -> None:
    app = generation.app.name
    obstacle = _missing_network(generation.app.containers[name], desk)
    if again is None or again.phase == "lost":
        obstacle = obstacle or _unreached(generation.app, name, desk)
    if obstacle:
        desk.waiting[f"{app}/{name}"] = obstacle
        return
    instance = again.id if again else None
    desk.offer(
        StartInstance(
            app=app, container=name, generation=generation.number, instance=instance, streak=streak, reason=reason
        )
    )


def _replace(
    instance: Instance, generation: Generation, found: tuple[Change, ...], hold: Hold | None, desk: _Desk
) -> bool:
    """Make room for a successor, once that could start (rule 5). A held container is left as the person wants it."""
    if hold is not None and hold.kind == "stopped" and instance.phase != "running":
        return False
    want = generation.app.containers[instance.container]
    obstacle = _unreached(generation.app, instance.container, desk) or _missing_network(want, desk, instance)
    if obstacle:
        desk.waiting[instance.key] = f"replaced when it can be: {obstacle}"
        return False
    _take_away(instance, f"{_listed(found)}; restarts {instance.key}", desk)
    return False


def _update(instance: Instance, generation: int, found: tuple[Change, ...], reason: str, desk: _Desk) -> None:
    desk.offer(
        UpdateInstance(
            app=instance.app,
            container=instance.container,
            instance=instance.id,
            generation=generation,
            changes=found,
            reason=reason,
        )
    )


def _stop(instance: Instance, reason: str, desk: _Desk) -> None:
    want = instance.want
    desk.offer(
        StopInstance(
            app=instance.app,
            container=instance.container,
            instance=instance.id,
            signal=want.stop_signal or "",
            grace=want.stop_grace_period,
            reason=reason,
        )
    )


def _take_away(instance: Instance, reason: str, desk: _Desk) -> None:
    """Stop, and on the next look remove."""
    if instance.phase == "running":
        _stop(instance, reason, desk)
    else:
        desk.offer(
            RemoveInstance(app=instance.app, container=instance.container, instance=instance.id, reason=reason)
        )


# -- an app, or a container, that is no longer wanted (rule 3) -----------------------------------------------


def _remove_app(app: str, desk: _Desk) -> None:
    for name in list(desk.by_app.get(app, {})):
        _retire(app, name, "the state no longer names the app", desk)
    if app in desk.by_app:
        return
    known = desk.history.generations.get(app, ())
    if _drop_volumes(app, None, desk) and known:
        desk.offer(ForgetApp(app=app, reason="nothing of it is left"))


def _retire(app: str, name: str, reason: str, desk: _Desk) -> None:
    dependents = [
        other.key
        for others in desk.by_app.get(app, {}).values()
        for other in others
        if name in other.want.depends_on and other.phase == "running" and not _wanted(other, desk)
    ]
    dependents += [
        each.key
        for other in sorted(_known_apps(desk) - desk.targets.keys())
        if app in _depends_on(other, desk)
        for found in desk.by_app.get(other, {}).values()
        for each in found
        if each.phase == "running"
    ]
    if dependents:
        desk.waiting[f"{app}/{name}"] = f"stops after {', '.join(sorted(dependents))}"
        return
    for instance in desk.by_app[app][name]:
        _take_away(instance, reason, desk)


def _wanted(instance: Instance, desk: _Desk) -> bool:
    target = desk.targets.get(instance.app)
    return target is not None and instance.container in target.app.containers


def _depends_on(app: str, desk: _Desk) -> tuple[str, ...]:
    known = desk.history.generations.get(app, ())
    return known[-1].app.depends_on if known else ()


def _drop_volumes(app: str, keep: App | None, desk: _Desk) -> bool:
    """Delete what generations marked on_remove = "delete" and the app no longer has; True when none is left."""
    kept = keep.volumes.keys() if keep else frozenset()
    doomed = sorted(
        {
            f"{app}/{name}"
            for generation in desk.history.generations.get(app, ())
            for name, volume in generation.app.volumes.items()
            if volume.on_remove == "delete" and name not in kept
        }
        & desk.observed.volumes.keys()
    )
    used = {mount.source for each in desk.observed.instances for mount in each.want.mounts if mount.kind == "volume"}
    for volume in doomed:
        if volume in used:
            desk.waiting[f"volume {volume}"] = "still mounted by a container of another app"
        else:
            desk.offer(
                RemoveVolume(app=app, volume=volume, reason='the state no longer names it, on_remove = "delete"')
            )
    return not doomed


# -- what a start waits for (rule 4) -------------------------------------------------------------------------


def _unreached(app: App, name: str, desk: _Desk) -> str:
    """Why a container of an app may not start yet, "" if it may."""
    for other, condition in app.containers[name].depends_on.items():
        if not _reached(app, other, condition, desk):
            return f"waits until {app.name}/{other} has {condition}"
    for needed in app.depends_on:
        target = desk.targets.get(needed)
        if needed in desk.unplaced:
            return f"waits for app {needed}"
        if target is not None:
            for other in target.app.containers:
                if not _reached(target.app, other, "started", desk):
                    return f"waits until {needed}/{other} has started"
    return ""


def _reached(app: App, name: str, condition: str, desk: _Desk) -> bool:
    instance = desk.newest(app.name, name)
    if instance is None or f"{app.name}/{name}" in desk.outdated:
        return False
    ended_well = instance.phase == "exited" and instance.exit is not None and instance.exit.code == 0
    return ended_well or (condition == "started" and instance.phase == "running")


def _missing_network(want: Container, desk: _Desk, instance: Instance | None = None) -> str:
    """The first network that does not stand as wanted, "" if all do. One that only the instance itself still holds
    in its old form is no obstacle to replacing that instance."""
    for network in want.networks:
        if network in UNMANAGED:
            continue
        state, spec = desk.observed.networks.get(network), _network_spec(network, desk)
        if state is None:
            return f"waits for network {network}"
        if instance is None and state.want != _network_digest(spec):
            return f"waits for network {network} to be made anew"
    return ""


# -- networks ------------------------------------------------------------------------------------------------


def _networks(desk: _Desk) -> None:
    wanted = {
        network
        for generation in desk.targets.values()
        for container in generation.app.containers.values()
        for network in container.networks
        if network not in UNMANAGED
    }
    for network in sorted(wanted):
        state, spec = desk.observed.networks.get(network), _network_spec(network, desk)
        owner = _owner(network)
        if state is None:
            desk.offer(EnsureNetwork(app=owner, network=network, spec=spec, reason="it is not there"))
        elif state.want != _network_digest(spec):
            if not desk.users.get(network):
                desk.offer(RemoveNetwork(app=owner, network=network, reason="its definition changed"))
        elif state.faults:
            desk.offer(EnsureNetwork(app=owner, network=network, spec=spec, reason="; ".join(state.faults)))
    for network in sorted(desk.observed.networks.keys() - wanted):
        if not desk.users.get(network):
            desk.offer(RemoveNetwork(app=_owner(network), network=network, reason="nothing uses it"))


def _network_spec(network: str, desk: _Desk) -> Network:
    """How a network is defined now; for one whose app is unknown here, as it was made."""
    owner, _, name = network.rpartition("/")
    target = desk.targets.get(owner)
    return target.app.networks.get(name, Network()) if target else Network()


def _network_digest(spec: Network) -> str:
    return digest_of(spec.model_dump(mode="json"))


def _network_changes(instance: Instance, generation: Generation, desk: _Desk) -> tuple[Change, ...]:
    """A network that is defined otherwise than it stands is made anew, and so is all that is attached to it."""
    return tuple(
        Change(f"network {network}", "as it stands", "as defined now", "replace")
        for network in instance.want.networks
        if (state := desk.observed.networks.get(network)) is not None
        and network in generation.app.containers[instance.container].networks
        and state.want != _network_digest(_network_spec(network, desk))
    )


def _owner(network: str) -> str:
    return network.rpartition("/")[0]


# -- what follows from what is there (rule 9) ----------------------------------------------------------------


def _derived(desk: _Desk) -> None:
    want = firewall_want(desk.observed, lambda instance: _published(instance, desk))
    if want != desk.observed.firewall and not (want.empty and desk.observed.firewall is None):
        desk.offer(WriteFirewall(app="", want=want, reason=_firewall_reason(want, desk.observed)))
    names = all_names(each for each in desk.observed.instances if each.phase in ("running", "creating"))
    stale = {
        each.id: names[each.id]
        for each in desk.observed.instances
        if each.phase == "running" and each.id in names and names[each.id].digest != each.names
    }
    if stale:
        desk.offer(WriteNames(app="", hosts=stale, reason=f"names of {len(stale)} containers' neighbours changed"))


def _published(instance: Instance, desk: _Desk) -> bool:
    answer = desk.verdicts.get(instance.id)
    return instance.phase == "running" or (answer is not None and answer.kind == "again")


def _firewall_reason(want: FirewallWant, observed: Observed) -> str:
    ports = sum(port.count for port in want.ports)
    content = f"{ports} published ports, {len(want.networks)} networks"
    return content if observed.firewall is not None else f"the table is not as written; {content}"


# -- words ---------------------------------------------------------------------------------------------------


def _held(key: str, hold: Hold) -> str:
    return f"{hold.kind} by hand{_by(hold)}; `holdfast release {key}` gives it back to the commit"


def _by(hold: Hold) -> str:
    return f" ({hold.by})" if hold.by else ""


def _listed(found: tuple[Change, ...]) -> str:
    return "; ".join(_worded(change) for change in found)


def _worded(change: Change) -> str:
    return f"image changed: {change.old} → {change.new}" if change.field == "image" else str(change)


def _update_reason(found: tuple[Change, ...], instance: Instance) -> str:
    tails = {"live": "applied live", "record": "noted, nothing restarts"}
    return "; ".join(
        f"{_worded(change)}; {tails.get(change.effect) or f'{instance.key} gets {change.effect.split()[-1]}'}"
        for change in found
    )


def _known_apps(desk: _Desk) -> set[str]:
    return desk.by_app.keys() | desk.history.generations.keys()


def _in_order(containers: Mapping[str, Container]) -> tuple[str, ...]:
    """Names so that what is depended on comes first; otherwise as the file has them."""
    done: dict[str, None] = {}

    def visit(name: str, above: frozenset[str]) -> None:
        if name in done or name in above or name not in containers:
            return
        for other in containers[name].depends_on:
            visit(other, above | {name})
        done[name] = None

    for name in containers:
        visit(name, frozenset())
    return tuple(done)
