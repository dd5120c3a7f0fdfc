"""Entry points → drivers by kind and name, and hooks to tell; each plugin's failures stay its own.

The agent and the command line call `load_plugins` once at start. This is the only user of pluggy's PluginManager:
pluggy lets one broken entry point abort loading, and one raising implementation abort its siblings, so entry
points are loaded and hooks are called one by one here. Drivers are handed out with a guard around them (`guard`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint
from importlib.metadata import entry_points as installed_entry_points
from typing import Any, Literal, TypeVar, cast

import pluggy
from pydantic import BaseModel

from holdfast import hookspecs
from holdfast.drivers import Host, VolumeWant
from holdfast.errors import TryAgain, UnfitHost, WrongState
from holdfast.guard import (
    OBSERVE_DEADLINE,
    Guarded,
    Observation,
    described,
    found_by,
    guarded,
    is_interrupt,
    observe_all,
)
from holdfast.kinds import KINDS, VOLUME, DriverKind, offers
from holdfast.observed import Finding, Json
from holdfast.workers import BACKLOG, Teller, Worker

D = TypeVar("D")

GROUP = "holdfast"
LOAD_DEADLINE = 30.0  # seconds that a plugin may take to be imported, and to offer its drivers

HOOKS = tuple(name for name, item in vars(hookspecs).items() if hasattr(item, "holdfast_spec"))


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

    noticed(plugin, error) is called when a plugin is newly at fault, or differently. expected: plugins without which
    no container may start, and that are not loaded → their distribution.
    """

    _drivers: dict[DriverKind[Any], dict[str, Guarded]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    _manager: pluggy.PluginManager = field(default_factory=lambda: _new_manager())
    noticed: Callable[[str, str], None] = lambda plugin, error: None
    expected: Mapping[str, str] = field(default_factory=dict)
    _observer: Worker = field(default_factory=lambda: Worker("observe", OBSERVE_DEADLINE))
    _trials: Worker = field(default_factory=lambda: Worker("adjust_oci_config", OBSERVE_DEADLINE))
    _optional: set[str] = field(default_factory=set)  # plugins whose adjust_oci_config may fail
    _states: dict[str, PluginState] = field(default_factory=dict)
    _faults: dict[str, dict[str, str]] = field(default_factory=dict)  # plugin → of what → error
    _guards: dict[str, list[Guarded]] = field(default_factory=dict)
    _tellers: dict[str, Teller] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def states(self) -> tuple[PluginState, ...]:
        """Every plugin that was found, in the order of loading."""
        with self._lock:
            found = tuple(self._with_faults(state) for state in self._states.values())
            gone = [(name, origin) for name, origin in self.expected.items() if name not in self._states]
        return (*found, *(PluginState(name, origin, "", "missing", _gone(name, origin)) for name, origin in gone))

    def loaded(self) -> frozenset[str]:
        """The names of the plugins that were loaded."""
        return frozenset(name for name, state in self._states.items() if state.state != "failed")

    def origins(self) -> dict[str, str]:
        """Driver, as `volume managed` → the distribution that offers it."""
        return {driver: state.distribution for state in self._states.values() for driver in state.drivers}

    def names(self) -> dict[str, dict[str, type[BaseModel] | None]]:
        """The drivers that state files may name, by kind, each with the table of its options."""
        return {kind.name: dict.fromkeys(self._drivers[kind]) for kind in KINDS if kind.chosen}

    def adjusting(self) -> dict[str, str]:
        """The plugins without whose adjust_oci_config no container may run → their distribution."""
        return {
            name: self._states[name].distribution
            for name, _ in self._implementations("adjust_oci_config")
            if name not in self._optional
        }

    def lacking(self, asked: Collection[str]) -> list[str]:
        """The plugins that must adjust every container and were not asked for one.

        Those that fail now are left out: to stop the container would not help.
        """
        return [
            name
            for name, _ in self._implementations("adjust_oci_config")
            if name not in asked
            and name not in self._optional
            and "adjust_oci_config" not in self._faults.get(name, ())
        ]

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

    def check_volume(self, driver: str, want: VolumeWant) -> None:
        """Let the driver check, after making sure that no other driver has made a volume of that name."""
        chosen = self.driver(VOLUME, driver)
        for name, other in self.of_kind(VOLUME).items():
            if name != driver and any(receipt.id == want.id for receipt in found_by(other) or ()):
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

    def observe(self) -> Observation:
        """All that drivers observe and tell. That one can't say is recorded as its plugin's fault."""
        return observe_all(self._observer, self._all())

    def findings(self) -> tuple[Finding, ...]:
        """What the drivers have to tell of the host (`drivers.Telling`)."""
        return self.observe().findings

    def _all(self) -> list[Guarded]:
        return [driver for named in self._drivers.values() for driver in named.values()]

    def hears(self, hook: str) -> bool:
        """Whether any plugin implements a hook: what nobody hears need not be made."""
        return bool(list(self._implementations(hook)))

    def tell(self, hook: str, **arguments: Any) -> None:
        """Have every implementation of a telling hook called, in a thread of its plugin, and go on at once.

        What one raises is recorded. A plugin that falls too far behind is told no more until it has caught up.
        """
        for name, implementation in self._implementations(hook):
            call = partial(self._call, name, hook, implementation, arguments)
            heard = self._teller(name).tell(call)
            self._record(name, "hooks", "" if heard else f"{BACKLOG} calls behind; what came after is not told")

    def wait_told(self, timeout: float) -> bool:
        """Block until all that was told by now has been heard; False if it has not after timeout seconds."""
        until = time.monotonic() + timeout
        heard = [teller.wait(max(until - time.monotonic(), 0.0)) for teller in list(self._tellers.values())]
        return all(heard)

    def _teller(self, name: str) -> Teller:
        with self._lock:
            if name not in self._tellers:
                self._tellers[name] = Teller(name)
            return self._tellers[name]

    def adjust_oci_config(self, app: str, container: str, config: Json) -> Adjusted:
        """Apply the merge patch of each plugin in turn (RFC 7396).

        Raises UnfitHost for a plugin that is gone, fails, or returns what can't be used, unless it is optional.
        """
        what = f"configure '{app}/{container}'"
        for name, origin in self.expected.items():
            raise UnfitHost(f"{what}: plugin '{name}': {self._why_not(name) or _gone(name, origin)}")
        made = Adjusted(dict(config))
        for name, implementation in self._implementations("adjust_oci_config"):
            arguments = {"app": app, "container": container, "config": copy.deepcopy(made.config)}
            try:
                patch = self._consult(
                    name, "adjust_oci_config", implementation, arguments, partial(_no_patch, made.config)
                )
            except UnfitHost as error:
                if name not in self._optional:
                    raise UnfitHost(f"{what}: {error}") from error
                made = replace(made, warnings=(*made.warnings, str(error)))
                continue
            config = merge_patch(made.config, patch) if patch else made.config
            by = (*made.by, name) if patch else made.by
            made = replace(made, config=config, asked=(*made.asked, name), by=by)
        return made

    def would_adjust(self, app: str, container: str, config: Json) -> bool:
        """Whether every required patch can be had now; asked before something is stopped for want of one."""
        try:
            self._trials.call(partial(self.adjust_oci_config, app, container, config))
        except (UnfitHost, TryAgain):  # TryAgain: it does not answer
            return False
        return True

    def _why_not(self, name: str) -> str:
        """Why a plugin that is installed is not loaded, "" for one that is not installed."""
        return f"could not be loaded: {self._states[name].error}" if name in self._states else ""

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
        """Call one implementation: its result, or None if something is wrong with it."""
        with contextlib.suppress(UnfitHost):
            return self._consult(name, hook, implementation, arguments, wrong)
        return None

    def _consult(
        self,
        name: str,
        hook: str,
        implementation: pluggy.HookImpl,
        arguments: Mapping[str, Any],
        wrong: Callable[[Any], str],
    ) -> Any:
        """Call one implementation. Whatever it raises is recorded and becomes UnfitHost; so does a wrong result."""
        try:
            result = _plain_result(implementation, arguments)
            found = wrong(result)
        except BaseException as error:
            if is_interrupt(error):
                raise
            found = described(error)
            self._record(name, hook, found)
            raise UnfitHost(f"plugin '{name}': {hook}: {found}") from error
        self._record(name, hook, found)
        if found:
            raise UnfitHost(f"plugin '{name}': {hook}: {found}")
        return result

    def _record(self, name: str, what: str, error: str) -> None:
        """Note that a hook or a driver's verb is at fault, or with error "" that it is no longer."""
        if not error and what not in self._faults.get(name, ()):
            return
        with self._lock:
            faults = self._faults.setdefault(name, {})
            known = faults.pop(what, "")
            if error:
                faults[what] = error
        if error and error != known:
            self.noticed(name, f"{what}: {error}")

    def _with_faults(self, state: PluginState) -> PluginState:
        faults = [f"{what}: {error}" for what, error in self._faults.get(state.name, {}).items()]
        slow = [line for guard in self._guards.get(state.name, ()) for line in guard.slow()]
        if not faults and not slow:
            return state
        error = "; ".join([*filter(None, [state.error]), *faults, *slow])
        return replace(state, state="raised" if faults else "slow", error=error)

    def _load(self, entry_point: EntryPoint, host: Host) -> None:
        name = entry_point.name
        distribution = entry_point.dist
        state = PluginState(
            name, distribution.name if distribution else "", distribution.version if distribution else ""
        )
        if name in self._states:
            state = replace(state, name=f"{name} ({state.distribution or entry_point.value})")
            taken = (
                f"load plugin {name!r}: the name is taken by {self._states[name].distribution or 'another plugin'}"
            )
            self._states[state.name] = replace(state, state="failed", error=taken)
            return
        worker = Worker(f"load {name}", LOAD_DEADLINE)  # an import may do anything, and for any length of time
        try:
            module = worker.call(entry_point.load)
            _refuse_unknown(module)
            self._manager.register(module, name=name)
            self._manager.check_pending()
            state = replace(state, hooks=self._hooks_of(name))
            if _is_optional(module):
                self._optional.add(name)
            offered = worker.call(partial(self._offers, name, host))
        except BaseException as error:  # the edge at which a plugin's exceptions end
            if is_interrupt(error):
                raise
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._states[name] = replace(state, state="failed", error=described(error))
            return
        self._guards[name] = offered
        accepted, refused = self._accept(offered)
        self._states[name] = replace(
            state, state="refused" if refused else "ok", drivers=accepted, error="; ".join(refused)
        )

    def _hooks_of(self, name: str) -> tuple[str, ...]:
        """The hooks that a plugin implements, in call order. Raises WrongState for what can't be called alone."""
        found = []
        for hook in HOOKS:
            for plugin, implementation in self._implementations(hook):
                if plugin == name:
                    found.append(hook)
                    _refuse_unusual(hook, implementation)
        return tuple(found)

    def _offers(self, name: str, host: Host) -> list[Guarded]:
        """All that a plugin registers; nothing of it counts when one of its hooks raises."""
        found: list[tuple[DriverKind[Any], Any]] = []
        for hook, kinds in offers():
            for plugin, implementation in self._implementations(hook):
                if plugin == name:
                    arguments = {"register": _collector(kinds, found), "host": host}
                    _plain_result(implementation, arguments)
        return [guarded(driver, kind, partial(self._record, name), self._observer) for kind, driver in found]

    def _accept(self, offered: Iterable[Guarded]) -> tuple[tuple[str, ...], list[str]]:
        accepted, refused = [], []
        for driver in offered:
            known, kind = self._drivers[driver.kind], driver.kind.name
            if driver.name in known:
                refused.append(f"{kind} driver {driver.name!r}: refused, an earlier plugin offers one of that name")
            else:
                known[driver.name] = driver
                accepted.append(f"{kind} {driver.name}")
        return tuple(accepted), refused


def load_plugins(
    host: Host, *, entry_points: Iterable[EntryPoint] | None = None, disabled: Collection[str] = ()
) -> Plugins:
    """Load the plugins of this installation, holdfast's own first; never raises for a plugin's faults.

    entry_points: instead of the installed ones of group `holdfast`. disabled: names not to load.
    """
    found = installed_entry_points(group=GROUP) if entry_points is None else entry_points
    plugins = Plugins()
    for entry_point in sorted(found, key=_own_first) if entry_points is None else found:
        if entry_point.name not in disabled:
            plugins._load(entry_point, host)
    return plugins


def merge_patch(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396): tables merge, None deletes, all else replaces. Neither is changed."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("holdfast")
    manager.add_hookspecs(hookspecs)
    return manager


def _own_first(entry_point: EntryPoint) -> tuple[bool, str, str]:
    distribution = entry_point.dist.name if entry_point.dist else ""
    return distribution != "holdfast", distribution, entry_point.name


def _collector(kinds: tuple[DriverKind[Any], ...], found: list[tuple[DriverKind[Any], Any]]) -> Callable[..., None]:
    def register(*drivers: Any) -> None:
        if len(drivers) != len(kinds):
            names = ", ".join(kind.name for kind in kinds)
            raise TypeError(f"register() takes {len(kinds)} drivers ({names}), not {len(drivers)}")
        found.extend(zip(kinds, drivers, strict=True))

    return register


def _no_patch(config: Json, result: Any) -> str:
    """Why what adjust_oci_config returned can't be merged into a config.json, "" if it can."""
    if result is None:
        return ""
    if not isinstance(result, Mapping):
        return f"returned {type(result).__name__} (expected a table or None)"
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        return f"returned what is not JSON-able: {error}"
    adjusted = merge_patch(config, result)
    for path, form, fits in FORMS:
        found = _at(adjusted, path)
        if found != _at(config, path) and not fits(found):
            return f"makes {'.'.join(path)} {found!r} (expected {form})"
    for path in OURS:
        if _at(adjusted, path) != _at(config, path):
            return f"changes {'.'.join(path)}, by which the agent finds the container (leave it as it is)"
    return ""


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _table(value: Any) -> bool:
    return isinstance(value, Mapping)


#: What a patch may make of the keys that no container runs without (config.md of the OCI runtime spec).
FORMS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("process",), "a table", _table),
    (("process", "args"), "a list of texts that is not empty", lambda value: bool(value) and _texts(value)),
    (("process", "env"), "a list of texts", _texts),
    (("process", "cwd"), "an absolute path", lambda value: isinstance(value, str) and value.startswith("/")),
    (("root",), "a table", _table),
    (("mounts",), "a list of tables", _tables),
    (("hooks",), "a table", lambda value: value is None or _table(value)),
    (("annotations",), "a table", lambda value: value is None or _table(value)),
    (("linux",), "a table", _table),
    (("linux", "namespaces"), "a list of tables", _tables),
    (("linux", "resources"), "a table", lambda value: value is None or _table(value)),
)
OURS = (("linux", "cgroupsPath"), ("process", "terminal"), ("root", "path"))


def _is_optional(plugin: Any) -> bool:
    """Whether a container may run without a plugin's patch, as its ADJUST_OCI_CONFIG says (default "required")."""
    said = getattr(plugin, "ADJUST_OCI_CONFIG", "required")
    if said not in ("required", "optional"):
        raise WrongState(f'ADJUST_OCI_CONFIG is {said!r} (expected "required" or "optional")')
    return bool(said == "optional")


def _gone(name: str, origin: str) -> str:
    again = f"install {origin or 'it'} again, or 'holdfast plugin forget {name}'"
    return f"it adjusts every container, and is not installed any more ({again})"


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


def _plain_result(implementation: pluggy.HookImpl, arguments: Mapping[str, Any]) -> Any:
    result = implementation.function(*(arguments[name] for name in implementation.argnames))
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("returned a coroutine (hooks are plain blocking functions)")
    return result
