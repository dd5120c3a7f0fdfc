"""Networks and containers → subnets and addresses, kept on disk so that they outlive restarts and reboots.

    ROOT/networks/<app~name>/subnet         the subnet of the network
    ROOT/networks/<app~name>/gone           present while there is no such network: since when, the subnet rests
    ROOT/networks/<app~name>/leases/<ip>    "OWNER INSTANCE": whose address it is, and which instance has it now, or,
                                            if nobody may write to the file, had it last
    ROOT/networks/<app~name>/forwarding     present if ip_forward was turned on for the network

An owner is `app/container/slot`. It keeps its address while one instance after the other uses it. An address that
nobody uses rests: others get it only when no address is left that was never used, and not before REST seconds have
passed. The same holds for the subnet of a network that was removed. To let an address rest takes no room on the disk;
"-" in place of an owner or an instance is nobody.

A lease is a file made with O_EXCL: two givers can't give one address twice. What is on disk is the truth; a copy in
memory avoids reading a thousand files for each new address. Older agents wrote the instance alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from pathlib import Path

from holdfast.errors import Conflict, TryAgain, WrongState
from holdfast.files import discard_tree

SMALLEST = 28  # prefix of the smallest subnet that is taken from the pool: a gateway and 13 containers
NOT_CONTAINERS = 3  # addresses of a subnet that no container has: the network's, the gateway's, the broadcast address
REST = 30.0  # seconds that an address, or a subnet, stays unused before another owner gets it
KEPT_GONE = 64  # removed networks whose subnets are remembered
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


def prefixes(containers: int) -> range:
    """Prefix lengths for a network of so many containers, the best first.

    That has room for twice as many: containers that get another name wait for no address to have rested.
    """
    widest = [32 - (count + NOT_CONTAINERS - 1).bit_length() for count in (2 * containers, containers)]
    return range(min(SMALLEST, widest[0]), min(SMALLEST, widest[1]) + 1)


def place(pool: IPv4Network, taken: Iterable[IPv4Network], prefix: int) -> IPv4Network | None:
    """A free subnet of the pool, so that it and its neighbours have room to grow; all of a pool that is smaller.

    The pool is halved again and again: 0, 1/2, 1/4, 3/4, 1/8, … So each network has as much room behind it as the
    number of networks allows.
    """
    prefix = max(prefix, pool.prefixlen)
    bits, size = prefix - pool.prefixlen, 1 << (32 - prefix)
    used = _merged(taken)
    starts = [first for first, _ in used]
    for number in _halving(bits):
        first = int(pool.network_address) + number * size
        before = bisect_right(starts, first + size - 1) - 1
        if before < 0 or used[before][1] < first:
            return IPv4Network((first, prefix))
    return None


def _halving(bits: int) -> Iterator[int]:
    """Count to 2**bits with the bits of each number reversed: 0, 1/2, 1/4, 3/4, … of it."""
    number = 0
    for _ in range(1 << bits):
        yield number
        bit = 1 << bits >> 1
        while number & bit:
            number, bit = number ^ bit, bit >> 1
        number |= bit


def _merged(subnets: Iterable[IPv4Network]) -> list[tuple[int, int]]:
    """The first and the last address of subnets, sorted and joined where they overlap."""
    found: list[tuple[int, int]] = []
    for first, length in sorted((int(each.network_address), each.prefixlen) for each in subnets):
        last = first + (1 << (32 - length)) - 1
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def still_resting(since: float, now: float) -> float:
    """Seconds that what is unused since then must still rest. A clock that was set back starts the rest again."""
    return max(0.0, min(since, now) + REST - now)


def waiting(what: str, seconds: float) -> TryAgain:
    """The error that something is free only after a rest."""
    error = TryAgain(f"{what} was another's until just now and is free in {seconds:.0f} s")
    error.wait = seconds
    return error


@dataclass(frozen=True, slots=True)
class Kept:
    """The subnet of a network. gone: since when there is no such network, None while there is."""

    subnet: IPv4Network
    gone: float | None = None


class Ledger:
    """The networks folder of one agent. Thread-safe."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = root / "networks"
        self._clock = clock
        self._lock = threading.RLock()
        self._leases: dict[str, Leases] = {}
        self._read: dict[str, Kept] | None = None

    def subnets(self) -> dict[str, IPv4Network]:
        """The subnet of every network, by id."""
        with self._lock:
            return {id: kept.subnet for id, kept in self._known().items() if kept.gone is None}

    def resting(self) -> dict[str, tuple[IPv4Network, float]]:
        """The subnet of every network that was removed, and how many seconds it must still rest; oldest first."""
        with self._lock:
            now = self._clock()
            gone = [(kept.gone, id, kept.subnet) for id, kept in self._known().items() if kept.gone is not None]
            return {id: (subnet, still_resting(since, now)) for since, id, subnet in sorted(gone)}

    def subnet(self, network: str) -> IPv4Network | None:
        """The subnet of a network, also of one that is gone: it gets the same again."""
        with self._lock:
            kept = self._known().get(network)
            return kept.subnet if kept else None

    def keep(self, network: str, subnet: IPv4Network) -> None:
        """Record the subnet of a network. Its leases stay if they are within it, and are void otherwise.

        Removed networks whose subnets overlap it are dropped; what rests of their addresses goes on resting here.
        """
        with self._lock:
            kept, folder = self._known().get(network), self._of(network)
            if kept == Kept(subnet):
                return
            if kept is not None and not kept.subnet.subnet_of(subnet):
                self.drop(network)
            heirlooms = [
                each
                for id, (other, _) in self.resting().items()
                if id != network and other.overlaps(subnet)
                for each in self._dropped(id)
            ]
            (folder / "leases").mkdir(parents=True, exist_ok=True)
            fresh = folder / "subnet.new"
            fresh.write_text(f"{subnet}\n")
            fresh.replace(folder / "subnet")
            (folder / "gone").unlink(missing_ok=True)
            self._known()[network] = Kept(subnet)
            self.leases(network).inherit(each for each in heirlooms if IPv4Address(each.address) in subnet)

    def rest(self, network: str) -> None:
        """Note that a network is gone: its subnet and its addresses rest."""
        with self._lock:
            kept = self._known().get(network)
            if kept is not None and kept.gone is None:
                self.leases(network).release_all()
                with contextlib.suppress(OSError):  # a full disk: it is not given to others, then
                    (self._of(network) / "gone").touch()
                self._known()[network] = replace(kept, gone=self._clock())

    def surplus(self) -> list[str]:
        """Removed networks that need not be remembered any longer: the older half, once there are too many."""
        rested = [id for id, (_, seconds) in self.resting().items() if not seconds]
        return rested[: len(rested) // 2] if len(rested) > KEPT_GONE else []

    def drop(self, network: str) -> None:
        """Forget a network with all its leases."""
        with self._lock:
            self._known().pop(network, None)
            self._leases.pop(network, None)
            discard_tree(self._of(network))

    def note_forwarding(self, network: str) -> None:
        """Remember that ip_forward was turned on for a network."""
        (self._of(network) / "forwarding").touch()

    def noted_forwarding(self, network: str) -> bool:
        return (self._of(network) / "forwarding").exists()

    def leases(self, network: str) -> Leases:
        with self._lock:
            return self._leases.setdefault(network, Leases(network, self._of(network) / "leases", self._clock))

    def _dropped(self, network: str) -> list[Lease]:
        found = self.leases(network).all()
        self.drop(network)
        return found

    def _of(self, network: str) -> Path:
        return self._folder / network.replace("/", "~")

    def _known(self) -> dict[str, Kept]:
        if self._read is None:
            folders = self._folder.iterdir() if self._folder.exists() else iter(())
            found = ((folder.name.replace("~", "/"), _kept(folder, self._clock())) for folder in folders)
            self._read = {id: kept for id, kept in found if kept is not None}
        return self._read


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
        self._by_owner: dict[str, Lease] = {}
        self._by_instance: dict[str, Lease] = {}
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
            held = self._by_owner.get(owner) or self._by_instance.get(instance)
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
            if (lease := self._by_instance.get(instance)) is not None:
                self._rest(replace(lease, instance=NOBODY, freed=self._clock()))

    def release_all(self) -> None:
        """Let every address rest."""
        for lease in self.all():
            self.release(lease.instance)

    def inherit(self, leases: Iterable[Lease]) -> None:
        """Let addresses rest here that rested in a network which had them before."""
        with self._lock:
            self._load()
            for lease in leases:
                if lease.address not in self._by_address:
                    self._write(replace(lease, instance=NOBODY, freed=lease.freed if lease.rests else self._clock()))

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
        return self._exchange(known, lease)

    def _rest(self, lease: Lease) -> None:
        """Mark a lease on disk as one that rests, without a new file: on a full disk, too, what runs can go."""
        file = self._folder / lease.address
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, (lease.freed, lease.freed))
            file.chmod(RESTS)
        self._exchange(self._by_address.get(lease.address), lease)

    def _exchange(self, known: Lease | None, lease: Lease) -> str:
        if known is not None:
            self._forget(known)
        self._remember(lease)
        return lease.address

    def _remember(self, lease: Lease) -> None:
        self._by_address[lease.address] = lease
        if lease.owner != NOBODY:
            self._by_owner[lease.owner] = lease
        if lease.instance != NOBODY:
            self._by_instance[lease.instance] = lease

    def _forget(self, lease: Lease) -> None:
        for index, key in ((self._by_owner, lease.owner), (self._by_instance, lease.instance)):
            if index.get(key) == lease:
                del index[key]

    def _load(self) -> None:
        if self._read:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            match [] if file.name.startswith(".") else file.read_text().split():
                case [*owners, instance] if len(owners) < 2:
                    user = NOBODY if stat.S_IMODE(file.stat().st_mode) == RESTS else instance
                    owner = owners[0] if owners else NOBODY
                    self._remember(Lease(file.name, owner, user, _changed(file, self._clock())))
                case _:
                    file.unlink()  # its giver died before it was written
        self._read = True


def _fits(address: str, subnet: IPv4Network, gateway: str) -> bool:
    """Whether a container may have an address: one of an earlier, wider subnet may be an end of this one."""
    number = IPv4Address(address)
    ends = (subnet.network_address, subnet.broadcast_address)
    return address != gateway and number in subnet and number not in ends


def _changed(file: Path, now: float) -> float:
    return min(file.stat().st_mtime, now)


def _kept(folder: Path, now: float) -> Kept | None:
    try:
        subnet = IPv4Network((folder / "subnet").read_text().strip())
    except (OSError, ValueError):
        return None
    with contextlib.suppress(FileNotFoundError):
        return Kept(subnet, _changed(folder / "gone", now))
    return Kept(subnet)
