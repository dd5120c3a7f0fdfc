from __future__ import annotations

import json
import queue
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ctypes import CDLL
from dataclasses import asdict
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.drivers import Host, NetworkWant
from holdfast.observed import Finding, FirewallNetwork, FirewallWant, PublishedPort, Receipt
from holdfast.testing import FirewallConformance
from holdfast_plugins.network.firewall import NftablesFirewall
from holdfast_plugins.network.monitor import Monitor
from holdfast_plugins.network.nftables import LIBRARY, Library, Program
from live.netlab import BRIEFLY, PATIENCE, Lab, Seen, in_namespace, tcp, udp
from live.test_spoofing import ethernet, ipv4
from live.test_spoofing import udp as datagram

pytestmark = pytest.mark.live


@pytest.fixture
def lab(site: Host) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(site, stack)


@pytest.fixture
def front(lab: Lab) -> Receipt:
    return lab.make("shop/front")


@pytest.fixture
def web(lab: Lab, front: Receipt) -> str:
    """The address of an instance `web` on the network front."""
    return str(lab.attach("web", front).data["address"])


def inside(lab: Lab, instance: str) -> Path:
    return lab.host.netns(instance)


def nft(*command: str) -> str:
    return subprocess.run(["nft", *command], check=True, capture_output=True, text=True).stdout


def test_published_port_is_reached_from_another_host_which_keeps_its_address(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port, (other, address, ours) = free_port(), lab.neighbour("other")
    lab.protect([front], PublishedPort("tcp", "", port, web, 80), PublishedPort("udp", "", port, web, 53))
    assert tcp(inside(lab, "web"), 80, other, ours, port) == Seen(address)
    assert udp(inside(lab, "web"), 53, other, ours, port) == Seen(address)


@pytest.mark.parametrize("send", [tcp, udp])
def test_published_port_is_reached_from_the_host_by_127_0_0_1_and_by_its_own_address(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int], send: Callable[..., Seen | None]
) -> None:
    port, (_, _, ours) = free_port(), lab.neighbour("other")
    lab.protect([front], PublishedPort(send.__name__, "", port, web, 80))
    assert send(inside(lab, "web"), 80, None, "127.0.0.1", port) == Seen(front.data["gateway"])
    assert send(inside(lab, "web"), 80, None, ours, port) == Seen(ours)


def test_every_port_of_a_range_leads_to_its_own(
    lab: Lab, front: Receipt, web: str, free_ports: Callable[[int], int]
) -> None:
    port = free_ports(3)
    lab.protect([front], PublishedPort("tcp", "127.0.0.1", port, web, 9000, 3))
    assert all(tcp(inside(lab, "web"), 9000 + n, None, "127.0.0.1", port + n) for n in range(3))


