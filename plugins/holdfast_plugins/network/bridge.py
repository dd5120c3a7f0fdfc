"""Bridge networks: one Linux bridge with the gateway's address on it for each, made by rtnetlink."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from holdfast.drivers import Host, NetworkWant
from holdfast.errors import WrongState, explained
from holdfast.keys import Table, within
from holdfast.leases import room
from holdfast.observed import Finding, Receipt
from holdfast.tables import read_options
from holdfast_plugins.network import flows, links, messages, sysctls
from holdfast_plugins.network.addresses import Ledger
from holdfast_plugins.network.collisions import Collisions
from holdfast_plugins.network.conntrack import Conntrack
from holdfast_plugins.network.netlink import Link, sockets
from holdfast_plugins.network.subnets import Subnets, gateway_of

IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


class BridgeOptions(Table):
    """The `driver_opts` of the driver `bridge`."""

    mtu: Annotated[int, within(68, 65535), Field(description="the largest packet, in bytes")] = 1500
    port_security: Annotated[
        Literal["on", "off"],
        Field(description="off: containers can send with addresses and MACs that are not theirs"),
    ] = "on"


class BridgeNetwork:
    """The network driver `bridge`."""

    name = "bridge"
    options = BridgeOptions

    def __init__(self, host: Host, conntrack: Conntrack | None = None) -> None:
        self.ledger = Ledger(host.root)
        self.conntrack = conntrack or Conntrack()
        self._host = host
        self._subnets = Subnets(host, self.ledger)
        self._choosing = threading.Lock()
        self._collisions = Collisions(host, self.ledger)
        self._closed: set[int] = set()  # bridges that are known to have the settings of `sysctls.GATEWAY`

    def check(self, want: NetworkWant) -> None:
        """Raise WrongState for impossible options and addresses, Conflict for a subnet that is in use."""
        read_options(BridgeOptions, want.driver_opts)
        subnet = self._subnets.of(want)
        gateway_of(want, subnet)
        if want.subnet and want.hosts > room(subnet):
            raise WrongState(
                f"network '{want.id}': subnet '{want.subnet}': has room for {room(subnet)} containers,"
                f" {want.hosts} join it (a larger subnet)"
            )
        self._subnets.refuse_overlap(want, subnet)

    def ensure(self, want: NetworkWant) -> Receipt:
        """Have the bridge up with its address; turn on ip_forward when the network leads out of the host."""
        options = read_options(BridgeOptions, want.driver_opts)
        with self._choosing:
            subnet = self._subnets.of(want)
            gateway = gateway_of(want, subnet)
            link = self._standing(want, subnet)
            self._vacate_former(want.id, subnet)
            self.ledger.keep(want.id, subnet)
        if not want.internal and _enable_forwarding():
            self.ledger.note_forwarding(want.id)
        with links.refused(f"make network '{want.id}'"):
            name = self._bring_up(want.id, link, subnet, gateway, options.mtu)
        data = {
            "interface": name,
            "subnet": str(subnet),
            "gateway": str(gateway),
            "internal": want.internal,
            "mtu": options.mtu,
        }
        if not want.subnet:
            data["hosts"] = room(subnet)
        if options.port_security == "off":
            data["port_security"] = "off"
        if self.ledger.noted_forwarding(want.id):
            data["enabled"] = "net.ipv4.ip_forward"
        return Receipt("network", self.name, want.id, data=data)

    def observe(self) -> Iterable[Receipt]:
        """List our bridges; addresses are those that the bridge really has."""
        found = [link for link in links.links_of(self._host, "bridge") if links.network_of(link)]
        addresses = dict(sockets.host.addresses()) if found else {}
        return [self._observed(link, addresses.get(link.index)) for link in found]

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Listen for routes that others make over our subnets."""
        return self._collisions.watch(tell)

    def findings(self) -> Iterable[Finding]:
        """Report routes that others made over our subnets, and what this kernel lacks."""
        return (*self._collisions.findings(), *self.conntrack.findings())

    def remove(self, receipt: Receipt) -> None:
        """Delete the bridge; subnet and addresses rest. ip_forward stays on: others may need it by now."""
        link = sockets.host.link(self._host.link("bridge", receipt.id))
        if link is not None and self._is_own(link, receipt.id):
            links.delete(link, f"remove network '{receipt.id}'")
        with self._choosing:
            self.ledger.rest(receipt.id)
            surplus, resting = self.ledger.surplus(), self.ledger.resting()
            if surplus:  # forgotten after the flows of their addresses are gone
                flows.vacate_subnets(self.conntrack, [resting[id][0] for id in surplus])
            for id in surplus:
                self.ledger.drop(id)

    def _observed(self, link: Link, subnet: IPv4Network | None) -> Receipt:
        root, id = links.network_of(link) or ("", "")
        healthy = link.up and subnet is not None and subnet == self.ledger.subnet(id) and self._is_closed(link)
        data = {"interface": link.name, "subnet": str(subnet)} if healthy else {}
        return Receipt("network", self.name, id, data=data, root=root)

    def _is_own(self, link: Link, id: str) -> bool:
        """Whether a bridge was made for a network of this root: it says so, or the network is known here."""
        root, network = links.network_of(link) or ("", "")
        return network == id and (root == self._host.id or self.ledger.subnet(id) is not None)

    def _standing(self, want: NetworkWant, subnet: IPv4Network) -> Link | None:
        """The bridge of a network, if it can be used for the subnet; raise Conflict for what is somebody else's."""
        link = sockets.host.link(self._host.link("bridge", want.id))
        alias = links.network_alias(self._host.id, want.id)
        if link is not None and not self._is_own(link, want.id):
            raise links.taken(link, f"network:{want.id}")
        if link is not None and link.alias != alias:  # as an earlier version marked it
            sockets.host.request(messages.link_alias(link.index, alias))
        before = self.ledger.subnet(want.id)
        if link is not None and (before is None or not before.subnet_of(subnet)):
            links.delete(link, f"renumber network '{want.id}'")
            link = None
        if link is None:
            self._subnets.refuse_overlap(want, subnet)
        return link

    def _is_closed(self, link: Link) -> bool:
        """Whether the bridge has the settings that `_bring_up` gives it; checked once for each bridge."""
        if link.index not in self._closed and not sysctls.differs(link.name, sysctls.GATEWAY):
            self._closed.add(link.index)
        return link.index in self._closed

    def _vacate_former(self, id: str, subnet: IPv4Network) -> None:
        """Cut the flows to addresses that other networks had before, unless the subnet is the network's own."""
        if self.ledger.subnet(id) == subnet:
            return
        former = [other for key, (other, _) in self.ledger.resting().items() if key != id and other.overlaps(subnet)]
        if former:
            flows.vacate_subnets(self.conntrack, former)

    def _bring_up(self, id: str, link: Link | None, subnet: IPv4Network, gateway: IPv4Address, mtu: int) -> str:
        """Have the bridge with its address and settings, and up; return its name."""
        host, name = sockets.host, self._host.link("bridge", id)
        if link is None:
            bridge = messages.new_bridge(name, links.mac_for(gateway), mtu)
            host.request(bridge, messages.name_link(name, links.network_alias(self._host.id, id)))
            link = host.link(name)
            assert link is not None, name
        sysctls.write(name, sysctls.GATEWAY)
        wanted = [messages.address(link.index, str(gateway), subnet.prefixlen, str(subnet.broadcast_address))]
        if link.up:
            wanted += links.other_prefixes(host, link.index, str(gateway), subnet)
        if link.mtu != mtu:
            wanted.append(messages.link_mtu(name, mtu))
        host.request(*wanted, messages.link_up(name))
        self._closed.add(link.index)
        return name


def _enable_forwarding() -> bool:
    """Let the host forward IPv4; return whether it did not before."""
    if IP_FORWARD.read_text().strip() == "1":
        return False
    with explained(f"write '{IP_FORWARD}'"):
        IP_FORWARD.write_text("1")
    return True
