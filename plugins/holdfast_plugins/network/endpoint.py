"""Attachments of instances to bridge networks: a veth pair, one end in the namespace, the other on the bridge."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv4Network

from holdfast.drivers import EndpointWant, Host
from holdfast.errors import Conflict, TryAgain
from holdfast.leases import parse_address
from holdfast.observed import Finding, Receipt
from holdfast_plugins.network import flows, ingress, links, messages, sysctls
from holdfast_plugins.network.bridge import BridgeNetwork
from holdfast_plugins.network.netlink import Link, open_in, sockets

NO_GUARDS = "containers can send with addresses that are not theirs: the kernel lacks sch_ingress or cls_bpf"
MANY = 1 << 14  # links whose receipts are kept from one look to the next


class BridgeEndpoint:
    """The endpoint driver `bridge`. The host's end is guarded (`ingress`) before it is attached and up.

    unguarded: what follows where the kernel has no way to guard it, "" where it has.
    """

    name = "bridge"

    def __init__(self, host: Host, network: BridgeNetwork) -> None:
        self._host = host
        self._ledger = network.ledger
        self._conntrack = network.conntrack
        self._guards: dict[int, bytes] = {}  # index of a link → its program; b"" where only known that it has one
        self.unguarded = ""

    def check(self, want: EndpointWant) -> None:
        """Raise WrongState for an impossible address, Conflict for one that is another instance's."""
        if want.ipv4_address is None:
            return
        subnet, gateway = _range(want.network)
        address = str(parse_address(want.network.id, "address", want.ipv4_address, subnet))
        holder = "the gateway" if address == gateway else self._ledger.leases(want.network.id).holder(address)
        leaving = want.predecessor.owner if want.predecessor else None
        if holder not in (None, want.instance, leaving):
            raise Conflict(f"network '{want.network.id}': address '{address}' is taken by {holder}")

    def ensure(self, want: EndpointWant) -> Receipt:
        """Have the pair, its address and its routes; keep what is there, add what is missing."""
        self.check(want)
        subnet, gateway = _range(want.network)
        leases = self._ledger.leases(want.network.id)
        owner = want.lease or want.instance
        vacate = partial(flows.vacate, self._conntrack)
        address = leases.take(owner, want.instance, subnet, gateway, want.ipv4_address, vacate)
        mac = (want.mac_address or links.mac_for(IPv4Address(address))).lower()
        name = self._host.link("endpoint", _id(want))
        with links.refused(f"attach '{want.instance}' to network '{want.network.id}'"):
            self._join(want, name, mac, address)
            self._number(want, name, mac, address, subnet, gateway)
        data = {"address": address, "subnet": str(subnet), "interface": want.interface, "host_interface": name}
        return Receipt("endpoint", self.name, _id(want), want.instance, {**data, "mac": mac})

    def observe(self) -> Iterable[Receipt]:
        """List our ends of pairs; data is empty for one that is down, not attached or not guarded."""
        found = [link for link in links.links_of(self._host, "veth") if link.alias.startswith(links.ENDPOINT)]
        if any(link.index not in self._guards for link in found):  # made by an agent before this one
            with self._guarding():
                self._guards = dict.fromkeys(sockets.host.guarded(), b"") | self._guards
        return [self._observed(link) for link in found]

    def remove(self, receipt: Receipt) -> None:
        """Let the address rest and remove the pair.

        Deleting a link blocks for 16 ms while the kernel waits for its readers. The namespace is removed next, and
        the kernel deletes the pair with it, in the background and many at a time. So the host's end is only cut off
        from the bridge and marked as gone; it is deleted here when there is no namespace to go with.
        """
        instance, _, network = receipt.id.partition("/")
        self._ledger.leases(network).release(instance)
        link = sockets.host.link(self._host.link("endpoint", receipt.id))
        if link is None or link.alias not in (links.ENDPOINT + receipt.id, links.GONE + receipt.id):
            return
        self._guards.pop(link.index, None)
        if self._host.netns(instance).exists():
            links.abandon(link, receipt.id)
        else:
            links.delete(link, f"detach '{instance}' from network '{network}'")

    def findings(self) -> Iterable[Finding]:
        """Say what this kernel can't keep containers from."""
        return [Finding("networks", self.unguarded)] if self.unguarded else []

    def _observed(self, link: Link) -> Receipt:
        return _observed(link, bool(self.unguarded) or link.index in self._guards)

    def _join(self, want: EndpointWant, name: str, mac: str, address: str) -> None:
        """Have the pair, its end on the host guarded, attached to the bridge and up."""
        bridge = sockets.host.link(want.network.data["interface"])
        if bridge is None:
            raise TryAgain(f"attach '{want.instance}' to network '{want.network.id}': its bridge is gone for now")
        link = self._own(name, _id(want))
        if link is None:
            with want.netns.open("rb") as netns:
                pair = messages.new_veth(name, bridge.mtu, want.interface, mac, netns.fileno())
                sockets.host.request(pair, messages.name_link(name, links.ENDPOINT + _id(want)))
            link = sockets.host.link(name)
            if link is None:
                raise OSError(errno.ENODEV, f"link '{name}' is gone")
        sysctls.write(name, sysctls.NO_IPV6)
        self._guard(link, want, mac, address)
        if not link.up or link.master != bridge.index:
            sockets.host.request(messages.attach(link.index, bridge.index), messages.port_up(name))

    def _own(self, name: str, id: str) -> Link | None:
        """The link of an endpoint, if it is there; raise Conflict if it exists for something else."""
        link = sockets.host.link(name)
        if link is not None and link.alias == links.GONE + id:
            links.delete(link, f"replace '{name}'")
            return None
        if link is not None and link.alias != links.ENDPOINT + id:
            raise links.taken(link, links.ENDPOINT.removeprefix(links.MARK) + id)
        return link

    def _guard(self, link: Link, want: EndpointWant, mac: str, address: str) -> None:
        """Let the port pass only what the instance sends as itself."""
        if want.network.data.get("port_security") == "off":
            program = ingress.loopback_program(ingress.ETHERNET)
        else:
            program = ingress.endpoint_program(mac, IPv4Address(address))
        if self._guards.get(link.index) == program or self.unguarded:
            return
        with self._guarding():
            sockets.host.request(*ingress.guard(link.index, program))
        self._guards[link.index] = program

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        """Note if the kernel has no guards."""
        try:
            yield
        except OSError as error:
            if error.errno not in ingress.UNSUPPORTED:
                raise
            self.unguarded = NO_GUARDS

    def _number(
        self, want: EndpointWant, name: str, mac: str, address: str, subnet: IPv4Network, gateway: str
    ) -> None:
        """Have address and route inside the namespace; a pair whose inner end is elsewhere is made anew."""
        with ExitStack() as stack:
            for again in (False, True):
                if again:
                    if (stray := sockets.host.link(name)) is not None:
                        links.delete(stray, f"replace '{name}'")
                    self._join(want, name, mac, address)
                close = partial(sysctls.write, want.interface, sysctls.INSIDE)
                inside = stack.enter_context(closing(open_in(want.netns, close)))
                if (link := inside.link(want.interface)) is not None:
                    break
            else:
                raise OSError(errno.ENODEV, f"no '{want.interface}' in its namespace")
            wanted = [] if link.up else [messages.link_up(want.interface)]
            former = links.other_prefixes(inside, link.index, address, subnet) if link.up else []
            if link.mac != mac:
                wanted.append(messages.link_mac(want.interface, mac))
            wanted.append(messages.address(link.index, address, subnet.prefixlen, str(subnet.broadcast_address)))
            if want.default_route and not want.network.data["internal"]:
                wanted.append(messages.default_route(link.index, gateway))
            inside.request(*wanted, *former)


@lru_cache(MANY)
def _observed(link: Link, guarded: bool) -> Receipt:
    id = link.alias.removeprefix(links.ENDPOINT)
    data = {"host_interface": link.name} if link.up and link.master and guarded else {}
    return Receipt("endpoint", BridgeEndpoint.name, id, id.partition("/")[0], data)


def _id(want: EndpointWant) -> str:
    return f"{want.instance}/{want.network.id}"


def _range(network: Receipt) -> tuple[IPv4Network, str]:
    return IPv4Network(network.data["subnet"]), network.data["gateway"]
