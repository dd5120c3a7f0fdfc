"""Requests of rtnetlink(7) as bytes; `netlink` sends them. Names and numbers are those of the kernel's headers."""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from pathlib import Path

from holdfast_plugins.network.wire import attribute, message

RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE = 16, 17, 19, 20, 21, 24
CREATE, REPLACE, EXCL = 0x400, 0x100, 0x200  # NLM_F_CREATE, …
AF_INET6, AF_BRIDGE, IFF_UP = 10, 7, 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_PROTINFO, IFLA_LINKINFO = 1, 3, 4, 10, 12, 18
IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_NET_NS_FD = 20, 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_MCAST_SNOOPING = 1, 5, 23
IFLA_BRPORT_MODE, VETH_INFO_PEER = 4, 1
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, RTA_OIF, RTA_GATEWAY = 1, 2, 4, 4, 5
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST = 254, 4, 0, 1


def new_bridge(name: str, mac: str, mtu: int) -> bytes:
    """Make a bridge, down. With a MAC of its own: else it has one of its ports', and another when that one goes.

    No multicast snooping: a container's IGMP query would steer multicast away from its neighbours.
    """
    settings = (_u32(IFLA_BR_STP_STATE, 0), _u32(IFLA_BR_FORWARD_DELAY, 0), attribute(IFLA_BR_MCAST_SNOOPING, b"\0"))
    info = _nest(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "bridge"), _nest(IFLA_INFO_DATA, *settings))
    return _link(RTM_NEWLINK, _text(IFLA_IFNAME, name), _mac(mac), info, _u32(IFLA_MTU, mtu), flags=CREATE | EXCL)


def new_veth(name: str, mtu: int, peer: str, peer_mac: str, netns: int) -> bytes:
    """Make a pair of links, both down, the peer in the namespace that is open as netns."""
    inside = (_text(IFLA_IFNAME, peer), _mac(peer_mac), _u32(IFLA_MTU, mtu), _u32(IFLA_NET_NS_FD, netns))
    pair = _nest(IFLA_INFO_DATA, _nest(VETH_INFO_PEER, _link_head(), *inside))
    info = _nest(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "veth"), pair)
    return _link(RTM_NEWLINK, _text(IFLA_IFNAME, name), _u32(IFLA_MTU, mtu), info, flags=CREATE | EXCL)


def name_link(name: str, alias: str) -> bytes:
    """Set the alias of a link, and keep IPv6 from giving it an address."""
    wanted = [_text(IFLA_IFNAME, name), _text(IFLA_IFALIAS, alias)]
    if Path("/proc/sys/net/ipv6").exists():
        quiet = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes((IN6_ADDR_GEN_MODE_NONE,)))
        wanted.append(_nest(IFLA_AF_SPEC, _nest(AF_INET6, quiet)))
    return _link(RTM_SETLINK, *wanted)


def attach(index: int, bridge: int) -> bytes:
    """Make a link a port of a bridge."""
    return _link(RTM_SETLINK, _u32(IFLA_MASTER, bridge), index=index)


def port_up(name: str) -> bytes:
    """Bring a bridge port up, with hairpin on: where bridged frames pass netfilter (br_netfilter), what a container
    sends to its own published port leaves by the port that it came in by.
    """
    hairpin = _nest(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, b"\1"))
    info = _nest(IFLA_LINKINFO, _text(IFLA_INFO_SLAVE_KIND, "bridge"), hairpin)
    return _link(RTM_NEWLINK, _text(IFLA_IFNAME, name), info, up=True)


@lru_cache(maxsize=8)
def link_up(name: str) -> bytes:
    """Bring a link up. Cached: in containers all links have the same name."""
    return _link(RTM_SETLINK, _text(IFLA_IFNAME, name), up=True)


def link_mac(name: str, mac: str) -> bytes:
    return _link(RTM_SETLINK, _text(IFLA_IFNAME, name), _mac(mac))


def link_mtu(name: str, mtu: int) -> bytes:
    return _link(RTM_SETLINK, _text(IFLA_IFNAME, name), _u32(IFLA_MTU, mtu))


def link_alias(index: int, alias: str) -> bytes:
    return _link(RTM_SETLINK, _text(IFLA_IFALIAS, alias), index=index)


def port_off(index: int) -> bytes:
    """Let a bridge pass nothing through one of its ports, until something else about the port changes.

    In the old form, which is a state alone: with the port's other attributes comes a notification that turns it on
    again.
    """
    disabled = attribute(IFLA_PROTINFO, bytes((0,)))  # BR_STATE_DISABLED
    return message(RTM_SETLINK, _link_head(index, family=AF_BRIDGE) + disabled)


def delete_link(index: int) -> bytes:
    return _link(RTM_DELLINK, index=index)


def address(index: int, ip: str, prefix: int, broadcast: str) -> bytes:
    """Give a link an address, or leave it as it is if it has it."""
    own = _ip(IFA_LOCAL, ip) + _ip(IFA_ADDRESS, ip) + _ip(IFA_BROADCAST, broadcast)
    return message(RTM_NEWADDR, _address_head(index, prefix) + own, CREATE | REPLACE)


def no_address(index: int, ip: str, prefix: int) -> bytes:
    """Take an address off a link, with exactly this prefix: a link may have it with several."""
    return message(RTM_DELADDR, _address_head(index, prefix) + _ip(IFA_LOCAL, ip))


def default_route(index: int, gateway: str) -> bytes:
    """Make gateway the way out, in place of any other default route."""
    head = (socket.AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    body = struct.pack("=8BI", *head) + _ip(RTA_GATEWAY, gateway) + _u32(RTA_OIF, index)
    return message(RTM_NEWROUTE, body, CREATE | REPLACE)


def _link(kind: int, *attributes: bytes, flags: int = 0, index: int = 0, up: bool = False) -> bytes:
    return message(kind, _link_head(index, up=up) + b"".join(attributes), flags)


def _link_head(index: int = 0, *, up: bool = False, family: int = socket.AF_UNSPEC) -> bytes:
    """struct ifinfomsg."""
    state = IFF_UP if up else 0
    return struct.pack("=BxHiII", family, 0, index, state, state)


def _address_head(index: int, prefix: int) -> bytes:
    """struct ifaddrmsg."""
    return struct.pack("=4BI", socket.AF_INET, prefix, 0, 0, index)


def _nest(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds others, without the flag that says so: these are older than it."""
    return attribute(kind, b"".join(inner))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _mac(value: str) -> bytes:
    return attribute(IFLA_ADDRESS, bytes.fromhex(value.replace(":", "")))


def _ip(kind: int, value: str) -> bytes:
    return attribute(kind, socket.inet_aton(value))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))
