"""A lab for network tests: instances on networks, another host on a wire, and sockets in any of their namespaces."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

from ground import patient
from holdfast.drivers import EndpointWant, Host, NetworkWant
from holdfast.observed import FirewallNetwork, FirewallWant, PublishedPort, Receipt
from holdfast.runtime import netns
from holdfast_plugins.network.bridge import BridgeNetwork
from holdfast_plugins.network.endpoint import BridgeEndpoint
from holdfast_plugins.network.firewall import NftablesFirewall

T = TypeVar("T")

PATIENCE, BRIEFLY = patient(20.0), patient(0.4)  # seconds to wait for what should come, and for what should not


@dataclass(frozen=True)
class Seen:
    """What a server saw of a client: the address that it came from."""

    address: str


class Lab:
    """Networks, instances and a firewall of one site; everything is gone when its stack ends."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self.host = host
        self.network = BridgeNetwork(host)
        self.endpoint = BridgeEndpoint(host, self.network)
        self.firewall = NftablesFirewall(host)
        self._stack = stack
        stack.callback(self.close)

    def close(self) -> None:
        for firewall in self.firewall.observe():
            self.firewall.remove(firewall)
        for endpoint in self.endpoint.observe():
            self.endpoint.remove(endpoint)
        for namespace in netns.observe(self.host):
            netns.remove(self.host, namespace)
        for network in self.network.observe():
            self.network.remove(network)

    def make(self, id: str, *, internal: bool = False, subnet: str | None = None) -> Receipt:
        return self.network.ensure(NetworkWant(id=id, internal=internal, subnet=subnet))

    def attach(self, instance: str, network: Receipt, **rest: str) -> Receipt:
        netns.ensure(self.host, instance)
        return self.endpoint.ensure(self.want(instance, network, **rest))

    def want(self, instance: str, network: Receipt, **rest: str) -> EndpointWant:
        return EndpointWant(
            instance=instance,
            network=network,
            netns=self.host.netns(instance),
            interface="eth0",
            default_route=True,
            ipv4_address=rest.get("ipv4_address"),
            mac_address=rest.get("mac_address"),
        )

    def protect(self, networks: Iterable[Receipt], *ports: PublishedPort) -> Receipt:
        return self.firewall.ensure(self.rules(networks, *ports))

    def rules(self, networks: Iterable[Receipt], *ports: PublishedPort) -> FirewallWant:
        known = (
            FirewallNetwork(n.id, n.data["interface"], n.data["subnet"], n.data["internal"])
            for n in sorted(networks, key=lambda network: network.id)
        )
        return FirewallWant(tuple(known), ports)

    def neighbour(self, name: str) -> tuple[Path, str, str]:
        """Another host on a wire of its own → (its namespace, its address, ours on that wire)."""
        last = list(IPv4Network(self.host.pool).subnets(new_prefix=30))
        wire = last[-1 - len(name)]
        ours, theirs = (str(address) for address in wire.hosts())
        namespace = Path("/run/netns") / f"{self.host.name}-{name}"
        near = f"{self.host.name}-{name}"
        self.ip("netns", "add", namespace.name)
        self._stack.callback(self.ip, "netns", "del", namespace.name)
        self.ip("link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", namespace.name)
        self.ip("address", "add", f"{ours}/30", "dev", near)
        self.ip("link", "set", near, "up")
        self.ip("-n", namespace.name, "address", "add", f"{theirs}/30", "dev", "eth0")
        self.ip("-n", namespace.name, "link", "set", "eth0", "up")
        return namespace, theirs, ours

    def nft(self, script: str) -> None:
        subprocess.run(["nft", script], check=True)

    def ip(self, *arguments: str) -> str:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def in_namespace(namespace: Path | None, work: Callable[[], T]) -> T:
    """Call work in a network namespace; None is the host's."""
    if namespace is None:
        return work()
    results: list[T] = []

    def enter() -> None:
        with namespace.open() as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0
        results.append(work())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return results[0]


def tcp(
    server: Path | None,
    port: int,
    client: Path | None,
    address: str,
    at: int,
    *,
    source: str = "",
    within: float = PATIENCE,
) -> Seen | None:
    """Listen on port in one namespace, connect to address:at from another; None if nothing comes through."""

    def listen() -> socket.socket:
        return socket.create_server(("", port))

    def connect() -> socket.socket | None:
        with suppress(OSError):
            return socket.create_connection((address, at), within, (source, 0) if source else None)
        return None

    with in_namespace(server, listen) as listener:
        connection = in_namespace(client, connect)
        if connection is None:
            return None
        with connection:
            listener.settimeout(PATIENCE)
            accepted, peer = listener.accept()
            accepted.close()
            return Seen(peer[0])


def udp(
    server: Path | None, port: int, client: Path | None, address: str, at: int, *, within: float = PATIENCE
) -> Seen | None:
    """The same with a datagram there, sent again until it arrives, and one back."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with in_namespace(server, make) as listener, in_namespace(client, make) as caller:
        listener.bind(("", port))
        listener.settimeout(BRIEFLY)
        caller.settimeout(PATIENCE)
        for _ in range(round(within / BRIEFLY)):
            caller.sendto(b"there", (address, at))
            with suppress(TimeoutError):
                _, peer = listener.recvfrom(16)
                break
        else:
            return None
        listener.sendto(b"back", peer)
        answer, whence = caller.recvfrom(16)
        assert (answer, whence) == (b"back", (address, at))
        return Seen(peer[0])
