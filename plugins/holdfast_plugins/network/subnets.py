"""Which subnet a network gets: the one it asks for, the one it has, a wider one, or a new one of the pool.

A subnet must be unused: by other networks, by the host, and by networks that were removed a short time ago (such a
subnet rests).
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from holdfast.drivers import Host, NetworkWant
from holdfast.errors import Conflict, WrongState
from holdfast.leases import NOT_CONTAINERS, parse_address, parse_subnet, room, waiting
from holdfast_plugins.network import hostuse
from holdfast_plugins.network.addresses import Ledger, place, prefixes
from holdfast_plugins.network.hostuse import Use
from holdfast_plugins.network.netlink import sockets


class Subnets:
    """Chooses the subnets of one agent's networks, and stores nothing: the ledger does."""

    def __init__(self, host: Host, ledger: Ledger) -> None:
        self._host = host
        self._ledger = ledger
        self._pool = IPv4Network(host.pool)

    def of(self, want: NetworkWant) -> IPv4Network:
        """The subnet for a network. Raises WrongState, Conflict, or TryAgain if one becomes free soon."""
        if want.subnet:
            return parse_subnet(want.id, want.subnet)
        kept = self._ledger.subnet(want.id)
        gone = want.id in self._ledger.resting()
        if kept is None or (gone and (want.hosts > room(kept) or self._obstacle(want.id, kept))):
            return self._choose(want)
        return kept if want.hosts <= room(kept) else self._grown(want, kept)

    def refuse_overlap(self, want: NetworkWant, subnet: IPv4Network) -> None:
        """Raise Conflict for a subnet that somebody else uses."""
        used = [*self._networks(want.id), *self._foreign(want.id)]
        if want.subnet and subnet != self._ledger.subnet(want.id):  # else these may be the network's own containers
            used += [*hostuse.of_resolver(), *hostuse.of_peers()]
        for holder, other in used:
            if subnet.overlaps(other):
                raise Conflict(f"network '{want.id}': subnet {subnet} overlaps {other} of {holder} (another subnet)")

    def _grown(self, want: NetworkWant, subnet: IPv4Network) -> IPv4Network:
        """A wider subnet that begins at the same address; raise Conflict where there is no room for it."""
        obstacle = f"it does not begin at a multiple of {want.hosts + NOT_CONTAINERS} addresses"
        for prefix in prefixes(want.hosts):
            wider = subnet.supernet(new_prefix=min(prefix, subnet.prefixlen))
            if wider.network_address == subnet.network_address:
                obstacle = self._obstacle(want.id, wider)
                if not obstacle:
                    return wider
        raise Conflict(
            f"network '{want.id}': {want.hosts} containers join it, its subnet {subnet} has room for {room(subnet)}"
            f' and can\'t grow: {obstacle} (subnet = "…" in its table)'
        )

    def _obstacle(self, id: str, subnet: IPv4Network) -> str:
        """Why a network can't have a subnet of the pool, "" if it can."""
        if not subnet.subnet_of(self._pool):
            return f"{subnet} is not within the pool {self._pool}"
        resting = self._ledger.resting().items()
        rest = ((f"network '{key}'", other) for key, (other, left) in resting if left and key != id)
        for holder, other in (*self._networks(id), *rest, *self._foreign(id)):
            if subnet.overlaps(other):
                return f"{other} is of {holder}"
        return ""

    def _choose(self, want: NetworkWant) -> IPv4Network:
        """A subnet of the pool that no network ever had, else the one that has rested longest."""
        if want.gateway:  # a gateway alone does not say how wide its subnet is
            raise WrongState(
                f"network '{want.id}': gateway '{want.gateway}': has no subnet (subnet = \"…\" beside it)"
            )
        hosts_own = (*self._foreign(want.id), *hostuse.of_resolver())
        held = [*self._ledger.subnets().values(), *(subnet for _, subnet in hosts_own)]
        resting = self._ledger.resting()
        while True:
            used = [*held, *(subnet for subnet, _ in resting.values())]
            for prefix in prefixes(want.hosts):
                chosen = place(self._pool, used, prefix)
                if chosen is not None and want.hosts <= room(chosen):
                    return chosen
            none_left = f"network '{want.id}': no subnet is left in pool {self._pool}"
            if not resting:
                raise Conflict(f"{none_left} (a larger [network] pool)")
            subnet, seconds = resting.pop(next(iter(resting)))
            if seconds:
                raise waiting(f"{none_left}; {subnet}", seconds)

    def _networks(self, id: str) -> Iterator[Use]:
        """The subnets of the other networks of this agent."""
        return ((f"network '{key}'", other) for key, other in self._ledger.subnets().items() if key != id)

    def _foreign(self, id: str) -> list[Use]:
        """Every address, route and gateway of the host, except those of the network's own bridge."""
        return list(hostuse.of_links(sockets.host, self._host.link("bridge", id)))


def gateway_of(want: NetworkWant, subnet: IPv4Network) -> IPv4Address:
    """The gateway's address: the one that is asked for, else the subnet's first."""
    if want.gateway is None:
        return subnet.network_address + 1
    return parse_address(want.id, "gateway", want.gateway, subnet)
