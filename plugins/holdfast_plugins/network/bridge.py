"""Bridge networks → Linux bridges and veth pairs, by rtnetlink; addresses come from `addresses`.

A link's ifalias says in full what it is, where its name has room for a hash only:

    holdfast:<root id>:network:<id>            the bridge; without a root id if an earlier version made it
    holdfast:endpoint:<instance>/<network id>  the host's end of a veth pair; an instance's id begins with its root's
    holdfast:gone:<instance>/<network id>      a removed end, until the kernel takes it away with its namespace
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from holdfast.drivers import EndpointWant, Host, NetworkWant
from holdfast.errors import Conflict, HoldfastError, NotPermitted, TryAgain, UnfitHost, WrongState
from holdfast.observed import Finding, Receipt
from holdfast_plugins.network import flows, hostuse, ingress, messages, sysctls
from holdfast_plugins.network.addresses import (
    NOT_CONTAINERS,
    Ledger,
    parse_address,
    parse_subnet,
    place,
    prefixes,
    room,
    waiting,
)
from holdfast_plugins.network.collisions import Collisions
from holdfast_plugins.network.conntrack import Conntrack
from holdfast_plugins.network.netlink import Link, Netlink, Sockets, open_in

MARK = "holdfast:"
NETWORK, ENDPOINT, GONE = f"{MARK}network:", f"{MARK}endpoint:", f"{MARK}gone:"
OPTIONS = ("mtu", "port_security")
MTU = range(68, 65536)
DEFAULT_MTU = 1500
BRIDGE_PORTS = 1023
NO_GUARDS = "containers can send with addresses that are not theirs: the kernel lacks sch_ingress or cls_bpf"
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

_sockets = Sockets()


class BridgeNetwork:
    """One Linux bridge with the gateway's address on it for each network.

    Options: mtu (bytes); port_security ("off" lets containers send with addresses and MACs that are not theirs).
    """

    name = "bridge"

    def __init__(self, host: Host, conntrack: Conntrack | None = None) -> None:
        self.ledger = Ledger(host.root)
        self.conntrack = conntrack or Conntrack()
        self._host = host
        self._choosing = threading.Lock()
        self._collisions = Collisions(host, self.ledger)
        self._closed: set[int] = set()  # bridges that are known to believe nothing that containers announce

    def check(self, want: NetworkWant) -> None:
        """Raise WrongState for options and addresses that can't be, Conflict for a subnet that is in use."""
        _mtu(want)
        _secured(want)
        subnet = self._subnet(want)
        _gateway(want, subnet)
        if want.subnet and want.hosts > room(subnet):
            raise WrongState(
                f"network '{want.id}': subnet '{want.subnet}': has room for {room(subnet)} containers,"
                f" {want.hosts} join it (a larger subnet)"
            )
        self._refuse_overlap(want, subnet)

    def ensure(self, want: NetworkWant) -> Receipt:
        """Have the bridge up with its address; turn on ip_forward when the network leads out of the host."""
        mtu, secured = _mtu(want), _secured(want)
        name = self._host.link("bridge", want.id)
        with self._choosing:
            subnet = self._subnet(want)
            gateway = _gateway(want, subnet)
            link = self._link(want.id)
            alias = self._alias(want.id)
            if link is not None and link.alias != alias:  # as an earlier version has marked it
                _sockets.host.request(messages.link_alias(link.index, alias))
            before = self.ledger.subnet(want.id)
            if link is not None and (before is None or not before.subnet_of(subnet)):
                _delete(link, f"renumber network '{want.id}'")
                link = None
            if link is None:
                self._refuse_overlap(want, subnet)
            self._make_way(want.id, subnet)
            self.ledger.keep(want.id, subnet)
        if not want.internal and _enable_forwarding():
            self.ledger.note_forwarding(want.id)
        try:
            self._bring_up(want.id, link, name, subnet, gateway, mtu)
        except OSError as error:
            raise _explained(error, f"make network '{want.id}'") from error
        data = {
            "interface": name,
            "subnet": str(subnet),
            "gateway": str(gateway),
            "internal": want.internal,
            "mtu": mtu,
        }
        if not want.subnet:
            data["hosts"] = room(subnet)
        if not secured:
            data["port_security"] = "off"
        if self.ledger.noted_forwarding(want.id):
            data["enabled"] = "net.ipv4.ip_forward"
        return Receipt("network", self.name, want.id, data=data)

    def observe(self) -> Iterable[Receipt]:
        """List our bridges; addresses are those that the bridge really has."""
        links = [link for link in _our_links(self._host, "bridge") if _network_of(link)]
        addresses = dict(_sockets.host.addresses()) if links else {}
        return [self._observed(link, addresses.get(link.index)) for link in links]

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Hear of routes that others make over our subnets."""
        return self._collisions.watch(tell)

    def findings(self) -> Iterable[Finding]:
        """Tell of routes that others made over our subnets, and of what this kernel lacks."""
        return (*self._collisions.findings(), *self.conntrack.findings())

    def remove(self, receipt: Receipt) -> None:
        """Delete the bridge; subnet and addresses rest. ip_forward stays: others may have come to need it."""
        name = self._host.link("bridge", receipt.id)
        link = _sockets.host.link(name)
        if link is not None and self._is_own(link, receipt.id):
            _delete(link, f"remove network '{receipt.id}'")
        with self._choosing:
            self.ledger.rest(receipt.id)
            surplus = self.ledger.surplus()
            if surplus:
                self._vacate(surplus)

    def _vacate(self, networks: Iterable[str]) -> None:
        """Forget networks that are gone, after the flows of their addresses are."""
        resting = self.ledger.resting()
        flows.vacate_subnets(self.conntrack, [resting[id][0] for id in networks])
        for id in networks:
            self.ledger.drop(id)

    def _observed(self, link: Link, subnet: IPv4Network | None) -> Receipt:
        root, id = _network_of(link) or ("", "")
        healthy = link.up and subnet is not None and subnet == self.ledger.subnet(id) and self._is_closed(link)
        data = {"interface": link.name, "subnet": str(subnet)} if healthy else {}
        return Receipt("network", self.name, id, data=data, root=root)

    def _alias(self, id: str) -> str:
        return f"{MARK}{self._host.id}:{NETWORK.removeprefix(MARK)}{id}"

    def _is_own(self, link: Link, id: str) -> bool:
        """Whether a bridge was made for a network of this root: it says so, or the network is known here."""
        root, network = _network_of(link) or ("", "")
        return network == id and (root == self._host.id or self.ledger.subnet(id) is not None)

    def _link(self, id: str) -> Link | None:
        """The bridge of a network; raise Conflict if the link of that name is there for something else."""
        link = _sockets.host.link(self._host.link("bridge", id))
        if link is not None and not self._is_own(link, id):
            raise _taken(link, f"network:{id}")
        return link

    def _is_closed(self, link: Link) -> bool:
        """Whether the bridge has the settings that `_bring_up` gives it; looked at once for each bridge."""
        if link.index not in self._closed and not sysctls.differs(link.name, sysctls.GATEWAY):
            self._closed.add(link.index)
        return link.index in self._closed

    def _subnet(self, want: NetworkWant) -> IPv4Network:
        """The subnet that is asked for, else the one that the network has, or had before it went, else a new one."""
        if want.subnet:
            return parse_subnet(want.id, want.subnet)
        kept = self.ledger.subnet(want.id)
        gone = want.id in self.ledger.resting()
        if kept is None or (gone and (want.hosts > room(kept) or self._in_the_way(want.id, kept))):
            return self._choose(want)
        return kept if want.hosts <= room(kept) else self._grown(want, kept)

    def _grown(self, want: NetworkWant, subnet: IPv4Network) -> IPv4Network:
        """A wider subnet that begins at the same address; raise Conflict where there is no room for it."""
        obstacle = f"it does not begin at a multiple of {want.hosts + NOT_CONTAINERS} addresses"
        for prefix in prefixes(want.hosts):
            wider = subnet.supernet(new_prefix=min(prefix, subnet.prefixlen))
            if wider.network_address == subnet.network_address:
                obstacle = self._in_the_way(want.id, wider)
                if not obstacle:
                    return wider
        raise Conflict(
            f"network '{want.id}': {want.hosts} containers join it, its subnet {subnet} has room for {room(subnet)}"
            f' and can\'t grow: {obstacle} (subnet = "…" in its table)'
        )

    def _in_the_way(self, id: str, subnet: IPv4Network) -> str:
        """What keeps a network from having a subnet of the pool, "" if nothing does."""
        if not subnet.subnet_of(IPv4Network(self._host.pool)):
            return f"{subnet} is not within the pool {self._host.pool}"
        others = ((f"network '{key}'", other) for key, other in self.ledger.subnets().items() if key != id)
        resting = (
            (f"network '{key}'", other) for key, (other, left) in self.ledger.resting().items() if left and key != id
        )
        for holder, taken in (*others, *resting, *self._foreign(id)):
            if subnet.overlaps(taken):
                return f"{taken} is of {holder}"
        return ""

    def _make_way(self, id: str, subnet: IPv4Network) -> None:
        """Cut the flows to addresses that other networks had before, unless the subnet is the network's own."""
        if self.ledger.subnet(id) == subnet:
            return
        former = [other for key, (other, _) in self.ledger.resting().items() if key != id and other.overlaps(subnet)]
        if former:
            flows.vacate_subnets(self.conntrack, former)

    def _choose(self, want: NetworkWant) -> IPv4Network:
        """A subnet of the pool that no network ever had, else the one that has rested longest."""
        hosts_own = (*self._foreign(want.id), *hostuse.of_resolver())
        taken = [*self.ledger.subnets().values(), *(subnet for _, subnet in hosts_own)]
        if want.gateway:  # a gateway alone does not say how wide its subnet is
            raise WrongState(
                f"network '{want.id}': gateway '{want.gateway}': has no subnet (subnet = \"…\" beside it)"
            )
        resting = self.ledger.resting()
        pool = IPv4Network(self._host.pool)
        while True:
            used = [*taken, *(subnet for subnet, _ in resting.values())]
            for prefix in prefixes(want.hosts):
                chosen = place(pool, used, prefix)
                if chosen is not None and want.hosts <= room(chosen):
                    return chosen
            if not resting:
                raise Conflict(f"network '{want.id}': no subnet is left in pool {pool} (a larger [network] pool)")
            subnet, seconds = resting.pop(next(iter(resting)))
            if seconds:
                raise waiting(f"network '{want.id}': no subnet is left in pool {pool}; {subnet}", seconds)

    def _refuse_overlap(self, want: NetworkWant, subnet: IPv4Network) -> None:
        id = want.id
        kept = ((f"network '{other}'", taken) for other, taken in self.ledger.subnets().items() if other != id)
        used = [*kept, *self._foreign(id)]
        if want.subnet and subnet != self.ledger.subnet(id):  # else these may be containers of the network itself
            used += [*hostuse.of_resolver(), *hostuse.of_peers()]
        for holder, taken in used:
            if subnet.overlaps(taken):
                raise Conflict(f"network '{id}': subnet {subnet} overlaps {taken} of {holder} (another subnet)")

    def _foreign(self, id: str) -> list[tuple[str, IPv4Network]]:
        """(who has it, range) of every address, route and gateway of the host that is not of the network's bridge."""
        return list(hostuse.of_links(_sockets.host, self._host.link("bridge", id)))

    def _bring_up(
        self, id: str, link: Link | None, name: str, subnet: IPv4Network, gateway: IPv4Address, mtu: int
    ) -> None:
        host = _sockets.host
        if link is None:
            host.request(messages.new_bridge(name, _mac(gateway), mtu), messages.name_link(name, self._alias(id)))
            link = host.link(name)
            assert link is not None, name
        sysctls.write(name, sysctls.GATEWAY)
        wanted = [messages.address(link.index, str(gateway), subnet.prefixlen, str(subnet.broadcast_address))]
        if link.up:
            wanted += _without_others(host, link.index, str(gateway), subnet)
        if link.mtu != mtu:
            wanted.append(messages.link_mtu(name, mtu))
        host.request(*wanted, messages.link_up(name))
        self._closed.add(link.index)


