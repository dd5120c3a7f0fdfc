from __future__ import annotations

import pytest

from holdfast.errors import Conflict, WrongState
from holdfast.observed import FirewallNetwork, FirewallWant, PublishedPort
from holdfast_plugins.network.firewall import _check_ports
from holdfast_plugins.network.rules import deletion, script, update

FRONT = FirewallNetwork("shop/front", "n-front", "10.1.0.0/24")
BACK = FirewallNetwork("shop/back", "n-back", "10.2.0.0/24", internal=True)
WEB = PublishedPort("tcp", "", 8080, "10.1.0.2", 80)


def test_range_becomes_one_element_for_each_port() -> None:
    text = script("n", FirewallWant((FRONT,), (PublishedPort("udp", "", 5000, "10.1.0.2", 6000, 2),)))
    assert "udp . 5000 : 10.1.0.2 . 6000, udp . 5001 : 10.1.0.2 . 6001" in text


def test_port_of_one_address_goes_to_the_map_that_knows_addresses() -> None:
    text = script("n", FirewallWant((FRONT,), (PublishedPort("tcp", "127.0.0.1", 9090, "10.1.0.2", 90),)))
    bound = next(line for line in text.splitlines() if "map bound" in line)
    assert "tcp . 127.0.0.1 . 9090 : 10.1.0.2 . 90" in bound


def test_internal_network_is_not_masqueraded() -> None:
    text = script("n", FirewallWant((FRONT, BACK)))
    outward = next(line for line in text.splitlines() if "set outward" in line)
    assert FRONT.subnet in outward
    assert BACK.subnet not in outward


def test_one_more_port_is_one_element_and_not_the_whole_table() -> None:
    change = update("n", FirewallWant((FRONT,)), FirewallWant((FRONT,), (WEB,)))
    assert change == "add element inet n wildcard { tcp . 8080 : 10.1.0.2 . 80 }\n"


def test_moved_port_leaves_its_old_address_before_it_gets_the_new_one() -> None:
    moved = PublishedPort("tcp", "", 8080, "10.1.0.3", 80)
    change = update("n", FirewallWant((FRONT,), (WEB,)), FirewallWant((FRONT,), (moved,)))
    assert [line.split()[0] for line in change.splitlines()] == ["delete", "add"]


def test_same_want_needs_no_transaction() -> None:
    assert update("n", FirewallWant((FRONT,), (WEB,)), FirewallWant((FRONT,), (WEB,))) == ""


def test_deletion_succeeds_without_a_table() -> None:
    assert deletion("n").splitlines() == ["table inet n", "delete table inet n"]


def test_port_within_a_published_range_is_a_conflict() -> None:
    ports = (PublishedPort("tcp", "", 8000, "10.1.0.2", 80, 10), PublishedPort("tcp", "", 8005, "10.1.0.3", 80))
    with pytest.raises(Conflict, match=r"port 8005/tcp leads to 10\.1\.0\.2 already"):
        _check_ports(ports)


def test_same_number_for_tcp_and_udp_is_no_conflict() -> None:
    _check_ports((WEB, PublishedPort("udp", "", 8080, "10.1.0.2", 80)))


def test_ipv6_host_address_is_refused_by_name() -> None:
    with pytest.raises(WrongState, match="address '::1'"):
        _check_ports((PublishedPort("tcp", "::1", 80, "10.1.0.2", 80),))
