"""Network ids and instances → subnets and addresses, kept on disk so that they outlive restarts and reboots.

    ROOT/networks/<app~name>/subnet         what the network's subnet was decided to be
    ROOT/networks/<app~name>/leases/<ip>    the instance that has the address
    ROOT/networks/<app~name>/forwarding     it is there if ip_forward was turned on for the network

A lease is a file made with O_EXCL: two givers can't give one address twice. What is on disk is the truth; a copy in
memory spares reading a thousand files for each new address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from pathlib import Path

from holdfast.errors import Conflict, WrongState

SUBNET_PREFIX = 24


def parse_subnet(network: str, text: str) -> IPv4Network:
    """Read a subnet that has room for a gateway and an address; raise WrongState."""
    try:
        subnet = IPv4Network(text)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        raise WrongState(
            f"network '{network}': subnet '{text}': {error} (an IPv4 range such as 10.90.1.0/24)"
        ) from error
    if subnet.prefixlen > 30:
        raise WrongState(f"network '{network}': subnet '{text}': has no room for containers (a prefix of 30 or less)")
    return subnet


def parse_address(network: str, what: str, text: str, subnet: IPv4Network) -> IPv4Address:
    """Read an address that a host of the subnet may have; raise WrongState."""
    try:
        address = IPv4Address(text)
    except AddressValueError as error:
        raise WrongState(f"network '{network}': {what} '{text}': {error} (an address in {subnet})") from error
    if address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
        raise WrongState(f"network '{network}': {what} '{text}': not a host's address in {subnet}")
    return address


def first_free(pool: IPv4Network, taken: Iterable[IPv4Network]) -> IPv4Network | None:
    """The first subnet of the pool that overlaps none of those taken: a /24, or the whole of a smaller pool."""
    others = [subnet for subnet in taken if subnet.overlaps(pool)]
    for subnet in pool.subnets(new_prefix=max(SUBNET_PREFIX, pool.prefixlen)):
        if not any(subnet.overlaps(other) for other in others):
            return subnet
    return None


class Ledger:
    """The networks folder of one agent. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "networks"
        self._lock = threading.Lock()
        self._leases: dict[str, Leases] = {}

    def subnets(self) -> dict[str, IPv4Network]:
        """The subnet of every network that is kept, by id."""
        return {folder.name.replace("~", "/"): subnet for folder in self._folders() if (subnet := _kept(folder))}

    def subnet(self, network: str) -> IPv4Network | None:
        return _kept(self._of(network))

    def keep(self, network: str, subnet: IPv4Network) -> None:
        """Record the subnet of a network; leases of another subnet are void."""
        folder = self._of(network)
        if _kept(folder) == subnet:
            return
        self.forget(network)
        (folder / "leases").mkdir(parents=True)
        fresh = folder / "subnet.new"
        fresh.write_text(f"{subnet}\n")
        fresh.replace(folder / "subnet")

    def forget(self, network: str) -> None:
        """Drop a network with all its leases."""
        with self._lock:
            self._leases.pop(network, None)
        shutil.rmtree(self._of(network), ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # once the last one is gone

    def note_forwarding(self, network: str) -> None:
        """Remember that ip_forward was turned on for a network."""
        (self._of(network) / "forwarding").touch()

    def noted_forwarding(self, network: str) -> bool:
        return (self._of(network) / "forwarding").exists()

    def leases(self, network: str) -> Leases:
        with self._lock:
            return self._leases.setdefault(network, Leases(network, self._of(network) / "leases"))

    def _of(self, network: str) -> Path:
        return self._folder / network.replace("/", "~")

    def _folders(self) -> Iterator[Path]:
        return self._folder.iterdir() if self._folder.exists() else iter(())


class Leases:
    """The addresses of one network and who has them. Thread-safe."""

    def __init__(self, network: str, folder: Path) -> None:
        self._network = network
        self._folder = folder
        self._lock = threading.Lock()
        self._holders: dict[str, str] = {}
        self._addresses: dict[str, str] = {}
        self._last = 0
        self._read = False

    def holder(self, address: str) -> str | None:
        with self._lock:
            self._load()
            return self._holders.get(address)

    def take(self, instance: str, subnet: IPv4Network, gateway: str, wanted: str | None) -> str:
        """Give the instance an address: the wanted one, else the one it has, else the next free one.

        Raises Conflict when the wanted one is another's or the subnet is full. Addresses go round, so that one just
        given back rests while its former owner's links and peers' caches fade.
        """
        with self._lock:
            self._load()
            held = self._addresses.get(instance)
            if held is not None and wanted in (None, held):
                return held
            address = self._claim(instance, wanted) if wanted else self._next(instance, subnet, gateway)
            if held is not None:
                self._give_back(held)
            self._holders[address], self._addresses[instance] = instance, address
            return address

    def release(self, instance: str) -> None:
        """Take back what the instance has, if anything."""
        with self._lock:
            self._load()
            if (address := self._addresses.get(instance)) is not None:
                self._give_back(address)

    def _next(self, instance: str, subnet: IPv4Network, gateway: str) -> str:
        first, hosts = int(subnet.network_address), subnet.num_addresses - 2
        for step in range(hosts):
            offset = (self._last + step) % hosts + 1
            address = str(IPv4Address(first + offset))
            if address == gateway or address in self._holders or not self._record(instance, address):
                continue
            self._last = offset
            return address
        raise Conflict(f"network '{self._network}': all {hosts} addresses of {subnet} are taken (a larger subnet)")

    def _claim(self, instance: str, address: str) -> str:
        holder = self._holders.get(address)
        if holder is None and self._record(instance, address):
            return address
        raise Conflict(f"network '{self._network}': address '{address}' is taken by {holder or 'another agent'}")

    def _record(self, instance: str, address: str) -> bool:
        """Write the lease; False if someone has written one since ours were read."""
        try:
            file = os.open(self._folder / address, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as lease:
            lease.write(instance)
        return True

    def _give_back(self, address: str) -> None:
        (self._folder / address).unlink(missing_ok=True)
        self._addresses.pop(self._holders.pop(address), None)

    def _load(self) -> None:
        if self._read:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for lease in self._folder.iterdir():
            if instance := lease.read_text():
                self._holders[lease.name], self._addresses[instance] = instance, lease.name
            else:
                lease.unlink()  # its giver died between making and writing it
        self._read = True


def _kept(folder: Path) -> IPv4Network | None:
    try:
        return IPv4Network((folder / "subnet").read_text().strip())
    except (OSError, ValueError):
        return None
