"""What only all state files together can tell: files that are missing, names that dangle or are taken, cycles.

Each check yields findings; a finding breaks the file that it stands in and no other. Of two files that want the same
port, address or subnet the one whose app has it already keeps it, else the first by path. Called by `load`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.grammar.images import built
from holdfast.grammar.network import unusable
from holdfast.spec.model import BUILTIN_NETWORKS, App, Network
from holdfast.spec.resolve import Draft
from holdfast.tables import Fault
from holdfast.toml import KeyPath, dotted
from holdfast.words import suggestion

Finding = tuple[Draft, Fault]

MOST_PORTS = 2 * 65535  # every port of both protocols


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a file's references may point at.

    here: the apps of this node. elsewhere: names of apps that `when` gives to other nodes. broken: names of apps that
    did not load, of which nothing is known, so that what points at them passes.
    """

    here: Mapping[str, Draft]
    elsewhere: frozenset[str] = frozenset()
    broken: frozenset[str] = field(default_factory=frozenset)


def place(draft: Draft, path: KeyPath) -> str:
    """Return a key path with its file and line, as findings name the other side."""
    return f"{dotted(draft.document.written(path))} ({draft.app.path}:{draft.document.line(path)})"


def duplicate_names(drafts: Iterable[Draft]) -> Iterator[Finding]:
    """Find files whose apps have the same name: neither can be preferred, so both are refused."""
    by_name: dict[str, list[Draft]] = {}
    for draft in drafts:
        by_name.setdefault(draft.app.name, []).append(draft)
    for name, several in by_name.items():
        for draft in several if len(several) > 1 else []:
            others = ", ".join(
                f"{other.app.path}:{other.document.line(('app', 'name'))}" for other in several if other is not draft
            )
            message = f"'{name}' is the name of the app in {others} too (expected another name)"
            yield draft, Fault(("app", "name"), message)


def missing_files(draft: Draft, lacks: Callable[[str], str], is_there: Callable[[str], bool]) -> Iterator[Finding]:
    """Find mounted paths that the revision lacks, or part of them. lacks: what is left out of a path, and why."""
    for path, wanted in draft.wanted.items():
        if lack := lacks(wanted):
            yield draft, Fault(path, f"'{wanted}' {lack}")
        elif not is_there(wanted):
            yield draft, Fault(path, f"'{wanted}' is not in this revision (expected a file or directory)")


def dangling(draft: Draft, around: Neighbours) -> Iterator[Finding]:
    """Find references to apps, networks and volumes that no file defines."""
    app = draft.app
    for other in app.depends_on:
        if wrong := _unknown_app(other, around):
            yield draft, Fault(("app", "depends_on", other), wrong)
    for name, container in app.containers.items():
        image = built(container.image or "")
        joined = [each for each in container.networks if each not in BUILTIN_NETWORKS]
        places: list[tuple[str, str, KeyPath]] = [
            *([("image", image, ("image",))] if image else ()),
            *(("network", each, ("networks", _as_written(each, app))) for each in joined),
            *(("volume", m.source, ("volumes", i)) for i, m in enumerate(container.mounts) if m.kind == "volume"),
        ]
        for kind, reference, path in places:
            if wrong := unknown(reference, draft, kind, around):
                yield draft, Fault(("containers", name, *path), wrong)


def _as_written(qualified: str, app: App) -> str:
    return qualified.removeprefix(f"{app.name}/")


def _unknown_app(name: str, around: Neighbours) -> str:
    if name in around.here or name in around.broken:
        return ""
    if name in around.elsewhere:
        return f"app '{name}' is not for this node (expected one whose `when` this node meets)"
    return f"no app is called '{name}'" + (suggestion(name, around.here) or " (expected the name of a state file)")


def unknown(qualified: str, asking: Draft, kind: str, around: Neighbours) -> str:
    """Say what is wrong with a reference to a network, volume or image; "" if nothing is."""
    owner, _, name = qualified.partition("/")
    if owner != asking.app.name:
        if owner in around.broken:
            return ""
        if wrong := _unknown_app(owner, around):
            also = {
                "volume": "; a path of the repository begins with ./",
                "image": f"; one of a registry is written with its tag, images.{qualified}:latest",
            }
            return f"'{qualified}': {wrong}{also.get(kind, '')}"
    draft = asking if owner == asking.app.name else around.here[owner]
    known = draft.names(f"{kind}s")
    if name in known:
        return ""
    builtin = BUILTIN_NETWORKS if kind == "network" else ()
    near = suggestion(name, [*known, *builtin]) or f" (expected [{kind}s.{name}] in {draft.app.path})"
    return f"no {kind} of app '{owner}' is called '{name}'{near}"


def cycles_of_containers(draft: Draft) -> Iterator[Finding]:
    """Find containers that wait for each other."""
    edges = {name: tuple(container.depends_on) for name, container in draft.app.containers.items()}
    for cycle in cycles(edges):
        path = ("containers", cycle[0], "depends_on", cycle[1])
        yield draft, Fault(path, f"a cycle: {' → '.join(cycle)} (leave out one of them)")


def cycles_of_apps(drafts: Mapping[str, Draft]) -> Iterator[Finding]:
    """Find apps that wait for each other; each of them gets a finding."""
    for turned in turns({name: draft.app.depends_on for name, draft in drafts.items()}):
        path = ("app", "depends_on", turned[1])
        yield drafts[turned[0]], Fault(path, f"a cycle: {' → '.join(turned)} (leave out one of them)")


