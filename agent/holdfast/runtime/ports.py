"""Find processes of the host that listen on ports that are to be published. Called by node at staging.

The sockets come from /proc/net (proc(5)). The holder of one is looked up only for the error.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import Conflict
from holdfast.files import read_text
from holdfast.spec.model import Port

LISTEN, UNCONNECTED = "0A", "07"  # states of TCP and UDP sockets that receive from anybody
ANY = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that receives what arrives at a port. address: the socket's; IPv4-mapped ones as IPv4."""

    protocol: str
    address: str
    port: int
    inode: int


def check_free(ports: Iterable[Port]) -> None:
    """Raise Conflict, with the port and its holder, if a process of the host listens on one of the ports.

    Ports that the agent publishes are rules, not sockets, so they don't count. Each port is bound for a moment, which
    is cheaper than reading the kernel's tables; these are read only to name the holder.
    """
    for port in ports:
        for offset in range(port.count):
            if not _is_free(port, port.host_port + offset):
                raise Conflict(f"publish '{port}': {_taken_by(port)} (a free port)")


def _is_free(port: Port, number: int) -> bool:
    """Whether a port can be bound. On all addresses it must be free for IPv6, too: `localhost` means both."""
    wide = not port.host_ip or port.host_ip in ANY
    places = [(socket.AF_INET, port.host_ip), *([(socket.AF_INET6, "::")] if wide and socket.has_ipv6 else [])]
    return all(_can_bind(family, address, number, port) for family, address in places)


def _can_bind(family: socket.AddressFamily, address: str, number: int, port: Port) -> bool:
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port.protocol == "tcp":  # then only listeners hold a port, and not connections in TIME_WAIT
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, number))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET:
            raise Conflict(f"publish '{port}': {address} is not an address of this host") from error
        return error.errno != errno.EADDRINUSE
    return True


def _taken_by(port: Port) -> str:
    for found in listeners(port.protocol):
        wide = not port.host_ip or port.host_ip in ANY or found.address in ANY
        if 0 <= found.port - port.host_port < port.count and (wide or port.host_ip == found.address):
            return f"{found.address}:{found.port}/{found.protocol} is taken by {_holder(found.inode)}"
    return "it is taken"


def listeners(protocol: str) -> Iterator[Listener]:
    """List the listening sockets of this network namespace."""
    state = LISTEN if protocol == "tcp" else UNCONNECTED
    for table in (protocol, f"{protocol}6"):
        for row in read_text(f"/proc/net/{table}").splitlines()[1:]:  # none of IPv6 on a host without
            fields = row.split()
            if fields[3] == state:
                address, port = fields[1].split(":")
                yield Listener(protocol, _address(address), int(port, 16), int(fields[9]))


def _address(text: str) -> str:
    """Read an address as /proc/net prints it: 32-bit words in the byte order of the host."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words).removeprefix(bytes(10) + b"\xff\xff")  # of an IPv4-mapped one
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _holder(inode: int) -> str:
    """The program that has a socket open; 'another process' if that can't be seen."""
    link = f"socket:[{inode}]"
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and link in _open_files(process):
            return f"'{read_text(process / 'comm').strip() or 'a process'}' (pid {process.name})"
    return "another process"


def _open_files(process: Path) -> Iterator[str]:
    try:
        names = os.listdir(process / "fd")  # noqa: PTH208 - names are enough
    except OSError:  # it has just ended, or is not ours to see
        return
    for name in names:
        try:
            yield os.readlink(process / "fd" / name)  # noqa: PTH115 - its text, not a path
        except OSError:
            continue