class BridgeEndpoint:
    """A veth pair: one end in the instance's namespace, the other one a guarded port of the bridge (`ingress`).

    The guard is there before the port is attached and up. Where the kernel has no way to do so, `unguarded` says it.
    """

    name = "bridge"

    def __init__(self, host: Host, network: BridgeNetwork) -> None:
        self._host = host
        self._ledger = network.ledger
        self._conntrack = network.conntrack
        self._guards: dict[int, bytes] = {}  # index of a port → the program that it has, b"" if only that it has one
        self.unguarded = ""

    def check(self, want: EndpointWant) -> None:
        """Raise WrongState for an address that can't be, Conflict for one that is another instance's."""
        if want.ipv4_address is None:
            return
        subnet, gateway = _range(want.network)
        address = str(parse_address(want.network.id, "address", want.ipv4_address, subnet))
        holder = "the gateway" if address == gateway else self._ledger.leases(want.network.id).holder(address)
        if holder not in (None, want.instance):
            raise Conflict(f"network '{want.network.id}': address '{address}' is taken by {holder}")

    def ensure(self, want: EndpointWant) -> Receipt:
        """Have the pair, its address and its routes; what is there already is kept, what is missing is added."""
        self.check(want)
        subnet, gateway = _range(want.network)
        leases = self._ledger.leases(want.network.id)
        owner = want.lease or want.instance
        address = leases.take(owner, want.instance, subnet, gateway, want.ipv4_address, self._vacate)
        mac = (want.mac_address or _mac(IPv4Address(address))).lower()
        name = self._host.link("endpoint", f"{want.instance}/{want.network.id}")
        try:
            self._join(want, name, mac, address)
            self._number(want, name, mac, address, subnet, gateway)
        except OSError as error:
            raise _explained(error, f"attach '{want.instance}' to network '{want.network.id}'") from error
        data = {
            "address": address,
            "subnet": str(subnet),
            "interface": want.interface,
            "host_interface": name,
            "mac": mac,
        }
        return Receipt("endpoint", self.name, f"{want.instance}/{want.network.id}", want.instance, data)

    def observe(self) -> Iterable[Receipt]:
        """List our ends of pairs; data is empty for one that is down or not attached to a bridge."""
        links = [link for link in _our_links(self._host, "veth") if link.alias.startswith(ENDPOINT)]
        if any(link.index not in self._guards for link in links):  # made by an agent before this one
            self._learn_guards()
        return [_observed_endpoint(link, guarded=self._is_guarded(link)) for link in links]

    def remove(self, receipt: Receipt) -> None:
        """Let the address rest and take the pair away.

        Deleting a link blocks for 16 ms while the kernel waits out its readers. As the namespace is removed next,
        which deletes the pair in the background and many at a time, the host's end is only cut off from the
        bridge and given the alias of what is gone; it is deleted here when there is no namespace to go with.
        """
        instance, _, network = receipt.id.partition("/")
        self._ledger.leases(network).release(instance)
        link = _sockets.host.link(self._host.link("endpoint", receipt.id))
        if link is None or link.alias not in (ENDPOINT + receipt.id, GONE + receipt.id):
            return
        self._guards.pop(link.index, None)
        if self._host.netns(instance).exists():
            _abandon(link, receipt.id)
        else:
            _delete(link, f"detach '{instance}' from network '{network}'")

    def _vacate(self, address: str) -> None:
        flows.vacate(self._conntrack, address)

    def findings(self) -> Iterable[Finding]:
        """Tell what this kernel can't keep containers from."""
        return [Finding("networks", self.unguarded)] if self.unguarded else []

    def _join(self, want: EndpointWant, name: str, mac: str, address: str) -> None:
        """Have the pair, its end on the host guarded, attached to the bridge and up."""
        id = f"{want.instance}/{want.network.id}"
        bridge = _sockets.host.link(want.network.data["interface"])
        if bridge is None:
            raise TryAgain(f"attach '{want.instance}' to network '{want.network.id}': its bridge is gone for now")
        link = _own_link(name, ENDPOINT + id, GONE + id)
        if link is not None and link.alias == GONE + id:
            _delete(link, f"replace '{name}'")
            link = None
        if link is None:
            with want.netns.open("rb") as netns:
                pair = messages.new_veth(name, bridge.mtu, want.interface, mac, netns.fileno())
                _sockets.host.request(pair, messages.name_link(name, ENDPOINT + id))
            link = _sockets.host.link(name)
            if link is None:
                raise OSError(errno.ENODEV, f"link '{name}' is gone")
        sysctls.write(name, sysctls.NO_IPV6)
        self._guard(link, want, mac, address)
        if not link.up or link.master != bridge.index:
            _sockets.host.request(messages.attach(link.index, bridge.index), messages.port_up(name))

    def _guard(self, link: Link, want: EndpointWant, mac: str, address: str) -> None:
        """Let the port pass only what the instance sends as itself."""
        if want.network.data.get("port_security") == "off":
            program = ingress.loopback_program(ingress.ETHERNET)
        else:
            program = ingress.endpoint_program(mac, IPv4Address(address))
        if self._guards.get(link.index) == program or self.unguarded:
            return
        try:
            _sockets.host.request(*ingress.guard(link.index, program))
        except OSError as error:
            if error.errno not in ingress.UNSUPPORTED:
                raise
            self.unguarded = NO_GUARDS
        self._guards[link.index] = program

    def _learn_guards(self) -> None:
        try:
            self._guards = dict.fromkeys(_sockets.host.guarded(), b"") | self._guards
        except OSError as error:
            if error.errno not in ingress.UNSUPPORTED:
                raise
            self.unguarded = NO_GUARDS

    def _is_guarded(self, link: Link) -> bool:
        return bool(self.unguarded) or link.index in self._guards

    def _number(
        self, want: EndpointWant, name: str, mac: str, address: str, subnet: IPv4Network, gateway: str
    ) -> None:
        """Have address and route inside the namespace; a pair whose inner end is elsewhere is made anew."""

        def close() -> None:
            sysctls.write(want.interface, sysctls.INSIDE)

        with ExitStack() as stack:
            inside = stack.enter_context(open_in(want.netns, close))
            link = inside.link(want.interface)
            if link is None:
                stray = _sockets.host.link(name)
                if stray is not None:
                    _delete(stray, f"replace '{name}'")
                self._join(want, name, mac, address)
                inside = stack.enter_context(open_in(want.netns, close))
                link = inside.link(want.interface)
            if link is None:
                raise OSError(errno.ENODEV, f"no '{want.interface}' in its namespace")
            wanted = [] if link.up else [messages.link_up(want.interface)]
            former = _without_others(inside, link.index, address, subnet) if link.up else []
            if link.mac != mac:
                wanted.append(messages.link_mac(want.interface, mac))
            wanted.append(messages.address(link.index, address, subnet.prefixlen, str(subnet.broadcast_address)))
            if want.default_route and not want.network.data["internal"]:
                wanted.append(messages.default_route(link.index, gateway))
            inside.request(*wanted, *former)


