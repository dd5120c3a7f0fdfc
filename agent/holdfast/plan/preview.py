"""The whole road: `decide` applied to its own expected effects until nothing is left to do.

`holdfast plan` prints it, so what it prints is what will run; the property tests walk it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, assert_never

from holdfast.observed import Exit, Generation, History, Instance, InstanceId, NetworkState, Observed, free_slot
from holdfast.plan.actions import (
    Action,
    EnsureNetwork,
    EnsureVolume,
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
from holdfast.plan.decide import decide
from holdfast.plan.derived import name_table, names_of
from holdfast.plan.diff import mounted_files
from holdfast.plan.memory import Memory
from holdfast.spec.model import App, Container, Network, Spec

ROUNDS = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The two values that change when an action is done."""

    observed: Observed
    history: History


def preview(
    spec: Spec | None, observed: Observed, history: History, now: float, *, rounds: int = ROUNDS
) -> tuple[Plan, ...]:
    """Every plan from here to rest; the last one is empty and says what still waits. Touches nothing."""
    world, plans, memory = World(observed, history), [], Memory()
    for _ in range(rounds):
        plan = decide(spec, world.observed, world.history, now, memory)
        plans.append(plan)
        if plan.empty:
            break
        for action in plan.actions:
            world = expect(world, action, now)
    return tuple(plans)


def expect(world: World, action: Action, now: float) -> World:
    """The world after an action that went well."""
    observed, history = world.observed, world.history
    match action:
        case StageGeneration(spec=app, images=images):
            return World(observed, _staged(history, app, images, now))
        case EnsureNetwork(network=network, spec=spec, hosts=hosts):
            known = observed.networks.get(network)
            data = dict(known.data) if known else _guessed_link(network, spec)
            if data.get("hosts", hosts) < hosts:
                data["hosts"] = hosts
            data["joined"] = hosts
            state = NetworkState(network, spec.driver, spec.digest, data)
            return World(replace(observed, networks={**observed.networks, network: state}), history)
        case RemoveNetwork(network=network):
            return World(replace(observed, networks=_without(observed.networks, network)), history)
        case StartInstance():
            instance, active = _started(world, action, now)
            others = tuple(each for each in observed.instances if each.id != instance.id)
            told = names_of(instance, name_table((*others, instance), instance.want.networks))
            instance = replace(instance, names=told.digest)
            return World(replace(observed, instances=(*others, instance)), _marked(history, active, "active"))
        case StopInstance(instance=id):
            ended = Exit(code=0, at=now, asked=True)
            return _instance(world, id, phase="exited", exit=ended, pid=None)
        case UpdateInstance(instance=id):
            generation = _generation(history, action.app, action.generation)
            want = generation.app.containers[action.container]
            updated = _instance(
                world,
                id,
                want=want,
                image=generation.images.get(action.container, ""),
                files=mounted_files(generation.app, want),
                generation=generation.number,
                drifted=(),
            )
            return World(updated.observed, _marked(history, generation, "active"))
        case RemoveInstance(instance=id):
            left = tuple(each for each in observed.instances if each.id != id)
            return World(replace(observed, instances=left), history)
        case EnsureVolume(volume=volume, spec=definition):
            changed = replace(observed.volumes[volume], asked=definition.driver_opts, faults=())
            return World(replace(observed, volumes={**observed.volumes, volume: changed}), history)
        case RemoveVolume(volume=volume):
            return World(replace(observed, volumes=_without(observed.volumes, volume)), history)
        case MarkGood(generation=number):
            return World(observed, _marked(history, _generation(history, action.app, number), "good"))
        case ForgetApp(app=app):
            holds = {key: hold for key, hold in history.holds.items() if not key.startswith(f"{app}/")}
            return World(observed, replace(history, generations=_without(history.generations, app), holds=holds))
        case WriteFirewall(want=want):
            return World(replace(observed, firewall=None if want.empty else want), history)
        case WriteNames(hosts=hosts):
            named = tuple(
                replace(each, names=hosts[each.id].digest) if each.id in hosts else each
                for each in observed.instances
            )
            return World(replace(observed, instances=named), history)
        case RemoveOrphan(receipt=receipt):
            orphans = tuple(each for each in observed.orphans if each != receipt)
            return World(replace(observed, orphans=orphans), history)
        case _:
            assert_never(action)


