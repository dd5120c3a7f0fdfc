"""What a container sends in the name of others, as raw frames, and who gets to see it."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.drivers import Host, NetworkWant
from holdfast.errors import WrongState
from holdfast.observed import Receipt
from holdfast_plugins.network.bridge import BridgeNetwork
from holdfast_plugins.network.endpoint import BridgeEndpoint
from live.netlab import PATIENCE, Lab, in_namespace

pytestmark = pytest.mark.live

ETH_P_ALL, PACKET_VNET_HDR, SOL_PACKET = 3, 15, 263
FORWARDING = "3"  # BR_STATE_FORWARDING
EVERYBODY = "ff:ff:ff:ff:ff:ff"
END = b"that was all of it"


@pytest.fixture
def lab(site: Host) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(site, stack)


class Party:
    """The attacker, its neighbour and the gateway of one network, each with its address and MAC."""

    def __init__(self, lab: Lab, network: Receipt) -> None:
        self.lab, self.network = lab, network
        evil, peer = lab.attach("evil", network).data, lab.attach("peer", network).data
        self.me, self.mac = evil["address"], evil["mac"]
        self.peer, self.peer_mac = peer["address"], peer["mac"]
        self.gateway = network.data["gateway"]
        self.gateway_mac = "02:42:" + IPv4Address(self.gateway).packed.hex(":")
        for port in (evil["host_interface"], peer["host_interface"]):
            wait_for(partial(_forwards, port), f"port {port} forwards")

    def arrives(self, *frames: bytes, huge: bool = False) -> list[str]:
        """Send frames from the attacker; who saw one of them: the neighbour, or the host on its bridge."""
        seen = []
        with (
            self._ear(self.lab.host.netns("peer"), "eth0") as neighbour,
            self._ear(None, self.network.data["interface"]) as bridge,
            self._ear(self.lab.host.netns("evil"), "eth0") as sender,
        ):
            if huge:
                sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            head = bytes(10) if huge else b""  # with it, only the Ethernet header lies where a program looks first
            for frame in frames:
                sender.send(head + frame)
            sender.send(head + ethernet(self.mac, EVERYBODY, 0x0800, ipv4(self.me, "224.0.0.1", 17, END)))
            for who, ear in (("neighbour", neighbour), ("host", bridge)):
                if any(frame[18:] in heard for heard in _until_end(ear) for frame in frames):  # without a VLAN tag
                    seen.append(who)
        return seen

    def _ear(self, namespace: Path | None, interface: str) -> socket.socket:
        def open_ear() -> socket.socket:
            ear = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW
            )  # deaf: else it heard other tests until it is bound
            ear.bind((interface, ETH_P_ALL))
            ear.settimeout(PATIENCE)
            return ear

        return in_namespace(namespace, open_ear)


def _forwards(port: str) -> bool:
    """Whether the bridge has noticed that both ends of a pair are up, which it does a moment afterwards."""
    return Path(f"/sys/class/net/{port}/brport/state").read_text().strip() == FORWARDING


def _until_end(ear: socket.socket) -> Iterator[bytes]:
    while True:
        heard = ear.recv(1 << 16)
        if END in heard:
            return
        yield heard


def ethernet(source: str, target: str, kind: int, content: bytes) -> bytes:
    return bytes.fromhex((target + source).replace(":", "")) + struct.pack("!H", kind) + content


def ipv4(source: str, target: str, protocol: int, content: bytes) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(content), 1, 0, 64, protocol)
    total = sum(struct.unpack("!9H", head + addresses))
    total = (total & 0xFFFF) + (total >> 16)
    return head + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + addresses + content


def arp(operation: int, mac: str, source: str, target: str) -> bytes:
    sender = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(source)
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + sender + bytes(6) + socket.inet_aton(target)


def udp(source: int, target: int, content: bytes = b"hello there") -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(content), 0) + content


def advertisement() -> bytes:
    """A router advertisement of 2001:db8:bad::/64 to all nodes."""
    prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 30, 30, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
    content = struct.pack("!BBHBBHII", 134, 0, 0, 64, 8, 30, 0, 0) + prefix
    route = socket.inet_pton(socket.AF_INET6, "fe80::1") + socket.inet_pton(socket.AF_INET6, "ff02::1")
    return struct.pack("!IHBB", 6 << 28, len(content), 58, 255) + route + content


Frames = Callable[[Party], bytes]

FORBIDDEN: dict[str, Frames] = {
    "the neighbour's address": lambda p: ethernet(
        p.mac, p.gateway_mac, 0x0800, ipv4(p.peer, p.gateway, 17, udp(9, 9))
    ),
    "the gateway's address": lambda p: ethernet(p.mac, p.peer_mac, 0x0800, ipv4(p.gateway, p.peer, 17, udp(53, 9))),
    "an address from outside": lambda p: ethernet(
        p.mac, p.peer_mac, 0x0800, ipv4("192.0.2.1", p.peer, 17, udp(9, 9))
    ),
    "127.0.0.1 as the sender": lambda p: ethernet(
        p.mac, p.gateway_mac, 0x0800, ipv4("127.0.0.1", p.gateway, 17, udp(9, 9))
    ),
    "127.0.0.1 as the target": lambda p: ethernet(
        p.mac, p.gateway_mac, 0x0800, ipv4(p.me, "127.0.0.1", 17, udp(9, 9))
    ),
    "the neighbour's MAC": lambda p: ethernet(p.peer_mac, EVERYBODY, 0x0800, ipv4(p.me, p.peer, 17, udp(9, 9))),
    "the bridge's MAC": lambda p: ethernet(p.gateway_mac, EVERYBODY, 0x0800, ipv4(p.me, p.peer, 17, udp(9, 9))),
    "a MAC of nobody": lambda p: ethernet("02:00:00:00:00:99", EVERYBODY, 0x0806, arp(1, p.mac, p.me, p.peer)),
    "an ARP answer for the gateway": lambda p: ethernet(p.mac, p.peer_mac, 0x0806, arp(2, p.mac, p.gateway, p.peer)),
    "a gratuitous ARP for the neighbour": lambda p: ethernet(p.mac, EVERYBODY, 0x0806, arp(1, p.mac, p.peer, p.peer)),
    "an ARP with the neighbour's MAC inside": lambda p: ethernet(
        p.mac, EVERYBODY, 0x0806, arp(1, p.peer_mac, p.me, p.me)
    ),
    "a router advertisement": lambda p: ethernet(p.mac, "33:33:00:00:00:01", 0x86DD, advertisement()),
    "a VLAN tag": lambda p: ethernet(p.mac, EVERYBODY, 0x8100, b"\0\5\x08\0" + ipv4(p.me, p.gateway, 17, udp(9, 9))),
    "two VLAN tags of no VLAN": lambda p: ethernet(
        p.mac, EVERYBODY, 0x8100, b"\0\0\x81\0\0\0\x08\0" + ipv4(p.me, p.gateway, 17, udp(9, 9))
    ),
    "a BPDU": lambda p: ethernet(p.mac, "01:80:c2:00:00:00", 38, b"\x42\x42\x03" + b"I am the root" + bytes(22)),
    "an answer to DHCP clients": lambda p: ethernet(
        p.mac, EVERYBODY, 0x0800, ipv4(p.me, "255.255.255.255", 17, udp(67, 68))
    ),
    "an ICMP redirect": lambda p: ethernet(
        p.mac, p.peer_mac, 0x0800, ipv4(p.me, p.peer, 1, struct.pack("!BBH", 5, 1, 0) + bytes(32))
    ),
}

ALLOWED: dict[str, Frames] = {
    "its own datagram": lambda p: ethernet(p.mac, EVERYBODY, 0x0800, ipv4(p.me, p.peer, 17, udp(9, 53))),
    "its own multicast": lambda p: ethernet(p.mac, EVERYBODY, 0x0800, ipv4(p.me, "224.0.0.251", 17, udp(9, 9))),
    "its own question by ARP": lambda p: ethernet(p.mac, EVERYBODY, 0x0806, arp(1, p.mac, p.me, p.peer)),
    "a probe for an address": lambda p: ethernet(p.mac, EVERYBODY, 0x0806, arp(1, p.mac, "0.0.0.0", p.me)),
    "a ping": lambda p: ethernet(p.mac, EVERYBODY, 0x0800, ipv4(p.me, p.peer, 1, b"\x08\0\0\0" + bytes(16))),
}


@pytest.fixture
def party(lab: Lab) -> Party:
    return Party(lab, lab.make("shop/front"))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_frame_in_the_name_of_another_reaches_nobody(party: Party, what: str) -> None:
    assert party.arrives(FORBIDDEN[what](party)) == []


@pytest.mark.parametrize("what", ALLOWED)
def test_frame_in_its_own_name_reaches_whom_it_is_for(party: Party, what: str) -> None:
    assert party.arrives(ALLOWED[what](party)) == ["neighbour", "host"]


def test_large_frame_whose_headers_lie_in_pages_is_judged_like_any_other(lab: Lab) -> None:
    party = Party(lab, lab.network.ensure(NetworkWant(id="shop/front", driver_opts={"mtu": "9000"})))
    long = udp(9, 9, bytes(6000))
    own = ethernet(party.mac, EVERYBODY, 0x0800, ipv4(party.me, party.peer, 17, long))
    stolen = ethernet(party.mac, EVERYBODY, 0x0800, ipv4(party.gateway, party.peer, 17, long))
    assert party.arrives(own, huge=True) == ["neighbour", "host"]
    assert party.arrives(stolen, huge=True) == []


def test_network_without_port_security_lets_addresses_through_but_never_loopback(lab: Lab) -> None:
    party = Party(lab, lab.network.ensure(NetworkWant(id="shop/front", driver_opts={"port_security": "off"})))
    assert "host" in party.arrives(FORBIDDEN["the neighbour's address"](party))
    assert party.arrives(FORBIDDEN["an ARP answer for the gateway"](party)) == ["neighbour"]
    for what in ("127.0.0.1 as the sender", "127.0.0.1 as the target", "two VLAN tags of no VLAN"):
        assert party.arrives(FORBIDDEN[what](party)) == []
    with pytest.raises(WrongState, match=r"port_security: 'maybe' is not known \(expected 'on' or 'off'\)"):
        lab.network.check(NetworkWant(id="shop/back", driver_opts={"port_security": "maybe"}))


def test_port_with_another_address_may_send_with_that_one_only(lab: Lab) -> None:
    network = lab.make("shop/front")
    party = Party(lab, network)
    other = str(IPv4Network(network.data["subnet"])[9])
    moved = ethernet(party.mac, EVERYBODY, 0x0800, ipv4(other, party.peer, 17, udp(9, 9)))
    assert party.arrives(moved) == []
    netns = lab.host.netns("evil").name
    lab.ip("-n", netns, "address", "flush", "dev", "eth0")
    lab.endpoint.ensure(lab.want("evil", network, ipv4_address=other, mac_address=party.mac))
    party.me = other
    assert party.arrives(moved) == ["neighbour", "host"]


def settings(interface: str, *names: str) -> list[str]:
    return [Path("/proc/sys/net", name.replace("*", interface)).read_text().strip() for name in names]


V6 = ("ipv6/conf/*/disable_ipv6", "ipv6/conf/*/accept_ra", "ipv6/conf/*/autoconf", "ipv6/conf/*/accept_redirects")
V4 = ("ipv4/conf/*/accept_redirects", "ipv4/conf/*/accept_source_route", "ipv4/conf/*/rp_filter")


def test_nothing_that_a_container_announces_becomes_a_route_of_the_host_or_of_a_neighbour(party: Party) -> None:
    bridge = party.network.data["interface"]
    port = party.lab.host.link("endpoint", "evil/shop/front")
    assert settings(bridge, *V6, *V4) == ["1", "0", "0", "0", "0", "0", "1"]
    assert settings(port, *V6) == ["1", "0", "0", "0"]
    inside = in_namespace(party.lab.host.netns("evil"), lambda: settings("eth0", *V6, V4[0]))
    assert inside == ["1", "0", "0", "0", "0"]
    everywhere = in_namespace(party.lab.host.netns("evil"), lambda: settings("all", V4[0]))
    assert everywhere == ["0"]
    shown = subprocess.run(["ip", "-d", "link", "show", bridge], check=True, capture_output=True, text=True).stdout
    assert "mcast_snooping 0" in shown
    assert "stp_state 0" in shown


def test_what_an_earlier_version_made_is_closed_when_it_is_mended(party: Party) -> None:
    lab, bridge = party.lab, party.network.data["interface"]
    port = lab.host.link("endpoint", "evil/shop/front")
    subprocess.run(["tc", "qdisc", "del", "dev", port, "clsact"], check=True)
    Path(f"/proc/sys/net/ipv6/conf/{bridge}/accept_ra").write_text("1")
    network, endpoint = BridgeNetwork(lab.host), BridgeEndpoint(lab.host, lab.network)
    assert [receipt.data for receipt in network.observe()] == [{}]
    assert [bool(receipt.data) for receipt in endpoint.observe() if receipt.owner == "evil"] == [False]
    network.ensure(NetworkWant(id="shop/front"))
    endpoint.ensure(lab.want("evil", party.network))
    assert all(receipt.data for receipt in (*network.observe(), *endpoint.observe()))
    assert party.arrives(FORBIDDEN["the gateway's address"](party)) == []
    assert settings(bridge, V6[1]) == ["0"]