def turns(edges: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    """Yield every cycle as each node of it sees it: it begins and ends there."""
    for cycle in cycles(edges):
        for index in range(len(cycle) - 1):
            yield [*cycle[index:-1], *cycle[: index + 1]]


def cycles(edges: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    """Yield every cycle that a depth-first walk finds, closed (first node = last node). No recursion."""
    done: set[str] = set()
    for start in edges:
        if start in done:
            continue
        trail: dict[str, Iterator[str]] = {start: iter(edges[start])}
        while trail:
            node, rest = next(reversed(trail.items()))
            following = next(rest, None)
            if following is None:
                done.add(node)
                del trail[node]
            elif following in trail:
                way = list(trail)
                yield [*way[way.index(following) :], following]
            elif following in edges and following not in done:
                trail[following] = iter(edges[following])


def networks_of(drafts: Iterable[Draft]) -> dict[str, Network]:
    """Return every network that these files define, by its qualified name."""
    return {f"{draft.app.name}/{name}": net for draft in drafts for name, net in draft.app.networks.items()}


def claims_of(app: App) -> set[str]:
    """Return everything that only one app of a node can have, as text that can be compared."""
    ports = {str(port) for container in app.containers.values() for port in container.ports}
    subnets = {str(network.subnet) for network in app.networks.values() if network.subnet}
    addresses = {
        f"{attachment.ipv4_address} of {network}"
        for container in app.containers.values()
        for network, attachment in container.networks.items()
        if attachment.ipv4_address
    }
    return ports | subnets | addresses


def newcomer(app: App, in_force: App | None) -> int:
    """Return how much of what an app claims is new: 0 nothing, 1 some of it, 2 all of it."""
    wanted = claims_of(app)
    had = claims_of(in_force) & wanted if in_force else set()
    return 0 if had == wanted else 1 if had else 2


class Claims:
    """Who has which host port, static address and subnet of this node; files are let in one by one."""

    def __init__(self) -> None:
        self.ports: dict[tuple[str, int], list[tuple[str, Draft, KeyPath]]] = {}
        self.addresses: dict[tuple[str, str], tuple[Draft, KeyPath]] = {}
        self.subnets: list[tuple[ipaddress.IPv4Network, Draft, KeyPath]] = []

    def claim(self, draft: Draft, networks: Mapping[str, Network]) -> list[Finding]:
        """Note what a file claims, or say who has it already. What a refused file claims does not count."""
        return [*self.claim_subnets(draft), *self.claim_ports(draft), *self.claim_addresses(draft, networks)]

    def claim_subnets(self, draft: Draft) -> Iterator[Finding]:
        for name, network in draft.app.networks.items():
            if network.subnet is None:
                continue
            path: KeyPath = ("networks", name, "subnet")
            subnet = ipaddress.IPv4Network(network.subnet)
            if taken := next((each for each in self.subnets if subnet.overlaps(each[0])), None):
                message = f"'{subnet}' overlaps {taken[0]} of {place(*taken[1:])} (expected a range of its own)"
                yield draft, Fault(path, message)
            self.subnets.append((subnet, draft, path))

    def claim_ports(self, draft: Draft) -> Iterator[Finding]:
        claimed = 0
        for name, container in draft.app.containers.items():
            for index, port in enumerate(container.ports):
                path: KeyPath = ("containers", name, "ports", index)
                numbers = range(port.host_port, port.host_port + port.count)
                held = ((number, *each) for number in numbers for each in self.ports.get((port.protocol, number), ()))
                if taken := next((each for each in held if not port.host_ip or each[1] in ("", port.host_ip)), None):
                    what = f"host port {taken[0]}/{port.protocol} is taken by {place(*taken[2:])}"
                    yield draft, Fault(path, f"'{port}': {what} (expected a free one)")
                    continue
                claimed += port.count
                if claimed > MOST_PORTS:
                    yield draft, Fault(path, f"'{port}': too many ports for one app (expected at most {MOST_PORTS})")
                    return
                for number in numbers:
                    self.ports.setdefault((port.protocol, number), []).append((port.host_ip, draft, path))

    def claim_addresses(self, draft: Draft, networks: Mapping[str, Network]) -> Iterator[Finding]:
        for name, container in draft.app.containers.items():
            for key, attachment in container.networks.items():
                if attachment.ipv4_address is None:
                    continue
                path: KeyPath = ("containers", name, "networks", _as_written(key, draft.app), "ipv4_address")
                if wrong := self.address_wrong(attachment.ipv4_address, key, networks):
                    yield draft, Fault(path, wrong)
                self.addresses.setdefault((key, attachment.ipv4_address), (draft, path))

    def address_wrong(self, address: str, key: str, networks: Mapping[str, Network]) -> str:
        network = networks.get(key)
        if network is None and key not in BUILTIN_NETWORKS:
            return ""  # its app did not load
        if network is None or network.subnet is None:
            return f"'{address}': network '{key}' names no subnet (expected subnet in its table)"
        subnet = ipaddress.IPv4Network(network.subnet)
        if reason := unusable(address, subnet):
            return reason
        if address == (network.gateway or str(subnet[1])):
            return f"'{address}' is the gateway of network '{key}' (expected another address of {subnet})"
        if (key, address) in self.addresses:
            owner = place(*self.addresses[key, address])
            return f"'{address}' of network '{key}' is taken by {owner} (expected a free address of {subnet})"
        return ""