def _observed_endpoint(link: Link, *, guarded: bool) -> Receipt:
    id = link.alias.removeprefix(ENDPOINT)
    data = {"host_interface": link.name} if link.up and link.master and guarded else {}
    return Receipt("endpoint", "bridge", id, id.partition("/")[0], data)


def _without_others(netlink: Netlink, index: int, address: str, subnet: IPv4Network) -> list[bytes]:
    """What takes an address off a link with every other prefix: those of a subnet that has grown since."""
    widths = {
        other.prefixlen for link, other in netlink.addresses() if link == index and IPv4Address(address) in other
    }
    return [messages.no_address(index, address, width) for width in sorted(widths - {subnet.prefixlen})]


def _our_links(host: Host, kind: str) -> list[Link]:
    return [link for link in _sockets.host.links(kind) if link.name.startswith(f"{host.name}-")]


def _own_link(name: str, *aliases: str) -> Link | None:
    """The link of that name; raise Conflict if it is there for something else."""
    link = _sockets.host.link(name)
    if link is not None and link.alias not in aliases:
        raise _taken(link, aliases[0].removeprefix(MARK))
    return link


def _taken(link: Link, wanted: str) -> Conflict:
    what = link.alias.partition(":")[2] or "something unknown"
    return Conflict(f"make '{wanted}': link '{link.name}' is there for {what} (remove or rename it)")


