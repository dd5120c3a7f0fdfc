"""What is a function of the instances and networks that are there: the firewall's table and the hosts files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from holdfast.observed import (
    FirewallNetwork,
    FirewallWant,
    Instance,
    InstanceId,
    NetworkState,
    Observed,
    PublishedPort,
)
from holdfast.plan.actions import Names
from holdfast.spec.model import digest_of

Lines = tuple[tuple[str, tuple[str, ...]], ...]


def firewall_want(observed: Observed, published: Callable[[Instance], bool]) -> FirewallWant:
    """The whole table: every network that leads somewhere, and the ports of the instances that are published."""
    networks = sorted(
        (
            FirewallNetwork(net.id, net.data["interface"], net.data["subnet"], bool(net.data.get("internal")))
            for net in observed.networks.values()
            if net.data.get("interface") and net.data.get("subnet")
        ),
        key=lambda network: network.id,
    )
    taken: dict[tuple[str, str, int], PublishedPort] = {}
    for instance in sorted(observed.instances, key=lambda each: (each.created_at, each.id)):
        address = published_address(instance, observed.networks)
        if not address or not published(instance):
            continue
        for port in instance.want.ports:
            taken[port.protocol, port.host_ip, port.host_port] = PublishedPort(
                port.protocol, port.host_ip, port.host_port, address, port.container_port, port.count
            )
    return FirewallWant(tuple(networks), tuple(taken[key] for key in sorted(taken)))


def published_address(instance: Instance, networks: Mapping[str, NetworkState]) -> str:
    """The address that published ports lead to: on the first network that leads out, else on the first."""
    known = [(networks.get(net), addr) for net in instance.want.networks if (addr := instance.addresses.get(net))]
    outward = [address for state, address in known if state and not state.data.get("internal")]
    return next(iter(outward or [address for _, address in known]), "")


def all_names(instances: Iterable[Instance]) -> dict[InstanceId, Names]:
    """The hosts file of every instance that has an address.

    `web` and its aliases name a container to its own app; `web.shop` names it to every app of the network.
    Computed once per network and app, so that a thousand containers of one network cost a thousand lines.
    """
    members: dict[str, list[Instance]] = {}
    attached = [instance for instance in instances if instance.addresses]
    for instance in attached:
        for network in instance.addresses:
            members.setdefault(network, []).append(instance)
    pages: dict[tuple[str, str], Names] = {}
    for network, there in members.items():
        there.sort(key=lambda each: (each.key, each.id))
        for app in {instance.app for instance in there}:
            lines = tuple((each.addresses[network], _names(each, network, app)) for each in there)
            pages[network, app] = Names(digest_of(lines), lines)
    return {each.id: _joined([pages[network, each.app] for network in each.addresses]) for each in attached}


def _names(instance: Instance, network: str, app: str) -> tuple[str, ...]:
    qualified = f"{instance.container}.{instance.app}"
    if instance.app != app:
        return (qualified,)
    attachment = instance.want.networks.get(network)
    return (instance.container, qualified, *(attachment.aliases if attachment else ()))


def _joined(pages: list[Names]) -> Names:
    if len(pages) == 1:
        return pages[0]
    lines: Lines = tuple(line for page in pages for line in page.lines)
    return replace(pages[0], digest=digest_of([page.digest for page in pages]), lines=lines)
