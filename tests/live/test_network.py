from __future__ import annotations

import queue
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.drivers import EndpointWant, Host, NetworkWant
from holdfast.errors import Conflict, TryAgain, WrongState
from holdfast.observed import Receipt
from holdfast.runtime import netns
from holdfast.testing import DriverConformance, EndpointConformance, NetworkConformance
from holdfast_plugins.network.bridge import BridgeNetwork
from holdfast_plugins.network.endpoint import BridgeEndpoint
from holdfast_plugins.network.none_host import BareEndpoint, BareNetwork
from live.netlab import BRIEFLY, PATIENCE, Lab, Seen, in_namespace, tcp

pytestmark = pytest.mark.live


@pytest.fixture
def lab(site: Host) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(site, stack)


def links(lab: Lab) -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob(f"{lab.host.name}-*")}


def inside(lab: Lab, instance: str, *command: str) -> str:
    return lab.ip("-n", lab.host.netns(instance).name, *command)


def test_namespace_is_seen_by_ip_and_has_loopback_up(site: Host) -> None:
    receipt = netns.ensure(site, "web")
    name = Path(receipt.data["path"]).name
    try:
        assert name in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
        shown = subprocess.run(["ip", "-n", name, "link"], check=True, capture_output=True, text=True).stdout
        assert "LOOPBACK,UP" in shown
        assert netns.ensure(site, "web") == receipt
        assert list(netns.observe(site)) == [receipt]
    finally:
        netns.remove(site, receipt)
    assert list(netns.observe(site)) == []
    netns.remove(site, receipt)


def test_file_that_lost_its_namespace_is_observed_empty_and_mended(site: Host) -> None:
    receipt = netns.ensure(site, "web")
    subprocess.run(["umount", receipt.data["path"]], check=True)
    assert list(netns.observe(site)) == [replace(receipt, data={})]
    assert netns.ensure(site, "web") == receipt
    assert list(netns.observe(site)) == [receipt]
    netns.remove(site, receipt)


def test_networks_take_different_subnets_of_the_pool_and_keep_them(lab: Lab) -> None:
    first, second = lab.make("shop/front"), lab.make("shop/back")
    assert first.data["subnet"] != second.data["subnet"]
    for network in (first, second):
        lab.network.remove(replace(network, data={})) if network is second else None
    rebooted = BridgeNetwork(lab.host)
    lab.ip("link", "del", first.data["interface"])
    assert rebooted.ensure(NetworkWant(id="shop/front")) == first


def test_network_that_others_have_is_refused_by_name(lab: Lab) -> None:
    front = lab.make("shop/front")
    with pytest.raises(Conflict, match="of network 'shop/front'"):
        lab.network.check(NetworkWant(id="shop/back", subnet=front.data["subnet"]))
    _, _, ours = lab.neighbour("other")
    with pytest.raises(Conflict, match=f"of host interface '{lab.host.name}-other'"):
        lab.network.check(NetworkWant(id="shop/back", subnet=f"{ours.rsplit('.', 1)[0]}.0/24"))


def test_network_that_holds_a_gateway_or_a_peer_of_the_host_is_refused(lab: Lab) -> None:
    other, _, ours = lab.neighbour("other")
    far = str(IPv4Network(lab.host.pool)[-6])
    want = NetworkWant(id="shop/back", subnet=f"{IPv4Network(f'{far}/30', strict=False)}")
    lab.ip("address", "add", f"{far}/32", "dev", f"{lab.host.name}-other")
    lab.ip("-n", other.name, "route", "add", "default", "via", ours)
    network = in_namespace(other, lambda: BridgeNetwork(lab.host))
    in_namespace(other, lambda: network.check(want))

    def refusal() -> str:
        with pytest.raises(Conflict) as refused:
            BridgeNetwork(lab.host).check(want)
        return str(refused.value)

    with (
        socket.create_server((far, 0)) as server,
        in_namespace(other, lambda: socket.create_connection(server.getsockname()[:2], PATIENCE)),
        server.accept()[0],
    ):
        assert f"overlaps {far}/32 of a machine that the host is connected to" in in_namespace(other, refusal)
    lab.ip("-n", other.name, "route", "replace", "default", "via", far, "dev", "eth0", "onlink")
    assert f"overlaps {far}/32 of a gateway of the host, by interface 'eth0'" in in_namespace(other, refusal)


