"""Entry points → drivers by kind and name, and hooks to tell; each plugin's failures stay its own.

The agent and the command line call `load_plugins` once at start. This is the only user of pluggy's PluginManager:
pluggy lets one broken entry point abort loading, and one raising implementation abort its siblings, so entry
points are loaded and hooks are called one by one here. Drivers are handed out with a guard around them (`guard`).
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import Distribution, EntryPoint
from importlib.metadata import entry_points as installed_entry_points
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

import pluggy
from pydantic import BaseModel

from holdfast import guard, hookspecs
from holdfast.config import Config
from holdfast.drivers import Host, VolumeWant
from holdfast.errors import TryAgain, UnfitHost, WrongConfig, WrongState
from holdfast.hookspecs import API_VERSION, OLDEST_API
from holdfast.keys import Table
from holdfast.kinds import FIREWALL, KINDS, POLICY, ROOTFS, VOLUME, DriverKind, offers
from holdfast.observed import Finding, Json
from holdfast.patches import merge_patch, unfit_patch
from holdfast.tables import Fault, read_table
from holdfast.toml import KeyPath, dotted
from holdfast.words import one_line, suggestion
from holdfast.workers import BACKLOG, Teller, Worker

D = TypeVar("D")

GROUP = "holdfast"
LOAD_DEADLINE = 30.0  # seconds that a plugin may take to be imported, and to offer its drivers
HOOKS = tuple(name for name, item in vars(hookspecs).items() if hasattr(item, "holdfast_spec"))
ADJUST = "adjust_oci_config"


@dataclass(frozen=True, slots=True)
class PluginState:
    """How a plugin fares.

    ok; failed: it offers nothing; refused: some of its drivers are not used; raised: a hook or driver of it was at
    fault when it was last called; slow: a call has not returned for some time; missing: this node depends on it, and
    it is not installed any more.
    hooks: what it implements. drivers: what it offers, as `volume managed`. error: why the state is not ok.
    """

    name: str
    distribution: str
    version: str
    state: Literal["ok", "failed", "refused", "raised", "slow", "missing"] = "ok"
    error: str = ""
    hooks: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()


@dataclass(slots=True)
class _Plugin:
    """What is kept of a plugin: how its loading went, its `Settings`, its drivers, its faults (of what → error).

    optional: a container may start without its adjust_oci_config.
    """

    state: PluginState
    settings: Any = None
    optional: bool = False
    guards: list[guard.Guarded] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    teller: Teller | None = None

    def now(self) -> PluginState:
        """Its state with what is wrong at the moment."""
        faults = [f"{what}: {error}" for what, error in self.faults.items()]
        slow = [line for driver in self.guards for line in driver.slow()]
        if not faults and not slow:
            return self.state
        error = "; ".join([*filter(None, [self.state.error]), *faults, *slow])
        return replace(self.state, state="raised" if faults else "slow", error=error)


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A config.json as the plugins have left it.

    asked: the plugins that had their say. by: those that changed something. warnings: why an optional one did not.
    """

    config: dict[str, Any]
    asked: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class Plugins:
    """Every driver by name, and the hooks of all plugins that loaded. Safe to use from several threads.

    tables: [plugins.NAME] of agent.toml, by name. wrong: what of agent.toml does not fit the plugins, by its keys.
    noticed(plugin, error) is called when a plugin is newly at fault, or differently. expected: plugins without which
    no container may start, and that are not loaded → their distribution.
    """

    host: Host
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wrong: list[Fault] = field(default_factory=list)
    noticed: Callable[[str, str], None] = lambda plugin, error: None
    expected: Mapping[str, str] = field(default_factory=dict)
    _drivers: dict[DriverKind[Any], dict[str, guard.Guarded]] = field(default_factory=lambda: {k: {} for k in KINDS})
    _plugins: dict[str, _Plugin] = field(default_factory=dict)
    _manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager("holdfast"))
    _observer: Worker = field(default_factory=lambda: Worker("observe", guard.OBSERVE_DEADLINE))
    _trials: Worker = field(default_factory=lambda: Worker(ADJUST, guard.OBSERVE_DEADLINE))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._manager.add_hookspecs(hookspecs)

    # -- what there is --

    @property
    def states(self) -> tuple[PluginState, ...]:
        """Every plugin that was found, in the order of loading, and those that are missing."""
        with self._lock:
            found = tuple(plugin.now() for plugin in self._plugins.values())
            gone = [(name, origin) for name, origin in self.expected.items() if name not in self._plugins]
        return (*found, *(PluginState(name, origin, "", "missing", _gone(name, origin)) for name, origin in gone))

    def loaded(self) -> frozenset[str]:
        """The names of the plugins that were loaded."""
        return frozenset(name for name, plugin in self._plugins.items() if plugin.state.state != "failed")

    def origins(self) -> dict[str, str]:
        """Driver, as `volume managed` → the distribution that offers it."""
        states = [plugin.state for plugin in self._plugins.values()]
        return {driver: state.distribution for state in states for driver in state.drivers}

    def names(self) -> dict[str, dict[str, type[BaseModel] | None]]:
        """The drivers that state files may name, by kind, each with the table of its options."""
        return {
            kind.name: {name: driver.options for name, driver in self._drivers[kind].items()}
            for kind in KINDS
            if kind.chosen
        }

    def of_kind(self, kind: DriverKind[D]) -> Mapping[str, D]:
        """Every driver of a kind, by name, in the order of loading."""
        return cast(Mapping[str, D], self._drivers[kind])

    def driver(self, kind: DriverKind[D], name: str) -> D:
        """The driver of that kind and name. Raises WrongState that names the known ones."""
        known = self.of_kind(kind)
        if name not in known:
            broken = [state.name for state in self.states if state.state == "failed"]
            hint = f"; failed plugins: {', '.join(broken)}" if broken else ""
            raise WrongState(
                f"{kind.name} driver {name!r}: no plugin offers it (known: {', '.join(known) or 'none'}{hint})"
            )
        return known[name]

    def withdraw(self, kind: DriverKind[Any], name: str, why: str) -> None:
        """Do without a driver from now on, as if no plugin offered it."""
        gone = self._drivers[kind].pop(name)
        for plugin in self._plugins.values():
            if gone in plugin.guards:
                left = tuple(each for each in plugin.state.drivers if each != f"{kind.name} {name}")
                error = "; ".join([*filter(None, [plugin.state.error]), f"{gone.title}: {why}"])
                plugin.state = replace(plugin.state, state="refused", drivers=left, error=error)

    def check_config(self, config: Config, known: Container[str] = ()) -> None:
        """Raise WrongConfig for what agent.toml says that no plugin here knows, a line for each thing.

        known: drivers, as `rootfs overlay`, that are missed by others: their plugin is gone, or can't be loaded.
        """
        wrong = [(fault.path, fault.message) for fault in self.wrong]
        for kind, path, name in chosen_drivers(config):
            if name not in self._drivers[kind] and f"{kind.name} {name}" not in known:
                expected = f" (expected {' or '.join(sorted(self._drivers[kind]))}, or its plugin to be installed)"
                hint = suggestion(name, self._drivers[kind]) or expected
                wrong.append((path, f"no plugin offers the {kind.name} driver '{name}'{hint}"))
        if wrong:
            raise WrongConfig("\n".join(f"{config.where(path)}: {one_line(message)}" for path, message in wrong))

    # -- what drivers do together --

    def check_volume(self, driver: str, want: VolumeWant) -> None:
        """Let the driver check, after making sure that no other driver has made a volume of that name."""
        chosen = self.driver(VOLUME, driver)
        for name, other in self.of_kind(VOLUME).items():
            if name != driver and any(receipt.id == want.id for receipt in guard.found_by(other) or ()):
                raise WrongState(
                    f"volume {want.id!r}: driver {name!r} made it, and now driver {driver!r} is asked for "
                    "(give the volume another name, or remove the old one)"
                )
        chosen.check(want)

    def watch(self, tell: Callable[[str, str], None]) -> list[Callable[[], None]]:
        """Have every driver that can look after what it made (`drivers.Watching`); returns what ends that."""
        ends = []
        for driver in self._all():
            with suppress(Exception):  # recorded as the plugin's fault; passes see what changes
                ends.append(driver.watch(tell))
        return ends

    def observe(self) -> guard.Observation:
        """All that drivers observe and tell. That one can't say is recorded as its plugin's fault."""
        return guard.observe_all(self._observer, self._all())

    def findings(self) -> tuple[Finding, ...]:
        """What the drivers have to tell of the host (`drivers.Telling`)."""
        return self.observe().findings

    def _all(self) -> list[guard.Guarded]:
        return [driver for named in self._drivers.values() for driver in named.values()]

    # -- telling hooks --

    def hears(self, hook: str) -> bool:
        """Whether any plugin implements a hook: what nobody hears need not be made."""
        return bool(list(self._implementations(hook)))

    def tell(self, hook: str, **arguments: Any) -> None:
        """Have every implementation of a telling hook called, in a thread of its plugin, and go on at once.

        What one raises is recorded. A plugin that falls too far behind is told no more until it has caught up.
        """
        for name, implementation in self._implementations(hook):
            plugin = self._plugins[name]
            with self._lock:
                plugin.teller = plugin.teller or Teller(name)
            heard = plugin.teller.tell(partial(self._tell, name, hook, implementation, arguments))
            self._record(name, "hooks", "" if heard else f"{BACKLOG} calls behind; what came after is not told")

    def wait_told(self, timeout: float) -> bool:
        """Block until all that was told by now has been heard; False if it has not after timeout seconds."""
        until = time.monotonic() + timeout
        tellers = [plugin.teller for plugin in self._plugins.values() if plugin.teller]
        return all(teller.wait(max(until - time.monotonic(), 0.0)) for teller in tellers)

    def _tell(self, name: str, hook: str, implementation: pluggy.HookImpl, arguments: Mapping[str, Any]) -> None:
        with suppress(UnfitHost):  # it is recorded
            self._call(name, hook, implementation, arguments)

    # -- adjust_oci_config --

    def adjusting(self) -> dict[str, str]:
        """The plugins without whose adjust_oci_config no container may run → their distribution."""
        adjusts = [self._plugins[name] for name, _ in self._implementations(ADJUST)]
        return {plugin.state.name: plugin.state.distribution for plugin in adjusts if not plugin.optional}

    def lacking(self, asked: Collection[str]) -> list[str]:
        """The plugins that must adjust every container and were not asked for one.

        Those that fail now are left out: to stop the container would not help.
        """
        return [name for name in self.adjusting() if name not in asked and ADJUST not in self._plugins[name].faults]

    def adjust_oci_config(
        self, app: str, container: str, config: Json, labels: Mapping[str, str] = MappingProxyType({})
    ) -> Adjusted:
        """Apply the merge patch of each plugin in turn.

        Raises UnfitHost for a plugin that is gone, fails, or returns what can't be used, unless it is optional.
        """
        what = f"configure '{app}/{container}'"
        for name, origin in self.expected.items():
            known = self._plugins.get(name)
            raise UnfitHost(
                f"{what}: plugin '{name}': "
                + (f"could not be loaded: {known.state.error}" if known else _gone(name, origin))
            )
        made = Adjusted(dict(config))
        about = {"app": app, "container": container, "labels": dict(labels)}
        for name, implementation in self._implementations(ADJUST):
            arguments = {**about, "config": copy.deepcopy(made.config)}
            try:
                patch = self._call(name, ADJUST, implementation, arguments, partial(unfit_patch, made.config))
            except UnfitHost as error:
                if not self._plugins[name].optional:
                    raise UnfitHost(f"{what}: {error}") from error
                made = replace(made, warnings=(*made.warnings, str(error)))
                continue
            config = merge_patch(made.config, patch) if patch else made.config
            by = (*made.by, name) if patch else made.by
            made = replace(made, config=config, asked=(*made.asked, name), by=by)
        return made

    def would_adjust(self, app: str, container: str, config: Json, labels: Mapping[str, str]) -> bool:
        """Whether every required patch can be had now; asked before something is stopped for want of one."""
        try:
            self._trials.call(partial(self.adjust_oci_config, app, container, config, labels))
        except (UnfitHost, TryAgain):  # TryAgain: it does not answer
            return False
        return True

    # -- calling hooks --

    def _implementations(self, hook: str) -> Iterator[tuple[str, pluggy.HookImpl]]:
        """In the order of loading; pluggy's own order is the reverse, but no plugin could rely on either."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            yield implementation.plugin_name, implementation

    def _call(
        self,
        name: str,
        hook: str,
        implementation: pluggy.HookImpl,
        arguments: Mapping[str, Any],
        wrong: Callable[[Any], str] = lambda result: "",
    ) -> Any:
        """Call one implementation. Whatever it raises is recorded and becomes UnfitHost; so does a wrong result."""
        result, cause = None, None
        try:
            result = self._result(name, implementation, arguments)
            found = wrong(result)
        except BaseException as error:
            if guard.is_interrupt(error):
                raise
            found, cause = guard.described(error), error
        self._record(name, hook, found)
        if found:
            raise UnfitHost(f"plugin '{name}': {hook}: {found}") from cause
        return result

    def _result(self, name: str, implementation: pluggy.HookImpl, arguments: Mapping[str, Any]) -> Any:
        known = {**arguments, "host": self.host, "settings": self._plugins[name].settings}
        result = implementation.function(*(known[parameter] for parameter in implementation.argnames))
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError("returned a coroutine (hooks are plain blocking functions)")
        return result

    def _record(self, name: str, what: str, error: str) -> None:
        """Note that a hook or a driver's verb is at fault, or with error "" that it is no longer."""
        faults = self._plugins[name].faults
        if not error and what not in faults:
            return
        with self._lock:
            known = faults.pop(what, "")
            if error:
                faults[what] = error
        if error and error != known:
            self.noticed(name, f"{what}: {error}")

    # -- loading --

    def _load(self, entry_point: EntryPoint) -> None:
        name, (origin, version) = entry_point.name, _origin(entry_point.dist)
        if name in self._plugins:
            other = self._plugins[name].state.distribution or "another plugin"
            taken = f"load plugin {name!r}: the name is taken by {other}"
            name = f"{name} ({origin or entry_point.value})"
            self._plugins[name] = _Plugin(PluginState(name, origin, version, "failed", taken))
            return
        plugin = self._plugins[name] = _Plugin(PluginState(name, origin, version))
        worker = Worker(f"load {name}", LOAD_DEADLINE)  # an import may do anything, and for any length of time
        try:
            module = worker.call(entry_point.load)
            _refuse_other_contract(module)
            _refuse_unknown(module)
            plugin.optional = _is_optional(module)
            plugin.settings = worker.call(partial(self._settings, name, module))
            self._manager.register(module, name=name)
            self._manager.check_pending()
            plugin.state = replace(plugin.state, hooks=self._hooks_of(name))
            plugin.guards = worker.call(partial(self._offers, name))
        except BaseException as error:  # the edge at which a plugin's exceptions end
            if guard.is_interrupt(error):
                raise
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            plugin.state = replace(plugin.state, state="failed", error=guard.described(error))
            return
        plugin.state = self._accept(plugin)

    def _settings(self, name: str, plugin: Any) -> Any:
        """Read a plugin's table in agent.toml with its own model. Raises WrongState if that fails."""
        model, table = getattr(plugin, "Settings", None), self.tables.get(name)
        if model is None:
            if table is not None:
                self.wrong.append(
                    Fault(("plugins", name), f"plugin '{name}' takes no settings (leave the table out)")
                )
            return None
        if not isinstance(model, type) or not issubclass(model, Table):
            raise WrongState(f"Settings is {model!r} (expected a class derived from holdfast.keys.Table)")
        settings, faults = read_table(model, table or {})
        self.wrong.extend(Fault(("plugins", name, *fault.path), fault.message) for fault in faults)
        for first in faults:
            raise WrongState(f"agent.toml: {dotted(('plugins', name, *first.path))}: {first.message}")
        return settings

    def _hooks_of(self, name: str) -> tuple[str, ...]:
        """The hooks that a plugin implements, in call order. Raises WrongState for what can't be called alone."""
        own = [(hook, each) for hook in HOOKS for plugin, each in self._implementations(hook) if plugin == name]
        for hook, implementation in own:
            _refuse_unusual(hook, implementation)
        return tuple(hook for hook, _ in own)

    def _offers(self, name: str) -> list[guard.Guarded]:
        """All that a plugin registers; nothing of it counts when one of its hooks raises."""
        found: list[tuple[DriverKind[Any], Any]] = []
        for hook, kinds in offers():
            for plugin, implementation in self._implementations(hook):
                if plugin == name:
                    self._result(name, implementation, {"register": _collector(kinds, found)})
        return [guard.guarded(driver, kind, partial(self._record, name), self._observer) for kind, driver in found]

    def _accept(self, plugin: _Plugin) -> PluginState:
        """Take up what a plugin offers, but for names that are taken."""
        accepted, refused = [], []
        for driver in plugin.guards:
            if driver.name in driver.kind.reserved:
                refused.append(f"{driver.title}: refused, that name is taken by the core")
            elif driver.name in self._drivers[driver.kind]:
                refused.append(f"{driver.title}: refused, an earlier plugin offers one of that name")
            else:
                self._drivers[driver.kind][driver.name] = driver
                accepted.append(f"{driver.kind.name} {driver.name}")
        state: Literal["ok", "refused"] = "refused" if refused else "ok"
        return replace(plugin.state, state=state, drivers=tuple(accepted), error="; ".join(refused))


