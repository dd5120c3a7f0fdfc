"""rtnetlink(7): requests as bytes (made by `messages`) → acknowledgements, links, addresses and routes.

A socket of our own instead of pyroute2's IPRoute: several requests travel in one datagram, any thread may use it,
a dump of a thousand links takes milliseconds, and a socket may belong to another network namespace than its caller.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import TracebackType
from typing import Self

CLONE_NEWNET = 0x40000000
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_GETQDISC = 18, 22, 26, 38
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_IFALIAS, IFLA_EXT_MASK = 1, 3, 4, 10, 20, 29
IFLA_LINKINFO, IFLA_INFO_KIND = 18, 1
OF_A_LINK = frozenset((IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_IFALIAS))
IFA_LOCAL, RTA_DST, RTA_OIF, TCA_KIND = 2, 1, 4, 1
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTA_GATEWAY, RTA_MULTIPATH, RTA_TABLE = 5, 9, 15
RT_TABLE_LOCAL, RTN_LOCAL = 255, 2
SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS: half of a link's reply is counters
IFF_UP = 0x1

_libc = ctypes.CDLL(None, use_errno=True)
_header = struct.Struct("=IHHII")
_link = struct.Struct("=BxHiII")
_attribute = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; alias is its ifalias, "" if it has none."""

    index: int
    name: str
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


class Netlink:
    """One rtnetlink socket, in the network namespace of the thread that opens it. Not for two threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        self.close()  # the socket of a thread ends with the thread

    def request(self, *messages: bytes) -> None:
        """Send all messages in one datagram; raise the OSError of the first that the kernel refused.

        The kernel works through all of them within the one system call: a crash of the agent can't part them.
        """
        first = self._sequence + 1
        self._socket.send(b"".join(self._stamp(message) for message in messages))
        refused = {number: code for number, code in self._acknowledgements(first, len(messages)) if code}
        if refused:
            code = refused[min(refused)]
            raise OSError(code, os.strerror(code))

    def links(self, kind: str = "") -> list[Link]:
        """List the links of the namespace, or those of one kind, which the kernel picks out (bridge, veth)."""
        body = _link.pack(0, 0, 0, 0, 0) + struct.pack("=HHI", 8, IFLA_EXT_MASK, SKIP_STATS)
        if kind:
            text = kind.encode() + b"\0"
            inner = _padded(struct.pack("=HH", 4 + len(text), IFLA_INFO_KIND) + text)
            body += struct.pack("=HH", 4 + len(inner), IFLA_LINKINFO) + inner
        return [_read_link(answer) for answer in self._dump(RTM_GETLINK, body)]

    def link(self, name: str) -> Link | None:
        """Find a link by name."""
        text = name.encode() + b"\0"
        body = _link.pack(0, 0, 0, 0, 0) + _padded(struct.pack("=HH", 4 + len(text), IFLA_IFNAME) + text)
        body += struct.pack("=HHI", 8, IFLA_EXT_MASK, SKIP_STATS)
        self._send(RTM_GETLINK, NLM_F_REQUEST, body)
        for kind, _, answer in self._receive():
            if kind == NLMSG_ERROR:
                return None
            return _read_link(answer)
        return None

    def addresses(self) -> list[tuple[int, IPv4Network]]:
        """List (index of the link, subnet) of every IPv4 address."""
        found = []
        for body in self._dump(RTM_GETADDR, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0)):
            _, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
            local = dict(_attributes(body, 8)).get(IFA_LOCAL)
            if local is not None:
                found.append((index, IPv4Network((IPv4Address(local), prefix), strict=False)))
        return found

    def guarded(self) -> frozenset[int]:
        """The links that have a clsact qdisc, where programs judge what comes in (`ingress`)."""
        answers = self._dump(RTM_GETQDISC, struct.pack("=BxxxiIII", socket.AF_UNSPEC, 0, 0, 0, 0))
        return frozenset(
            struct.unpack_from("=i", body, 4)[0]
            for body in answers
            if dict(_attributes(body, 20)).get(TCA_KIND) == b"clsact\0"
        )

    def routes(self) -> list[Route]:
        """List every IPv4 route, in whichever table."""
        asked = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        return [route for body in self._dump(RTM_GETROUTE, asked) for route in read_routes(body)]

    def way_to(self, address: IPv4Address) -> Route | None:
        """The route by which the host sends to an address; None if it has no way there."""
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0)
        body += struct.pack("=HH", 8, RTA_DST) + address.packed
        self._send(RTM_GETROUTE, NLM_F_REQUEST, body)
        for kind, _, answer in self._receive():
            if kind != NLMSG_ERROR:
                return next(read_routes(answer))
        return None

    def local_subnets(self) -> list[IPv4Network]:
        """List the IPv4 ranges that the host takes for its own addresses, whatever interface they are on."""
        found = []
        asked = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, RT_TABLE_LOCAL, 0, 0, 0, 0)
        for body in self._dump(RTM_GETROUTE, asked):
            destination = dict(_attributes(body, 12)).get(RTA_DST)
            if destination is not None and body[7] == RTN_LOCAL:
                found.append(IPv4Network((IPv4Address(destination), body[1]), strict=False))
        return found

    def _stamp(self, message: bytes) -> bytes:
        """Number a message and ask for its acknowledgement."""
        self._sequence += 1
        length, kind, flags, _, _ = _header.unpack_from(message)
        return _padded(
            _header.pack(length, kind, flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence, 0) + message[16:]
        )

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._socket.send(_header.pack(16 + len(body), kind, flags, self._sequence, 0) + body)

    def _acknowledgements(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        left = count
        while left:
            for kind, number, body in self._receive():
                if kind == NLMSG_ERROR and number >= first:
                    left -= 1
                    yield number, -struct.unpack_from("=i", body)[0]

    def _dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        self._send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)
        while True:
            for answer, _, content in self._receive():
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", content)[0]
                    raise OSError(code, os.strerror(code))
                yield content

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Read one datagram: (type, sequence number, body) of each message in it."""
        data = self._socket.recv(1 << 16)
        at = 0
        while at < len(data):
            length, kind, _, number, _ = _header.unpack_from(data, at)
            yield kind, number, data[at + 16 : at + length]
            at += (length + 3) & ~3


