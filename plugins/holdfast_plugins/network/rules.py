"""Make the nft(8) script that replaces the agent's own table. Pure; called by `firewall`.

    raw          drop what containers send to the host's 127.0.0.0/8 (replies pass), with an address from outside
                 their network, and ICMP redirects
    prerouting   send what others, and containers, send to a published port of the host to its container
    output       the same for what the host itself sends there, by any of its addresses or 127.0.0.1
    postrouting  give the host's address to what leaves it, and to what would come back without passing the host
                 (loopback, same bridge)
    forward      allow traffic within a network; out of it, if it is not internal; into it, by published ports only

Ports and networks are elements of maps and sets: a packet costs the same with one and with a thousand. The chains
apply only to what comes from or goes to our own bridges; the host's own traffic is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.observed import FirewallWant

WILDCARDS = ("", "0.0.0.0")
MARK = "holdfast:"

CHAINS = "\n" + Path(__file__).with_name("chains.nft").read_text()


@dataclass(frozen=True, slots=True)
class Collection:
    """A named set or map of the table, with the type of its elements."""

    head: str
    type: str
    elements: tuple[str, ...]
    interval: bool = False

    @property
    def name(self) -> str:
        return self.head.split()[1]

    def __str__(self) -> str:
        flags = " flags interval;" if self.interval else ""
        listed = f" elements = {{ {', '.join(self.elements)} }};" if self.elements else ""
        return f"  {self.head} {{ type {self.type};{flags}{listed} }}\n"


def script(table: str, want: FirewallWant, root: str = "") -> str:
    """Replace the whole table in one transaction. root: the id of the root, the table's comment."""
    mark = f'  comment "{MARK}{root}"\n' if root else ""
    return f"{deletion(table)}table inet {table} {{\n{mark}{''.join(map(str, _collections(table, want)))}{CHAINS}}}\n"


def update(table: str, old: FirewallWant, new: FirewallWant) -> str:
    """Change a table that contains old to new, in one transaction. Only elements differ; "" if nothing does.

    It is much cheaper than replacing the table, because the kernel waits when chains are hooked in and out.
    """
    lines = []
    for before, after in zip(_collections(table, old), _collections(table, new), strict=True):
        for verb, one, other in (("delete", before, after), ("add", after, before)):
            known = frozenset(other.elements)
            if elements := [element for element in one.elements if element not in known]:
                lines.append(f"{verb} element inet {table} {one.name} {{ {', '.join(elements)} }}\n")
    return "".join(lines)


def deletion(table: str) -> str:
    """Delete the table, whether it is there or not."""
    return f"table inet {table}\ndelete table inet {table}\n"


def _collections(table: str, want: FirewallWant) -> tuple[Collection, ...]:
    networks = want.networks
    ours = [n for n in networks if n.interface.startswith(f"{table}-")]  # not a link of the host's that a driver uses
    bridges = tuple(f'"{n.interface}"' for n in networks)
    internal = tuple(f'"{n.interface}"' for n in networks if n.internal)
    outward = tuple(n.subnet for n in networks if not n.internal)
    target = "ipv4_addr . inet_service"
    return (
        Collection("set bridges", "ifname", bridges),
        Collection("set internal", "ifname", internal),
        Collection("set ours", "ifname", tuple(f'"{n.interface}"' for n in ours)),
        Collection("set senders", "ipv4_addr . ifname", tuple(f'{n.subnet} . "{n.interface}"' for n in ours), True),
        Collection("set within", "ifname . ifname", tuple(f"{b} . {b}" for b in bridges)),
        Collection("set outward", "ipv4_addr", outward, interval=True),
        Collection("set same", "ipv4_addr . ipv4_addr", tuple(f"{n.subnet} . {n.subnet}" for n in networks), True),
        Collection("map bound", f"inet_proto . ipv4_addr . inet_service : {target}", tuple(_ports(want, bound=True))),
        Collection("map wildcard", f"inet_proto . inet_service : {target}", tuple(_ports(want, bound=False))),
    )


def _ports(want: FirewallWant, *, bound: bool) -> Iterator[str]:
    """The elements of the ports that are published on one address of the host, or of those on every one."""
    for port in want.ports:
        if bound == (port.host_ip not in WILDCARDS):
            host = f"{port.protocol} . {port.host_ip}" if bound else port.protocol
            for step in range(port.count):
                yield f"{host} . {port.host_port + step} : {port.address} . {port.container_port + step}"