def test_route_over_our_subnet_that_comes_up_later_is_told_and_taken_back_when_it_goes(lab: Lab) -> None:
    network = lab.make("shop/front")
    subnet = IPv4Network(network.data["subnet"])
    lab.neighbour("vpn")
    link, half = f"{lab.host.name}-vpn", str(next(subnet.subnets()))
    told: queue.Queue[tuple[str, str]] = queue.Queue()
    end = lab.network.watch(lambda subject, what: told.put((subject, what)))
    try:
        assert list(lab.network.findings()) == []
        lab.ip("route", "add", "198.51.100.0/24", "dev", link)  # nobody's concern
        lab.ip("route", "add", half, "dev", link)
        subject, what = told.get(timeout=PATIENCE)
        assert subject == "network shop/front"
        assert what.startswith(f"route {half} dev {link} takes addresses of its subnet {subnet}")
        [found] = lab.network.findings()
        assert (found.text, found.breaks) == (what, True)
        lab.ip("route", "del", half, "dev", link)
        assert told.get(timeout=PATIENCE) == ("network shop/front", "")
        assert list(lab.network.findings()) == []
        assert told.empty()
    finally:
        end()
        lab.ip("route", "del", "198.51.100.0/24", "dev", link)


@pytest.mark.parametrize(
    ("route", "breaks"),
    [("blackhole {first}/32", [True]), ("{wide} dev {link}", [False]), ("0.0.0.0/1 dev {link}", [])],
)
def test_only_a_route_that_takes_traffic_away_breaks_a_network(lab: Lab, route: str, breaks: list[bool]) -> None:
    network = lab.make("shop/front")
    other, _, _ = lab.neighbour("vpn")
    subnet = IPv4Network(network.data["subnet"])
    words = route.format(first=subnet[9], wide=subnet.supernet(2), link="eth0" if "wide" in route else "x").split()
    if "dev" not in words:
        lab.ip("route", "add", *words)
        try:
            assert [found.breaks for found in BridgeNetwork(lab.host).findings()] == breaks
        finally:
            lab.ip("route", "del", *words)
        return

    def elsewhere() -> list[bool]:
        there = BridgeNetwork(lab.host)
        lab.ip("-n", other.name, "link", "add", there._host.link("bridge", "shop/front"), "type", "bridge")
        bridge = there._host.link("bridge", "shop/front")
        lab.ip("-n", other.name, "address", "add", f"{network.data['gateway']}/{subnet.prefixlen}", "dev", bridge)
        lab.ip("-n", other.name, "link", "set", bridge, "up")
        lab.ip("-n", other.name, "route", "add", words[0], "dev", "eth0")
        return [found.breaks for found in there.findings()]

    assert in_namespace(other, elsewhere) == breaks


def test_option_that_the_bridge_does_not_know_is_refused(lab: Lab) -> None:
    with pytest.raises(WrongState, match=r"driver_opts\.mtuu: unknown key 'mtuu' \(did you mean 'mtu'\?\)"):
        lab.network.check(NetworkWant(id="shop/front", driver_opts={"mtuu": "1400"}))


def test_mtu_of_the_network_is_that_of_its_endpoints(lab: Lab) -> None:
    network = lab.network.ensure(NetworkWant(id="shop/front", driver_opts={"mtu": "1400"}))
    lab.attach("web", network)
    assert "mtu 1400" in inside(lab, "web", "link", "show", "eth0")
    assert "mtu 1400" in lab.ip("link", "show", network.data["interface"])


def test_link_of_that_name_which_is_not_ours_is_left_alone(lab: Lab) -> None:
    name = lab.host.link("bridge", "shop/front")
    lab.ip("link", "add", name, "type", "bridge")
    with pytest.raises(Conflict, match=f"link '{name}' belongs to something unknown"):
        lab.make("shop/front")
    lab.ip("link", "del", name)


