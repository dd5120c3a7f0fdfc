from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from holdfast.drivers import EndpointWant, NetworkWant
from holdfast.errors import Conflict, WrongState
from holdfast.observed import Receipt
from holdfast_plugins.network.addresses import Ledger, first_free, parse_subnet
from holdfast_plugins.network.none_host import BareEndpoint, BareNetwork

SUBNET = IPv4Network("10.1.0.0/29")
GATEWAY = "10.1.0.1"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path)
    ledger.keep("shop/front", SUBNET)
    return ledger


def take(ledger: Ledger, instance: str, wanted: str | None = None) -> str:
    return ledger.leases("shop/front").take(instance, SUBNET, GATEWAY, wanted)


def test_gateway_and_broadcast_are_never_given(ledger: Ledger) -> None:
    assert {take(ledger, f"i{n}") for n in range(5)} == {f"10.1.0.{n}" for n in range(2, 7)}


def test_full_subnet_is_a_conflict(ledger: Ledger) -> None:
    for n in range(5):
        take(ledger, f"i{n}")
    with pytest.raises(Conflict, match="all 6 addresses"):
        take(ledger, "one too many")


def test_instance_keeps_its_address_across_a_restart_of_the_agent(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, "first")
    mine = take(ledger, "second")
    assert take(Ledger(tmp_path), "second") == mine


def test_released_address_rests_before_it_is_given_again(ledger: Ledger) -> None:
    first = take(ledger, "first")
    ledger.leases("shop/front").release("first")
    assert take(ledger, "second") != first


def test_taken_static_address_names_its_holder(ledger: Ledger) -> None:
    take(ledger, "shop-web-1", "10.1.0.4")
    with pytest.raises(Conflict, match=r"address '10\.1\.0\.4' is taken by shop-web-1"):
        take(ledger, "shop-api-1", "10.1.0.4")


def test_instance_that_wants_another_address_gives_the_old_one_back(ledger: Ledger, tmp_path: Path) -> None:
    old = take(ledger, "first")
    assert take(ledger, "first", "10.1.0.5") == "10.1.0.5"
    assert Ledger(tmp_path).leases("shop/front").holder(old) is None


def test_lease_whose_giver_died_before_writing_it_is_void(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "networks/shop~front/leases/10.1.0.2").touch()
    assert take(Ledger(tmp_path), "first") == "10.1.0.2"


def test_lease_written_by_another_process_is_respected(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, "first")
    other = Ledger(tmp_path)
    assert take(other, "second") != take(ledger, "third")


def test_forgotten_network_leaves_no_file(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, "first")
    ledger.forget("shop/front")
    assert list(tmp_path.iterdir()) == []


def test_renumbered_network_voids_its_leases(ledger: Ledger) -> None:
    take(ledger, "first", "10.1.0.4")
    ledger.keep("shop/front", IPv4Network("10.9.0.0/24"))
    assert ledger.leases("shop/front").holder("10.1.0.4") is None


def test_first_free_subnet_avoids_everything_that_overlaps() -> None:
    taken = [IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.128/25"), IPv4Network("192.168.0.0/16")]
    assert first_free(IPv4Network("10.0.0.0/16"), taken) == IPv4Network("10.0.2.0/24")


def test_exhausted_pool_has_none() -> None:
    assert first_free(IPv4Network("10.0.0.0/24"), [IPv4Network("10.0.0.0/8")]) is None


@pytest.mark.parametrize("text", ["10.0.0.1/24", "10.0.0.0/31", "fd00::/64", "front"])
def test_subnet_without_room_or_sense_is_refused(text: str) -> None:
    with pytest.raises(WrongState, match=f"subnet '{text}'"):
        parse_subnet("shop/front", text)


@pytest.mark.parametrize("name", ["none", "host"])
def test_networks_without_links_take_no_settings_and_no_addresses(name: str, tmp_path: Path) -> None:
    network = BareNetwork(name)
    receipt = network.ensure(NetworkWant(id=name))
    assert receipt == Receipt(
        "network", name, name, data={"interface": "", "subnet": "", "gateway": "", "internal": False}
    )
    with pytest.raises(WrongState):
        network.check(NetworkWant(id=name, subnet="10.0.0.0/24"))
    want = EndpointWant(
        instance="i", network=receipt, netns=tmp_path, interface="eth0", default_route=True, ipv4_address="10.0.0.2"
    )
    with pytest.raises(WrongState):
        BareEndpoint(name).check(want)