def _staged(history: History, app: App, images: Mapping[str, str], now: float) -> History:
    pinned = {name: reference.rpartition("@")[2] for name, reference in images.items()}
    known = history.generations.get(app.name, ())
    number = known[-1].number + 1 if known else 1
    generation = Generation(
        app=app, number=number, state="staged", images=_guessed(app, known) | pinned, newer=images, staged_at=now
    )
    return replace(history, generations={**history.generations, app.name: (*known, generation)})


def _guessed(app: App, known: tuple[Generation, ...]) -> dict[str, str]:
    """Image digests as they will be unless a tag has moved: those of the same references in the newest generation."""
    newest = known[-1] if known else None
    seen = (
        {
            newest.app.containers[name].image: digest
            for name, digest in (newest.images.items() if newest else ())
            if name in newest.app.containers
        }
        if newest
        else {}
    )
    return {
        name: seen.get(want.image, f"of {want.image}") if want.image else f"rootfs:{want.rootfs}"
        for name, want in app.containers.items()
    }


def _started(world: World, action: StartInstance, now: float) -> tuple[Instance, Generation]:
    generation = _generation(world.history, action.app, action.generation)
    want = generation.app.containers[action.container]
    known = next((each for each in world.observed.instances if each.id == action.instance), None)
    slot = known.slot if known else free_slot(world.observed.instances, action.app, action.container)
    ends = _is_job(generation.app, action.container, want)
    instance = Instance(
        id=known.id if known else InstanceId(f"new {action.app}/{action.container}"),
        app=action.app,
        container=action.container,
        generation=generation.number,
        want=want,
        image=generation.images.get(action.container, ""),
        image_volumes=generation.volumes_of(action.container, slot),
        files=mounted_files(generation.app, want),
        phase="exited" if ends else "running",
        created_at=known.created_at if known else now,
        started_at=now,
        exit=Exit(code=0, at=now) if ends else None,
        restarts=known.restarts + 1 if known else 0,
        streak=action.streak,
        slot=slot,
        addresses=known.addresses if known else _guessed_addresses(world.observed, action, want),
    )
    return instance, generation


def _guessed_link(network: str, spec: Network) -> dict[str, Any]:
    """What the driver will say of a network: a bridge has a link and a subnet; of others nothing is known."""
    if spec.driver != "bridge":
        return {}
    return {"interface": f"of {network}", "subnet": spec.subnet or f"of {network}", "internal": spec.internal}


def _guessed_addresses(observed: Observed, action: StartInstance, want: Container) -> dict[str, str]:
    """An address on every network that gives some: which one, only the start will tell."""
    return {
        network: f"of {action.app}/{action.container}"
        for network in want.networks
        if (state := observed.networks.get(network)) and state.data.get("subnet")
    }


def _is_job(app: App, name: str, want: Container) -> bool:
    """Whether a container is expected to end: another one waits for that."""
    return want.restart_policy.policy in ("no", "on-failure") and any(
        other.depends_on.get(name) == "completed" for other in app.containers.values()
    )


def _instance(world: World, id: InstanceId, **fields: object) -> World:
    changed = tuple(
        replace(each, **fields) if each.id == id else each  # type: ignore[arg-type]
        for each in world.observed.instances
    )
    return World(replace(world.observed, instances=changed), world.history)


def _generation(history: History, app: str, number: int) -> Generation:
    return next(each for each in history.generations[app] if each.number == number)


def _marked(history: History, generation: Generation, state: str) -> History:
    if generation.state == "good" or generation.state == state:
        return history
    known = tuple(
        replace(each, state=state) if each.number == generation.number else each  # type: ignore[arg-type]
        for each in history.generations[generation.app.name]
    )
    return replace(history, generations={**history.generations, generation.app.name: known})


def _without(mapping: Mapping[str, T], key: str) -> dict[str, T]:
    return {name: value for name, value in mapping.items() if name != key}