def test_endpoint_has_address_route_and_a_mac_that_goes_with_the_address(lab: Lab) -> None:
    network = lab.make("shop/front")
    receipt = lab.attach("web", network)
    address = receipt.data["address"]
    assert f"inet {address}/28" in inside(lab, "web", "address", "show", "eth0")
    assert f"default via {network.data['gateway']} dev eth0" in inside(lab, "web", "route")
    assert receipt.data["mac"] == "02:42:" + bytes(map(int, address.split("."))).hex(":")
    assert receipt.data["mac"] in inside(lab, "web", "link", "show", "eth0")


def test_static_address_and_mac_are_honoured_and_a_second_claim_names_the_holder(lab: Lab) -> None:
    network = lab.make("shop/front")
    address = str(IPv4Network(network.data["subnet"])[9])
    receipt = lab.attach("web", network, ipv4_address=address, mac_address="02:00:00:00:00:07")
    assert receipt.data["address"] == address
    assert "02:00:00:00:00:07" in inside(lab, "web", "link", "show", "eth0")
    with pytest.raises(Conflict, match=f"address '{address}' is taken by web"):
        lab.endpoint.check(lab.want("api", network, ipv4_address=address))
    with pytest.raises(Conflict, match="is taken by the gateway"):
        lab.endpoint.check(lab.want("api", network, ipv4_address=network.data["gateway"]))


def test_address_outside_the_subnet_is_refused(lab: Lab) -> None:
    with pytest.raises(WrongState, match="not a host's address"):
        lab.endpoint.check(lab.want("web", lab.make("shop/front"), ipv4_address="192.0.2.1"))


@pytest.mark.parametrize(
    "damage",
    [
        ("link", "del", "{host_interface}"),
        ("link", "set", "{host_interface}", "down"),
        ("link", "set", "{host_interface}", "nomaster"),
        ("-n", "{netns}", "address", "flush", "dev", "eth0"),
        ("-n", "{netns}", "route", "del", "default"),
        ("-n", "{netns}", "link", "set", "eth0", "down"),
        ("-n", "{netns}", "link", "set", "eth0", "address", "02:00:00:00:00:01"),
        ("-n", "{netns}", "link", "del", "eth0"),
    ],
    ids=lambda words: " ".join(words[-3:]),
)
def test_endpoint_altered_by_hand_is_put_right(lab: Lab, damage: tuple[str, ...]) -> None:
    network = lab.make("shop/front")
    receipt = lab.attach("web", network)
    lab.attach("api", network)
    lab.ip(*(word.format(netns=lab.host.netns("web").name, **receipt.data) for word in damage))
    assert lab.attach("web", network) == receipt
    assert receipt.data["mac"] in inside(lab, "web", "link", "show", "eth0")
    assert tcp(lab.host.netns("web"), 80, lab.host.netns("api"), receipt.data["address"], 80)
    assert f"default via {network.data['gateway']}" in inside(lab, "web", "route")


def test_endpoint_that_is_gone_or_unplugged_is_observed_so(lab: Lab) -> None:
    network = lab.make("shop/front")
    web, api = lab.attach("web", network), lab.attach("api", network)
    lab.ip("link", "set", web.data["host_interface"], "nomaster")
    lab.ip("link", "del", api.data["host_interface"])
    assert list(lab.endpoint.observe()) == [replace(web, data={})]


def test_bridge_deleted_by_hand_is_made_again_and_its_endpoints_plugged_in(lab: Lab) -> None:
    network = lab.make("shop/front")
    receipt = lab.attach("web", network)
    lab.ip("link", "del", network.data["interface"])
    with pytest.raises(TryAgain, match="its bridge is gone"):
        lab.attach("web", network)
    assert lab.make("shop/front") == network
    assert lab.attach("web", network) == receipt
    assert tcp(lab.host.netns("web"), 80, None, receipt.data["address"], 80) == Seen(network.data["gateway"])


