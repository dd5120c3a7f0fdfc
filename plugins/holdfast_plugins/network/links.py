"""The links that are this agent's: how they are marked, found, cut off and deleted. Used by `bridge` and `endpoint`.

A link's ifalias says in full what it is, where its name has room for a hash only:

    holdfast:<root id>:network:<id>            the bridge; without a root id if an earlier version made it
    holdfast:endpoint:<instance>/<network id>  the host's end of a veth pair; an instance's id begins with its root's
    holdfast:gone:<instance>/<network id>      a removed end, until the kernel deletes it with its namespace
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network

from holdfast.drivers import Host
from holdfast.errors import Conflict, NotPermitted, TryAgain, UnfitHost, reason
from holdfast_plugins.network import messages, wire
from holdfast_plugins.network.netlink import Link, Netlink, link_news, sockets

MARK = "holdfast:"
ENDPOINT, GONE = f"{MARK}endpoint:", f"{MARK}gone:"
BRIDGE_PORTS = 1023

RTNLGRP_LINK = 1
OLD = 60.0  # seconds after which all links are read again, whatever was heard


class LinkTable:
    """The links of the network namespace that this process is in, kept up to date by what the kernel tells.

    To list a thousand links takes the kernel 20 ms. It tells of no new alias while a link is down. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._whose: tuple[int, str] | None = None
        self._news: wire.Group | None = None
        self._links: dict[int, Link] = {}
        self._read_at = 0.0

    def links(self) -> list[Link]:
        """Every link; one that has not changed is the same object."""
        whose = os.getpid(), os.readlink("/proc/thread-self/ns/net")  # noqa: PTH115 - in every pass
        with self._lock:
            if self._news is None or whose != self._whose:
                self._news, self._whose = wire.Group(socket.NETLINK_ROUTE, RTNLGRP_LINK), whose
                self._read()
            elif not self._hear(self._news) or time.monotonic() > self._read_at + OLD:
                self._read()
            return list(self._links.values())

    def _read(self) -> None:
        self._links = {link.index: link for link in Netlink().links()}
        self._read_at = time.monotonic()

    def _hear(self, news: wire.Group) -> bool:
        """Take in what has come; False where some of it was lost."""
        heard = list(news.read())
        for index, link in link_news(heard):
            if link is None:
                self._links.pop(index, None)
            elif self._links.get(index) != link:
                self._links[index] = link
        return all(heard)


table = LinkTable()


def network_alias(root: str, id: str) -> str:
    """The alias of the bridge of a network."""
    return f"{MARK}{root}:network:{id}"


def network_of(link: Link) -> tuple[str, str] | None:
    """(root id, network id) of a bridge, from its alias; root "" for one of an earlier version."""
    match link.alias.split(":"):
        case ["holdfast", "network", id]:
            return "", id
        case ["holdfast", root, "network", id]:
            return root, id
        case _:
            return None


def links_of(host: Host, kind: str) -> list[Link]:
    """The links of one kind whose names begin with the agent's."""
    prefix = f"{host.name}-"
    named = (link for link in table.links() if link.kind == kind and link.name.startswith(prefix))
    asked = (link if link.up else sockets.host.link(link.name) for link in named)  # its alias may be new
    return [link for link in asked if link is not None]


def taken(link: Link, wanted: str) -> Conflict:
    """The error for a link that exists for something else."""
    what = link.alias.partition(":")[2] or "something unknown"
    return Conflict(f"make '{wanted}': link '{link.name}' belongs to {what} (remove or rename it)")


def delete(link: Link, operation: str) -> None:
    """Delete a link; succeed when it is gone."""
    with refused(operation, errno.ENODEV):
        sockets.host.request(messages.delete_link(link.index))


def abandon(link: Link, id: str) -> None:
    """Cut an endpoint's link off its bridge without waiting; it is deleted with its namespace."""
    wanted = [messages.link_alias(link.index, GONE + id)]
    if link.master:
        wanted.append(messages.port_off(link.index))  # last: a change of alias would turn the port on again
    with refused(f"detach '{id}'", errno.ENODEV, errno.ENETDOWN):  # gone; or down, which is off, too
        sockets.host.request(*wanted)


def other_prefixes(netlink: Netlink, index: int, address: str, subnet: IPv4Network) -> list[bytes]:
    """Requests that remove an address with every other prefix: those of a subnet that has grown since."""
    widths = {
        other.prefixlen for link, other in netlink.addresses() if link == index and IPv4Address(address) in other
    }
    return [messages.no_address(index, address, width) for width in sorted(widths - {subnet.prefixlen})]


def mac_for(address: IPv4Address) -> str:
    """A locally administered MAC that is made from the address, so that neighbours' caches stay right."""
    return "02:42:" + address.packed.hex(":")


@contextmanager
def refused(operation: str, *harmless: int) -> Iterator[None]:
    """Say what to do about a request within a with block that the kernel refuses, but for harmless reasons."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case number if number in harmless:
                return
            case errno.EXFULL:
                full = f"its bridge is full (at most {BRIDGE_PORTS} containers on a network)"
                raise Conflict(f"{operation}: {full}") from error
            case errno.EPERM | errno.EACCES:
                raise NotPermitted(f"{operation}: not permitted (root with CAP_NET_ADMIN)") from error
            case errno.EOPNOTSUPP | errno.EAFNOSUPPORT:
                raise UnfitHost(f"{operation}: {reason(error)} (a kernel with bridge and veth)") from error
            case number:
                kind = Conflict if number == errno.EEXIST else TryAgain
                raise kind(f"{operation}: {reason(error)}") from error
