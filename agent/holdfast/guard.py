"""Drivers as plugins offer them → drivers that keep to their contract, or say whose fault it is.

`plugins` puts a guard around every driver and policy, its own included. What a verb returns is checked before
anybody relies on it. What it raises by mistake, SystemExit included, carries the driver's name and is recorded as the
plugin's fault. `observe` gets a deadline, because every pass waits for it.
"""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NamedTuple, TypeVar

from holdfast.drivers import (
    CgroupWant,
    Driver,
    EndpointWant,
    FirewallWant,
    MountWant,
    NetworkWant,
    RootfsWant,
    VolumeWant,
)
from holdfast.errors import HoldfastError, UnfitHost, WrongState
from holdfast.observed import Finding, Json, Receipt
from holdfast.workers import Answer, NoAnswer, Worker, answer_of

DRIVER_VERBS = ("check", "ensure", "observe", "remove")
POLICY_VERBS = ("check", "settings")
OF_MOUNTS = ("release", "refresh")  # what drivers of mounts may have besides
UNASKED = ("observe", "findings", "watch")  # verbs without a want that could be at fault
#: What others read of a receipt's data, by the want that it answers (`drivers` says what it means).
READ: Mapping[type, tuple[str, ...]] = {
    RootfsWant: ("path",),
    VolumeWant: ("path",),
    MountWant: ("type", "source"),
    NetworkWant: ("interface", "subnet", "gateway"),
    EndpointWant: ("address", "interface", "host_interface"),
    FirewallWant: (),
}

#: The kinds whose drivers observe in every pass; what the others made is known by its receipts.
OBSERVED = ("rootfs", "volume", "network", "endpoint", "firewall")
OBSERVE_DEADLINE = 5.0  # seconds that a pass waits for `observe`
SLOW = 10.0  # seconds after which any other call is shown in `status`

T = TypeVar("T")
Fault = Callable[[str, str], None]  # (of what, error); an error of "" takes the fault back


def described(error: BaseException) -> str:
    """An exception in words, whatever its own __str__ does."""
    try:
        return str(error) if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


def unsound(offered: Any, verbs: Iterable[str]) -> str:
    """Why what a plugin offers is no driver (or policy), "" if it is one."""
    if not isinstance(getattr(offered, "name", None), str) or not offered.name:
        return 'has no name (expected name = "…")'
    for verb in verbs:
        method = getattr(offered, verb, None)
        if not callable(method):
            return f"has no verb {verb!r} (expected {', '.join(verbs)})"
        if inspect.iscoroutinefunction(method):
            return f"{verb} is async (verbs are plain blocking functions)"
    return ""


def breach(name: str, want: Any, receipt: Any) -> str:
    """How what `ensure(want)` of driver `name` returned breaks the contract, "" if it does not."""
    if not isinstance(receipt, Receipt):
        return f"returned {type(receipt).__name__} (expected a Receipt)"
    if (receipt.kind, receipt.driver) != (_kind(want), name):
        return f"returned a receipt of {receipt.kind} driver {receipt.driver!r} (expected {_kind(want)} {name!r})"
    asked = _asked(want)
    if asked is not None and (receipt.id, receipt.owner) != asked:
        return f"returned a receipt of {receipt.id!r}, owner {receipt.owner!r} (expected {asked[0]!r}, {asked[1]!r})"
    if wrong := _not_json(receipt.data):
        return f"returned a receipt that is not JSON-able: {wrong}"
    for key in READ.get(type(want), ()):
        if not isinstance(receipt.data.get(key), str):
            return f"returned a receipt whose data[{key!r}] is {receipt.data.get(key)!r} (expected text)"
    return _misread(want, receipt.data)


def _kind(want: Any) -> str:
    match want:
        case RootfsWant():
            return "rootfs"
        case NetworkWant():
            return "network"
        case EndpointWant():
            return "endpoint"
        case FirewallWant():
            return "firewall"
        case _:
            return "volume"


