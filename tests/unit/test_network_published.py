"""What the kernel keeps in the maps of ports → the ports that are published."""

from __future__ import annotations

import socket
import struct

from holdfast.observed import PublishedPort
from holdfast_plugins.network.published import published

WEB = PublishedPort("tcp", "", 8080, "10.1.0.2", 80)
RANGE = PublishedPort("udp", "", 5000, "10.1.0.2", 6000, 3)


def element(protocol: int, port: int, address: str, target: int, host_ip: str = "") -> tuple[bytes, bytes]:
    parts = [bytes([protocol]), socket.inet_aton(host_ip) if host_ip else b"", struct.pack("!H", port)]
    value = [socket.inet_aton(address), struct.pack("!H", target)]
    return tuple(b"".join(part.ljust(-(-len(part) // 4) * 4, b"\0") for part in each) for each in (parts, value))  # type: ignore[return-value]


def test_ports_are_read_as_they_were_written() -> None:
    wildcard = [element(6, 8080, "10.1.0.2", 80), *(element(17, 5000 + n, "10.1.0.2", 6000 + n) for n in range(3))]
    bound = [element(6, 90, "10.1.0.3", 91, "127.0.0.1")]
    local = PublishedPort("tcp", "127.0.0.1", 90, "10.1.0.3", 91)
    assert set(published(bound, wildcard, (WEB, RANGE))) == {WEB, RANGE, local}


def test_a_range_that_lost_a_port_is_what_is_left_of_it() -> None:
    wildcard = [element(17, port, "10.1.0.2", port + 1000) for port in (5000, 5002, 5003)]
    assert published((), wildcard, (WEB, RANGE)) == (
        PublishedPort("udp", "", 5000, "10.1.0.2", 6000),
        PublishedPort("udp", "", 5002, "10.1.0.2", 6002, 2),
    )


def test_a_port_that_leads_elsewhere_is_published_there() -> None:
    assert published((), [element(6, 8080, "10.1.0.9", 80)], (WEB,)) == (
        PublishedPort("tcp", "", 8080, "10.1.0.9", 80),
    )


def test_what_was_written_as_every_address_is_found_in_the_map_of_every_address() -> None:
    zeros = PublishedPort("tcp", "0.0.0.0", 8080, "10.1.0.2", 80)
    assert published((), [element(6, 8080, "10.1.0.2", 80)], (zeros,)) == (zeros,)
