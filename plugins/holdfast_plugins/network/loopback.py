"""Turn route_localnet on where ports published on 127.0.0.1 need it, behind a guard.

What the host sends to such a port leaves by the network's link, and replies to 127.0.0.1 come back there: the kernel
accepts them only if route_localnet is on. With it, a container could also reach the host's own services on 127.0.0.1,
so the link gets a guard first (`ingress`), which `nft flush ruleset` does not remove. Links that need none keep
route_localnet off. This works for links of all network drivers. On a bridge its ports have the guard: with
br_netfilter, replies from a bridge already have the address 127.0.0.1.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from holdfast.observed import FirewallWant, PublishedPort
from holdfast_plugins.network import ingress, sysctls
from holdfast_plugins.network.netlink import sockets
from holdfast_plugins.network.rules import WILDCARDS

LOOPBACK = IPv4Network("127.0.0.0/8")
ARPHRD_ETHER = "1"
NO_GUARD = "ports published on 127.0.0.1 don't answer there: the kernel lacks sch_ingress or cls_bpf"


class Loopback:
    """Guards and settings of the links of one agent's networks. Not for two threads at once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, bool]] = {}  # link → its index, and whether route_localnet is on there
        self.unguarded = ""

    def ensure(self, want: FirewallWant) -> None:
        """Turn route_localnet on where it is needed, and off elsewhere. Raises OSError, UnfitHost."""
        needed = needing(want)
        for network in want.networks:
            link = network.interface
            index = _index(link)
            if not index:
                continue  # the network is being recreated; `intact` finds the new link
            on = link in needed and self._guard(link, index)
            if self._known.get(link) != (index, on):
                sysctls.write(link, {"ipv4/route_localnet": str(int(on))})
            self._known[link] = index, on
        links = {network.interface for network in want.networks}
        self._known = {link: known for link, known in self._known.items() if link in links}

    def intact(self, want: FirewallWant) -> bool:
        """Whether every link is as `ensure` left it. A link is checked once, and again when it was recreated."""
        needed = needing(want)
        for network in want.networks:
            link = network.interface
            index, on = _index(link), link in needed and not self.unguarded
            if index and self._known.get(link) != (index, on):
                if sysctls.differs(link, {"ipv4/route_localnet": str(int(on))}):
                    return False
                if on and self._bare(link, index):
                    return False
                self._known[link] = index, on
        return True

    def withdraw(self, want: FirewallWant) -> None:
        """Turn route_localnet off on every link; the guards stay."""
        for network in want.networks:
            sysctls.write(network.interface, {"ipv4/route_localnet": "0"})
        self._known = {}

    def _guard(self, link: str, index: int) -> bool:
        """Put the guard on a link; False if the kernel can't."""
        try:
            for bare in self._bare(link, index) if self._known.get(link) != (index, True) else ():
                try:
                    sockets.host.request(*ingress.guard(bare, ingress.loopback_program(_header(link))))
                except OSError as error:
                    if error.errno != errno.ENODEV:  # the port has just gone
                        raise
        except OSError as error:
            if error.errno not in ingress.UNSUPPORTED:
                raise
            self.unguarded = NO_GUARD
        return not self.unguarded

    def _bare(self, link: str, index: int) -> frozenset[int]:
        """The links that should have a guard and have none."""
        try:
            ports = os.listdir(f"/sys/class/net/{link}/brif")  # noqa: PTH208 - names are all we want
        except FileNotFoundError:
            return frozenset({index}) - sockets.host.guarded()
        return frozenset(map(_index, ports)) - sockets.host.guarded() - {0}


def needing(want: FirewallWant) -> frozenset[str]:
    """The links by which replies to 127.0.0.0/8 come back."""
    networks = {IPv4Network(network.subnet): network.interface for network in want.networks}
    lengths = {subnet.prefixlen for subnet in networks}
    targets = {port.address for port in want.ports if _on_loopback(port)}
    subnets = {IPv4Network((target, length), strict=False) for target in targets for length in lengths}
    return frozenset(networks[subnet] for subnet in subnets if subnet in networks)


def _on_loopback(port: PublishedPort) -> bool:
    return port.host_ip in WILDCARDS or IPv4Address(port.host_ip) in LOOPBACK


def _index(link: str) -> int:
    with suppress(OSError):
        return socket.if_nametoindex(link)
    return 0


def _header(link: str) -> int:
    """The number of bytes before the IPv4 header in what a link receives."""
    kind = Path("/sys/class/net", link, "type").read_text().strip()
    return ingress.ETHERNET if kind == ARPHRD_ETHER else 0