def test_removed_endpoint_is_deaf_at_once_and_gone_with_its_namespace(lab: Lab) -> None:
    network = lab.make("shop/front")
    receipt = lab.attach("web", network)
    lab.endpoint.remove(receipt)
    assert list(lab.endpoint.observe()) == []
    assert tcp(lab.host.netns("web"), 80, None, receipt.data["address"], 80, within=BRIEFLY) is None
    netns.remove(lab.host, Receipt("netns", "kernel", "web", "web"))
    wait_for(lambda: links(lab) == {network.data["interface"]}, "its link is gone")


def test_removed_endpoint_without_a_namespace_is_deleted_at_once(lab: Lab) -> None:
    network = lab.make("shop/front")
    receipt = lab.attach("web", network)
    with lab.host.netns("web").open():  # someone still holds it
        netns.remove(lab.host, Receipt("netns", "kernel", "web", "web"))
        lab.endpoint.remove(replace(receipt, data={}))
        assert links(lab) == {network.data["interface"]}


def test_restarted_instance_in_a_new_namespace_gets_its_old_address(lab: Lab) -> None:
    network = lab.make("shop/front")
    lab.attach("other", network)
    receipt = lab.attach("web", network)
    netns.remove(lab.host, Receipt("netns", "kernel", "web", "web"))
    lab.endpoint = BridgeEndpoint(lab.host, BridgeNetwork(lab.host))
    assert lab.attach("web", network) == receipt
    assert tcp(lab.host.netns("web"), 80, None, receipt.data["address"], 80)


def test_second_network_adds_an_interface_and_leaves_the_way_out(lab: Lab) -> None:
    front, back = lab.make("shop/front"), lab.make("shop/back", internal=True)
    lab.attach("web", front)
    second = replace(lab.want("web", back), interface="eth1", default_route=False)
    receipt = lab.endpoint.ensure(second)
    assert f"inet {receipt.data['address']}/28" in inside(lab, "web", "address", "show", "eth1")
    assert f"default via {front.data['gateway']} dev eth0" in inside(lab, "web", "route")
    assert {each.id for each in lab.endpoint.observe()} == {"web/shop/front", "web/shop/back"}


def test_internal_network_gives_no_way_out(lab: Lab) -> None:
    lab.attach("db", lab.make("shop/back", internal=True))
    assert "default" not in inside(lab, "db", "route")


def test_network_grows_in_place_and_its_containers_with_it(lab: Lab) -> None:
    small = lab.network.ensure(NetworkWant(id="shop/front", hosts=6))
    assert small.data["hosts"] == 13
    web, api = lab.attach("web", small), lab.attach("api", small)
    grown = lab.network.ensure(NetworkWant(id="shop/front", hosts=14))
    assert grown.data["hosts"] == 29
    assert (grown.data["interface"], grown.data["gateway"]) == (small.data["interface"], small.data["gateway"])
    assert [each.data["subnet"] for each in lab.network.observe()] == [grown.data["subnet"]]
    assert lab.network.ensure(NetworkWant(id="shop/front", hosts=14)) == grown
    assert tcp(lab.host.netns("web"), 80, lab.host.netns("api"), web.data["address"], 80)
    for name, before in (("web", web), ("api", api)):
        assert lab.attach(name, grown) == replace(before, data={**before.data, "subnet": grown.data["subnet"]})
        shown = inside(lab, name, "address", "show", "eth0")
        assert (shown.count("inet "), f"inet {before.data['address']}/27" in shown) == (1, True)
        assert f"default via {grown.data['gateway']} dev eth0" in inside(lab, name, "route")
    gateway = lab.ip("address", "show", grown.data["interface"])
    assert (gateway.count("inet "), f"inet {grown.data['gateway']}/27" in gateway) == (1, True)
    far = grown.data["gateway"].removesuffix(".1") + ".30"
    lab.attach("far", grown, ipv4_address=far)
    assert tcp(lab.host.netns("far"), 80, lab.host.netns("web"), far, 80)


def test_network_that_has_no_room_to_grow_says_what_is_in_its_way(lab: Lab) -> None:
    small = lab.network.ensure(NetworkWant(id="shop/front"))
    first = small.data["gateway"].rpartition(".")[0]
    lab.make("shop/back", subnet=f"{first}.16/28")
    with pytest.raises(Conflict, match=rf"has room for 13 and can't grow: {first}\.16/28 is of network 'shop/back'"):
        lab.network.ensure(NetworkWant(id="shop/front", hosts=14))
    assert [each.data for each in lab.network.observe() if each.id == "shop/front"] == [
        {key: small.data[key] for key in ("interface", "subnet")}
    ]


