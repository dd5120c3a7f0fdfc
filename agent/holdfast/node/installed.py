"""Which plugins this node relies on → what is missing when one of them is gone.

What a plugin that is not loaded did can't be asked of it. So each start of the agent writes down which distribution
offers each driver, and which plugins adjust every container; `holdfast plugin forget` takes one of the latter back.
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
    """Write down what the plugins that are loaded now offer, beside what others offered before them."""
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
    """Use no driver that made something in a newer version than it is: its receipts can't be read, and are kept."""
    for receipt, kind, driver in _versioned(store, plugins):
        if receipt.version > driver.receipt_version:
            why = f"what it made has receipts of version {receipt.version}, and it knows {driver.receipt_version}"
            plugins.withdraw(kind, receipt.driver, f"{why} (install the newer plugin again)")


def migrate(store: Store, plugins: Plugins) -> None:
    """Bring receipts of older versions to the one that their drivers have by now.

    A driver that fails at one of them is not used: what it made is left as it is, as if its plugin were gone.
    """
    for receipt, kind, driver in _versioned(store, plugins):
        if receipt.version < driver.receipt_version:
            try:
                store.put_receipt(driver.migrate(receipt))
            except Exception as error:
                why = f"the receipt of '{receipt.id}' stays at version {receipt.version}: {described(error)}"
                plugins.withdraw(kind, receipt.driver, why)


def _versioned(store: Store, plugins: Plugins) -> Iterator[tuple[Receipt, DriverKind[Any], Guarded]]:
    """Every receipt whose driver is here and counts its versions otherwise."""
    for receipt in list(made(store)):
        kind = kind_of(receipt)
        driver = cast(Guarded | None, kind and plugins.of_kind(kind).get(receipt.driver))
        if kind and driver and driver.receipt_version != receipt.version:
            yield receipt, kind, driver


def check_settings(context: Context, config: Config) -> None:
    """Raise WrongConfig for what agent.toml says that no plugin knows now, or knew when the agent last ran."""
    context.plugins.check_config(config, (context.store.fact(FACT) or {}).get("drivers", {}))


def expect(context: Context) -> None:
    """Start no container without the plugins that adjust every one, and use no driver that is older than its work."""
    refuse_newer(context.store, context.plugins)
    adjusting = (context.store.fact(FACT) or {}).get("adjusting", {})
    loaded = context.plugins.loaded()
    context.plugins.expected = {name: origin for name, origin in adjusting.items() if name not in loaded}


def forget(context: Context, name: str) -> None:
    """Expect a plugin that is gone no more. Raises NotFound, or Conflict for one that is installed."""
    known = context.store.fact(FACT) or {}
    if name not in known.get("adjusting", {}):
        raise NotFound(f"plugin '{name}': containers do not depend on one of that name (see 'holdfast plugin list')")
    if name in context.plugins.loaded():
        raise Conflict(f"plugin '{name}': it is installed (uninstall it, restart the agent, then forget it)")
    left = {each: origin for each, origin in known["adjusting"].items() if each != name}
    context.store.put_fact(FACT, {**known, "adjusting": left})
    expect(context)


def missing_drivers(context: Context, made: Iterable[Receipt]) -> tuple[MissingDriver, ...]:
    """The drivers that no plugin offers now, of what was made and is in use.

    A volume that nobody mounts is not in use: nothing suffers while its driver is gone.
    """
    used: dict[tuple[str, str], list[str]] = {}
    for receipt in made:
        kind = kind_of(receipt)
        if kind and receipt.driver not in BARE and receipt.driver not in context.plugins.of_kind(kind):
            used.setdefault((kind.name, receipt.driver), []).append(receipt.id)
    if any(kind == "volume" for kind, _ in used):
        mounted = _mounted(context)
        for key in [key for key in used if key[0] == "volume"]:
            used[key] = [id for id in used[key] if id in mounted]
    used = {key: things for key, things in used.items() if things}
    origins = (context.store.fact(FACT) or {}).get("drivers", {}) if used else {}
    return tuple(
        MissingDriver(kind, driver, tuple(sorted(things)), origins.get(f"{kind} {driver}", ""))
        for (kind, driver), things in sorted(used.items())
    )


def states(context: Context, missing: Iterable[MissingDriver]) -> tuple[PluginState, ...]:
    """Every plugin that was found, and every driver that is missing."""
    gone = (PluginState(each.title, each.distribution, "", "missing", str(each)) for each in missing)
    return (*context.plugins.states, *gone)


def made(store: Store) -> Iterator[Receipt]:
    """Every receipt that a driver could have been asked for."""
    for kind in dict.fromkeys(each.receipt for each in KINDS if each.receipt):
        yield from store.receipts(kind)


def _mounted(context: Context) -> set[str]:
    instances = list(context.store.instances.values())
    return {mount.source for each in instances for mount in each.want.mounts if mount.kind == "volume"}
