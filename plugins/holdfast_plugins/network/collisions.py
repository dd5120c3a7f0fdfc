"""Find routes that others made later over the subnet of one of our networks: a VPN, a LAN.

A new network can't get such a subnet. An existing one can't be moved, so the collision is reported. The kernel is
asked whether a route really takes traffic away, because it knows metrics and rules. A thread listens for new routes;
while none of them is in our ranges, nothing is read.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Network

from holdfast.drivers import Host
from holdfast.observed import Finding
from holdfast_plugins.network import wire
from holdfast_plugins.network.addresses import Ledger
from holdfast_plugins.network.links import table
from holdfast_plugins.network.netlink import Route, route_news, sockets

RTNLGRP_IPV4_ROUTE = 7
RTN_LOCAL = 2
WIDE = 8  # routes with a shorter prefix lead everywhere, not to one network
AGAIN = 1.0  # seconds between two looks, while there are findings or routes change


class Collisions:
    """The collisions of one agent's networks. Thread-safe."""

    def __init__(self, host: Host, ledger: Ledger) -> None:
        self._host = host
        self._ledger = ledger
        self._lock = threading.Lock()
        self._found: tuple[Finding, ...] = ()
        self._looked = -AGAIN
        self._heard = True  # of a route in our ranges since the last look
        self._watched = False

    def findings(self) -> tuple[Finding, ...]:
        """The collisions. The routes are read only if there is a reason."""
        with self._lock:
            due = self._heard or bool(self._found) or not self._watched
            if due and time.monotonic() >= self._looked + AGAIN:
                self._heard = False
                self._found = tuple(self._look())
                self._looked = time.monotonic()
            return self._found

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Listen for changes of routes; call tell(subject, what) for new collisions, and for those that are over."""
        news = wire.News(socket.NETLINK_ROUTE, RTNLGRP_IPV4_ROUTE)
        self._watched = True
        news.start(lambda: self._run(news, tell), "watch routes")

        def close() -> None:
            news.close()
            self._watched = False

        return close

    def _run(self, news: wire.News, tell: Callable[[str, str], None]) -> None:
        told: tuple[Finding, ...] = ()
        pending = False
        while True:
            rest = max(self._looked + AGAIN - time.monotonic(), 0.0) if pending else None
            if not news.wait(rest):
                return
            pending |= self._hear(news)
            if not pending or time.monotonic() < self._looked + AGAIN:
                continue
            pending = False
            found = self.findings()
            for each in set(found) - set(told):
                tell(each.subject, each.text)
            for each in set(told) - set(found):
                tell(each.subject, "")
            told = found

    def _hear(self, news: wire.News) -> bool:
        """Read what has come; return whether a route of others in our ranges was, or may have been, in it."""
        heard, ours = list[Route](), False
        for datagram in news.read():
            heard.extend(route_news(datagram))
            ours = ours or not datagram
        near = [route for route in heard if route.subnet.prefixlen >= WIDE]
        ours = ours or bool(near and self._concerned(near))
        self._heard = self._heard or ours
        return ours

    def _concerned(self, routes: list[Route]) -> bool:
        subnets, pool = self._ledger.subnets(), IPv4Network(self._host.pool)
        ranges = [pool, *(subnet for subnet in subnets.values() if not subnet.subnet_of(pool))]
        routes = [route for route in routes if any(route.subnet.overlaps(each) for each in ranges)]
        own = {self._host.link("bridge", id) for id in subnets} if routes else set()
        return any(_name(route.index) not in own for route in routes)

    def _look(self) -> Iterator[Finding]:
        links = {link.index: link.name for link in table.links()}
        indexes = {link: index for index, link in links.items()}
        standing = {
            id: (subnet, indexes[bridge])
            for id, subnet in self._ledger.subnets().items()
            if (bridge := self._host.link("bridge", id)) in indexes
        }
        own = {bridge_index for _, bridge_index in standing.values()}
        routes = sockets.host.routes()
        strange = [route for route in routes if route.index not in own and route.subnet.prefixlen >= WIDE]
        for id, (subnet, bridge_index) in sorted(standing.items()):
            for route in strange:
                if route.subnet.overlaps(subnet):
                    yield from _finding(id, subnet, bridge_index, route, links.get(route.index, ""))


def _finding(id: str, subnet: IPv4Network, bridge: int, route: Route, link: str) -> Iterator[Finding]:
    way = f"route {route.subnet}" + (f" dev {link}" if link else "")
    if _leads_elsewhere(max(route.subnet, subnet, key=lambda each: each.prefixlen), bridge):
        text = f"{way} takes addresses of its subnet {subnet}: containers that have them can't be reached"
        yield Finding(f"network {id}", text, "remove the route, or give the network another subnet", breaks=True)
    elif route.subnet.prefixlen < subnet.prefixlen:
        text = f"{way} includes its subnet {subnet}: what lies there beyond this host can't be reached from here"
        yield Finding(f"network {id}", text, "give the network another subnet")


def _leads_elsewhere(subnet: IPv4Network, bridge: int) -> bool:
    """Whether the host sends to containers in this part of a subnet by another link than the bridge."""
    samples = (subnet[1], subnet[2]) if subnet.num_addresses > 2 else tuple(subnet)
    ways = [sockets.host.way_to(sample) for sample in samples]
    others = [way for way in ways if way is None or way.kind != RTN_LOCAL]  # else it is our own gateway's address
    return any(way is None or way.index != bridge for way in others)


def _name(index: int) -> str:
    with suppress(OSError):
        return socket.if_indextoname(index)
    return ""
