from __future__ import annotations

import os
from ipaddress import IPv4Network
from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.drivers import EndpointWant, NetworkWant
from holdfast.errors import Conflict, TryAgain, WrongState
from holdfast.leases import REST, parse_subnet, room
from holdfast.observed import Receipt
from holdfast_plugins.network.addresses import SMALLEST, Ledger, place, prefixes
from holdfast_plugins.network.none_host import BareEndpoint, BareNetwork

SUBNET = IPv4Network("10.1.0.0/29")
GATEWAY = "10.1.0.1"
END = IPv4Network("10.210.0.0/28")
LEASES = "networks/shop~front/leases"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    ledger = Ledger(tmp_path, clock)
    ledger.keep("shop/front", SUBNET)
    return ledger


@pytest.fixture
def vacated() -> list[str]:
    return []


def take(
    ledger: Ledger, owner: str, wanted: str | None = None, *, instance: str = "", vacated: list[str] | None = None
) -> str:
    vacate = (vacated if vacated is not None else []).append
    leases = ledger.leases("shop/front")
    return leases.take(owner, instance or f"instance of {owner}".replace(" ", "-"), SUBNET, GATEWAY, wanted, vacate)


def release(ledger: Ledger, owner: str) -> None:
    ledger.leases("shop/front").release(f"instance-of-{owner}")


def fill(ledger: Ledger) -> list[str]:
    return [take(ledger, f"shop/c{n}/1") for n in range(5)]


def test_gateway_and_broadcast_are_never_given(ledger: Ledger) -> None:
    assert set(fill(ledger)) == {f"10.1.0.{n}" for n in range(2, 7)}


def test_full_subnet_is_a_conflict(ledger: Ledger) -> None:
    fill(ledger)
    with pytest.raises(Conflict, match="all 6 addresses"):
        take(ledger, "one/too/many")


def test_next_instance_of_an_owner_has_its_address(ledger: Ledger) -> None:
    first = take(ledger, "shop/web/1", instance="a")
    ledger.leases("shop/front").release("a")
    assert take(ledger, "shop/api/1") != first
    assert take(ledger, "shop/web/1", instance="b") == first


def test_owner_keeps_its_address_across_a_restart_of_the_agent(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, "shop/api/1")
    mine = take(ledger, "shop/web/1", instance="a")
    ledger.leases("shop/front").release("a")
    assert take(Ledger(tmp_path), "shop/web/1", instance="b") == mine


def test_slots_of_a_container_have_addresses_of_their_own(ledger: Ledger) -> None:
    assert take(ledger, "shop/web/1") != take(ledger, "shop/web/2")


def test_address_is_used_again_only_when_none_is_left_that_nobody_had(ledger: Ledger, clock: Clock) -> None:
    first = take(ledger, "shop/gone/1")
    release(ledger, "shop/gone/1")
    clock.now += 2 * REST
    assert first not in [take(ledger, f"shop/c{n}/1") for n in range(4)]
    assert take(ledger, "shop/last/1") == first


