"""UDP senders that never pause, while what is behind a published port comes, goes and changes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.drivers import Host
from holdfast.observed import PublishedPort, Receipt
from holdfast_plugins.network.addresses import Ledger
from holdfast_plugins.network.bridge import BridgeNetwork
from holdfast_plugins.network.conntrack import LACKING, Conntrack
from holdfast_plugins.network.endpoint import BridgeEndpoint
from holdfast_plugins.network.firewall import NftablesFirewall
from live.netlab import BRIEFLY, PATIENCE, Lab, in_namespace

pytestmark = pytest.mark.live


@pytest.fixture
def lab(site: Host) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(site, stack)


@pytest.fixture
def network(lab: Lab) -> Receipt:
    return lab.make("shop/front")


def udp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


class Sender:
    """One flow: every packet from the same port to the same place."""

    def __init__(self, client: Path | None, address: str, port: int) -> None:
        self.socket = in_namespace(client, udp_socket)
        self.to = (address, port)

    def __del__(self) -> None:
        self.socket.close()

    def send(self) -> None:
        with suppress(ConnectionRefusedError):  # of an earlier packet
            self.socket.sendto(b"there", self.to)

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])


@contextmanager
def listening(namespace: Path | None, port: int, address: str = "") -> Iterator[socket.socket]:
    with in_namespace(namespace, udp_socket) as listener:
        listener.bind((address, port))
        yield listener


Ways = dict[str, Sender]


def heard(listener: socket.socket, within: float = BRIEFLY / 8) -> bool:
    listener.settimeout(within)
    with suppress(TimeoutError):
        listener.recv(16)
        return True
    return False


def reaches(sender: Sender, listener: socket.socket, within: float = PATIENCE) -> bool:
    """Whether what it sends next arrives; what is there already is read first."""
    while heard(listener):
        pass
    sender.send()
    return heard(listener, within)


def silent(senders: Ways, listener: socket.socket) -> list[str]:
    """The ways by which nothing arrives."""
    return [way for way, sender in senders.items() if not reaches(sender, listener)]


def arriving(senders: Ways, listener: socket.socket) -> list[str]:
    """The ways by which something arrives where nothing should."""
    return [way for way, sender in senders.items() if reaches(sender, listener, BRIEFLY / 8)]


def published(port: int, receipt: Receipt, inner: int = 514, host_ip: str = "") -> PublishedPort:
    return PublishedPort("udp", host_ip, port, receipt.data["address"], inner)


@pytest.fixture
def ways(lab: Lab) -> Callable[[int], Ways]:
    other, _, ours = lab.neighbour("other")

    def make(port: int) -> Ways:
        return {
            "from outside": Sender(other, ours, port),
            "from the host by its address": Sender(None, ours, port),
            "by 127.0.0.1": Sender(None, "127.0.0.1", port),
        }

    return make


@pytest.mark.parametrize("inner", [514, None], ids=["another port inside", "the same port inside"])
def test_flow_follows_the_port_to_another_container_whichever_way_it_comes(
    free_port: Callable[[], int], lab: Lab, network: Receipt, ways: Callable[[int], Ways], inner: int | None
) -> None:
    port = free_port()
    inside = inner or port
    web, api = lab.attach("web", network), lab.attach("api", network)
    with listening(lab.host.netns("web"), inside) as first, listening(lab.host.netns("api"), inside) as second:
        lab.protect([network], published(port, web, inside))
        senders = ways(port)
        assert silent(senders, first) == []
        lab.protect([network], published(port, api, inside))
        assert silent(senders, second) == []
        assert not heard(first)


def test_flow_that_began_before_there_was_a_container_reaches_it(
    free_port: Callable[[], int], lab: Lab, network: Receipt, ways: Callable[[int], Ways]
) -> None:
    port = free_port()
    web = lab.attach("web", network)
    lab.protect([network])  # from here on flows are tracked
    with listening(lab.host.netns("web"), port) as listener:
        senders = ways(port)
        for sender in senders.values():
            sender.send()
        lab.protect([network], published(port, web, port))
        assert silent(senders, listener) == []
        lab.protect([network])
        assert arriving(senders, listener) == []
        lab.protect([network], published(port, web, port))
        assert silent(senders, listener) == []


def test_flow_reaches_nobody_once_the_last_port_is_withdrawn(
    free_port: Callable[[], int], lab: Lab, network: Receipt, ways: Callable[[int], Ways]
) -> None:
    port = free_port()
    web = lab.attach("web", network)
    with listening(lab.host.netns("web"), 514) as listener:
        receipt = lab.protect([network], published(port, web))
        senders = ways(port)
        assert silent(senders, listener) == []
        lab.firewall.remove(receipt)
        assert arriving(senders, listener) == []


def test_flow_that_began_while_the_table_was_gone_comes_back(
    free_port: Callable[[], int], lab: Lab, network: Receipt, ways: Callable[[int], Ways]
) -> None:
    port = free_port()
    web = lab.attach("web", network)
    lab.protect([network], published(port, web))
    lab.nft(f"delete chain inet {lab.host.name} prerouting; delete chain inet {lab.host.name} output")
    with listening(lab.host.netns("web"), 514) as listener:
        senders = ways(port)
        assert arriving(senders, listener) == []
        lab.protect([network], published(port, web))
        assert silent(senders, listener) == []


def test_neighbours_flow_on_the_same_port_of_another_address_is_not_touched(
    free_port: Callable[[], int], lab: Lab, network: Receipt
) -> None:
    port = free_port()
    near, _, ours = lab.neighbour("near")
    other, _, theirs = lab.neighbour("other")
    web, api = lab.attach("web", network), lab.attach("api", network)
    lab.protect([network], published(port, web, host_ip=ours))
    with listening(None, port, theirs) as service, listening(lab.host.netns("web"), 514) as listener:
        mine, neighbours = Sender(near, ours, port), Sender(other, theirs, port)
        assert reaches(mine, listener)
        assert reaches(neighbours, service)
        before = [flow.key for flow in Conntrack().to_port("udp", port) if flow.to == theirs]
        assert len(before) == 1
        lab.protect([network], published(port, api, host_ip=ours))
        lab.protect([network])
        assert [flow.key for flow in Conntrack().to_port("udp", port) if flow.to == theirs] == before
        assert reaches(neighbours, service)


def test_forwarded_flow_to_a_port_of_that_number_elsewhere_is_not_touched(
    free_port: Callable[[], int], lab: Lab, network: Receipt
) -> None:
    port = free_port()
    other, address, _ = lab.neighbour("other")
    web, api = lab.attach("web", network), lab.attach("api", network)
    lab.protect([network], published(port, web))
    with listening(other, port) as service:
        outward = Sender(lab.host.netns("api"), address, port)
        assert reaches(outward, service)
        before = [flow.key for flow in Conntrack().to_port("udp", port) if flow.to == address]
        assert len(before) == 1
        lab.protect([network], published(port, api))
        assert [flow.key for flow in Conntrack().to_port("udp", port) if flow.to == address] == before


def test_address_that_goes_to_another_owner_takes_no_flow_along(
    free_port: Callable[[], int], lab: Lab, site: Host
) -> None:
    """Even one that some rule of the host keeps alive."""
    now = [1_000_000.0]
    network = lab.make("shop/front", subnet=f"{lab.host.pool.partition('/')[0]}/30")
    lab.network.ledger = Ledger(site.root, lambda: now[0])
    lab.endpoint = BridgeEndpoint(site, lab.network)
    other, _, ours = lab.neighbour("other")
    port = free_port()
    web = lab.attach("web", network)
    lab.protect([network], published(port, web))
    with listening(lab.host.netns("web"), 514) as listener:
        assert reaches(Sender(other, ours, port), listener)
    lab.endpoint.remove(web)
    now[0] += 60
    address = web.data["address"]
    assert Conntrack().of_address(address)
    assert lab.attach("stranger", network).data["address"] == address
    assert Conntrack().of_address(address) == []


def test_ten_thousand_flows_are_gone_through_in_moments(
    free_port: Callable[[], int], lab: Lab, network: Receipt
) -> None:
    port = free_port()
    web, api = lab.attach("web", network), lab.attach("api", network)
    lab.protect([network], published(port, web))
    with in_namespace(None, udp_socket) as sender:
        for n in range(10_000):
            with suppress(ConnectionRefusedError):
                sender.sendto(b"x", (f"127.1.{n // 250}.{n % 250 + 1}", port))
    conntrack = Conntrack()
    wait_for(lambda: len(conntrack.to_port("udp", port)) == 10_000, "all are tracked")
    lab.protect([network], published(port, api))
    assert conntrack.to_port("udp", port) == []


def test_network_driver_finds_flows_of_a_subnet_that_it_gives_away(
    free_port: Callable[[], int], lab: Lab, site: Host
) -> None:
    """A pool with room for one network: the second gets the subnet of the first, and nothing of its flows."""
    tiny = Host(site.name, site.root, site.run_root, f"{site.pool.partition('/')[0]}/24")
    now = [1_000_000.0]
    lab.network = BridgeNetwork(tiny)
    lab.network.ledger = Ledger(site.root, lambda: now[0])
    lab.endpoint = BridgeEndpoint(tiny, lab.network)
    other, _, ours = lab.neighbour("other")
    port = free_port()
    first = lab.make("shop/front", subnet=tiny.pool)
    web = lab.attach("web", first)
    lab.protect([first], published(port, web))
    with listening(lab.host.netns("web"), 514) as listener:
        assert reaches(Sender(other, ours, port), listener)
    lab.endpoint.remove(web)
    lab.network.remove(first)
    now[0] += 60
    assert Conntrack().of_address(web.data["address"])
    second = lab.make("blog/front", subnet=tiny.pool)
    assert lab.attach("stranger", second).data["address"] != web.data["address"]
    assert Conntrack().of_address(web.data["address"]) == []


def test_kernel_that_tells_of_no_flows_is_told_of_and_keeps_nothing_from_working(
    free_port: Callable[[], int], lab: Lab, site: Host
) -> None:
    assert Conntrack().findings() == []
    unable = Conntrack(subsystem=NOBODYS)  # as for a module that is missing, the kernel says: no such thing
    lab.network = BridgeNetwork(site, unable)
    lab.network.ledger = Ledger(site.root)
    lab.endpoint, lab.firewall = BridgeEndpoint(site, lab.network), NftablesFirewall(site, unable)
    network = lab.make("shop/front")
    web, api, port = lab.attach("web", network), lab.attach("api", network), free_port()
    for each in (web, api):
        assert lab.firewall.applied() != lab.rules([network], published(port, each))
        lab.protect([network], published(port, each))
        assert lab.firewall.applied() == lab.rules([network], published(port, each))
    lab.endpoint.remove(web)
    assert list(lab.network.findings()) == list(lab.firewall.findings()) == [LACKING]
    told: list[tuple[str, str]] = []
    lab.firewall.watch(lambda subject, text: told.append((subject, text)))()
    assert [(subject, "nf_conntrack_netlink" in text) for subject, text in told] == [("flows", True)]


NOBODYS = 15
