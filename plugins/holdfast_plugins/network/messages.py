"""What is asked of rtnetlink(7), as bytes: encoded by pyroute2, sent by `netlink`.

pyroute2 takes 0.1 s to import. The agent pays that when it starts, so that its first container need not; commands
that talk to a running agent load no drivers.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from holdfast_plugins.network import wire

RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE = 16, 17, 19, 20, 21, 24
CREATE, REPLACE, EXCL = 0x400, 0x100, 0x200
AF_INET, AF_BRIDGE, IFLA_PROTINFO = 2, 7, 12
IFF_UP = 0x1
ADDRESSES_NONE = 1  # IN6_ADDR_GEN_MODE_NONE
PORT_DISABLED = 0  # BR_STATE_DISABLED
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST = 254, 4, 0, 1

Attributes = list[tuple[str, Any]]


def new_bridge(name: str, mac: str, mtu: int | None) -> bytes:
    """Make a bridge, down. Its own MAC, so that it does not take its ports' and change as they come and go.

    No multicast snooping: a container's IGMP query would steer multicast away from its neighbours.
    """
    settings: Attributes = [("IFLA_BR_STP_STATE", 0), ("IFLA_BR_FORWARD_DELAY", 0), ("IFLA_BR_MCAST_SNOOPING", 0)]
    attributes: Attributes = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), _kind("bridge", settings)]
    if mtu is not None:
        attributes.append(("IFLA_MTU", mtu))
    return _link(RTM_NEWLINK, attributes, flags=CREATE | EXCL)


def new_veth(name: str, mtu: int, peer: str, peer_mac: str, netns: int) -> bytes:
    """Make a pair of links, both down, the other one in the namespace open as netns."""
    inside = {
        "attrs": [("IFLA_IFNAME", peer), ("IFLA_ADDRESS", peer_mac), ("IFLA_MTU", mtu), ("IFLA_NET_NS_FD", netns)]
    }
    pair: Attributes = [("VETH_INFO_PEER", inside)]
    return _link(RTM_NEWLINK, [("IFLA_IFNAME", name), ("IFLA_MTU", mtu), _kind("veth", pair)], flags=CREATE | EXCL)


def name_link(name: str, alias: str) -> bytes:
    """Set the alias of a link, and keep IPv6 from numbering it by itself."""
    attributes: Attributes = [("IFLA_IFNAME", name), ("IFLA_IFALIAS", alias)]
    if Path("/proc/sys/net/ipv6").exists():
        quiet = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", ADDRESSES_NONE)]}
        attributes.append(("IFLA_AF_SPEC", {"attrs": [("AF_INET6", quiet)]}))
    return _link(RTM_SETLINK, attributes)


def attach(index: int, bridge: int) -> bytes:
    """Make a link a port of a bridge."""
    return _link(RTM_SETLINK, [("IFLA_MASTER", bridge)], index=index)


def port_up(name: str) -> bytes:
    """Bring a bridge port up, with hairpin on: where bridged frames pass netfilter (br_netfilter), what a container
    sends to its own published port goes out of the port that it came in by.
    """
    return _link(RTM_NEWLINK, [("IFLA_IFNAME", name), _port([("IFLA_BRPORT_MODE", 1)])], up=True)


@lru_cache(maxsize=8)
def link_up(name: str) -> bytes:
    """Bring a link up. Kept, for in containers they all have the same name."""
    return _link(RTM_SETLINK, [("IFLA_IFNAME", name)], up=True)


def link_mac(name: str, mac: str) -> bytes:
    return _link(RTM_SETLINK, [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac)])


def link_mtu(name: str, mtu: int) -> bytes:
    return _link(RTM_SETLINK, [("IFLA_IFNAME", name), ("IFLA_MTU", mtu)])


def link_alias(index: int, alias: str) -> bytes:
    return _link(RTM_SETLINK, [("IFLA_IFALIAS", alias)], index=index)


def port_off(index: int) -> bytes:
    """Let a bridge pass nothing through one of its ports, until something else about the port changes.

    By hand, and in the old form that is a state alone: a port's attributes, which pyroute2 would encode, come with a
    notification that turns the port on again.
    """
    body = struct.pack("=BxHiIIHHB3x", AF_BRIDGE, 0, index, 0, 0, 5, IFLA_PROTINFO, PORT_DISABLED)
    return wire.message(RTM_SETLINK, body)


def delete_link(index: int) -> bytes:
    return _link(RTM_DELLINK, [], index=index)


def address(index: int, ip: str, prefix: int, broadcast: str) -> bytes:
    """Give a link an address, or leave it be if it has it."""
    more: Attributes = [("IFA_ADDRESS", ip), ("IFA_BROADCAST", broadcast)]
    return _address(RTM_NEWADDR, CREATE | REPLACE, index, prefix, [("IFA_LOCAL", ip), *more])


def no_address(index: int, ip: str, prefix: int) -> bytes:
    """Take an address off a link; that very prefix, for a link may have it with several."""
    return _address(RTM_DELADDR, 0, index, prefix, [("IFA_LOCAL", ip)])


def _address(kind: int, flags: int, index: int, prefix: int, attributes: Attributes) -> bytes:
    message = ifaddrmsg()
    message["family"], message["prefixlen"], message["index"] = AF_INET, prefix, index
    message["attrs"] = attributes
    return _encode(message, kind, flags)


def default_route(index: int, gateway: str) -> bytes:
    """Make gateway the way out, in place of any other default route."""
    message = rtmsg()
    message["family"], message["table"], message["proto"] = AF_INET, RT_TABLE_MAIN, RTPROT_STATIC
    message["scope"], message["type"] = RT_SCOPE_UNIVERSE, RTN_UNICAST
    message["attrs"] = [("RTA_GATEWAY", gateway), ("RTA_OIF", index)]
    return _encode(message, RTM_NEWROUTE, CREATE | REPLACE)


def _kind(name: str, data: Attributes) -> tuple[str, Any]:
    return "IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", name), ("IFLA_INFO_DATA", {"attrs": data})]}


def _port(data: Attributes) -> tuple[str, Any]:
    return "IFLA_LINKINFO", {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": data})]}


def _link(kind: int, attributes: Attributes, *, flags: int = 0, index: int = 0, up: bool = False) -> bytes:
    message = ifinfmsg()
    message["index"] = index
    if up:
        message["flags"] = message["change"] = IFF_UP
    message["attrs"] = attributes
    return _encode(message, kind, flags)


def _encode(message: Any, kind: int, flags: int) -> bytes:
    message["header"]["type"], message["header"]["flags"] = kind, flags
    message.encode()
    return bytes(message.data)
