from __future__ import annotations

import pytest

from holdfast.observed import PublishedPort
from holdfast_plugins.network.conntrack import Flow
from holdfast_plugins.network.flows import changed_ports, is_stale, targets

WEB, API = "10.1.0.2", "10.1.0.3"
HOST, OTHER_HOST_ADDRESS, ELSEWHERE = "192.0.2.1", "192.0.2.3", "198.51.100.7"


def port(host_port: int, address: str, *, host_ip: str = "", count: int = 1, protocol: str = "udp") -> PublishedPort:
    return PublishedPort(protocol, host_ip, host_port, address, 514, count)


def flow(to: str, at: int, answered_by: str, answering_port: int) -> Flow:
    return Flow("udp", "192.0.2.99", to, at, answered_by, answering_port, b"")


def stale(seen: Flow, *ports: PublishedPort) -> bool:
    return is_stale(
        seen, targets(ports), lambda address: address.startswith("10.1."), {HOST, OTHER_HOST_ADDRESS}.__contains__
    )


@pytest.mark.parametrize(
    ("seen", "ports", "expected"),
    [
        (flow(HOST, 26140, WEB, 514), [port(26140, WEB)], False),
        (flow(HOST, 26140, WEB, 514), [port(26140, API)], True),
        (flow(HOST, 26140, WEB, 515), [port(26140, WEB)], True),
        (flow(HOST, 26140, WEB, 514), [], True),
        (flow(HOST, 26140, HOST, 26140), [port(26140, WEB)], True),
        (flow(HOST, 514, HOST, 514), [port(514, WEB)], True),
        (flow(HOST, 26140, HOST, 26140), [], False),
        (flow(OTHER_HOST_ADDRESS, 26140, OTHER_HOST_ADDRESS, 26140), [port(26140, WEB, host_ip=HOST)], False),
        (flow(HOST, 26140, HOST, 26140), [port(26140, WEB, host_ip=HOST)], True),
        (flow(HOST, 26140, WEB, 514), [port(26140, API, host_ip=HOST), port(26140, WEB)], True),
        (flow(OTHER_HOST_ADDRESS, 26140, WEB, 514), [port(26140, API, host_ip=HOST), port(26140, WEB)], False),
        (flow(ELSEWHERE, 53, ELSEWHERE, 53), [port(53, WEB)], False),
        (flow(HOST, 26140, "172.17.0.2", 514), [], False),
        (flow(HOST, 26140, "172.17.0.2", 514), [port(26140, WEB)], False),
        (flow(HOST, 26142, WEB, 516), [port(26140, WEB, count=3)], False),
        (flow(HOST, 26142, WEB, 514), [port(26140, WEB, count=3)], True),
    ],
    ids=[
        "right container",
        "container that was replaced",
        "another port of the container",
        "port withdrawn",
        "begun before the container was there",
        "begun before, on the same port number",
        "service of the host where nothing is published",
        "service of the host on another of its addresses",
        "begun before, on the one address",
        "address that has a container of its own now",
        "address that has none of its own",
        "forwarded to a port of that number elsewhere",
        "translated by somebody else",
        "translated by somebody else before us",
        "within a range",
        "beside the place in the range",
    ],
)
def test_flow_is_stale_where_the_table_says_something_else(
    seen: Flow, ports: list[PublishedPort], expected: bool
) -> None:
    assert stale(seen, *ports) is expected


def test_only_ports_that_lead_elsewhere_than_before_are_looked_at() -> None:
    old = targets([port(1, WEB), port(2, WEB), port(3, WEB, host_ip=HOST), port(4, WEB), port(10, WEB, count=2)])
    new = targets([port(1, WEB), port(2, API), port(3, API, host_ip=HOST), port(5, WEB), port(10, WEB, count=3)])
    assert changed_ports(old, new) == {2, 3, 4, 5, 12}
    assert changed_ports(old, old) == frozenset()


def test_tcp_is_left_alone() -> None:
    assert changed_ports(targets([]), targets([port(80, WEB, protocol="tcp")])) == frozenset()