def test_address_rests_before_another_owner_gets_it(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    fill(ledger)
    release(ledger, "shop/c3/1")
    clock.now += 1
    for agent in (ledger, Ledger(tmp_path, clock)):
        with pytest.raises(TryAgain, match=r"10\.1\.0\.5 was another's until just now and is free in 29 s") as caught:
            take(agent, "shop/other/1")
        assert caught.value.wait == pytest.approx(REST - 1)
    clock.now += REST
    assert take(Ledger(tmp_path, clock), "shop/other/1") == "10.1.0.5"


def test_address_that_rested_longest_is_given_first(ledger: Ledger, clock: Clock) -> None:
    fill(ledger)
    for owner in ("shop/c2/1", "shop/c0/1"):
        release(ledger, owner)
        clock.now += REST
    assert take(ledger, "shop/other/1") == "10.1.0.4"


def test_clock_that_was_set_back_makes_nobody_wait_longer_than_a_rest(ledger: Ledger, clock: Clock) -> None:
    fill(ledger)
    release(ledger, "shop/c0/1")
    clock.now -= 10_000
    with pytest.raises(TryAgain) as caught:
        take(ledger, "shop/other/1")
    assert caught.value.wait == REST


def test_address_is_vacated_before_another_owner_has_it(ledger: Ledger, clock: Clock, vacated: list[str]) -> None:
    fill(ledger)
    release(ledger, "shop/c0/1")
    assert take(ledger, "shop/c0/1", vacated=vacated) == "10.1.0.2"
    assert vacated == []
    release(ledger, "shop/c0/1")
    clock.now += REST
    assert take(ledger, "shop/other/1", vacated=vacated) == "10.1.0.2"
    assert vacated == ["10.1.0.2"]


def test_address_stays_its_owners_when_it_can_not_be_vacated(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    fill(ledger)
    release(ledger, "shop/c0/1")
    clock.now += REST

    def fail(address: str) -> None:
        raise TryAgain(address)

    with pytest.raises(TryAgain):
        ledger.leases("shop/front").take("shop/other/1", "b", SUBNET, GATEWAY, None, fail)
    assert take(Ledger(tmp_path, clock), "shop/c0/1") == "10.1.0.2"


def test_taken_static_address_names_its_holder(ledger: Ledger) -> None:
    take(ledger, "shop/web/1", "10.1.0.4", instance="shop-web-1")
    with pytest.raises(Conflict, match=r"address '10\.1\.0\.4' is taken by shop-web-1"):
        take(ledger, "shop/api/1", "10.1.0.4")


def test_static_address_that_moves_to_another_owner_need_not_rest(ledger: Ledger, vacated: list[str]) -> None:
    take(ledger, "shop/web/1", "10.1.0.4", instance="a")
    ledger.leases("shop/front").release("a")
    assert take(ledger, "shop/api/1", "10.1.0.4", vacated=vacated) == "10.1.0.4"
    assert vacated == ["10.1.0.4"]
    assert take(ledger, "shop/web/1") != "10.1.0.4"


def test_owner_that_wants_another_address_gives_the_old_one_back(ledger: Ledger, tmp_path: Path) -> None:
    old = take(ledger, "shop/web/1")
    assert take(ledger, "shop/web/1", "10.1.0.5") == "10.1.0.5"
    assert Ledger(tmp_path).leases("shop/front").holder(old) is None
    assert take(Ledger(tmp_path), "shop/web/1") == "10.1.0.5"


def test_lease_whose_giver_died_before_writing_it_is_void(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / LEASES / "10.1.0.2").touch()
    assert take(Ledger(tmp_path), "shop/web/1") == "10.1.0.2"


def test_lease_written_by_another_process_is_respected(ledger: Ledger, tmp_path: Path) -> None:
    take(ledger, "shop/web/1")
    other = Ledger(tmp_path)
    assert take(other, "shop/api/1") != take(ledger, "shop/job/1")


def test_lease_of_an_older_agent_stays_with_its_instance_and_becomes_its_owners(tmp_path: Path, clock: Clock) -> None:
    Ledger(tmp_path, clock).keep("shop/front", SUBNET)
    (tmp_path / LEASES / "10.1.0.5").write_text("4f3a99b1c2d0")
    agent = Ledger(tmp_path, clock)
    assert agent.leases("shop/front").holder("10.1.0.5") == "4f3a99b1c2d0"
    assert take(agent, "shop/web/1", instance="4f3a99b1c2d0") == "10.1.0.5"
    agent.leases("shop/front").release("4f3a99b1c2d0")
    assert take(Ledger(tmp_path, clock), "shop/web/1", instance="another") == "10.1.0.5"


def test_lease_of_an_older_agent_whose_instance_went_rests(tmp_path: Path, clock: Clock) -> None:
    Ledger(tmp_path, clock).keep("shop/front", SUBNET)
    (tmp_path / LEASES / "10.1.0.2").write_text("4f3a99b1c2d0")
    agent = Ledger(tmp_path, clock)
    agent.leases("shop/front").release("4f3a99b1c2d0")
    assert take(agent, "shop/web/1") == "10.1.0.3"
    assert Ledger(tmp_path, clock).leases("shop/front").holder("10.1.0.2") is None


def test_network_that_comes_back_has_its_subnet_and_its_addresses(
    ledger: Ledger, tmp_path: Path, clock: Clock
) -> None:
    mine = take(ledger, "shop/web/1", "10.1.0.6")
    ledger.rest("shop/front")
    assert ledger.subnets() == {}
    again = Ledger(tmp_path, clock)
    assert again.subnet("shop/front") == SUBNET
    again.keep("shop/front", SUBNET)
    assert take(again, "shop/web/1") == mine


def test_subnet_of_a_removed_network_rests_across_restarts(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    ledger.rest("shop/front")
    clock.now += 10
    file = tmp_path / "networks/shop~front/gone"
    os.utime(file, (clock.now - 10, clock.now - 10))
    assert Ledger(tmp_path, clock).resting() == {"shop/front": (SUBNET, REST - 10)}
    clock.now += REST
    assert Ledger(tmp_path, clock).resting() == {"shop/front": (SUBNET, 0.0)}


def test_network_under_a_new_name_lets_the_addresses_of_the_old_one_rest(ledger: Ledger, tmp_path: Path) -> None:
    first = take(ledger, "shop/web/1")
    ledger.rest("shop/front")
    ledger.keep("shop/public", SUBNET)
    leases = ledger.leases("shop/public")
    assert leases.take("shop/other/1", "b", SUBNET, GATEWAY, None) != first
    assert leases.take("shop/web/1", "c", SUBNET, GATEWAY, None) == first
    assert not (tmp_path / "networks/shop~front").exists()


def test_addresses_of_an_earlier_network_that_no_host_may_have_here_are_never_given(
    tmp_path: Path, clock: Clock
) -> None:
    ledger, wide, narrow = Ledger(tmp_path, clock), IPv4Network("10.1.0.0/24"), IPv4Network("10.1.0.16/30")
    ledger.keep("shop/old", wide)
    ends = [str(narrow.network_address), str(narrow.broadcast_address)]
    for end in ends:
        ledger.leases("shop/old").take(f"shop/c{end}/1", f"i{end}", wide, GATEWAY, end)
    ledger.rest("shop/old")
    ledger.keep("shop/new", narrow)
    clock.now += REST
    leases = ledger.leases("shop/new")
    assert leases.take(f"shop/c{ends[0]}/1", "a", narrow, "10.1.0.17", None) == "10.1.0.18"
    with pytest.raises(Conflict, match="are taken"):
        leases.take(f"shop/c{ends[1]}/1", "b", narrow, "10.1.0.17", None)


def test_only_so_many_removed_networks_are_remembered(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path, clock)
    for n in range(70):
        ledger.keep(f"app{n}/front", IPv4Network(f"10.2.{n}.0/24"))
        ledger.rest(f"app{n}/front")
        clock.now += 1
    clock.now += REST
    surplus = ledger.surplus()
    assert surplus == [f"app{n}/front" for n in range(35)]
    for id in surplus:
        ledger.drop(id)
    assert ledger.surplus() == []
    assert not (tmp_path / "networks/app0~front").exists()


def test_renumbered_network_voids_its_leases(ledger: Ledger) -> None:
    take(ledger, "shop/web/1", "10.1.0.4")
    ledger.keep("shop/front", IPv4Network("10.9.0.0/24"))
    assert ledger.leases("shop/front").holder("10.1.0.4") is None


def test_network_that_grows_keeps_its_leases(ledger: Ledger, tmp_path: Path) -> None:
    mine = take(ledger, "shop/web/1", "10.1.0.4")
    ledger.keep("shop/front", IPv4Network("10.1.0.0/28"))
    assert take(Ledger(tmp_path), "shop/web/1") == mine


def test_subnet_avoids_everything_that_overlaps() -> None:
    taken = [IPv4Network("10.0.0.0/17"), IPv4Network("10.0.128.128/25"), IPv4Network("192.168.0.0/16")]
    assert place(IPv4Network("10.0.0.0/16"), taken, 24) == IPv4Network("10.0.192.0/24")


def test_exhausted_pool_has_none() -> None:
    assert place(IPv4Network("10.0.0.0/24"), [IPv4Network("10.0.0.0/8")], 28) is None


def test_pool_that_is_smaller_than_a_subnet_is_one_subnet() -> None:
    assert place(IPv4Network("10.0.0.0/29"), [], 28) == IPv4Network("10.0.0.0/29")


def test_pool_holds_a_thousand_networks_that_have_room_to_grow() -> None:
    pool = IPv4Network("10.209.0.0/16")
    taken: list[IPv4Network] = []
    for expected in (16, 17, 18, 18, 19):
        taken.append(place(pool, taken, SMALLEST) or pool)
        gap = min(int(b.network_address) - int(a.network_address) for a, b in pairwise(sorted([*taken, END])))
        assert gap == 1 << (32 - expected)
    while len(taken) < 1000:
        taken.append(place(pool, taken, SMALLEST) or pool)
    starts = sorted(int(each.network_address) for each in taken)
    assert min(b - a for a, b in pairwise(starts)) == 64


@pytest.mark.parametrize(("containers", "best"), [(0, 28), (1, 28), (6, 28), (7, 27), (14, 27), (15, 26), (100, 24)])
def test_network_has_room_for_twice_as_many_containers_as_join_it(containers: int, best: int) -> None:
    assert prefixes(containers)[0] == best
    assert all(room(IPv4Network((0, prefix))) >= containers for prefix in prefixes(containers))


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