def _network_of(link: Link) -> tuple[str, str] | None:
    """(root id, network id) of a bridge, from its alias; root "" for one of an earlier version."""
    words = link.alias.split(":")
    match words:
        case ["holdfast", "network", id]:
            return "", id
        case ["holdfast", root, "network", id]:
            return root, id
        case _:
            return None


def _abandon(link: Link, id: str) -> None:
    """Cut the link off its bridge without waiting, and leave its deletion to that of its namespace."""
    wanted = [messages.link_alias(link.index, GONE + id)]
    if link.master:
        wanted.append(messages.port_off(link.index))  # last, since a change of alias would turn it on again
    try:
        _sockets.host.request(*wanted)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENETDOWN):  # gone, or down, which is off, too
            raise _explained(error, f"detach '{id}'") from error


def _delete(link: Link, operation: str) -> None:
    try:
        _sockets.host.request(messages.delete_link(link.index))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise _explained(error, operation) from error


def _mtu(want: NetworkWant) -> int:
    """Read the options; raise WrongState for one that is unknown or out of range."""
    for option in want.driver_opts:
        if option not in OPTIONS:
            raise WrongState(
                f"network '{want.id}': driver_opts '{option}': unknown to driver 'bridge' ({', '.join(OPTIONS)})"
            )
    text = want.driver_opts.get("mtu", str(DEFAULT_MTU))
    if not text.isdecimal() or int(text) not in MTU:
        raise WrongState(f"network '{want.id}': mtu '{text}': not a size in bytes ({MTU.start} to {MTU.stop - 1})")
    return int(text)