def _asked(want: Any) -> tuple[str, str] | None:
    """The id and owner of the receipt that answers a want."""
    match want:
        case RootfsWant(instance=instance):
            return instance, instance
        case VolumeWant(id=id) | NetworkWant(id=id):
            return id, ""
        case MountWant(instance=instance, mount=mount):
            return f"{instance}:{mount.target}", instance
        case EndpointWant(instance=instance, network=network):
            return f"{instance}/{network.id}", instance
        case _:
            return None


def _misread(want: Any, data: Json) -> str:
    """What others could not make sense of: addresses go into everybody's firewall, options into config.json."""
    match want:
        case NetworkWant() if data["subnet"]:
            return _unlike(IPv4Network, "subnet", data["subnet"])
        case EndpointWant() if data["address"]:
            return _unlike(IPv4Address, "address", data["address"])
        case MountWant() if not isinstance(data.get("options"), list | tuple):
            return f"returned a receipt whose data['options'] is {data.get('options')!r} (expected a list)"
        case _:
            return ""


def _unlike(form: Callable[[str], object], key: str, text: str) -> str:
    try:
        form(text)
    except ValueError as error:
        return f"returned a receipt whose data[{key!r}] is no {key}: {error}"
    return ""


class _Guard:
    """Calls verbs. fault: told of each verb that fails by mistake, and again once it works."""

    __slots__ = ("_fault", "_faulty", "_running", "driver", "name", "title")

    def __init__(self, driver: Any, kind: str, fault: Fault) -> None:
        self.driver = driver
        self.name: str = driver.name
        self.title = f"cgroup policy {self.name!r}" if kind == "policy" else f"{kind} driver {self.name!r}"
        self._fault = fault
        self._faulty: set[str] = set()
        self._running: dict[int, tuple[str, float]] = {}  # thread → verb, time.time() of its beginning

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def slow(self) -> list[str]:
        """The calls that have been running for more than SLOW seconds, in words."""
        now = time.time()
        return [
            f"{self.title}: {verb}: has been running since {time.strftime('%H:%M:%S', time.localtime(since))}"
            for verb, since in list(self._running.values())
            if now - since > SLOW
        ]

    def _call(self, verb: str, work: Callable[[], T], wrong: Callable[[T], str]) -> T:
        """Do the work of a verb and return what it did, if nothing is wrong with that. Raises UnfitHost if it is."""
        thread = threading.get_ident()
        self._running[thread] = verb, time.time()
        try:
            result = work()
            found = wrong(result)
        except HoldfastError as error:
            if verb in UNASKED:
                self._note(verb, described(error))
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            self._note(verb, described(error))
            if not isinstance(error, Exception):  # SystemExit, CancelledError, …: no lane expects these
                raise UnfitHost(f"{self.title}: {verb}: raised {described(error)}") from error
            error.add_note(f"{self.title}: {verb}")
            raise
        finally:
            self._running.pop(thread, None)
        if found:
            if inspect.iscoroutine(result):
                result.close()
            self._note(verb, found)
            raise UnfitHost(f"{self.title}: {verb}: {found}")
        if verb in self._faulty:
            self._faulty.discard(verb)
            self._fault(f"{self.title}: {verb}", "")
        return result

    def _note(self, verb: str, error: str) -> None:
        self._faulty.add(verb)
        self._fault(f"{self.title}: {verb}", error)


def is_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl-C, which Python raises in the main thread only, and not a plugin's doing."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class Look(NamedTuple):
    """What a driver answers in a pass. Each raises what the driver raised, or NoAnswer."""

    receipts: Answer[list[Receipt]]
    findings: Answer[list[Finding]]


