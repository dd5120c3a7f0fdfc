"""Networks → subnets, kept on disk so that they outlive restarts and reboots. Addresses are `holdfast.leases`.

    ROOT/networks/<app~name>/subnet         the subnet of the network
    ROOT/networks/<app~name>/gone           present while there is no such network: since when, the subnet rests
    ROOT/networks/<app~name>/leases/        its addresses
    ROOT/networks/<app~name>/forwarding     present if ip_forward was turned on for the network

The subnet of a network that was removed rests like an address that nobody uses.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from holdfast.files import discard_tree, names_in, write_whole
from holdfast.leases import NOT_CONTAINERS, Lease, Leases, changed_at, still_resting

SMALLEST = 28  # prefix of the smallest subnet that is taken from the pool: a gateway and 13 containers
KEPT_GONE = 64  # removed networks whose subnets are remembered


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
    return (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))


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
            heirlooms: list[Lease] = []
            for id in [id for id, (each, _) in self.resting().items() if id != network and each.overlaps(subnet)]:
                heirlooms += self.leases(id).all()
                self.drop(id)
            (folder / "leases").mkdir(parents=True, exist_ok=True)
            write_whole(folder / "subnet", f"{subnet}\n")
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

    def _of(self, network: str) -> Path:
        return self._folder / network.replace("/", "~")

    def _known(self) -> dict[str, Kept]:
        if self._read is None:
            found = (
                (name.replace("~", "/"), _kept(self._folder / name, self._clock())) for name in names_in(self._folder)
            )
            self._read = {id: kept for id, kept in found if kept is not None}
        return self._read


def _kept(folder: Path, now: float) -> Kept | None:
    try:
        subnet = IPv4Network((folder / "subnet").read_text().strip())
    except (OSError, ValueError):
        return None
    with contextlib.suppress(FileNotFoundError):
        return Kept(subnet, changed_at(folder / "gone", now))
    return Kept(subnet)