def _secured(want: NetworkWant) -> bool:
    """Whether containers may send as themselves only; raise WrongState for a value that is unknown."""
    text = want.driver_opts.get("port_security", "on")
    if text not in ("on", "off"):
        raise WrongState(f"network '{want.id}': port_security '{text}': unknown (on, off)")
    return text == "on"


def _gateway(want: NetworkWant, subnet: IPv4Network) -> IPv4Address:
    if want.gateway is None:
        return subnet.network_address + 1
    return parse_address(want.id, "gateway", want.gateway, subnet)


def _range(network: Receipt) -> tuple[IPv4Network, str]:
    return IPv4Network(network.data["subnet"]), network.data["gateway"]


def _mac(address: IPv4Address) -> str:
    """A locally administered MAC that goes with the address, so that neighbours' caches stay right."""
    return "02:42:" + address.packed.hex(":")


def _enable_forwarding() -> bool:
    """Let the host forward IPv4; return whether it did not before."""
    if IP_FORWARD.read_text().strip() == "1":
        return False
    try:
        IP_FORWARD.write_text("1")
    except OSError as error:
        raise UnfitHost(f"write '{IP_FORWARD}': {(error.strerror or str(error)).lower()}") from error
    return True


def _explained(error: OSError, operation: str) -> HoldfastError:
    """The error that tells the reader of a refused request what to do about it."""
    text = os.strerror(error.errno).lower() if error.errno else str(error)
    match error.errno:
        case errno.EXFULL:
            return Conflict(f"{operation}: its bridge is full (at most {BRIDGE_PORTS} containers on a network)")
        case errno.EPERM | errno.EACCES:
            return NotPermitted(f"{operation}: not permitted (root with CAP_NET_ADMIN)")
        case errno.EOPNOTSUPP | errno.EAFNOSUPPORT:
            return UnfitHost(f"{operation}: {text} (a kernel with bridge and veth)")
        case errno.EEXIST:
            return Conflict(f"{operation}: {text}")
        case _:
            return TryAgain(f"{operation}: {text}")