def load_plugins(
    host: Host,
    *,
    entry_points: Iterable[EntryPoint] | None = None,
    disabled: Collection[str] = (),
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Plugins:
    """Load the plugins of this installation, holdfast's own first; never raises for a plugin's faults.

    entry_points: instead of the installed ones of group `holdfast`. disabled: names not to load. settings: the tables
    [plugins.NAME] of agent.toml, by name.
    """
    found = installed_entry_points(group=GROUP) if entry_points is None else entry_points
    plugins = Plugins(host, settings)
    for entry_point in sorted(found, key=_own_first) if entry_points is None else found:
        if entry_point.name not in disabled:
            plugins._load(entry_point)
    for name in settings.keys() - plugins._plugins.keys():
        hint = suggestion(name, plugins._plugins) or " (leave the table out, or install the plugin)"
        plugins.wrong.append(Fault(("plugins", name), f"no plugin is called '{name}'{hint}"))
    return plugins


def chosen_drivers(config: Config) -> Iterator[tuple[DriverKind[Any], KeyPath, str]]:
    """Every driver that agent.toml chooses, and where."""
    yield ROOTFS, ("storage", "driver"), config.storage.driver
    yield FIREWALL, ("network", "firewall"), config.network.firewall
    for index, name in enumerate(config.cgroup.policy):
        yield POLICY, ("cgroup", "policy", index), name


@cache
def _origin(distribution: Distribution | None) -> tuple[str, str]:
    """The name and the version of a distribution, which parses its metadata for each."""
    return (distribution.name, distribution.version) if distribution else ("", "")


def _own_first(entry_point: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _origin(entry_point.dist)
    return distribution != "holdfast", distribution, entry_point.name


def _collector(kinds: tuple[DriverKind[Any], ...], found: list[tuple[DriverKind[Any], Any]]) -> Callable[..., None]:
    def register(*drivers: Any) -> None:
        if len(drivers) != len(kinds):
            names = ", ".join(kind.name for kind in kinds)
            raise TypeError(f"register() takes {len(kinds)} drivers ({names}), not {len(drivers)}")
        found.extend(zip(kinds, drivers, strict=True))

    return register


def _gone(name: str, origin: str) -> str:
    again = f"install {origin or 'it'} again, or 'holdfast plugin forget {name}'"
    return f"it adjusts every container, and is not installed any more ({again})"


def _is_optional(plugin: Any) -> bool:
    """Whether a container may run without a plugin's patch, as its ADJUST_OCI_CONFIG says (default "required")."""
    said = getattr(plugin, "ADJUST_OCI_CONFIG", "required")
    if said not in ("required", "optional"):
        raise WrongState(f'ADJUST_OCI_CONFIG is {said!r} (expected "required" or "optional")')
    return bool(said == "optional")


def _refuse_other_contract(plugin: Any) -> None:
    """Raise WrongState for a plugin that is written for a version of the contract that is not offered here."""
    asked = getattr(plugin, "api_version", OLDEST_API)
    if type(asked) is not int or not OLDEST_API <= asked <= API_VERSION:
        cure = "install a newer holdfast" if type(asked) is int and asked > API_VERSION else "install a newer plugin"
        raise WrongState(f"api_version {asked!r}: this holdfast offers {OLDEST_API} to {API_VERSION} ({cure})")


def _refuse_unknown(plugin: Any) -> None:
    """Raise WrongState for a hook, or a parameter of one, that does not exist; pluggy's words are about pluggy."""
    for name, item in inspect.getmembers_static(plugin):
        options = getattr(item, "holdfast_impl", None)
        if not isinstance(options, Mapping):
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS:
            raise WrongState(f"hook {hook!r}: there is no such hook (expected one of {', '.join(HOOKS)})")
        known = inspect.signature(getattr(hookspecs, hook)).parameters
        for parameter in inspect.signature(item).parameters:
            if parameter not in known and parameter != "self":
                raise WrongState(f"hook {hook!r}: has no parameter {parameter!r} (expected {', '.join(known)})")


def _refuse_unusual(hook: str, implementation: pluggy.HookImpl) -> None:
    if implementation.wrapper or implementation.hookwrapper:
        raise WrongState(f"hook {hook!r}: is a wrapper (hooks are plain functions)")
    if inspect.iscoroutinefunction(implementation.function):
        raise WrongState(f"hook {hook!r}: is async (hooks are plain blocking functions)")
