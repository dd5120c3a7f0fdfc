"""Filter what a link sends to the host: classic BPF programs at tc(8) ingress, before bridge and netfilter.

They belong to the link and not to nftables: flushing the rule set does not remove them, and they work as soon as the
link is up. A program returns TC_ACT_OK or TC_ACT_SHOT. One that reads beyond a frame returns 0, which lets it pass:
nobody accepts a frame that is shorter than the headers read here.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from holdfast_plugins.network.wire import attribute, message

OK, DROP = 0, 2  # TC_ACT_OK, TC_ACT_SHOT
UNSUPPORTED = (errno.ENOENT, errno.EOPNOTSUPP)  # errors of a kernel without clsact or cls_bpf
ETHERNET = 14  # length of the header; 0 on links that carry plain IP

RTM_NEWQDISC, RTM_NEWTFILTER, CREATE = 36, 44, 0x400
TC_H_CLSACT, TC_H_INGRESS, CLSACT_HANDLE, ETH_P_ALL = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFF0000, 3
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_OPS_LEN, TCA_BPF_OPS, TCA_BPF_FLAGS, ACT_DIRECT = 4, 5, 8, 1

WORD, HALF, BYTE, IP_LENGTH = 0x20, 0x28, 0x30, 0xB1  # BPF_LD|BPF_ABS by size; BPF_LDX: 4 * (byte & 15)
HALF_AFTER, BYTE_AFTER = 0x48, 0x50  # BPF_LD|BPF_IND: at X + k
EQUAL, ANY_BIT, AND, RETURN = 0x15, 0x45, 0x54, 0x06
VLAN_TAG_PRESENT = 0xFFFFF000 + 48  # SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT

IPV4, ARP, VLAN, VLAN_OUTER = 0x0800, 0x0806, 0x8100, 0x88A8
ICMP, UDP, REDIRECT, DHCP_CLIENT = 1, 17, 5, 68


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. A jump names the label of its target; "" is the next instruction."""

    code: int
    value: int
    yes: str = ""
    no: str = ""
    label: str = ""


def endpoint_program(mac: str, address: IPv4Address) -> bytes:
    """Let a container send only as itself: IPv4 and ARP with its own MAC and address, untagged.

    Dropped are addresses of others (neighbours, the gateway, 127.0.0.0/8), everything that is not IPv4 or ARP (IPv6,
    VLAN tags, BPDUs), ICMP redirects, and answers to DHCP clients.
    """
    high, low = _split(mac)
    own = int(address)
    return _assemble(
        Step(HALF, VLAN_TAG_PRESENT),
        Step(EQUAL, 0, no="drop"),
        Step(WORD, 6),
        Step(EQUAL, high, no="drop"),
        Step(HALF, 10),
        Step(EQUAL, low, no="drop"),
        Step(HALF, 12),
        Step(EQUAL, ARP, yes="arp"),
        Step(EQUAL, IPV4, no="drop"),
        Step(WORD, ETHERNET + 12),
        Step(EQUAL, own, no="drop"),
        Step(BYTE, ETHERNET + 16),
        Step(EQUAL, 127, yes="drop"),
        Step(HALF, ETHERNET + 6),
        Step(ANY_BIT, 0x1FFF, yes="pass"),  # a later fragment has no header of a protocol
        Step(IP_LENGTH, ETHERNET),
        Step(BYTE, ETHERNET + 9),
        Step(EQUAL, UDP, yes="udp"),
        Step(EQUAL, ICMP, no="pass"),
        Step(BYTE_AFTER, ETHERNET),
        Step(EQUAL, REDIRECT, yes="drop", no="pass"),
        Step(HALF_AFTER, ETHERNET + 2, label="udp"),
        Step(EQUAL, DHCP_CLIENT, yes="drop", no="pass"),
        Step(WORD, ETHERNET + 8, label="arp"),
        Step(EQUAL, high, no="drop"),
        Step(HALF, ETHERNET + 12),
        Step(EQUAL, low, no="drop"),
        Step(WORD, ETHERNET + 14),
        Step(EQUAL, own, yes="pass"),
        Step(EQUAL, 0, yes="pass", no="drop"),  # a probe: does anybody have this address?
    )


def loopback_program(header: int) -> bytes:
    """Drop what comes from or goes to 127.0.0.0/8. header: the number of bytes before the IPv4 header."""
    kind = (
        (
            Step(HALF, 12),
            Step(EQUAL, VLAN, yes="drop"),  # inside a tag that the kernel took off: it would take this one off, too
            Step(EQUAL, VLAN_OUTER, yes="drop"),
            Step(EQUAL, IPV4, no="pass"),
        )
        if header
        else (Step(BYTE, 0), Step(AND, 0xF0), Step(EQUAL, 0x40, no="pass"))
    )
    return _assemble(
        *kind,
        Step(BYTE, header + 12),
        Step(EQUAL, 127, yes="drop"),
        Step(BYTE, header + 16),
        Step(EQUAL, 127, yes="drop", no="pass"),
    )


def guard(index: int, program: bytes) -> tuple[bytes, bytes]:
    """Requests of rtnetlink that put a program on what a link receives, in place of an earlier one."""
    qdisc = _traffic(index, CLSACT_HANDLE, TC_H_CLSACT, 0) + attribute(TCA_KIND, b"clsact\0")
    options = (
        attribute(TCA_BPF_OPS_LEN, struct.pack("=H", len(program) // 8))
        + attribute(TCA_BPF_OPS, program)
        + attribute(TCA_BPF_FLAGS, struct.pack("=I", ACT_DIRECT))
    )
    which = 1 << 16 | socket.htons(ETH_P_ALL)  # priority 1, every protocol
    filter = _traffic(index, 1, TC_H_INGRESS, which) + attribute(TCA_KIND, b"bpf\0")
    filter += attribute(TCA_OPTIONS, options)
    return message(RTM_NEWQDISC, qdisc, CREATE), message(RTM_NEWTFILTER, filter, CREATE)


def _assemble(*steps: Step) -> bytes:
    listing: Sequence[Step] = (*steps, Step(RETURN, OK, label="pass"), Step(RETURN, DROP, label="drop"))
    places = {step.label: number for number, step in enumerate(listing) if step.label}

    def leap(number: int, label: str) -> int:
        return places[label] - number - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", step.code, leap(number, step.yes), leap(number, step.no), step.value)
        for number, step in enumerate(listing)
    )


def _split(mac: str) -> tuple[int, int]:
    """The first four bytes and the last two, as the programs compare them."""
    text = mac.replace(":", "")
    return int(text[:8], 16), int(text[8:], 16)


def _traffic(index: int, handle: int, parent: int, info: int) -> bytes:
    return struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, handle, parent, info)
