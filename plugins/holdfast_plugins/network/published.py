"""The elements of the table's two maps of ports → the ports that it publishes. Pure; the inverse of `rules`.

The kernel keeps the parts of a concatenated key or value one after the other, each padded to four bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace

from holdfast.observed import PublishedPort
from holdfast_plugins.network.rules import WILDCARDS

Elements = Iterable[tuple[bytes, bytes]]
PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}


def published(bound: Elements, wildcard: Elements, wanted: Iterable[PublishedPort]) -> tuple[PublishedPort, ...]:
    """What the maps `bound` and `wildcard` publish. wanted: ranges that stay as they are if all of them is there."""
    left = {*_ports(bound, bound=True), *_ports(wildcard, bound=False)}
    whole = []
    for port in wanted:
        parts = set(_parts(port))
        if parts <= left:
            left -= parts
            whole.append(port)
    return (*whole, *_joined(left))


def _ports(elements: Elements, *, bound: bool) -> Iterator[PublishedPort]:
    for key, value in elements:
        protocol, host_ip, port = struct.unpack("!B3x4sH2x" if bound else "!B3x0sH2x", key)
        address, target = struct.unpack("!4sH2x", value)
        yield PublishedPort(
            PROTOCOLS.get(protocol, str(protocol)),
            socket.inet_ntoa(host_ip) if bound else "",
            port,
            socket.inet_ntoa(address),
            target,
        )


def _parts(port: PublishedPort) -> Iterator[PublishedPort]:
    host_ip = "" if port.host_ip in WILDCARDS else port.host_ip
    for step in range(port.count):
        yield PublishedPort(port.protocol, host_ip, port.host_port + step, port.address, port.container_port + step)


def _joined(ports: Iterable[PublishedPort]) -> list[PublishedPort]:
    """Single ports as ranges, as far as they follow each other."""
    found: list[PublishedPort] = []
    for port in sorted(ports, key=lambda each: (each.protocol, each.host_ip, each.address, each.host_port)):
        last = found[-1] if found else replace(port, count=0)
        host, inner = last.host_port + last.count, last.container_port + last.count
        if found and replace(last, count=1, host_port=host, container_port=inner) == port:
            found[-1] = replace(last, count=last.count + 1)
        else:
            found.append(port)
    return found
