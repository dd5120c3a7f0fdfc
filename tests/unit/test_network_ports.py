from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable

import pytest

from holdfast.errors import Conflict
from holdfast.runtime.ports import check_free
from holdfast.spec.model import Port


def listen(address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, kind)
    listener.bind((address, 0))
    if kind == socket.SOCK_STREAM:
        listener.listen()
    return listener


def published(listener: socket.socket, host_ip: str = "", **rest: int | str) -> Port:
    return Port.model_validate(
        {"host_ip": host_ip, "host_port": listener.getsockname()[1], "container_port": 80, **rest}
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_port_with_a_listener_names_the_program_that_holds_it(address: str) -> None:
    with listen(address) as listener, pytest.raises(Conflict, match=re.escape(f"(pid {os.getpid()})")):
        check_free([published(listener)])


def test_udp_socket_takes_udp_only() -> None:
    with listen("127.0.0.1", socket.SOCK_DGRAM) as listener:
        check_free([published(listener)])
        with pytest.raises(Conflict, match="/udp is taken"):
            check_free([published(listener, protocol="udp")])


def test_listener_inside_a_range_is_found() -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Conflict):
            check_free([Port(host_port=port - 2, container_port=80, count=5)])


def test_another_address_of_the_host_is_free() -> None:
    with listen("127.0.0.1") as listener:
        check_free([published(listener, host_ip="127.0.0.2")])


def test_port_without_a_listener_is_free(free_port: Callable[[], int]) -> None:
    check_free([Port(host_port=free_port(), container_port=80)])
