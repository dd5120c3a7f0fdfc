"""rtnetlink(7): requests as bytes (made by `messages`) → acknowledgements, links, addresses and routes.

A socket of our own instead of pyroute2's IPRoute: several requests travel in one datagram, any thread may use it,
a dump of a thousand links takes milliseconds, and a socket may belong to another network namespace than its caller.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from holdfast.syscalls import CLONE_NEWNET, call, in_thread
from holdfast_plugins.network.wire import SOL_NETLINK, Socket, attribute, attributes, messages, number, text

NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 10, 12
RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_GETQDISC = 18, 22, 26, 38
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_IFALIAS, IFLA_EXT_MASK = 1, 3, 4, 10, 20, 29
IFLA_LINKINFO, IFLA_INFO_KIND = 18, 1
OF_A_LINK = frozenset((IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_IFALIAS, IFLA_LINKINFO))
IFA_LOCAL, RTA_DST, RTA_OIF, TCA_KIND = 2, 1, 4, 1
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTA_GATEWAY, RTA_MULTIPATH, RTA_TABLE = 5, 9, 15
RT_TABLE_LOCAL, RTN_LOCAL = 255, 2
SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS: half of a link's reply is counters
IFF_UP = 0x1

_link = struct.Struct("=BxHiII")
ALL_LINKS = _link.pack(0, 0, 0, 0, 0) + attribute(IFLA_EXT_MASK, struct.pack("=I", SKIP_STATS))


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; alias is its ifalias, "" if it has none. kind: bridge, veth, …; "" for hardware."""

    index: int
    name: str
    kind: str = ""
    alias: str = ""
    up: bool = False
    mtu: int = 0
    master: int = 0
    mac: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to an IPv4 range; 0.0.0.0/0 is a default route. index: 0 where no link is named. table: 254 is main."""

    index: int
    subnet: IPv4Network
    gateway: IPv4Address | None = None
    table: int = 0
    kind: int = 0  # RTN_UNICAST, RTN_LOCAL, RTN_BLACKHOLE, …


class Netlink(Socket):
    """An rtnetlink socket."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)
        for option in (NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)

    def request(self, *messages: bytes) -> None:
        """Send all messages in one datagram; raise the OSError of the first that the kernel refused."""
        if code := next(filter(None, self.do(*messages)), 0):
            raise OSError(code, os.strerror(code))

    def links(self) -> list[Link]:
        """List the links of the namespace."""
        return [_read_link(answer) for answer in self.ask(RTM_GETLINK, ALL_LINKS)]

    def link(self, name: str) -> Link | None:
        """Find a link by name."""
        with suppress(OSError):
            wanted = ALL_LINKS + attribute(IFLA_IFNAME, name.encode() + b"\0")
            return _read_link(next(self.ask(RTM_GETLINK, wanted, dump=False)))
        return None

    def addresses(self) -> list[tuple[int, IPv4Network]]:
        """List (index of the link, subnet) of every IPv4 address."""
        found = []
        for body in self.ask(RTM_GETADDR, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0)):
            _, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
            local = dict(attributes(body, 8)).get(IFA_LOCAL)
            if local is not None:
                found.append((index, IPv4Network((IPv4Address(local), prefix), strict=False)))
        return found

    def guarded(self) -> frozenset[int]:
        """The links that have a clsact qdisc, where programs judge what comes in (`ingress`)."""
        answers = self.ask(RTM_GETQDISC, struct.pack("=BxxxiIII", socket.AF_UNSPEC, 0, 0, 0, 0))
        return frozenset(
            struct.unpack_from("=i", body, 4)[0]
            for body in answers
            if dict(attributes(body, 20)).get(TCA_KIND) == b"clsact\0"
        )

    def routes(self, table: int = 0) -> list[Route]:
        """List every IPv4 route, in whichever table, or those of one."""
        asked = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, table, 0, 0, 0, 0)
        return [route for body in self.ask(RTM_GETROUTE, asked) for route in read_routes(body)]

    def way_to(self, address: IPv4Address) -> Route | None:
        """The route by which the host sends to an address; None if it has none."""
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0)
        with suppress(OSError):
            answer = next(self.ask(RTM_GETROUTE, body + attribute(RTA_DST, address.packed), dump=False))
            return next(read_routes(answer))
        return None

    def local_subnets(self) -> list[IPv4Network]:
        """List the IPv4 ranges of the host's own addresses, on all interfaces."""
        return [route.subnet for route in self.routes(RT_TABLE_LOCAL) if route.kind == RTN_LOCAL]


class Sockets(threading.local):
    """The host's rtnetlink socket of each thread, opened when first asked for."""

    @cached_property
    def host(self) -> Netlink:
        return Netlink()


sockets = Sockets()


def open_in(netns: Path, before: Callable[[], None] = lambda: None) -> Netlink:
    """Open a socket in another network namespace. Raises OSError, and what before() raises, which is called there.

    A thread enters the namespace, opens the socket and ends; the socket stays there, the caller in its own.
    """

    def work() -> Netlink:
        with open(netns, "rb") as file:  # noqa: PTH123 - its descriptor is all we want
            call("setns", file.fileno(), CLONE_NEWNET, about=netns)
        before()
        return Netlink()

    return in_thread(work, f"enter {netns.name}")


def _read_link(body: bytes) -> Link:
    _, _, index, flags, _ = _link.unpack_from(body)
    found = dict(attributes(body, _link.size, OF_A_LINK))
    kind = dict(attributes(found.get(IFLA_LINKINFO, b""))).get(IFLA_INFO_KIND)
    return Link(
        index=index,
        name=text(found.get(IFLA_IFNAME)),
        kind=text(kind),
        alias=text(found.get(IFLA_IFALIAS)),
        up=bool(flags & IFF_UP),
        mtu=number(found.get(IFLA_MTU)),
        master=number(found.get(IFLA_MASTER)),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
    )


def read_routes(body: bytes) -> Iterator[Route]:
    """The routes of one message about a route: one for each of its next hops."""
    found = dict(attributes(body, 12))
    subnet = IPv4Network((IPv4Address(found.get(RTA_DST, bytes(4))), body[1]), strict=False)
    table, kind = number(found.get(RTA_TABLE)) or body[4], body[7]
    ways = [(number(found.get(RTA_OIF)), found.get(RTA_GATEWAY))]
    if (hops := found.get(RTA_MULTIPATH)) is not None:
        ways, at = [], 0
        while at + 8 <= len(hops):
            length, _, _, index = struct.unpack_from("=HBBi", hops, at)
            ways.append((index, dict(attributes(hops[at : at + length], 8)).get(RTA_GATEWAY)))
            at += max((length + 3) & ~3, 8)
    for index, gateway in ways:
        yield Route(index, subnet, IPv4Address(gateway) if gateway else None, table, kind)


def link_news(datagrams: Iterable[bytes]) -> Iterator[tuple[int, Link | None]]:
    """The links that datagrams of the group for links are about, by index, as the last of them says; None: gone."""
    last: dict[int, tuple[int, bytes]] = {}
    for datagram in datagrams:
        for kind, _, body in messages(datagram):
            if kind in (RTM_NEWLINK, RTM_DELLINK) and body[0] == socket.AF_UNSPEC:  # else about a port of a bridge
                last[_link.unpack_from(body)[2]] = kind, body
    for index, (kind, body) in last.items():
        yield index, _read_link(body) if kind == RTM_NEWLINK else None


def route_news(heard: bytes) -> Iterator[Route]:
    """The routes that were added or deleted, from a datagram of the group for IPv4 routes."""
    for kind, _, body in messages(heard):
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            yield from read_routes(body)
