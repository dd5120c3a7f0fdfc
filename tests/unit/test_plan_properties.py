"""What holds of every plan, whatever the revision asks for and whatever is found on the host.

Each number is a world, the same in every run: a valid revision, and a host and a history that a valid past need not
have led to. Instances of any generation in any phase, networks that stand otherwise than defined, holds, failures,
orphans, faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import pytest

from holdfast.observed import (
    Exit,
    Failure,
    Generation,
    History,
    Hold,
    Instance,
    InstanceId,
    NetworkState,
    Observed,
    Receipt,
    Subject,
    VolumeState,
)
from holdfast.plan.actions import Action, Plan, RemoveInstance, StartInstance, StopInstance
from holdfast.plan.decide import decide
from holdfast.plan.diff import mounted_files
from holdfast.plan.memory import Memory
from holdfast.plan.preview import World, expect, preview
from holdfast.spec.model import (
    App,
    Attachment,
    Container,
    Mount,
    Network,
    Resources,
    RestartPolicy,
    Spec,
    Volume,
)

Pick = Callable[[Sequence[Any]], Any]  # returns one of what it is given
NOW = 1000.0
WORLDS = 100
APPS = ("base", "mid", "top")
NAMES = ("db", "job", "web")


@dataclass(frozen=True)
class Drawn:
    """The arguments of `decide`."""

    spec: Spec | None
    observed: Observed
    history: History

    @property
    def bound(self) -> int:
        """How many rounds the road may have: a few for the app, and for each container to go and to come back."""
        wanted = sum(len(app.containers) for app in self.spec.apps.values()) if self.spec else 0
        return 8 + 4 * (wanted + len(self.observed.instances))


@dataclass(frozen=True)
class Step:
    """One round: the world it began in, and its plan."""

    world: World
    plan: Plan

    def instance(self, id: str | None) -> Instance | None:
        return next((each for each in self.world.observed.instances if each.id == id), None)


def draw_world(pick: Pick) -> Drawn:
    """A world, by a function that picks one of several values."""
    variants = {name: [draw_app(pick, name) for _ in range(2)] for name in APPS}
    generations: dict[str, tuple[Generation, ...]] = {}
    for name in APPS:
        known = tuple(
            draw_generation(pick, pick(variants[name]), number) for number in range(1, pick((0, 1, 2, 3)) + 1)
        )
        if known:
            generations[name] = known
    instances = tuple(draw_instances(pick, generations))
    keys = [f"{app}/{name}" for app in APPS for name in NAMES]
    wanted: dict[str, App] = {}
    for name in APPS:
        app = pick(variants[name])
        if set(app.depends_on) <= wanted.keys() and pick((True, True, True, False)):
            wanted[name] = app
    broken = {f"{name}.toml": name for name in APPS if name not in wanted and pick((True, False, False))}
    history = History(
        generations=generations,
        holds={
            key: Hold(kind=pick(("stopped", "started", "restarted")), at=pick((50.0, 990.0)))
            for key in keys
            if pick((False, False, False, False, True))
        },
        failures=dict(draw_failures(pick, wanted, keys)),
    )
    observed = Observed(
        instances=instances,
        networks=dict(draw_networks(pick, variants)),
        volumes={f"{app}/data": VolumeState(f"{app}/data", "managed") for app in APPS if pick((True, False))},
        orphans=tuple(
            found
            for found in (
                Receipt("netns", "x", "n1"),
                Receipt("network", "x", "base/front"),
                Receipt("volume", "x", "mid/data"),
                Receipt("firewall", "x", "f"),
            )
            if pick((False, False, True))
        ),
    )
    return Drawn(None if pick((True, *[False] * 9)) else Spec(apps=wanted, broken=broken), observed, history)


def draw_app(pick: Pick, name: str) -> App:
    """An app that depends on earlier apps only, with containers that depend on earlier containers only."""
    containers: dict[str, Container] = {}
    for each in NAMES:
        if pick((True, True, False)):
            containers[each] = draw_container(pick, name, list(containers))
    fronts = {"front": Network(internal=pick((True, False)))}
    volumes = {"data": Volume(on_remove=pick(("keep", "delete")))} if pick((True, False)) else {}
    needs = tuple(other for other in APPS[: APPS.index(name)] if pick((True, False)))
    return App(
        name=name,
        path=f"{name}.toml",
        depends_on=needs,
        containers=containers,
        networks=fronts,
        volumes=volumes,
        files={"f": pick(("aa", "bb"))},
    )


def draw_container(pick: Pick, app: str, earlier: list[str]) -> Container:
    network = pick(("none", "bridge", f"{app}/front", f"{app}/front", "base/front"))
    return Container(
        image=pick(("app:1", "app:2")),
        labels=pick(({}, {"a": "b"})),
        networks={network: Attachment()},
        mounts=pick(
            (
                (),
                (Mount(kind="file", source="f", target="/f", on_change=pick(("restart", "SIGHUP", "none"))),),
                (Mount(kind="volume", source=f"{app}/data", target="/data"),),
            )
        ),
        restart_policy=RestartPolicy(policy=pick(("no", "on-failure", "always")), max_attempts=pick((None, 2))),
        depends_on={other: pick(("started", "completed")) for other in earlier if pick((True, False))},
        resources=Resources(memory=pick((None, 1 << 20))),
    )


def draw_generation(pick: Pick, app: App, number: int) -> Generation:
    return Generation(
        app=app,
        number=number,
        state=pick(("staged", "active", "good")),
        images={name: pick((f"of {each.image}", "moved")) for name, each in app.containers.items()},
    )


def draw_instances(pick: Pick, generations: dict[str, tuple[Generation, ...]]) -> Iterator[Instance]:
    for known in generations.values():
        for generation in known:
            for name, want in generation.app.containers.items():
                if pick((True, False)):
                    yield draw_instance(pick, generation, name, want)


def draw_instance(pick: Pick, generation: Generation, name: str, want: Container) -> Instance:
    phase = pick(("creating", "running", "running", "running", "exited", "lost"))
    code = pick((0, 1, None))
    return Instance(
        id=InstanceId(f"{generation.app.name}-{generation.number}-{name}"),
        app=generation.app.name,
        container=name,
        generation=generation.number,
        want=want,
        image=pick((generation.images[name], generation.images[name], "older")),
        files=mounted_files(generation.app, want),
        phase=phase,
        created_at=float(generation.number),
        started_at=pick((None, 900.0, 999.0)),
        exit=Exit(code=code, at=999.5, asked=pick((False, True))) if phase == "exited" else None,
        streak=pick((0, 1, 2, 9)),
        addresses=pick(({}, dict.fromkeys(want.networks, "10.0.0.9"))),
        names=pick(("", "old")),
        faults=pick(((), (), ("its mount is gone",))),
        drifted=pick(((), (), ("its limit was altered",))),
    )


def draw_networks(pick: Pick, variants: dict[str, list[App]]) -> Iterator[tuple[str, NetworkState]]:
    for key in ("bridge", *(f"{name}/front" for name in APPS)):
        if pick((True, True, False)):
            made = pick((Network(), Network(internal=True)))
            data = pick(({}, {"interface": "br0", "subnet": "10.0.0.0/24", "internal": made.internal}))
            yield key, NetworkState(key, "bridge", made.digest, data, pick(((), (), ("its bridge is gone",))))


def draw_failures(pick: Pick, wanted: dict[str, App], keys: list[str]) -> Iterator[tuple[Subject, Failure]]:
    tried: dict[str, tuple[str, ...]] = {name: (app.digest, "another digest") for name, app in wanted.items()}
    tried |= dict.fromkeys(keys, ("StartInstance 1", "StartInstance 2", "another"))
    tried |= {f"network {name}/front": (Network().digest, "another") for name in APPS}
    for subject, digests in tried.items():
        if pick((False, False, False, False, False, True)):
            yield (
                Subject.parse(subject),
                Failure(pick(digests), "it failed", pick((1, 4)), 990.0, pick((None, 999.0, 1030.0))),
            )


def road(drawn: Drawn) -> list[Step]:
    """The rounds of `preview`, each with the world that it began in."""
    world, steps = World(drawn.observed, drawn.history), []
    for plan in preview(drawn.spec, drawn.observed, drawn.history, NOW, rounds=drawn.bound):
        steps.append(Step(world, plan))
        for action in plan.actions:
            world = expect(world, action, NOW)
    return steps


# -- the laws, each a list of what breaks it -----------------------------------------------------------------


def colliding(plan: Plan) -> list[str]:
    """Subjects that two actions of a plan share: they would meet in a lane."""
    subjects = [action.subject for action in plan.actions]
    return sorted({each for each in subjects if subjects.count(each) > 1})


def replaced_too_early(step: Step) -> list[Action]:
    """What is stopped for a successor that no staged generation holds."""
    found: list[Action] = []
    for action in step.plan.actions:
        if isinstance(action, StopInstance | RemoveInstance) and "; restarts " in action.reason:
            instance = step.instance(action.instance)
            assert instance is not None
            if not any(
                differs(instance, generation, step.world.observed)
                for generation in step.world.history.generations.get(action.app, ())
                if action.container in generation.app.containers
            ):
                found.append(action)
    return found


def differs(instance: Instance, generation: Generation, observed: Observed) -> bool:
    want = generation.app.containers[instance.container]
    return (
        want != instance.want
        or generation.images[instance.container] != instance.image
        or mounted_files(generation.app, want) != instance.files
        or any(network in observed.networks for network in want.networks)
    )


def started_too_early(step: Step, spec: Spec | None) -> list[str]:
    """First starts, and starts after a loss, whose dependencies have not been reached at that moment."""
    found = []
    for action in step.plan.actions:
        if not isinstance(action, StartInstance):
            continue
        again = step.instance(action.instance)
        if again is not None and again.phase != "lost":
            continue
        known = step.world.history.generations[action.app]
        app = next(each.app for each in known if each.number == action.generation)
        for other, condition in app.containers[action.container].depends_on.items():
            if not reached(step, app.name, other, condition):
                found.append(f"{action.subject} before {app.name}/{other}")
        for needed in app.depends_on:
            target = spec.apps.get(needed) if spec else None
            staged = target and any(
                each.app.digest == target.digest for each in step.world.history.generations.get(needed, ())[-1:]
            )
            if target and staged:
                found += [
                    f"{action.subject} before {needed}/{other}"
                    for other in target.containers
                    if not reached(step, needed, other, "started")
                ]
    return found


def reached(step: Step, app: str, name: str, condition: str) -> bool:
    found = [each for each in step.world.observed.instances if (each.app, each.container) == (app, name)]
    return any(
        (each.phase == "running" and condition == "started")
        or (each.phase == "exited" and each.exit is not None and each.exit.code == 0 and not each.exit.asked)
        for each in found
    )


def retired_too_early(steps: list[Step], spec: Spec | None) -> list[str]:
    """What is stopped for good while something that depends on it, and goes for good as well, still runs."""
    found = []
    for number, step in enumerate(steps):
        going = {action.subject for later in steps[number:] for action in retirements(later)}
        for action in retirements(step):
            found += [
                f"{action.subject} before {other.key}"
                for other in step.world.observed.instances
                if other.phase == "running" and other.key in going and needs(other, action, step, spec)
            ]
    return found


def retirements(step: Step) -> list[StopInstance]:
    stops = [action for action in step.plan.actions if isinstance(action, StopInstance)]
    return [action for action in stops if "no longer names" in action.reason]


def needs(other: Instance, action: StopInstance, step: Step, spec: Spec | None) -> bool:
    if other.app == action.app:
        return action.container in other.want.depends_on
    known = step.world.history.generations.get(other.app, ())
    gone = spec is not None and other.app not in spec.apps and other.app not in spec.broken.values()
    return gone and bool(known) and action.app in known[-1].app.depends_on


@pytest.fixture(params=range(WORLDS))
def drawn(request: pytest.FixtureRequest) -> Drawn:
    """Each of the worlds in turn."""
    return world(request.param)


@cache
def world(number: int) -> Drawn:
    return draw_world(Random(number).choice)


def test_every_road_ends_within_its_bound_and_then_there_is_nothing_to_do(drawn: Drawn) -> None:
    steps = road(drawn)
    assert steps[-1].plan.empty
    assert len(steps) <= drawn.bound
    rest = steps[-1].world
    assert decide(drawn.spec, rest.observed, rest.history, NOW).empty


def test_no_road_breaks_an_order(drawn: Drawn) -> None:
    steps = road(drawn)
    for step in steps:
        assert colliding(step.plan) == []
        assert replaced_too_early(step) == []
        assert started_too_early(step, drawn.spec) == []
    assert retired_too_early(steps, drawn.spec) == []


def test_one_world_has_one_plan(drawn: Drawn) -> None:
    first = decide(drawn.spec, drawn.observed, drawn.history, NOW)
    assert first == decide(drawn.spec, drawn.observed, drawn.history, NOW)


def test_an_unreadable_source_takes_no_app_away(drawn: Drawn) -> None:
    plan = decide(None, drawn.observed, drawn.history, NOW)
    assert not [action for action in plan.actions if "the state no longer names the app" in action.reason]


@pytest.mark.parametrize("number", range(WORLDS))
def test_a_plan_with_a_memory_is_the_plan_without(number: int) -> None:
    memory, first, second = Memory(), world(number), world(WORLDS + number)
    for each in (first, second, first):
        for step in road(each):
            observed, remembered = step.world.observed, step.world.history
            remembering = decide(each.spec, observed, remembered, NOW, memory)
            forgetful = decide(each.spec, observed, remembered, NOW)
            assert by_subject(remembering) == by_subject(forgetful)
            assert (remembering.waiting, remembering.drift, remembering.wake_at) == (
                forgetful.waiting, forgetful.drift, forgetful.wake_at
            )  # fmt: skip


def by_subject(plan: Plan) -> dict[Subject, Action]:
    return {action.subject: action for action in plan.actions}
