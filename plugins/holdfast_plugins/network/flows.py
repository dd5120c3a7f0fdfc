"""Tracked flows that no longer go where they should → gone. Called by `firewall` and `bridge`.

The kernel decides once for a flow where it goes. A UDP sender that never pauses keeps its flow alive, and with it a
decision that was right for a container which has been replaced, or wrong from the start because the port was not
published yet. So after each change of published ports the flows to these ports are compared with what the table says
now. TCP needs none of that: its next connection is a new flow, and what is open belongs to a process that goes on.

First the rules, then the flows, then the flows once more: a packet that was on its way while the rules changed may
have begun one after the first look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network

from holdfast.observed import FirewallWant, PublishedPort
from holdfast_plugins.network.conntrack import UDP, Conntrack, Flow
from holdfast_plugins.network.netlink import Sockets
from holdfast_plugins.network.rules import WILDCARDS

LOOKS = 2
SINGLY = 4  # so many ports are asked for one by one; for more, all flows of the protocol are

Target = tuple[str, int]
_sockets = Sockets()


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the table sends UDP. bound: (address, port) of the host → target; wildcard: port of any address."""

    bound: Mapping[Target, Target]
    wildcard: Mapping[int, Target]

    def of(self, address: str, port: int) -> Target | None:
        return self.bound.get((address, port)) or self.wildcard.get(port)


def targets(ports: Iterable[PublishedPort]) -> Targets:
    """The table's maps, as `rules` writes them."""
    bound: dict[Target, Target] = {}
    wildcard: dict[int, Target] = {}
    for port in ports:
        for step in range(port.count if port.protocol == UDP else 0):
            number, target = port.host_port + step, (port.address, port.container_port + step)
            if port.host_ip in WILDCARDS:
                wildcard[number] = target
            else:
                bound[port.host_ip, number] = target
    return Targets(bound, wildcard)


def changed_ports(old: Targets, new: Targets) -> frozenset[int]:
    """The ports of the host that lead elsewhere than before."""
    wildcard = {port for port in old.wildcard.keys() | new.wildcard.keys() if old.of("", port) != new.of("", port)}
    bound = {key for key in old.bound.keys() | new.bound.keys() if old.bound.get(key) != new.bound.get(key)}
    return frozenset(wildcard | {port for _, port in bound})


def all_ports(*several: Targets) -> frozenset[int]:
    """The ports of the host that are published."""
    return frozenset(port for each in several for port in (*each.wildcard, *(port for _, port in each.bound)))


def is_stale(flow: Flow, now: Targets, ours: Callable[[str], bool], local: Callable[[str], bool]) -> bool:
    """Whether a UDP flow goes elsewhere than the table says.

    ours: whether an address is on one of our networks. local: whether it is the host's own. What others have
    translated, and what the host forwards or answers itself where nothing is published, is not ours to judge.
    """
    if flow.translated and not ours(flow.answered_by):
        return False
    target = now.of(flow.to, flow.port)
    if target is None:
        return flow.translated
    return target != (flow.answered_by, flow.answering_port) and (flow.translated or local(flow.to))


def settle(conntrack: Conntrack, old: FirewallWant, new: FirewallWant, pool: str, *, altered: bool) -> None:
    """Delete the UDP flows that the change from old to new has made stale. The rules are in force already.

    altered: others have changed the table meanwhile, so that a flow to any port of it may have begun wrongly.
    """
    before, now = targets(old.ports), targets(new.ports)
    ports = all_ports(before, now) if altered else changed_ports(before, now)
    if not ports:
        return
    subnets = (each.subnet for want in (old, new) for each in want.networks)
    ours = _within((IPv4Network(pool), *map(IPv4Network, subnets)))
    local = _within(_sockets.host.local_subnets())
    for _ in range(LOOKS):
        asked: Iterable[int | None] = ports if len(ports) <= SINGLY else (None,)
        found = [flow for port in asked for flow in conntrack.to_port(UDP, port) if flow.port in ports]
        conntrack.delete(flow for flow in found if is_stale(flow, now, ours, local))


def vacate(conntrack: Conntrack, address: str) -> None:
    """Delete every flow that an address began or answers, before it goes to another owner."""
    for _ in range(LOOKS):
        conntrack.delete(conntrack.of_address(address))


def vacate_subnets(conntrack: Conntrack, subnets: Iterable[IPv4Network]) -> None:
    """Delete every flow that an address of these subnets began or answers."""
    within = _within(tuple(subnets))
    for _ in range(LOOKS):
        conntrack.delete(flow for flow in conntrack.all() if within(flow.source) or within(flow.answered_by))


def _within(networks: Iterable[IPv4Network]) -> Callable[[str], bool]:
    """Tell whether an address is in any of these networks; each address is looked up once."""
    ranges = [(int(network.network_address), int(network.netmask)) for network in networks]

    @cache
    def within(address: str) -> bool:
        number = int(IPv4Address(address))
        return any(number & mask == first for first, mask in ranges)

    return within
