"""Delete tracked flows that no longer go where the rules send them. Called by `firewall`, `bridge` and `endpoint`.

The kernel decides once for each flow where it goes. A UDP sender that never pauses keeps its flow, and with it a
decision for a container that was replaced, or for a port that was not published yet. So after each change of
published ports the flows to these ports are compared with the table. TCP does not need this: its next connection is a
new flow.

First the rules are changed, then the flows are compared twice: a packet that was on its way while the rules changed
may have begun a flow after the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from ipaddress import IPv4Address, IPv4Network

from holdfast.observed import FirewallWant, PublishedPort
from holdfast_plugins.network.conntrack import UDP, Conntrack, Flow
from holdfast_plugins.network.netlink import sockets
from holdfast_plugins.network.rules import WILDCARDS

LOOKS = 2
SINGLY = 4  # up to so many ports are asked for one by one; for more, all flows of the protocol are listed

Target = tuple[str, int]
Targets = Mapping[Target, Target]


def targets(ports: Iterable[PublishedPort]) -> Targets:
    """Where the maps of the table, as `rules` writes them, send UDP: (address, "" for any, and port) → target."""
    return {
        ("" if port.host_ip in WILDCARDS else port.host_ip, port.host_port + step): (
            port.address,
            port.container_port + step,
        )
        for port in ports
        if port.protocol == UDP
        for step in range(port.count)
    }


def changed_ports(old: Targets, new: Targets) -> frozenset[int]:
    """The ports of the host whose target has changed."""
    return frozenset(port for _, port in dict(old.items() ^ new.items()))


def is_stale(flow: Flow, now: Targets, ours: Callable[[str], bool], local: Callable[[str], bool]) -> bool:
    """Whether a UDP flow does not go where the table sends it.

    ours: whether an address is on one of our networks. local: whether it is the host's own. Flows that others have
    translated, and flows to ports that are not published and were not translated, are left alone.
    """
    if flow.translated and not ours(flow.answered_by):
        return False
    target = now.get((flow.to, flow.port)) or now.get(("", flow.port))
    if target is None:
        return flow.translated
    return target != (flow.answered_by, flow.answering_port) and (flow.translated or local(flow.to))


def settle(conntrack: Conntrack, old: FirewallWant, new: FirewallWant, pool: str, *, altered: bool) -> None:
    """Delete the UDP flows that are stale after the change from old to new. The rules are already in force.

    altered: others have changed the table meanwhile, so a flow to any of its ports may be wrong.
    """
    before, now = targets(old.ports), targets(new.ports)
    ports = frozenset(port for _, port in {**before, **now}) if altered else changed_ports(before, now)
    if not ports:
        return
    subnets = (each.subnet for want in (old, new) for each in want.networks)
    ours = _within((IPv4Network(pool), *map(IPv4Network, subnets)))
    local = _within(sockets.host.local_subnets())
    for _ in range(LOOKS):
        asked: Iterable[int | None] = ports if len(ports) <= SINGLY else (None,)
        found = [flow for port in asked for flow in conntrack.to_port(UDP, port) if flow.port in ports]
        conntrack.delete(flow for flow in found if is_stale(flow, now, ours, local))


def vacate(conntrack: Conntrack, address: str) -> None:
    """Delete every flow from or to an address, before it gets another owner."""
    for _ in range(LOOKS):
        conntrack.delete(conntrack.of_address(address))


def vacate_subnets(conntrack: Conntrack, subnets: Iterable[IPv4Network]) -> None:
    """Delete every flow from or to an address of these subnets."""
    within = _within(tuple(subnets))
    for _ in range(LOOKS):
        conntrack.delete(flow for flow in conntrack.all() if within(flow.source) or within(flow.answered_by))


def _within(networks: Iterable[IPv4Network]) -> Callable[[str], bool]:
    """A function that says whether an address is in any of these networks; it is computed once for each address."""
    ranges = [(int(network.network_address), int(network.netmask)) for network in networks]

    @cache
    def within(address: str) -> bool:
        number = int(IPv4Address(address))
        return any(number & mask == first for first, mask in ranges)

    return within
