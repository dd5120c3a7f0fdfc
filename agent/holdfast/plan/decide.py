"""The heart: one look at the world, and what to do next.

A plan holds everything that can be done *now*, side by side; what has to wait is named with its reason and is found
again by the next look. Nothing here does anything, reads a clock or knows where a value came from.

The rules, in the order in which they are applied:

 1. An app is brought to a generation only when that generation is staged: images on disk, drivers consulted.
    Until then, and when staging fails, the app is held at the generation it has; so it is while another app is
    held at one that publishes the same port.
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
    A clock that is set back makes nothing wait until it has caught up.
 9. The firewall and the hosts files are a function of what is there. What carries our id and has no receipt goes;
    what only has our name is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from holdfast.observed import (
    FirewallWant,
    Generation,
    History,
    Hold,
    Instance,
    Observed,
    Receipt,
    Subject,
    container_of,
)
from holdfast.plan.actions import (
    Change,
    EnsureVolume,
    ForgetApp,
    MarkGood,
    Plan,
    RemoveInstance,
    RemoveOrphan,
    RemoveVolume,
    StartInstance,
    StopInstance,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)
from holdfast.plan.derived import names_of, published_ports
from holdfast.plan.diff import changes, mounted_files, replaces, volume_changes
from holdfast.plan.draft import PlanDraft
from holdfast.plan.memory import Memory
from holdfast.plan.networks import is_outdated, joined, missing_network, network_changes, plan_networks
from holdfast.plan.reasons import by_hand, counted, firewall_reason, in_hand, listed, option_words, update_words
from holdfast.plan.restart import verdict
from holdfast.plan.targets import lacking_mounts, targets
from holdfast.spec.model import App, Spec, Volume

JOINS_WITHIN = 10.0  # seconds that the hosts files of others wait for a container that is being started
DEFAULT_VOLUME = Volume()


def decide(spec: Spec | None, observed: Observed, history: History, now: float, memory: Memory | None = None) -> Plan:
    """Say what to do next. spec None: the source can't be read, so every app stays at its generation.

    memory: of the caller's plan before, which makes this one cheaper and no other.
    """
    memory = memory or Memory()
    memory.follow(spec, observed, history)
    draft = PlanDraft(observed, history, now, memory)
    draft.targets = dict(targets(spec, draft))
    draft.stays_for = _stays_for(draft)
    draft.joining = joined(draft)
    _orphans(draft)
    moving = {name: each.app.depends_on for name, each in draft.targets.items() if name not in memory.apps}
    for app in _in_order(moving):
        subject, before = Subject("app", app), draft.said
        being_staged = subject in draft.subjects or subject in draft.waiting
        if _hold_app(app, draft) and draft.said == before and not being_staged:
            memory.rest_app(spec.apps.get(app) if spec else None, draft.targets[app], history)
    for app in sorted(draft.known_apps - draft.targets.keys() - draft.without_generation):
        _remove_app(app, draft)
    plan_networks(draft)
    _derived(draft)
    draft.waiting.update({Subject(each.title): str(each) for each in observed.missing})
    return draft.plan()


# -- an app that is wanted -----------------------------------------------------------------------------------


def _hold_app(app: str, draft: PlanDraft) -> bool:
    """Decide about one app; True when it is as it should be."""
    generation = draft.targets[app]
    before = len(draft.actions)
    resting, settled, fresh = draft.memory.resting_containers(generation), True, []
    containers = generation.app.containers
    for name in _in_order({name: each.depends_on for name, each in containers.items() if name not in resting}):
        said = draft.said
        held = _hold_container(generation, name, draft)
        settled &= held
        if held and draft.said == said:
            fresh.append(name)
    draft.memory.rest_containers(generation, resting, fresh, draft.history)
    for name in sorted(draft.by_app.get(app, {}).keys() - containers.keys()):
        settled = False
        _retire(app, name, "the state no longer names it", draft)
    _hold_volumes(generation, draft)
    if not settled or len(draft.actions) != before:
        return False
    _drop_volumes(app, generation.app, draft)
    if generation.state != "good":
        draft.offer(MarkGood(app=app, generation=generation.number, reason="every container runs as committed"))
    return True


def _hold_volumes(generation: Generation, draft: PlanDraft) -> None:
    """Bring the volumes of an app that are there to what it asks for. Those that are not are made by a start."""
    app = generation.app.name
    mounts = (mount for mounts in (generation.image_volumes or {}).values() for mount in mounts)
    defined = {mount.source: DEFAULT_VOLUME for mount in mounts}
    defined |= {f"{app}/{name}": spec for name, spec in generation.app.volumes.items()}
    for state in draft.volumes.get(app, ()):
        spec = defined.get(state.id) or defined.get(state.defined_as)
        if spec is None or state.asked is None or state.driver != spec.driver:
            continue
        if reasons := [*option_words(state.asked, spec.driver_opts), *state.faults]:
            draft.offer(EnsureVolume(app=app, volume=state.id, spec=spec, reason="; ".join(reasons)))


def _hold_container(generation: Generation, name: str, draft: PlanDraft) -> bool:
    """Decide about one container; True when it is as it should be."""
    app, want = generation.app.name, generation.app.containers[name]
    key, instance = f"{app}/{name}", draft.newest(app, name)
    hold = draft.history.holds.get(key)
    if hold is not None and (hold.kind == "stopped" or instance is None or _asked_since(instance, hold, draft)):
        draft.drift[key] = in_hand(key, hold)
    for older in draft.by_app.get(app, {}).get(name, ())[:-1]:
        _take_away(older, "a newer instance stands in its place", draft)
    if instance is None:
        if hold is None or hold.kind != "stopped":
            _start(generation, name, "it is not there", draft)
        return False
    if instance.phase == "creating" and key in draft.observed.busy:
        return False  # it is being started right now
    if instance.phase == "creating":
        draft.offer(
            RemoveInstance(app=app, container=name, instance=instance.id, reason="its start was interrupted half way")
        )
        return False
    found = changes(instance, want, generation.images.get(name, ""), mounted_files(generation.app, want))
    found += volume_changes(instance, generation)
    found += network_changes(instance, generation, draft)
    if replaces(found):
        draft.outdated.add(key)
        _replace(instance, generation, found, hold, draft)
        return False
    if instance.phase == "running":
        settled = _hold_running(instance, hold, draft)
    else:
        settled = _hold_exited(instance, generation, hold, draft)
    # Offered after what stops or starts it: that is more urgent, and a start brings these changes along.
    if found or (instance.phase == "running" and instance.drifted):
        _update(instance, generation.number, found, draft)
        return False
    return settled


def _hold_running(instance: Instance, hold: Hold | None, draft: PlanDraft) -> bool:
    overdue = hold is not None and hold.kind == "restarted" and _asked_since(instance, hold, draft)
    if hold is not None and (overdue or hold.kind == "stopped"):
        _stop(instance, by_hand(hold), draft)
    elif instance.faults:
        _stop(instance, "; ".join(instance.faults), draft)
    else:
        return True
    return False


def _asked_since(instance: Instance, hold: Hold, draft: PlanDraft) -> bool:
    """Whether a person has asked for a start since the last one."""
    return (instance.started_at or 0.0) < hold.at and not draft.ahead(hold)


def _hold_exited(instance: Instance, generation: Generation, hold: Hold | None, draft: PlanDraft) -> bool:
    key = instance.key
    if hold is not None and hold.kind == "stopped":
        return False
    if hold is not None and _asked_since(instance, hold, draft):
        _start(generation, instance.container, by_hand(hold), draft, again=instance)
        return False
    answer = verdict(instance, generation.app.containers[instance.container].restart_policy)
    draft.verdicts[instance.id] = answer
    match answer.kind:
        case "done":
            return True
        case "failed":
            draft.waiting[key] = answer.reason
        case "again" if answer.at > draft.now and not draft.ahead(instance.exit):
            draft.waiting[key] = f"back-off: {answer.reason}"
            draft.wakes.append(answer.at)
        case "again":
            _start(generation, instance.container, answer.reason, draft, again=instance, streak=answer.streak)
    return False


def _start(
    generation: Generation,
    name: str,
    reason: str,
    draft: PlanDraft,
    *,
    again: Instance | None = None,
    streak: int = 0,
) -> None:
    app = generation.app.name
    obstacle = missing_network(generation.app.containers[name], draft)
    obstacle = obstacle or lacking_mounts({name: generation.app.containers[name]}, draft)
    if again is None or again.host_went_down:
        obstacle = obstacle or _unreached(generation.app, name, draft)
    if obstacle:
        draft.waiting[container_of(app, name)] = obstacle
        return
    instance = again.id if again else None
    draft.offer(
        StartInstance(
            app=app, container=name, generation=generation.number, instance=instance, streak=streak, reason=reason
        )
    )


def _replace(
    instance: Instance, generation: Generation, found: tuple[Change, ...], hold: Hold | None, draft: PlanDraft
) -> None:
    """Make room for a successor, once that could start (rule 5). One stopped by hand is left as it lies, unless
    that keeps others from a network that has to be made anew."""
    in_the_way = any(is_outdated(network, draft) for network in instance.want.networks)
    if hold is not None and hold.kind == "stopped":
        if instance.phase == "running":
            _stop(instance, by_hand(hold), draft)
        elif in_the_way:
            _take_away(instance, listed(found), draft)
        return
    want = generation.app.containers[instance.container]
    obstacle = missing_network(want, draft, instance) or lacking_mounts({instance.container: want}, draft)
    if not in_the_way:  # else what it depends on may itself wait for the network that this one is attached to
        obstacle = obstacle or _unreached(generation.app, instance.container, draft)
    if obstacle:
        draft.waiting[instance.key] = f"replaced when it can be: {obstacle}"
        return
    _take_away(instance, f"{listed(found)}; restarts {instance.key}", draft)


def _update(instance: Instance, generation: int, found: tuple[Change, ...], draft: PlanDraft) -> None:
    draft.offer(
        UpdateInstance(
            app=instance.app,
            container=instance.container,
            instance=instance.id,
            generation=generation,
            changes=found,
            reason="; ".join([*update_words(found), *instance.drifted]),
        )
    )


def _stop(instance: Instance, reason: str, draft: PlanDraft) -> None:
    want = instance.want
    draft.offer(
        StopInstance(
            app=instance.app,
            container=instance.container,
            instance=instance.id,
            signal=want.stop_signal or "",
            grace=want.stop_grace_period,
            reason=reason,
        )
    )


def _take_away(instance: Instance, reason: str, draft: PlanDraft) -> None:
    """Stop, and on the next look remove."""
    if instance.phase == "running":
        _stop(instance, reason, draft)
    else:
        draft.offer(
            RemoveInstance(app=instance.app, container=instance.container, instance=instance.id, reason=reason)
        )


# -- an app, or a container, that is no longer wanted (rule 3) -----------------------------------------------


def _remove_app(app: str, draft: PlanDraft) -> None:
    for name in sorted(draft.by_app.get(app, {})):
        _retire(app, name, "the state no longer names the app", draft)
    if app in draft.by_app:
        return
    known = draft.history.generations.get(app, ())
    if _drop_volumes(app, None, draft) and known:
        draft.offer(ForgetApp(app=app, reason="nothing of it is left"))


def _retire(app: str, name: str, reason: str, draft: PlanDraft) -> None:
    dependents = {*draft.stays_for.get(f"{app}/{name}", ()), *draft.stays_for.get(app, ())}
    if dependents:
        draft.waiting[container_of(app, name)] = f"stops after {', '.join(sorted(dependents))}"
        return
    for instance in draft.by_app[app][name]:
        _take_away(instance, reason, draft)


def _stays_for(draft: PlanDraft) -> Mapping[str, list[str]]:
    """Container or app → the running containers that have to leave before it."""
    leaving = [
        each
        for app in sorted(draft.by_app.keys() - draft.memory.apps.keys() - draft.without_generation)
        for name in draft.by_app[app].keys() - (draft.targets[app].app.containers if app in draft.targets else ())
        for each in draft.by_app[app][name]
        if each.phase == "running"
    ]
    before: dict[str, list[str]] = {}
    for each in leaving:
        for name in each.want.depends_on:
            before.setdefault(f"{each.app}/{name}", []).append(each.key)
        if each.app not in draft.targets:
            for app in _depends_on(each.app, draft):
                before.setdefault(app, []).append(each.key)
    if all(each.key in before or each.app in before for each in leaving):
        return {}  # a ring, as containers of several commits can make: all of it at once
    return before


def _depends_on(app: str, draft: PlanDraft) -> tuple[str, ...]:
    known = draft.history.generations.get(app, ())
    return known[-1].app.depends_on if known else ()


def _drop_volumes(app: str, keep: App | None, draft: PlanDraft) -> bool:
    """Delete what the app no longer has and last defined with on_remove = "delete"; True when none is left."""
    kept = keep.volumes.keys() if keep else frozenset()
    last = {
        f"{app}/{name}": volume
        for generation in draft.history.generations.get(app, ())
        for name, volume in generation.app.volumes.items()
        if name not in kept
    }
    going = {key for key, volume in last.items() if volume.on_remove == "delete"}
    doomed = sorted(each.id for each in draft.volumes.get(app, ()) if {each.id, each.defined_as} & going)
    if not doomed:
        return True
    used = {mount.source for each in draft.observed.instances for mount in each.mounts if mount.kind == "volume"}
    for volume in doomed:
        if volume in used:
            draft.waiting[Subject.of("volume", volume)] = "still mounted by a container of another app"
        else:
            draft.offer(
                RemoveVolume(app=app, volume=volume, reason='the state no longer names it, on_remove = "delete"')
            )
    return False


# -- what a start waits for (rule 4) -------------------------------------------------------------------------


def _unreached(app: App, name: str, draft: PlanDraft) -> str:
    """Why a container of an app may not start yet, "" if it may."""
    for other, condition in app.containers[name].depends_on.items():
        if not _reached(app, other, condition, draft):
            return f"waits until {app.name}/{other} has {condition}{_so_far(app.name, other, draft)}"
    for needed in app.depends_on:
        target = draft.targets.get(needed)
        if needed in draft.without_generation:
            return f"waits for app {needed}"
        if target is not None:
            for other in target.app.containers:
                if not _reached(target.app, other, "started", draft):
                    return f"waits until {needed}/{other} has started{_so_far(needed, other, draft)}"
    return ""


def _so_far(app: str, name: str, draft: PlanDraft) -> str:
    """How the one that is waited for ended, if it did by itself."""
    instance = draft.newest(app, name)
    ended = instance.exit if instance is not None and instance.phase == "exited" else None
    return f" (it {ended})" if ended is not None and not ended.asked else ""


def _reached(app: App, name: str, condition: str, draft: PlanDraft) -> bool:
    instance = draft.newest(app.name, name)
    if instance is None or f"{app.name}/{name}" in draft.outdated:
        return False
    ended = instance.exit if instance.phase == "exited" else None
    completed = ended is not None and ended.code == 0 and not ended.asked
    return completed or (condition == "started" and instance.phase == "running")


# -- what follows from what is there (rule 9) ----------------------------------------------------------------


def _orphans(draft: PlanDraft) -> None:
    """First of all, so that a network that was left half made goes before it is made again. A table that was left is
    another matter: it is overwritten as long as there is anything to write (see `_derived`)."""
    for orphan in draft.observed.orphans:
        if orphan.kind != "firewall":
            _remove_orphan(orphan, draft)


def _remove_orphan(orphan: Receipt, draft: PlanDraft) -> None:
    draft.offer(
        RemoveOrphan(
            app="", receipt=orphan, reason=f"{orphan.kind} {orphan.id} carries our id and belongs to nothing"
        )
    )


def _derived(draft: PlanDraft) -> None:
    networks = draft.memory.firewall_networks(draft.observed.networks)
    want = FirewallWant(networks, published_ports(draft.observed, lambda instance: _published(instance, draft)))
    if want != draft.observed.firewall and not (want.empty and draft.observed.firewall is None):
        draft.offer(WriteFirewall(app="", want=want, reason=firewall_reason(want, draft.observed)))
    for orphan in draft.observed.orphans:
        if orphan.kind == "firewall" and want.empty:
            _remove_orphan(orphan, draft)
    _names(draft)


def _names(draft: PlanDraft) -> None:
    """Have the hosts files written whose networks have other members now. A network that a container is just about
    to join is left for when it has: one that is replaced comes back with the address that it had."""
    memory, joining = draft.memory, set(_about_to_join(draft))
    index = memory.index
    moved = None if index.moved is None else (index.moved | memory.unwritten) - joining
    readers = [
        each
        for each in (
            draft.observed.instances if moved is None or moved else map(index.by_id.__getitem__, index.fresh)
        )
        if (moved is None or each.id in index.fresh or not moved.isdisjoint(each.want.networks))
        and each.phase == "running"
        and any(each.addresses.values())
        and joining.isdisjoint(each.want.networks)
    ]
    known = memory.name_table(draft.observed.instances, {net for each in readers for net in each.want.networks})
    stale = {each.id: names for each in readers if (names := names_of(each, known)).digest != each.names}
    memory.unwritten = frozenset(net for each in readers if each.id in stale for net in each.want.networks) | joining
    if stale:
        reason = f"the neighbours of {counted(len(stale), 'container')} changed"
        draft.offer(WriteNames(app="", hosts=stale, reason=reason))


def _about_to_join(draft: PlanDraft) -> Iterator[str]:
    """The networks of containers whose first start is planned, or under way and not stuck."""
    for action in draft.actions:
        if isinstance(action, StartInstance) and action.instance is None:
            yield from draft.targets[action.app].app.containers[action.container].networks
    for subject in draft.observed.busy:
        instance = draft.newest(subject.app, subject.name) if subject.kind == "container" else None
        if instance is not None and instance.phase == "creating":
            until = instance.created_at + JOINS_WITHIN
            if draft.now < until:
                draft.wakes.append(until)
                yield from instance.want.networks


def _published(instance: Instance, draft: PlanDraft) -> bool:
    answer = draft.verdicts.get(instance.id)
    return instance.phase == "running" or (answer is not None and answer.kind == "again")


def _in_order(needs: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Names so that what is depended on comes first; otherwise in the order given. A ring is cut anywhere."""
    done: dict[str, None] = {}

    def visit(name: str, above: frozenset[str]) -> None:
        if name in done or name in above or name not in needs:
            return
        for other in needs[name]:
            visit(other, above | {name})
        done[name] = None

    for name in needs:
        visit(name, frozenset())
    return tuple(done)