class Sockets(threading.local):
    """The host's rtnetlink socket of each thread, opened when first asked for."""

    def __init__(self) -> None:
        self._netlink: Netlink | None = None

    @property
    def host(self) -> Netlink:
        if self._netlink is None:
            self._netlink = Netlink()
        return self._netlink


def open_in(netns: Path, before: Callable[[], None] = lambda: None) -> Netlink:
    """Open a socket in another network namespace. Raises OSError, and what before() raises, which is called there.

    A thread enters it, opens the socket and ends there; the socket stays in that namespace, the caller in its own.
    """
    opened: list[Netlink] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            with open(netns, "rb") as file:  # noqa: PTH123 - its descriptor is all we want
                if _libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(netns))
            before()
            opened.append(Netlink())
        except Exception as error:  # raised again by the caller's thread
            failed.append(error)

    thread = threading.Thread(target=work, name=f"enter {netns.name}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return opened[0]


def _read_link(body: bytes) -> Link:
    _, _, index, flags, _ = _link.unpack_from(body)
    found: dict[int, bytes] = {}
    at, end = _link.size, len(body)
    while at < end:  # not `_attributes`: of some forty that a link has, five are wanted
        length, kind = _attribute.unpack_from(body, at)
        if kind in OF_A_LINK:
            found[kind] = body[at + 4 : at + length]
        at += (length + 3) & ~3
    return Link(
        index=index,
        name=_text(found.get(IFLA_IFNAME)),
        alias=_text(found.get(IFLA_IFALIAS)),
        up=bool(flags & IFF_UP),
        mtu=_number(found.get(IFLA_MTU)),
        master=_number(found.get(IFLA_MASTER)),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
    )


def read_routes(body: bytes) -> Iterator[Route]:
    """The routes of one message about a route: one for each of its next hops."""
    attributes = dict(_attributes(body, 12))
    subnet = IPv4Network((IPv4Address(attributes.get(RTA_DST, bytes(4))), body[1]), strict=False)
    table, kind = _number(attributes.get(RTA_TABLE)) or body[4], body[7]
    if (hops := attributes.get(RTA_MULTIPATH)) is None:
        gateway = attributes.get(RTA_GATEWAY)
        index = _number(attributes.get(RTA_OIF))
        yield Route(index, subnet, IPv4Address(gateway) if gateway else None, table, kind)
        return
    at = 0
    while at + 8 <= len(hops):
        length, _, _, index = struct.unpack_from("=HBBi", hops, at)
        gateway = dict(_attributes(hops[at : at + length], 8)).get(RTA_GATEWAY)
        yield Route(index, subnet, IPv4Address(gateway) if gateway else None, table, kind)
        at += max((length + 3) & ~3, 8)


def route_news(heard: bytes) -> Iterator[Route]:
    """The routes that a datagram of the group for IPv4 routes says came or went."""
    at = 0
    while at + _header.size <= len(heard):
        length, kind, _, _, _ = _header.unpack_from(heard, at)
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            yield from read_routes(heard[at + 16 : at + length])
        at += max((length + 3) & ~3, _header.size)


def _text(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", sys.byteorder)


def _padded(message: bytes) -> bytes:
    return message + bytes(-len(message) % 4)


def _attributes(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= len(body):
        length, kind = _attribute.unpack_from(body, at)
        yield kind & 0x3FFF, body[at + 4 : at + length]
        at += (length + 3) & ~3
