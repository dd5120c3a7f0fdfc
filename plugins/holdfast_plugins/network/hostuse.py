"""List the IPv4 addresses that this host uses: its own, its routes, gateways, name servers and peers.

A network of containers must not contain any of them: what the host sends there would go to a container.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path

from holdfast.files import read_text
from holdfast_plugins.network.netlink import Netlink

RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
CONNECTIONS = Path("/proc/thread-self/net/tcp")
ESTABLISHED = "01"

Use = tuple[str, IPv4Network]  # (what uses it, the range)


def of_links(netlink: Netlink, but: str) -> Iterator[Use]:
    """Every address, route and gateway of the host, except those of the link `but`."""
    names = {link.index: link.name for link in netlink.links()}
    for index, subnet in netlink.addresses():
        if names.get(index) != but and not subnet.is_loopback:
            yield f"host interface '{names.get(index, '?')}'", subnet
    for route in netlink.routes():
        link = names.get(route.index, "?")
        if link != but and route.subnet.prefixlen and not route.subnet.is_loopback:
            yield f"host interface '{link}'", route.subnet
        if link != but and route.gateway is not None:
            yield f"a gateway of the host, by interface '{link}'", IPv4Network(route.gateway)


def of_resolver(files: Iterable[Path] = RESOLVERS) -> Iterator[Use]:
    """The name servers of the host."""
    for file in files:
        for words in map(str.split, read_text(file).splitlines()):
            if words[:1] == ["nameserver"] and len(words) > 1:
                with suppress(AddressValueError):  # IPv6
                    yield f"a name server in {file}", IPv4Network(IPv4Address(words[1]))


def of_peers(file: Path = CONNECTIONS) -> Iterator[Use]:
    """The peers of the host's TCP connections: its administrators, its git server, its registry."""
    lines = read_text(file).splitlines()[1:]
    peers = {words[2].partition(":")[0] for line in lines if (words := line.split())[3] == ESTABLISHED}
    for peer in sorted(peers):
        address = IPv4Address(bytes.fromhex(peer)[::-1])  # printed as a number in the order of the machine
        if not address.is_loopback:
            yield "a machine that the host is connected to", IPv4Network(address)
