"""Remember which plugins this node relies on, and tell what is missing when one of them is gone.

A plugin that is not loaded can't be asked what it did. So each start of the agent stores which distribution offers
each driver, and which plugins adjust every container; `holdfast plugin forget` removes one of the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from holdfast.config import Config
from holdfast.errors import Conflict, NotFound
from holdfast.guard import Guarded, described
from holdfast.kinds import KINDS, DriverKind, kind_of
from holdfast.node.context import BARE, Context
from holdfast.observed import MissingDriver, Receipt
from holdfast.plugins import Plugins, PluginState
from holdfast.store import Store

FACT = "plugins"


def remember(context: Context) -> None:
    """Store what the loaded plugins offer, next to what other plugins offered before."""
    known = context.store.fact(FACT) or {}
    loaded = context.plugins.loaded()
    adjusting = {name: origin for name, origin in known.get("adjusting", {}).items() if name not in loaded}
    fresh = {
        "drivers": {**known.get("drivers", {}), **context.plugins.origins()},
        "adjusting": {**adjusting, **context.plugins.adjusting()},
    }
    if fresh != known:
        context.store.put_fact(FACT, fresh)
    expect(context)


def refuse_newer(store: Store, plugins: Plugins) -> None:
    """Stop using each driver that is older than the receipts of what it made: it could not read them."""
    for receipt, kind, driver in _versioned(store, plugins):
        if receipt.version > driver.receipt_version:
            why = f"what it made has receipts of version {receipt.version}, and it knows {driver.receipt_version}"
            plugins.withdraw(kind, receipt.driver, f"{why} (install the newer plugin again)")


def migrate(store: Store, plugins: Plugins) -> None:
    """Bring receipts of older versions to the one that their drivers have by now.

    A driver whose `migrate` fails is not used any more: what it made stays as it is, as if its plugin were gone.
    """
    for receipt, kind, driver in _versioned(store, plugins):
        if receipt.version < driver.receipt_version:
            try:
                store.put_receipt(driver.migrate(receipt))
            except Exception as error:
                why = f"the receipt of '{receipt.id}' stays at version {receipt.version}: {described(error)}"
                plugins.withdraw(kind, receipt.driver, why)


def _versioned(store: Store, plugins: Plugins) -> Iterator[tuple[Receipt, DriverKind[Any], Guarded]]:
    """Yield every receipt that has another version than its driver."""
    for receipt in list(made(store)):
        kind = kind_of(receipt)
        driver = cast(Guarded | None, kind and plugins.of_kind(kind).get(receipt.driver))
        if kind and driver and driver.receipt_version != receipt.version:
            yield receipt, kind, driver


def check_settings(context: Context, config: Config) -> None:
    """Raise WrongConfig for what agent.toml says that no plugin knows now, or knew when the agent last ran."""
    context.plugins.check_config(config, (context.store.fact(FACT) or {}).get("drivers", {}))


def expect(context: Context) -> None:
    """Start no container without the plugins that adjust all of them, and use no driver that is too old."""
    refuse_newer(context.store, context.plugins)
    adjusting = (context.store.fact(FACT) or {}).get("adjusting", {})
    loaded = context.plugins.loaded()
    context.plugins.expected = {name: origin for name, origin in adjusting.items() if name not in loaded}


def forget(context: Context, name: str) -> None:
    """Stop expecting a plugin that is gone. Raises NotFound, or Conflict for one that is installed."""
    known = context.store.fact(FACT) or {}
    if name not in known.get("adjusting", {}):
        raise NotFound(f"plugin '{name}': containers do not depend on one of that name (see 'holdfast plugin list')")
    if name in context.plugins.loaded():
        raise Conflict(f"plugin '{name}': it is installed (uninstall it, restart the agent, then forget it)")
    left = {each: origin for each, origin in known["adjusting"].items() if each != name}
    context.store.put_fact(FACT, {**known, "adjusting": left})
    expect(context)


def missing_drivers(context: Context, made: Iterable[Receipt]) -> tuple[MissingDriver, ...]:
    """Return the drivers that no plugin offers now although something in use was made by them.

    A volume that no container mounts is not in use.
    """
    made_by: dict[tuple[str, bool, str], list[Receipt]] = {}
    for receipt in made:
        made_by.setdefault((receipt.kind, bool(receipt.owner), receipt.driver), []).append(receipt)
    used: dict[tuple[str, str], list[str]] = {}
    for receipts in made_by.values():
        kind, driver = kind_of(receipts[0]), receipts[0].driver
        if kind and driver not in BARE and driver not in context.plugins.of_kind(kind):
            used[kind.name, driver] = [each.id for each in receipts]
    if any(kind == "volume" for kind, _ in used):
        mounts = (mount for each in list(context.store.instances.values()) for mount in each.want.mounts)
        mounted = {mount.source for mount in mounts if mount.kind == "volume"}
        used = {key: [id for id in ids if key[0] != "volume" or id in mounted] for key, ids in used.items()}
        used = {key: ids for key, ids in used.items() if ids}
    origins = (context.store.fact(FACT) or {}).get("drivers", {}) if used else {}
    return tuple(
        MissingDriver(kind, driver, tuple(sorted(things)), origins.get(f"{kind} {driver}", ""))
        for (kind, driver), things in sorted(used.items())
    )


def states(context: Context, missing: Iterable[MissingDriver]) -> tuple[PluginState, ...]:
    """Return every plugin that was found, and every driver that is missing."""
    gone = (PluginState(each.title, each.distribution, "", "missing", str(each)) for each in missing)
    return (*context.plugins.states, *gone)


def made(store: Store) -> Iterator[Receipt]:
    """Yield every receipt that was made by a driver."""
    for kind in dict.fromkeys(each.receipt for each in KINDS if each.receipt):
        yield from store.receipts(kind)