def test_subnet_of_a_commit_that_is_too_small_for_its_containers_is_refused(lab: Lab) -> None:
    subnet = f"{lab.host.pool.partition('/')[0]}/29"
    with pytest.raises(WrongState, match="has room for 5 containers, 6 join it"):
        lab.network.check(NetworkWant(id="shop/front", subnet=subnet, hosts=6))


def test_two_hundred_endpoints_stand_side_by_side(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    network = lab.make("shop/front", subnet=str(lab.host.pool))
    timings: list[tuple[float, float, float]] = []
    for n in range(200):
        began = time.perf_counter()
        netns.ensure(lab.host, f"i{n}")
        made = time.perf_counter()
        receipt = lab.endpoint.ensure(lab.want(f"i{n}", network))
        attached = time.perf_counter()
        assert lab.endpoint.ensure(lab.want(f"i{n}", network)) == receipt
        timings.append((made - began, attached - made, time.perf_counter() - attached))
    began = time.perf_counter()
    assert len(list(lab.endpoint.observe())) == 200
    observed = time.perf_counter() - began
    medians = [sorted(each)[100] * 1e3 for each in zip(*timings, strict=True)]
    with capsys.disabled():
        print("\n200 endpoints: namespace {:.2f} ms, endpoint {:.2f} ms, again {:.2f} ms".format(*medians), end="")
        print(f", observed in {observed * 1e3:.1f} ms")


@pytest.mark.usefixtures("mounts_alone")
class OnSites(DriverConformance):
    """Runs on the test's own site; a second one is another agent."""

    @pytest.fixture
    def host(self, site: Host) -> Host:
        return site

    @pytest.fixture
    def another_host(self, new_site: Callable[[], Host]) -> Host:
        return new_site()


class TestBridgeNetwork(OnSites, NetworkConformance):
    def make_driver(self, host: Host) -> BridgeNetwork:
        return BridgeNetwork(host)

    def make_want(self, host: Host, number: int) -> NetworkWant:
        return NetworkWant(id=f"shop/net-{number}", internal=bool(number % 2))


class TestBareNetwork(OnSites, NetworkConformance):
    leaves_traces = False

    def make_driver(self, host: Host) -> BareNetwork:
        return BareNetwork("none")

    def make_want(self, host: Host, number: int) -> NetworkWant:
        return NetworkWant(id=f"none-{number}")


class TestBareEndpoint(OnSites, EndpointConformance):
    leaves_traces = False

    def make_driver(self, host: Host) -> BareEndpoint:
        return BareEndpoint("none")

    def make_want(self, host: Host, number: int) -> EndpointWant:
        network = BareNetwork("none").ensure(NetworkWant(id="none"))
        instance = f"{host.id}-{number:08}"
        path = Path(netns.ensure(host, instance).data["path"])
        return EndpointWant(instance=instance, network=network, netns=path, interface="eth0", default_route=False)

    def clean_up(self, host: Host) -> None:
        for namespace in netns.observe(host):
            netns.remove(host, namespace)


class TestBridgeEndpoint(OnSites, EndpointConformance):
    """A pair goes with its namespace, so that is taken away, too."""

    def make_driver(self, host: Host) -> BridgeEndpoint:
        return BridgeEndpoint(host, BridgeNetwork(host))

    def make_want(self, host: Host, number: int) -> EndpointWant:
        network = BridgeNetwork(host).ensure(NetworkWant(id="shop/front", hosts=self.many))
        instance = f"{host.id}-{number:08}"
        return EndpointWant(
            instance=instance,
            network=network,
            netns=Path(netns.ensure(host, instance).data["path"]),
            interface="eth0",
            default_route=True,
        )

    def clean_up(self, host: Host) -> None:
        for namespace in netns.observe(host):
            netns.remove(host, namespace)
        BridgeNetwork(host).remove(Receipt("network", "bridge", "shop/front"))