def test_port_bound_to_one_address_of_the_host_is_closed_on_the_others(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    (near, _, ours), (far, _, others) = lab.neighbour("near"), lab.neighbour("other")
    lab.protect([front], PublishedPort("tcp", ours, port, web, 80))
    assert tcp(inside(lab, "web"), 80, near, ours, port)
    assert tcp(inside(lab, "web"), 80, far, others, port, within=BRIEFLY) is None
    assert tcp(inside(lab, "web"), 80, None, "127.0.0.1", port, within=BRIEFLY) is None


def test_port_bound_to_127_0_0_1_is_closed_to_a_neighbour_that_routes_there(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port, (other, _, ours) = free_port(), lab.neighbour("other")
    lab.ip("-n", other.name, "link", "set", "lo", "down")
    lab.ip("-n", other.name, "route", "add", "127.0.0.1/32", "via", ours)
    subprocess.run(
        ["ip", "netns", "exec", other.name, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet"],
        check=True,
    )
    lab.protect([front], PublishedPort("tcp", "127.0.0.1", port, web, 80))
    assert tcp(inside(lab, "web"), 80, other, "127.0.0.1", port, within=BRIEFLY) is None


def test_container_reaches_a_published_port_of_its_own_and_of_a_peer(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port, (_, _, ours) = free_port(), lab.neighbour("other")
    lab.attach("api", front)
    lab.protect([front], PublishedPort("tcp", "", port, web, 80))
    assert tcp(inside(lab, "web"), 80, inside(lab, "web"), ours, port) == Seen(front.data["gateway"])
    assert tcp(inside(lab, "web"), 80, inside(lab, "api"), ours, port) == Seen(front.data["gateway"])


def test_networks_are_isolated_but_for_published_ports(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port, back = free_port(), lab.make("shop/back")
    lab.attach("db", back)
    lab.protect([front, back])
    assert tcp(inside(lab, "web"), 80, inside(lab, "db"), web, 80, within=BRIEFLY) is None
    lab.protect([front, back], PublishedPort("tcp", "", port, web, 80))
    assert tcp(inside(lab, "web"), 80, inside(lab, "db"), web, 80, within=BRIEFLY) is None
    assert tcp(inside(lab, "web"), 80, inside(lab, "db"), front.data["gateway"], port)


def test_containers_of_one_network_see_each_other_by_their_addresses(lab: Lab, front: Receipt, web: str) -> None:
    api = lab.attach("api", front).data["address"]
    lab.protect([front])
    assert tcp(inside(lab, "web"), 80, inside(lab, "api"), web, 80) == Seen(api)


def test_what_leaves_the_host_bears_the_address_of_the_host(lab: Lab, front: Receipt, web: str) -> None:
    other, address, ours = lab.neighbour("other")
    lab.protect([front])
    assert tcp(other, 7000, inside(lab, "web"), address, 7000) == Seen(ours)
    assert udp(other, 7000, inside(lab, "web"), address, 7000) == Seen(ours)


def test_unpublished_port_is_closed_to_a_host_that_routes_to_the_container(
    lab: Lab, front: Receipt, web: str
) -> None:
    other, _, ours = lab.neighbour("other")
    lab.ip("-n", other.name, "route", "add", front.data["subnet"], "via", ours)
    lab.protect([front])
    assert tcp(inside(lab, "web"), 80, other, web, 80, within=BRIEFLY) is None


def test_internal_network_has_no_way_out_and_none_in(lab: Lab) -> None:
    back = lab.make("shop/back", internal=True)
    db, peer = lab.attach("db", back).data["address"], lab.attach("peer", back).data["address"]
    other, address, ours = lab.neighbour("other")
    lab.ip("-n", other.name, "route", "add", back.data["subnet"], "via", ours)
    lab.ip("-n", inside(lab, "db").name, "route", "add", "default", "via", back.data["gateway"])
    lab.protect([back])
    assert tcp(other, 7000, inside(lab, "db"), address, 7000, within=BRIEFLY) is None
    assert udp(other, 7000, inside(lab, "db"), address, 7000, within=BRIEFLY) is None
    assert tcp(inside(lab, "db"), 80, other, db, 80, within=BRIEFLY) is None
    assert tcp(inside(lab, "db"), 80, inside(lab, "peer"), db, 80) == Seen(peer)


def test_container_does_not_reach_what_listens_on_the_hosts_loopback(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    lab.protect([front])
    name = inside(lab, "web").name
    lab.ip("-n", name, "link", "set", "lo", "down")
    lab.ip("-n", name, "route", "add", "127.0.0.1/32", "via", front.data["gateway"])
    subprocess.run(
        ["ip", "netns", "exec", name, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet"], check=True
    )
    assert tcp(None, port, inside(lab, "web"), "127.0.0.1", port, source=web, within=BRIEFLY) is None


@pytest.mark.parametrize("port_security", ["on", "off"])
def test_hosts_loopback_stays_closed_while_the_table_is_away(
    lab: Lab, free_port: Callable[[], int], port_security: str
) -> None:
    network = lab.network.ensure(NetworkWant(id="shop/front", driver_opts={"port_security": port_security}))
    web = lab.attach("web", network).data
    receipt = lab.protect([network], PublishedPort("tcp", "", free_port(), web["address"], 80))
    assert route_localnet(network) == "1"
    nft("delete", "table", "inet", lab.host.name)
    gateway = "02:42:" + IPv4Address(network.data["gateway"]).packed.hex(":")

    def frame(source: str, target: str, port: int, content: bytes) -> bytes:
        return ethernet(web["mac"], gateway, 0x0800, ipv4(source, target, 17, datagram(9, port, content)))

    def sender() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        raw.bind(("eth0", 0))
        return raw

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service, in_namespace(inside(lab, "web"), sender) as raw:
        service.bind(("", 0))
        service.settimeout(PATIENCE)
        port = service.getsockname()[1]
        raw.send(frame(web["address"], "127.0.0.1", port, b"to loopback"))
        raw.send(frame("127.0.0.1", network.data["gateway"], port, b"from loopback"))
        raw.send(frame("192.0.2.7", network.data["gateway"], port, b"from elsewhere"))
        raw.send(frame(web["address"], network.data["gateway"], port, b"as itself"))
        assert service.recv(100) == b"as itself"
    lab.firewall.remove(receipt)


def test_route_localnet_is_on_only_where_a_port_is_published_on_loopback(lab: Lab) -> None:
    front, back = lab.make("shop/front"), lab.make("shop/back")
    web, db = lab.attach("web", front).data["address"], lab.attach("db", back).data["address"]
    _, _, ours = lab.neighbour("other")
    everywhere, here = PublishedPort("tcp", "", 7001, web, 80), PublishedPort("tcp", ours, 7002, db, 80)
    lab.protect([front, back], everywhere, here)
    assert (route_localnet(front), route_localnet(back)) == ("1", "0")
    lab.protect([front, back], here, PublishedPort("tcp", "127.0.0.1", 7003, db, 80))
    assert (route_localnet(front), route_localnet(back)) == ("0", "1")
    lab.protect([front, back])
    assert (route_localnet(front), route_localnet(back)) == ("0", "0")


def test_link_that_another_driver_made_answers_on_loopback_too_and_has_a_guard(
    lab: Lab, free_port: Callable[[], int]
) -> None:
    other, address, ours = lab.neighbour("other")
    port, link = free_port(), f"{lab.host.name}-other"
    network = Receipt("network", "mine", "shop/mine", data={"interface": link, "subnet": f"{ours}/30"})
    want = FirewallWant(
        (FirewallNetwork("shop/mine", link, str(IPv4Network(f"{ours}/30", strict=False))),),
        (PublishedPort("tcp", "127.0.0.1", port, address, 80),),
    )
    lab.firewall.ensure(want)
    assert tcp(other, 80, None, "127.0.0.1", port)
    assert "direct-action" in tc(link)
    lab.firewall.ensure(FirewallWant(want.networks))
    assert route_localnet(network) == "0"


def test_network_that_was_made_anew_answers_on_loopback_again(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    want = lab.rules([front], PublishedPort("tcp", "127.0.0.1", port, web, 80))
    lab.firewall.ensure(want)
    lab.ip("link", "del", front.data["interface"])
    lab.make("shop/front")
    lab.attach("web", front)
    assert lab.firewall.applied() is None
    lab.firewall.ensure(want)
    assert tcp(inside(lab, "web"), 80, None, "127.0.0.1", port)


def test_table_of_an_earlier_version_is_written_anew(lab: Lab, front: Receipt) -> None:
    lab.protect([front])
    kept = lab.host.run_root / "firewall.json"
    kept.write_text(json.dumps(json.loads(kept.read_text())[:3]))
    assert NftablesFirewall(lab.host).applied() is None


def test_table_is_back_at_once_when_somebody_flushes_it_and_who_did_is_told(lab: Lab, front: Receipt) -> None:
    want, (other, _, _) = lab.rules([front]), lab.neighbour("other")
    told: queue.Queue[tuple[str, str]] = queue.Queue()

    def work() -> list[tuple[str, str]]:
        firewall, seen = NftablesFirewall(lab.host), []
        receipt = firewall.ensure(want)
        end = firewall.watch(lambda subject, what: told.put((subject, what)))
        try:
            for damage in ("flush ruleset", f"flush chain inet {lab.host.name} forward"):
                nft(damage)
                seen.append(told.get(timeout=PATIENCE))  # nobody asks the driver meanwhile: it hears of it
                assert firewall.applied() == want
        finally:
            end()
            firewall.remove(receipt)
        return seen

    for subject, what in in_namespace(other, work):
        assert subject == "firewall"
        assert re.search(r"was altered by 'nft' \(process \d+\); it is written again", what)


def test_changes_of_other_tables_are_not_answered_and_a_fight_over_ours_ever_more_rarely(lab: Lab) -> None:
    other, _, _ = lab.neighbour("other")
    answers: list[str] = []

    def work() -> tuple[int, int]:
        nft(f"add table inet {lab.host.name}")

        def answer(who: str) -> bool:
            answers.append(who)
            return True

        monitor = Monitor(lab.host.name, answer)
        change = "add table inet x; add chain inet x y; delete table inet x"
        try:
            library = Library(CDLL(LIBRARY))
            for _ in range(200):
                library.run(change)
            library.run(f"add chain inet {lab.host.name} z")
            wait_for(lambda: answers, "our table is answered for")
            before, began = len(answers), time.monotonic()

            def fought() -> bool:
                library.run(f"delete chain inet {lab.host.name} z; add chain inet {lab.host.name} z")
                return time.monotonic() - began > 1.0 and len(answers) > before

            wait_for(fought, "it is answered once more")
            return before, len(answers)
        finally:
            monitor.close()

    before, after = in_namespace(other, work)
    assert before == 1
    assert 1 < after <= 6


def route_localnet(network: Receipt) -> str:
    return Path("/proc/sys/net/ipv4/conf", network.data["interface"], "route_localnet").read_text().strip()


def tc(link: str) -> str:
    command = ["tc", "filter", "show", "dev", link, "ingress"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_moved_port_leads_to_the_new_address_only(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int]
) -> None:
    port, api = free_port(), lab.attach("api", front).data["address"]
    lab.protect([front], PublishedPort("tcp", "", port, web, 80))
    lab.protect([front], PublishedPort("tcp", "", port, api, 80))
    assert tcp(inside(lab, "web"), 80, None, "127.0.0.1", port, within=BRIEFLY) is None
    assert tcp(inside(lab, "api"), 80, None, "127.0.0.1", port)
    lab.protect([front])
    assert tcp(inside(lab, "api"), 80, None, "127.0.0.1", port, within=BRIEFLY) is None


@pytest.mark.parametrize(
    "damage",
    [
        "delete table inet {}",
        "flush chain inet {} forward",
        "flush map inet {} wildcard",
        "add table inet {} {{ flags dormant; }}",
        "insert rule inet {} publish drop",
    ],
)
def test_table_altered_by_hand_is_seen_and_put_right(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int], damage: str
) -> None:
    port = free_port()
    want = lab.rules([front], PublishedPort("tcp", "", port, web, 80))
    receipt = lab.firewall.ensure(want)
    nft(damage.format(lab.host.name))
    assert lab.firewall.applied() is None
    assert receipt not in lab.firewall.observe()
    assert lab.firewall.ensure(want) == receipt
    assert lab.firewall.applied() == want
    assert tcp(inside(lab, "web"), 80, None, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        ("delete element inet {} wildcard {{ tcp . {} }}", "others"),
        ("flush chain inet {} publish", "none"),
        ("delete chain inet {} prerouting", "none"),
        ("add table inet {} {{ flags dormant; }}", "none"),
        ("add rule inet {} forward counter", "all"),
        ("delete table inet {}", "no table"),
    ],
)
def test_what_an_altered_table_publishes_is_told_until_it_is_put_right(
    lab: Lab, front: Receipt, web: str, free_port: Callable[[], int], damage: str, left: str
) -> None:
    gone, kept = (
        PublishedPort("tcp", "", free_port(), web, 80),
        PublishedPort("udp", "127.0.0.1", free_port(), web, 53, 2),
    )
    lab.firewall.ensure(lab.rules([front], gone, kept))
    nft(damage.format(lab.host.name, gone.host_port))
    published = {"others": [kept], "none": [], "all": [gone, kept]}
    for firewall in (lab.firewall, NftablesFirewall(lab.host)):  # and one that has just been started
        told = [receipt.data for receipt in firewall.observe()]
        assert told == ([{"ports": [asdict(port) for port in published[left]]}] if left in published else [])
    assert lab.firewall.ensure(lab.rules([front], gone, kept)).data.keys() == {"digest"}


def test_change_of_another_table_leaves_ours_intact_across_a_restart_of_the_agent(lab: Lab, front: Receipt) -> None:
    receipt = lab.protect([front])
    other = f"{lab.host.name}x"
    nft(f"add table inet {other}; delete table inet {other}")
    assert list(lab.firewall.observe()) == [receipt]
    restarted = NftablesFirewall(lab.host)
    assert list(restarted.observe()) == [receipt]
    assert restarted.applied() == lab.rules([front])


def test_nothing_wanted_leaves_no_table_and_no_file(lab: Lab, front: Receipt) -> None:
    lab.protect([front])
    lab.firewall.ensure(FirewallWant())
    assert f" {lab.host.name}\n" not in nft("list", "tables")
    assert list(lab.firewall.observe()) == []
    assert not (lab.host.run_root / "firewall.json").exists()


def test_program_nft_serves_where_the_library_lacks(lab: Lab, front: Receipt) -> None:
    lab.firewall._nft = Program("/usr/sbin/nft")
    lab.protect([front])
    assert lab.firewall.applied() == lab.rules([front])


def test_forward_policy_of_another_product_gets_our_accept_and_loses_it_again(lab: Lab, front: Receipt) -> None:
    other, _, _ = lab.neighbour("docker")

    def rules() -> str:
        return subprocess.run(["iptables", "-S", "FORWARD"], check=True, capture_output=True, text=True).stdout

    def work() -> tuple[str, str, list[list[Finding]]]:
        subprocess.run(["iptables", "-P", "FORWARD", "DROP"], check=True)
        firewall = NftablesFirewall(lab.host)
        found = [list(firewall.findings())]
        receipt = firewall.ensure(lab.rules([front]))
        found.append(list(firewall.findings()))
        during = rules()
        firewall.remove(receipt)
        return during, rules(), found

    during, after, found = in_namespace(other, work)
    assert f'-A FORWARD -o {lab.host.name}-+ -m comment --comment "holdfast:{lab.host.name}" -j ACCEPT' in during
    assert f'-A FORWARD -i {lab.host.name}-+ -m comment --comment "holdfast:{lab.host.name}" -j ACCEPT' in during
    assert after == "-P FORWARD DROP\n"
    [[before], with_accept] = found
    assert "chain 'ip filter FORWARD' drops what is forwarded by policy" in before.text
    assert with_accept == []


def test_forward_policy_in_a_table_of_nftables_is_told_until_a_rule_there_names_our_bridges(lab: Lab) -> None:
    other, _, _ = lab.neighbour("strict")
    drop = "{ type filter hook forward priority 0; policy drop; }"

    def work() -> list[list[str]]:
        firewall, told = NftablesFirewall(lab.host), []
        for change in (
            "add table inet quiet; add chain inet quiet forward { type filter hook forward priority 0; }",
            f"add table inet filter; add chain inet filter forward {drop}",
            "add rule inet filter forward oifname lo accept",
            f'add rule inet filter forward iifname "{lab.host.name}-*" accept',
            "delete table inet filter",
        ):
            nft(change)
            told.append([str(found) for found in firewall.findings()])
        return told

    quiet, strict, elsewhere, accepted, gone = in_namespace(other, work)
    assert quiet == accepted == gone == []
    assert strict == elsewhere
    assert "chain 'inet filter forward' drops what is forwarded by policy" in strict[0]
    assert f"'{lab.host.name}-*'" in strict[0]


@pytest.mark.usefixtures("mounts_alone")
class TestNftablesFirewall(FirewallConformance):
    @pytest.fixture
    def host(self, site: Host) -> Host:
        return site

    @pytest.fixture
    def another_host(self, new_site: Callable[[], Host]) -> Host:
        return new_site()

    def make_driver(self, host: Host) -> NftablesFirewall:
        return NftablesFirewall(host)

    def make_want(self, host: Host, number: int) -> FirewallWant:
        front = FirewallNetwork("shop/front", host.link("bridge", "shop/front"), host.pool)
        web = str(IPv4Network(host.pool)[2])
        return FirewallWant(networks=(front,), ports=(PublishedPort("tcp", "0.0.0.0", 8080, web, 80),))
