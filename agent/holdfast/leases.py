"""Address leases: whose each address of a network is, kept on disk so that it outlives restarts and reboots.

For drivers of networks that give out IPv4 addresses. A network has a folder with one file for each address:

    FOLDER/<ip>    "OWNER INSTANCE": whose address it is, and which instance has it now, or, if nobody may write to
                   the file, had it last

An owner is what `EndpointWant.lease` says, `app/container/slot`. It keeps its address while one instance after the
other uses it. An address that nobody uses rests: others get it only when no address is left that was never used, and
not before REST seconds have passed. To let an address rest takes no room on the disk; "-" in place of an owner or an
instance is nobody.

A lease is a file made with O_EXCL: two givers can't give one address twice. What is on disk is the truth; a copy in
memory avoids reading a thousand files for each new address. Older agents wrote the instance alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from pathlib import Path

from holdfast.errors import Conflict, TryAgain, WrongState

NOT_CONTAINERS = 3  # addresses of a subnet that no container has: the network's, the gateway's, the broadcast address
REST = 30.0  # seconds that an address, or a subnet, stays unused before another owner gets it
NOBODY = "-"
RESTS = 0o444  # mode of the file of a lease that nobody uses


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


def room(subnet: IPv4Network) -> int:
    """How many containers a subnet has addresses for."""
    return subnet.num_addresses - NOT_CONTAINERS


def still_resting(since: float, now: float) -> float:
    """Seconds that what is unused since then must still rest. A clock that was set back starts the rest again."""
    return max(0.0, min(since, now) + REST - now)


def waiting(what: str, seconds: float) -> TryAgain:
    """The error that something is free only after a rest."""
    error = TryAgain(f"{what} was another's until just now and is free in {seconds:.0f} s")
    error.wait = seconds
    return error


@dataclass(frozen=True, slots=True)
class Lease:
    """An address, its owner (NOBODY: not known) and the instance that uses it (NOBODY: it rests, since `freed`)."""

    address: str
    owner: str
    instance: str
    freed: float = 0.0

    @property
    def rests(self) -> bool:
        return self.instance == NOBODY

    def __str__(self) -> str:
        return f"{self.owner} {self.instance}"


class Leases:
    """The addresses of one network and whose they are. Thread-safe.

    vacate, where a method takes it, is called with an address before it goes from one owner to another.
    """

    def __init__(self, network: str, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._network = network
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._by_address: dict[str, Lease] = {}
        self._last = 0
        self._read = False

    def all(self) -> list[Lease]:
        with self._lock:
            self._load()
            return list(self._by_address.values())

    def holder(self, address: str) -> str | None:
        """The instance that uses an address."""
        with self._lock:
            self._load()
            lease = self._by_address.get(address)
            return None if lease is None or lease.rests else lease.instance

    def take(
        self,
        owner: str,
        instance: str,
        subnet: IPv4Network,
        gateway: str,
        wanted: str | None,
        vacate: Callable[[str], None] = lambda address: None,
    ) -> str:
        """Give an instance its owner's address: the wanted one, else the one that the owner has, else a free one.

        Raises Conflict when the wanted one is in use by another or the subnet is full, TryAgain when all that is left
        must still rest.
        """
        with self._lock:
            self._load()
            held = self._find(lambda each: each.owner == owner) or self._find(lambda each: each.instance == instance)
            if held is not None and wanted in (None, held.address) and _fits(held.address, subnet, gateway):
                return self._write(Lease(held.address, owner, instance))
            address = self._claim(wanted, vacate) if wanted else self._next(subnet, gateway, vacate)
            if held is not None:
                self._write(replace(held, owner=NOBODY, instance=NOBODY, freed=self._clock()))
            return self._write(Lease(address, owner, instance))

    def release(self, instance: str) -> None:
        """Let the address of an instance rest, if it has any; it stays its owner's."""
        with self._lock:
            self._load()
            if (lease := self._find(lambda each: each.instance == instance)) is not None:
                self._rest(replace(lease, instance=NOBODY, freed=self._clock()))

    def release_all(self) -> None:
        """Let every address rest."""
        for lease in self.all():
            if not lease.rests:
                self.release(lease.instance)

    def inherit(self, leases: Iterable[Lease]) -> None:
        """Let addresses rest here that rested in a network which had them before."""
        with self._lock:
            self._load()
            for lease in leases:
                if lease.address not in self._by_address:
                    self._write(replace(lease, instance=NOBODY, freed=lease.freed if lease.rests else self._clock()))

    def _find(self, fits: Callable[[Lease], bool]) -> Lease | None:
        return next(filter(fits, self._by_address.values()), None)

    def _next(self, subnet: IPv4Network, gateway: str, vacate: Callable[[str], None]) -> str:
        """An address that nobody ever had, else the one that has rested longest."""
        first, hosts = int(subnet.network_address), subnet.num_addresses - 2
        for step in range(hosts):
            offset = (self._last + step) % hosts + 1
            address = str(IPv4Address(first + offset))
            if address != gateway and address not in self._by_address and self._make(address):
                self._last = offset
                return address
        resting = [each for each in self._by_address.values() if each.rests and _fits(each.address, subnet, gateway)]
        if not resting:
            raise Conflict(
                f"network '{self._network}': all {hosts} addresses of {subnet} are taken (a larger subnet)"
            )
        oldest = min(resting, key=lambda lease: lease.freed)
        if seconds := still_resting(oldest.freed, self._clock()):
            full = f"network '{self._network}': all {hosts} addresses of {subnet} are taken; {oldest.address}"
            raise waiting(full, seconds)
        vacate(oldest.address)
        return oldest.address

    def _claim(self, address: str, vacate: Callable[[str], None]) -> str:
        """The address that a state file names. It need not rest: whoever commits it says whose it is now."""
        lease = self._by_address.get(address)
        if lease is not None and lease.rests:
            vacate(address)
        elif lease is not None or not self._make(address):
            holder = lease.instance if lease else "another agent"
            raise Conflict(f"network '{self._network}': address '{address}' is taken by {holder}")
        return address

    def _make(self, address: str) -> bool:
        """Make the file of a lease; False if somebody has made one since ours were read."""
        try:
            os.close(os.open(self._folder / address, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except FileExistsError:
            return False
        return True

    def _write(self, lease: Lease) -> str:
        """Put a lease on disk, then into memory; return its address."""
        known = self._by_address.get(lease.address)
        if known is None or str(known) != str(lease):
            fresh = self._folder / f".{lease.address}"
            fresh.write_text(str(lease))
            if lease.rests:
                os.utime(fresh, (lease.freed, lease.freed))
            fresh.replace(self._folder / lease.address)
        self._by_address[lease.address] = lease
        return lease.address

    def _rest(self, lease: Lease) -> None:
        """Mark a lease on disk as one that rests, without a new file: on a full disk, too, what runs can go."""
        file = self._folder / lease.address
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, (lease.freed, lease.freed))
            file.chmod(RESTS)
        self._by_address[lease.address] = lease

    def _load(self) -> None:
        if self._read:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            match [] if file.name.startswith(".") else file.read_text().split():
                case [*owners, instance] if len(owners) < 2:
                    user = NOBODY if stat.S_IMODE(file.stat().st_mode) == RESTS else instance
                    owner = owners[0] if owners else NOBODY
                    self._by_address[file.name] = Lease(file.name, owner, user, changed_at(file, self._clock()))
                case _:
                    file.unlink()  # its giver died before it was written
        self._read = True


def _fits(address: str, subnet: IPv4Network, gateway: str) -> bool:
    """Whether a container may have an address: one of an earlier, wider subnet may be an end of this one."""
    number = IPv4Address(address)
    ends = (subnet.network_address, subnet.broadcast_address)
    return address != gateway and number in subnet and number not in ends


def changed_at(file: Path, now: float) -> float:
    """When a file was last changed, but never later than now."""
    return min(file.stat().st_mtime, now)
