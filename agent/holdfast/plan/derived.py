"""What is a function of the instances and networks that are there: the firewall's table and the hosts files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping

from holdfast.observed import (
    FirewallNetwork,
    Instance,
    NetworkState,
    Observed,
    PublishedPort,
)
from holdfast.plan.actions import Names
from holdfast.spec.model import digest_of

NameTable = Mapping[tuple[str, str], Names]
NOBODY = Names("", ())


def firewall_networks(states: Iterable[NetworkState]) -> tuple[FirewallNetwork, ...]:
    """Every network that leads somewhere, as the firewall knows it."""
    known = (
        FirewallNetwork(net.id, net.data["interface"], net.data["subnet"], bool(net.data.get("internal")))
        for net in states
        if net.data.get("interface") and net.data.get("subnet")
    )
    return tuple(sorted(known, key=lambda network: network.id))


def published_ports(observed: Observed, published: Callable[[Instance], bool]) -> tuple[PublishedPort, ...]:
    """The ports of the instances that are published, each leading to where the newest of them is."""
    taken: dict[tuple[str, str, int], PublishedPort] = {}
    publishing = (each for each in observed.instances if each.want.ports)
    for instance in sorted(publishing, key=lambda each: (each.created_at, each.id)):
        address = published_address(instance, observed.networks)
        if not address or not published(instance):
            continue
        for port in instance.want.ports:
            taken[port.protocol, port.host_ip, port.host_port] = PublishedPort(
                port.protocol, port.host_ip, port.host_port, address, port.container_port, port.count
            )
    return tuple(taken[key] for key in sorted(taken))


def published_address(instance: Instance, networks: Mapping[str, NetworkState]) -> str:
    """The address that published ports lead to: on the first network that leads out, else on the first."""
    known = [(networks.get(net), addr) for net in instance.want.networks if (addr := instance.addresses.get(net))]
    outward = [address for state, address in known if state and not state.data.get("internal")]
    return next(iter(outward or [address for _, address in known]), "")


def name_table(instances: Iterable[Instance], networks: Collection[str]) -> NameTable:
    """Who is called what on each of these networks, as each app there sees it: (network, app) → lines.

    `web` and its aliases name a container to its own app; `web.shop` names it to every app of the network.
    Made once per network and app, so that a thousand containers of one network cost a thousand lines.
    """
    members: dict[str, list[Instance]] = {network: [] for network in networks}
    for instance in instances if members else ():
        for network in instance.addresses:
            if network in members:
                members[network].append(instance)
    for there in members.values():
        there.sort(key=lambda each: (each.key, each.id))
    readers = {(network, each.app) for network, there in members.items() for each in there}
    return {(network, app): _names_on(network, app, members[network]) for network, app in readers}


def names_of(instance: Instance, known: NameTable) -> Names:
    """What the hosts file of an instance says of its neighbours."""
    own = [known.get((network, instance.app), NOBODY) for network in instance.want.networks]
    if len(own) == 1:
        return own[0]
    return Names(digest_of([page.digest for page in own]), tuple(line for page in own for line in page.lines))


def _names_on(network: str, app: str, members: Iterable[Instance]) -> Names:
    lines = tuple(
        (each.addresses[network], _names(each, network, app)) for each in members if each.addresses[network]
    )
    return Names(hashlib.sha256(repr(lines).encode()).hexdigest(), lines) if lines else NOBODY


def _names(instance: Instance, network: str, app: str) -> tuple[str, ...]:
    qualified = f"{instance.container}.{instance.app}"
    if instance.app != app:
        return (qualified,)
    attachment = instance.want.networks.get(network)
    return (instance.container, qualified, *(attachment.aliases if attachment else ()))