class GuardedDriver(_Guard):
    """A driver of any kind (`drivers.Driver`), with what it does beyond the four verbs.

    observer: calls what passes wait for. last: what `observe` returned when it last returned. tells: whether it has
    findings. is_asked: whether passes ask it at all.
    """

    __slots__ = ("_observed", "_observer", "_receipts", "is_asked", "last", "tells")

    def __init__(self, driver: Any, kind: str, fault: Fault, observer: Worker) -> None:
        super().__init__(driver, kind, fault)
        self.tells = hasattr(driver, "findings")
        self._observed = kind in OBSERVED
        self.is_asked = self.tells or self._observed
        self._receipts = "volume" if kind == "mount" else kind
        self._observer = observer
        self.last: list[Receipt] = []

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name not in OF_MOUNTS:
            return found
        return lambda *arguments: self._call(name, lambda: found(*arguments), _not_plain)

    def check(self, want: Any) -> None:
        self._call("check", lambda: self.driver.check(want), _not_plain)

    def ensure(self, want: Any) -> Receipt:
        receipt: Receipt = self._call(
            "ensure", lambda: self.driver.ensure(want), lambda made: breach(self.name, want, made)
        )
        return receipt

    def observe(self, seen: Answer[list[Receipt]] | None = None) -> list[Receipt]:
        """What the driver observes. Raises NoAnswer after the deadline. seen: what a look has got already."""
        self.last = self._call("observe", (seen or self._ask(self._read)).get, self._strange)
        return self.last

    def look(self) -> Look:
        """For the observer: all that a pass asks of the driver, to the end, so that generators raise here."""
        return Look(answer_of(self._read) if self._observed else Answer([]), answer_of(self._listen))

    def remove(self, receipt: Receipt) -> None:
        self._call("remove", lambda: self.driver.remove(receipt), _not_plain)

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Have the driver look after what it made, if it can (`drivers.Watching`); returns what ends that.

        Both raise NoAnswer after the deadline.
        """
        if not hasattr(self.driver, "watch"):
            return lambda: None
        end: Callable[[], object] = self._call(
            "watch",
            lambda: self._ask(lambda: self.driver.watch(tell)).get(),
            lambda end: "" if callable(end) else "returned nothing to call",
        )

        def close() -> None:
            self._call("watch", lambda: self._ask(end).get(), lambda ended: "")

        return close

    def findings(self, told: Answer[list[Finding]] | None = None) -> list[Finding]:
        """What the driver has to tell of the host (`drivers.Telling`). Raises NoAnswer after the deadline."""
        return self._call("findings", (told or self._ask(self._listen)).get, _no_findings)

    def _read(self) -> list[Receipt]:
        return list(self.driver.observe())

    def _listen(self) -> list[Finding]:
        return list(self.driver.findings()) if self.tells else []

    def _ask(self, work: Callable[[], T]) -> Answer[T]:
        return self._observer.call_all({self.title: work})[self.title]

    def _strange(self, found: list[Any]) -> str:
        for each in found:
            if not isinstance(each, Receipt):
                return f"yielded {type(each).__name__} (expected Receipts)"
            if (each.kind, each.driver) != (self._receipts, self.name):
                return f"yielded a receipt of {each.kind} driver {each.driver!r}"
            if not all(isinstance(text, str) for text in (each.id, each.owner, each.root)):
                return f"yielded a receipt of {each.id!r}, owner {each.owner!r}, root {each.root!r} (expected texts)"
            if not isinstance(each.data, Mapping):
                return f"yielded a receipt whose data is {type(each.data).__name__} (expected a table)"
            if self._receipts == "volume" and (wrong := _not_json(each.data)):  # that of others is not read
                return f"yielded a receipt that is not JSON-able: {wrong}"
        return ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a driver observes; heard: now. What it observed when it could last say is to be used with care."""

    receipts: list[Receipt]
    heard: bool = True


@dataclass(frozen=True, slots=True)
class Observation:
    """What drivers observe, by kind and name, and what they have to tell."""

    seen: Mapping[str, Mapping[str, Seen]]
    findings: tuple[Finding, ...] = ()


