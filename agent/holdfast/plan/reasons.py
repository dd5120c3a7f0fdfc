"""Changes, holds and tables in words: what the reasons of a plan are put together from. `decide` calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from holdfast.observed import FirewallWant, Hold, Observed
from holdfast.plan.actions import Change


def in_hand(key: str, hold: Hold) -> str:
    """Why nothing is done about a container: what was asked by hand, and how to end it."""
    return f"{by_hand(hold)}; `holdfast release {key}` gives it back to the commit"


def by_hand(hold: Hold) -> str:
    """What was asked by hand, and by whom as far as that is known."""
    return f"{hold.kind} by hand ({hold.by})" if hold.by else f"{hold.kind} by hand"


def left_alone(observed: Observed) -> dict[str, str]:
    """What has our name and is not ours: why it is left where it is."""
    return {
        f"{thing.kind} {thing.id}": f"belongs to the root with the id {thing.of_root}; it is left alone"
        if thing.of_root
        else "has our name, but does not say for which root it was made; it is left alone"
        for thing in observed.foreign
    }


def counted(number: int, noun: str) -> str:
    """`1 port`, `2 ports`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(found: tuple[Change, ...]) -> str:
    """Several changes in one line."""
    return "; ".join(_worded(change) for change in found)


def _worded(change: Change) -> str:
    if change.field == "image":
        return f"image changed: {change.old} → {change.new}"
    return str(change).removeprefix("resources.")


def update_words(found: tuple[Change, ...]) -> Iterator[str]:
    """Each change to a running container with what it means for the process."""
    return (f"{_worded(change)}; {change.effect}" for change in found)


def option_words(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Each option of a driver that differs."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"driver_opts.{key} {old.get(key) or 'none'} → {new.get(key) or 'none'}"


def firewall_reason(want: FirewallWant, observed: Observed) -> str:
    """Why the table is written, and how much is in it."""
    ports, networks = sum(port.count for port in want.ports), len(want.networks)
    content = f"{counted(ports, 'published port')}, {counted(networks, 'network')}"
    return content if observed.firewall is not None else f"the table is not there or was altered; {content}"
