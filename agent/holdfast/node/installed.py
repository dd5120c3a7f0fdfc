"""Which plugins this node relies on → what is missing when one of them is gone.

What a plugin that is not loaded did can't be asked of it. So each start of the agent writes down which distribution
offers each driver, and which plugins adjust every container; `holdfast plugin forget` takes one of the latter back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from holdfast.errors import Conflict, NotFound
from holdfast.node.rig import BARE, Rig
from holdfast.observed import MissingDriver, Receipt
from holdfast.plugins import PluginState

FACT = "plugins"
KINDS = ("rootfs", "volume", "mount", "network", "endpoint", "firewall")


def remember(rig: Rig) -> None:
    """Write down what the plugins that are loaded now offer, beside what others offered before them."""
    known = rig.store.fact(FACT) or {}
    loaded = rig.plugins.loaded()
    adjusting = {name: origin for name, origin in known.get("adjusting", {}).items() if name not in loaded}
    fresh = {
        "drivers": {**known.get("drivers", {}), **rig.plugins.origins()},
        "adjusting": {**adjusting, **rig.plugins.adjusting()},
    }
    if fresh != known:
        rig.store.put_fact(FACT, fresh)
    expect(rig)


def expect(rig: Rig) -> None:
    """Have no container started without the plugins that adjust every one of them."""
    adjusting = (rig.store.fact(FACT) or {}).get("adjusting", {})
    loaded = rig.plugins.loaded()
    rig.plugins.expected = {name: origin for name, origin in adjusting.items() if name not in loaded}


def forget(rig: Rig, name: str) -> None:
    """Expect a plugin that is gone no more. Raises NotFound, or Conflict for one that is installed."""
    known = rig.store.fact(FACT) or {}
    if name not in known.get("adjusting", {}):
        raise NotFound(f"plugin '{name}': containers do not depend on one of that name (see 'holdfast plugin list')")
    if name in rig.plugins.loaded():
        raise Conflict(f"plugin '{name}': it is installed (uninstall it, restart the agent, then forget it)")
    left = {each: origin for each, origin in known["adjusting"].items() if each != name}
    rig.store.put_fact(FACT, {**known, "adjusting": left})
    expect(rig)


def missing_drivers(rig: Rig, made: Iterable[Receipt]) -> tuple[MissingDriver, ...]:
    """The drivers that no plugin offers now, of what was made and is in use.

    A volume that nobody mounts is not in use: nothing suffers while its driver is gone.
    """
    used: dict[tuple[str, str], list[str]] = {}
    for receipt in made:
        kind = "mount" if receipt.kind == "volume" and receipt.owner else receipt.kind
        if kind in KINDS and receipt.driver not in BARE and not rig.plugins.offers(kind, receipt.driver):
            used.setdefault((kind, receipt.driver), []).append(receipt.id)
    if any(kind == "volume" for kind, _ in used):
        mounted = _mounted(rig)
        for key in [key for key in used if key[0] == "volume"]:
            used[key] = [id for id in used[key] if id in mounted]
    used = {key: things for key, things in used.items() if things}
    origins = (rig.store.fact(FACT) or {}).get("drivers", {}) if used else {}
    return tuple(
        MissingDriver(kind, driver, tuple(sorted(things)), origins.get(f"{kind} {driver}", ""))
        for (kind, driver), things in sorted(used.items())
    )


def states(rig: Rig, missing: Iterable[MissingDriver]) -> tuple[PluginState, ...]:
    """Every plugin that was found, and every driver that is missing."""
    gone = (PluginState(each.title, each.distribution, "", "missing", str(each)) for each in missing)
    return (*rig.plugins.states, *gone)


def made(rig: Rig) -> Iterator[Receipt]:
    """Every receipt that a driver could have been asked for."""
    for kind in ("rootfs", "volume", "network", "endpoint", "firewall"):
        yield from rig.store.receipts(kind)


def _mounted(rig: Rig) -> set[str]:
    instances = list(rig.store.instances.values())
    return {mount.source for each in instances for mount in each.want.mounts if mount.kind == "volume"}