class GuardedPolicy(_Guard):
    """A cgroup policy (`drivers.CgroupPolicy`)."""

    __slots__ = ()

    def check(self, want: CgroupWant) -> None:
        self._call("check", lambda: self.driver.check(want), _not_plain)

    def settings(self, want: CgroupWant) -> Json:
        settings: Json = self._call("settings", lambda: self.driver.settings(want), _no_settings)
        return settings


def guarded(driver: Any, kind: str, fault: Fault, observer: Worker) -> GuardedDriver | GuardedPolicy:
    """Put a guard around what a plugin offers. Raises WrongState for what lacks a name or a verb."""
    wrong = unsound(driver, POLICY_VERBS if kind == "policy" else DRIVER_VERBS)
    if wrong:
        raise WrongState(f"{kind} driver {getattr(driver, 'name', driver)!r}: {wrong}")
    return GuardedPolicy(driver, kind, fault) if kind == "policy" else GuardedDriver(driver, kind, fault, observer)


def found_by(driver: Driver[Any]) -> list[Receipt] | None:
    """What a driver observes; None when it can't say, which is recorded as its plugin's fault."""
    try:
        return list(driver.observe())
    except Exception:
        return None


def observe_all(observer: Worker, drivers: Iterable[tuple[str, Mapping[str, Any]]]) -> Observation:
    """Have all drivers (kind, and by name) observe and tell, in one thread.

    Handing over to it costs more than most of them do.
    """
    everyone = [(kind, name, each) for kind, named in drivers for name, each in named.items()]
    asked = {each.title: each.look for _, _, each in everyone if isinstance(each, GuardedDriver) and each.is_asked}
    looks = {title: _looked(answer) for title, answer in observer.call_all(asked).items()}
    seen: dict[str, dict[str, Seen]] = {kind: {} for kind in OBSERVED}
    told: list[Finding] = []
    for kind, name, driver in everyone:
        look = looks.get(driver.title) if isinstance(driver, GuardedDriver) else None
        if kind in seen:
            seen[kind][name] = _seen(driver, look)
        if look and driver.tells:
            with suppress(Exception):  # recorded as the plugin's fault, here as in `_seen`
                told.extend(driver.findings(look.findings))
    order = sorted(dict.fromkeys(told), key=lambda each: (not each.breaks, each.subject, each.text))
    return Observation(seen, tuple(order))


def _looked(answer: Answer[Look]) -> Look:
    try:
        return answer.get()
    except NoAnswer as error:
        return Look(Answer(error=error), Answer(error=error))


def _seen(driver: Any, look: Look | None) -> Seen:
    try:
        return Seen(driver.observe(look.receipts) if look else list(driver.observe()))
    except Exception:
        return Seen(driver.last if look else [], heard=False)


def _not_plain(result: Any) -> str:
    return "returned a coroutine (verbs are plain blocking functions)" if inspect.iscoroutine(result) else ""


def _no_findings(found: list[Any]) -> str:
    for each in found:
        if not isinstance(each, Finding):
            return f"yielded {type(each).__name__} (expected Findings)"
        texts = all(isinstance(text, str) for text in (each.subject, each.text, each.remedy))
        if not texts or not isinstance(each.breaks, bool):
            return f"yielded a Finding of wrong types: {each!r:.200} (expected texts, and whether it breaks)"
    return ""


def _no_settings(made: Any) -> str:
    if not isinstance(made, Mapping):
        return f"returned {type(made).__name__} (expected a table)"
    if not isinstance(made.get("resources", {}), Mapping):
        return "returned resources that are no table (expected linux.resources of the OCI runtime spec)"
    unknown = made.keys() - {"resources", "oom_score_adj"}
    if unknown:
        return f"returned {min(unknown)!r} (expected resources and oom_score_adj)"
    wrong = _not_json(made)
    return f"returned what is not JSON-able: {wrong}" if wrong else ""


def _not_json(value: Any) -> str:
    """Why a value can't be written as JSON, "" if it can."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
