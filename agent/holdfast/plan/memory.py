"""What one plan leaves for the next: the apps, containers and networks that were at rest, and what they rested on.

From one pass to the next nearly everything is the same object. What was at rest, and rests on the same objects, is at
rest still, and `decide` passes it over: a plan costs what has changed. Nothing else is remembered, so a plan that is
made without a memory is the same plan (`tests/unit/test_plan_properties.py` compares them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from holdfast.observed import FirewallNetwork, Generation, History, Instance, InstanceId, NetworkState, Observed
from holdfast.plan.actions import Names
from holdfast.plan.derived import NameTable, firewall_networks, name_table
from holdfast.spec.model import App, Container, Mount, Spec

UNMANAGED = frozenset({"none", "host"})  # networks that nobody makes
Containers = Mapping[str, list[Instance]]


@dataclass(frozen=True, slots=True)
class Index:
    """Instances by id, and by app and container, oldest first.

    fresh: those that are others than in the index before. moved: the networks whose members, or what these are
    called, may be others than before; None where there was no index.
    """

    by_id: Mapping[InstanceId, Instance] = field(default_factory=dict)
    by_app: Mapping[str, Containers] = field(default_factory=dict)
    fresh: frozenset[InstanceId] = frozenset()
    moved: frozenset[str] | None = None

    def follow(self, instances: Iterable[Instance]) -> Index:
        """The index of these instances: only what differs is looked at."""
        by_id = {each.id: each for each in instances}
        fresh = [each for id, each in by_id.items() if self.by_id.get(id) is not each]
        stale = [self.by_id[each.id] for each in fresh if each.id in self.by_id]
        stale += [self.by_id[id] for id in self.by_id.keys() - by_id.keys()]
        changed: dict[str, dict[str, set[InstanceId]]] = {}
        for each in (*fresh, *stale):
            changed.setdefault(each.app, {}).setdefault(each.container, set()).add(each.id)
        by_app = dict(self.by_app)
        for app, names in changed.items():
            there = dict(by_app.pop(app, {}))
            for name, ids in names.items():
                ids.update(each.id for each in there.pop(name, ()))
                found = [by_id[id] for id in ids if id in by_id]
                if found:
                    there[name] = sorted(found, key=lambda each: (each.created_at, each.id))
            if there:
                by_app[app] = there
        moved = {
            network
            for each in (*fresh, *stale)
            if not _is_called_the_same(self.by_id.get(each.id), by_id.get(each.id))
            for network in (*each.want.networks, *each.addresses)
        }
        known = frozenset(moved) if self.by_id else None
        return Index(by_id, by_app, frozenset(each.id for each in fresh), known)


def _is_called_the_same(before: Instance | None, after: Instance | None) -> bool:
    """Whether an instance has kept its addresses and its names."""
    return (
        before is not None
        and after is not None
        and (before.addresses, before.want.networks) == (after.addresses, after.want.networks)
    )


@dataclass(frozen=True, slots=True)
class RestingApp:
    """An app that nothing was to be done for. owners: the other apps whose networks it joins."""

    wanted: App | None
    known: tuple[Generation, ...]
    there: Containers
    generation: Generation
    owners: frozenset[str]


@dataclass(frozen=True, slots=True)
class RestingContainer:
    """A container that nothing was to be done for."""

    instance: Instance
    want: Container
    image: str
    image_volumes: tuple[Mount, ...] | None


@dataclass(slots=True)
class Memory:
    """What is kept. It belongs to one caller that makes one plan after the other.

    networks: network → its state, how many containers join it, and the app that defines it. joined: app → the
    network of each attachment of its containers. joining: network → how many containers join it. names: network →
    app → what hosts files say of its members. unwritten: networks whose hosts files may be out of date.
    """

    index: Index = field(default_factory=Index)
    shared: tuple[object, ...] = ()
    apps: dict[str, RestingApp] = field(default_factory=dict)
    containers: dict[str, tuple[App, dict[str, RestingContainer]]] = field(default_factory=dict)
    networks: dict[str, tuple[NetworkState, int, str]] = field(default_factory=dict)
    joined: dict[str, tuple[App, list[str]]] = field(default_factory=dict)
    joining: Counter[str] = field(default_factory=Counter)
    names: dict[str, dict[str, Names]] = field(default_factory=dict)
    firewall: tuple[Mapping[str, NetworkState], tuple[FirewallNetwork, ...]] = field(default_factory=lambda: ({}, ()))
    unwritten: frozenset[str] = frozenset()

    def follow(self, spec: Spec | None, observed: Observed, history: History) -> None:
        """Go on to another world: forget what does not rest on the same objects any more."""
        self.index = self.index.follow(observed.instances)
        for network in self.names.keys() & (self.names if self.index.moved is None else self.index.moved):
            del self.names[network]
        shared = (
            spec is None, observed.networks, observed.volumes, observed.lacking,
            history.holds, history.failures, history.newer,
        )  # fmt: skip
        if shared != self.shared:
            self.apps.clear()
            self.containers.clear()
            self.networks.clear()
        self.shared = shared
        wanted, known, there = spec.apps if spec else {}, history.generations, self.index.by_app
        gone = [
            name
            for name, app in self.apps.items()
            if app.wanted is not wanted.get(name)
            or app.known is not known.get(name)
            or app.there is not there.get(name)
        ]
        while gone:  # and whoever joins their networks
            for name in gone:
                del self.apps[name]
            gone = [name for name, app in self.apps.items() if app.owners and not app.owners <= self.apps.keys()]
        for name in self.containers.keys() - known.keys():
            del self.containers[name]

    def resting_containers(self, generation: Generation) -> set[str]:
        """The containers of an app that are as they were when nothing was to be done for them."""
        app, kept = self.containers.get(generation.app.name, (generation.app, {}))
        if app is not generation.app and (app.files, app.networks) != (generation.app.files, generation.app.networks):
            return set()
        there, images = self.index.by_app.get(app.name, {}), generation.images
        single = {name: each[0] for name, each in there.items() if len(each) == 1}
        wants, volumes = generation.app.containers, generation.image_volumes or {}
        return {
            name
            for name, each in kept.items()
            if each.want is wants.get(name)
            and each.instance is single.get(name)
            and each.image == images.get(name, "")
            and each.image_volumes == volumes.get(name)
        }

    def rest_app(self, wanted: App | None, generation: Generation, history: History) -> None:
        """Note that nothing was to be done for an app. One that builds images or that a person holds is not noted:
        there is more to look at."""
        app = generation.app
        if app.images or any(key.startswith(f"{app.name}/") for key in history.holds):
            return
        owners = frozenset(network.rpartition("/")[0] for network in self.joined[app.name][1]) - {"", app.name}
        known, there = history.generations[app.name], self.index.by_app.get(app.name)
        if there is not None:
            self.apps[app.name] = RestingApp(wanted, known, there, generation, owners)

    def rest_containers(
        self, generation: Generation, still: set[str], fresh: Iterable[str], history: History
    ) -> None:
        """Note for which containers of an app nothing was to be done: still: as before; fresh: by now, too."""
        app, volumes = generation.app, generation.image_volumes or {}
        _, before = self.containers.get(app.name, (app, {}))
        kept = {name: each for name, each in before.items() if name in still}
        for name in fresh:
            want, there = app.containers[name], self.index.by_app[app.name][name]
            own = all(network.rpartition("/")[0] in ("", app.name) for network in want.networks)
            if own and len(there) == 1 and f"{app.name}/{name}" not in history.holds:
                kept[name] = RestingContainer(there[0], want, generation.images.get(name, ""), volumes.get(name))
        self.containers[app.name] = (app, kept)

    def firewall_networks(self, states: Mapping[str, NetworkState]) -> tuple[FirewallNetwork, ...]:
        """What the firewall is to know of these networks."""
        if self.firewall[0] != states:
            self.firewall = (states, firewall_networks(states.values()))
        return self.firewall[1]

    def count_joining(self, apps: Iterable[App]) -> Mapping[str, int]:
        """Count the containers that join each network. Only apps that have changed are gone through."""
        held = {app.name: app for app in apps}
        for name in [name for name, (app, _) in self.joined.items() if held.get(name) is not app]:
            self.joining -= Counter(self.joined.pop(name)[1])
        for name in held.keys() - self.joined.keys():
            joined = [net for want in held[name].containers.values() for net in want.networks if net not in UNMANAGED]
            self.joined[name] = held[name], joined
            self.joining.update(joined)
        return self.joining

    def name_table(self, instances: Iterable[Instance], networks: set[str]) -> NameTable:
        """Say who is called what on each of these networks. Only those with other members are gone through."""
        changed = networks - self.names.keys()
        self.names |= {network: {} for network in changed}
        for (network, app), found in name_table(instances, changed).items():
            self.names[network][app] = found
        return {(network, app): found for network in networks for app, found in self.names[network].items()}
