"""FirewallWant → the nft(8) script that replaces the agent's own table. Pure; called by `firewall`.

    raw          nothing from a container reaches the host's 127.0.0.0/8, though replies to it are let back in
    prerouting   what others, and containers, send to a published port of the host goes to its container
    output       what the host itself sends there, by any of its addresses or 127.0.0.1, does too
    postrouting  what leaves the host bears its address; so does what would come back past us (loopback, same bridge)
    forward      a network talks with itself; out, if it is not internal; in, through published ports only

Ports and networks are elements of maps and sets: a packet costs the same whether there is one or a thousand.
The chains judge only what comes from or goes to our own bridges; the host's own traffic is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from holdfast.observed import FirewallWant, PublishedPort

WILDCARDS = ("", "0.0.0.0")

CHAINS = """
  chain publish {
    dnat ip to meta l4proto . ip daddr . th dport map @bound
    dnat ip to meta l4proto . th dport map @wildcard
  }
  chain raw {
    type filter hook prerouting priority raw; policy accept;
    iifname @bridges ip daddr 127.0.0.0/8 drop
  }
  chain prerouting {
    type nat hook prerouting priority dstnat; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local jump publish
  }
  chain output {
    type nat hook output priority -100; policy accept;
    meta nfproto ipv4 fib daddr type local jump publish
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    oifname @bridges ct status dnat ip saddr 127.0.0.0/8 masquerade
    ct status dnat ip saddr . ip daddr @same masquerade
    ip saddr @outward oifname != @bridges masquerade
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname . oifname @within accept
    iifname @internal drop
    oifname @internal drop
    oifname != @bridges accept
    ct state established,related accept
    ct status dnat accept
    drop
  }
"""


def script(table: str, want: FirewallWant) -> str:
    """Replace the table in one transaction, or only delete it when nothing is wanted."""
    if want.empty:
        return deletion(table)
    networks = want.networks
    sets = (
        _set("set bridges", "ifname", (f'"{n.interface}"' for n in networks)),
        _set("set internal", "ifname", (f'"{n.interface}"' for n in networks if n.internal)),
        _set("set within", "ifname . ifname", (f'"{n.interface}" . "{n.interface}"' for n in networks)),
        _set("set outward", "ipv4_addr", (n.subnet for n in networks if not n.internal), interval=True),
        _set("set same", "ipv4_addr . ipv4_addr", (f"{n.subnet} . {n.subnet}" for n in networks), interval=True),
        _set("map bound", "inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service", _bound(want.ports)),
        _set("map wildcard", "inet_proto . inet_service : ipv4_addr . inet_service", _wildcard(want.ports)),
    )
    return f"{deletion(table)}table inet {table} {{\n{''.join(sets)}{CHAINS}}}\n"


def deletion(table: str) -> str:
    """Delete the table, whether it is there or not."""
    return f"table inet {table}\ndelete table inet {table}\n"


def _bound(ports: Iterable[PublishedPort]) -> Iterator[str]:
    for port in ports:
        if port.host_ip not in WILDCARDS:
            for step in range(port.count):
                yield (
                    f"{port.protocol} . {port.host_ip} . {port.host_port + step}"
                    f" : {port.address} . {port.container_port + step}"
                )


def _wildcard(ports: Iterable[PublishedPort]) -> Iterator[str]:
    for port in ports:
        if port.host_ip in WILDCARDS:
            for step in range(port.count):
                yield f"{port.protocol} . {port.host_port + step} : {port.address} . {port.container_port + step}"


def _set(head: str, kind: str, elements: Iterable[str], *, interval: bool = False) -> str:
    inner = ", ".join(elements)
    flags = " flags interval;" if interval else ""
    listed = f" elements = {{ {inner} }};" if inner else ""
    return f"  {head} {{ type {kind};{flags}{listed} }}\n"
