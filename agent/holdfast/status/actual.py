"""What the kernel has of a container, beside what its state file asks for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.observed import Instance, Limits, PublishedPort

Published = Mapping[str, Sequence[PublishedPort]] | None  # address → the ports that lead to it; None: not known


@dataclass(frozen=True, slots=True)
class LimitsStatus:
    """The limits of an instance. observed: as the kernel has them; None when it does not run or was not looked at."""

    asked: Limits
    observed: Limits | None


def limits_status(instance: Instance, observed: Limits | None) -> LimitsStatus:
    """Put the limits that the kernel has beside those that were asked for."""
    running = instance.phase == "running"
    return LimitsStatus(Limits.asked(instance.want.resources), observed if running else None)


def by_address(ports: Iterable[PublishedPort] | None) -> Published:
    """Sort published ports by the address that they lead to."""
    if ports is None:
        return None
    found: dict[str, list[PublishedPort]] = {}
    for port in ports:
        found.setdefault(port.address, []).append(port)
    return found


def published_ports(instances: Iterable[Instance], published: Published) -> tuple[str, ...] | None:
    """The published ports that lead to some instances, in the words of a state file."""
    if published is None:
        return None
    addresses = dict.fromkeys(address for each in instances for address in each.addresses.values() if address)
    return tuple(str(port) for address in addresses for port in published.get(address, ()))
