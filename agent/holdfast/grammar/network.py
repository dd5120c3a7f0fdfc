"""Ports and IPv4 addresses."""

from __future__ import annotations

import ipaddress
import re

from holdfast.grammar.quantities import number


def ports(value: str) -> range:
    """Read one port or a range of them."""
    first, dash, last = value.partition("-")
    last = last if dash else first
    if not (number(first) and number(last)):
        raise ValueError(f"'{value}' is not a number (expected a port or a range as 8000-8010)")
    found = range(int(first), int(last) + 1)
    if not found:
        raise ValueError(f"'{value}' ends before it begins (expected a port or a range as 8000-8010)")
    if found.start < 1 or found.stop > 65536:
        raise ValueError(f"'{value}' is out of range (expected 1 to 65535)")
    return found


def ports_text(value: str) -> str:
    """Check one port or a range of them."""
    ports(value)
    return value


def port_text(host_ip: str, host_port: int, container_port: int, protocol: str, count: int = 1) -> str:
    """Write a published port, or a range of count ports, as state files do: [HOST_IP:]HOST:CONTAINER/PROTOCOL."""
    through = [f"-{first + count - 1}" if count > 1 else "" for first in (host_port, container_port)]
    host, inner = f"{host_port}{through[0]}", f"{container_port}{through[1]}"
    return f"{host_ip + ':' if host_ip else ''}{host}:{inner}/{protocol}"


def address(value: str) -> str:
    """Read an IPv4 address; return its canonical form."""
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError(f"'{value}' is not an IPv4 address (expected four numbers as 10.90.1.2)") from None


def subnet(value: str) -> str:
    """Read an IPv4 network; /30 is the smallest that holds a gateway and a container."""
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        host_bits = "host bits" in str(error)
        near = f"expected {ipaddress.IPv4Network(value, strict=False)}" if host_bits else "expected as 10.90.1.0/24"
        raise ValueError(f"'{value}' is not an IPv4 network ({near})") from None
    if network.prefixlen > 30:
        raise ValueError(f"'{value}' has no room for a gateway and a container (expected /30 or larger)")
    if network.prefixlen < 8 or any(network.overlaps(other) for other in _NOBODYS):
        raise ValueError(f"'{value}' is not for a network of containers (expected a private range as 10.90.1.0/24)")
    return str(network)


_NOBODYS = tuple(map(ipaddress.IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
"""This host, loopback, link-local (the cloud's metadata), multicast and reserved: RFC 6890."""


def mac(value: str) -> str:
    """Read a unicast MAC address; return it in lower case."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise ValueError(f"'{value}' is not a MAC address (expected six hexadecimal pairs as 02:42:ac:11:00:02)")
    if int(value[:2], 16) & 1:
        raise ValueError(f"'{value}' is a multicast address (expected an even first pair, as 02)")
    return value.lower()


def unusable(address: str, subnet: str | ipaddress.IPv4Network) -> str:
    """Say why an address can't be given to a machine of a subnet; "" if it can."""
    found, subnet = ipaddress.IPv4Address(address), ipaddress.IPv4Network(subnet)
    if found not in subnet:
        return f"'{address}' is outside the subnet (expected an address of {subnet})"
    if found in (subnet.network_address, subnet.broadcast_address):
        return f"'{address}' is the subnet's own first or last address (expected one between them)"
    return ""
