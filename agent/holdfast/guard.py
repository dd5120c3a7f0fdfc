"""Drivers as plugins offer them → drivers that keep to their contract, or say whose fault it is.

`plugins` puts a guard around every driver and policy, its own included: what a verb returns is looked at before
anybody relies on it, what it raises by mistake bears the driver's name and is recorded as the plugin's fault.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

from holdfast.drivers import (
    CgroupWant,
    EndpointWant,
    FirewallWant,
    MountWant,
    NetworkWant,
    RootfsWant,
    VolumeWant,
)
from holdfast.errors import HoldfastError, UnfitHost, WrongState
from holdfast.observed import Json, Receipt

DRIVER_VERBS = ("check", "ensure", "observe", "remove")
POLICY_VERBS = ("check", "settings")
#: What others read of a receipt's data, by the want that it answers (`drivers` says what it means).
READ: Mapping[type, tuple[str, ...]] = {
    RootfsWant: ("path",),
    VolumeWant: ("path",),
    MountWant: ("type", "source"),
    NetworkWant: ("interface", "subnet", "gateway"),
    EndpointWant: ("address", "interface", "host_interface"),
    FirewallWant: (),
}

T = TypeVar("T")
Fault = Callable[[str, str], None]  # (of what, error); an error of "" takes the fault back


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
    try:
        json.dumps(receipt.data)
    except (TypeError, ValueError) as error:
        return f"returned a receipt that is not JSON-able: {error}"
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

    __slots__ = ("_fault", "_faulty", "driver", "name", "title")

    def __init__(self, driver: Any, kind: str, fault: Fault) -> None:
        self.driver = driver
        self.name: str = driver.name
        self.title = f"cgroup policy {self.name!r}" if kind == "policy" else f"{kind} driver {self.name!r}"
        self._fault = fault
        self._faulty: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def _call(self, verb: str, work: Callable[[], T], wrong: Callable[[T], str]) -> T:
        """Do the work of a verb and return what it did, if nothing is wrong with that. Raises UnfitHost if it is."""
        try:
            result = work()
        except HoldfastError as error:
            if verb == "observe":  # has no want that could be at fault
                self._note(verb, str(error))
            raise
        except Exception as error:
            self._note(verb, f"{type(error).__name__}: {error}")
            error.add_note(f"{self.title}: {verb}")
            raise
        found = wrong(result)
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


class GuardedDriver(_Guard):
    """A driver of any kind (`drivers.Driver`). What it does beyond the four verbs is passed through."""

    __slots__ = ()

    def check(self, want: Any) -> None:
        self._call("check", lambda: self.driver.check(want), _not_plain)

    def ensure(self, want: Any) -> Receipt:
        receipt: Receipt = self._call(
            "ensure", lambda: self.driver.ensure(want), lambda made: breach(self.name, want, made)
        )
        return receipt

    def observe(self) -> list[Receipt]:
        """Read to the end, so that what a generator raises is raised here."""
        return self._call("observe", lambda: list(self.driver.observe()), self._strange)

    def remove(self, receipt: Receipt) -> None:
        self._call("remove", lambda: self.driver.remove(receipt), _not_plain)

    def _strange(self, found: list[Any]) -> str:
        for each in found:
            if not isinstance(each, Receipt):
                return f"yielded {type(each).__name__} (expected Receipts)"
            if each.driver != self.name:
                return f"yielded a receipt of driver {each.driver!r}"
        return ""


class GuardedPolicy(_Guard):
    """A cgroup policy (`drivers.CgroupPolicy`)."""

    __slots__ = ()

    def check(self, want: CgroupWant) -> None:
        self._call("check", lambda: self.driver.check(want), _not_plain)

    def settings(self, want: CgroupWant) -> Json:
        settings: Json = self._call("settings", lambda: self.driver.settings(want), _no_settings)
        return settings


def guarded(driver: Any, kind: str, fault: Fault) -> GuardedDriver | GuardedPolicy:
    """Put a guard around what a plugin offers. Raises WrongState for what lacks a name or a verb."""
    wrong = unsound(driver, POLICY_VERBS if kind == "policy" else DRIVER_VERBS)
    if wrong:
        raise WrongState(f"{kind} driver {getattr(driver, 'name', driver)!r}: {wrong}")
    return GuardedPolicy(driver, kind, fault) if kind == "policy" else GuardedDriver(driver, kind, fault)


def _not_plain(result: Any) -> str:
    return "returned a coroutine (verbs are plain blocking functions)" if inspect.iscoroutine(result) else ""


def _no_settings(made: Any) -> str:
    if not isinstance(made, Mapping):
        return f"returned {type(made).__name__} (expected a table)"
    if not isinstance(made.get("resources", {}), Mapping):
        return "returned resources that are no table (expected linux.resources of the OCI runtime spec)"
    unknown = made.keys() - {"resources", "oom_score_adj"}
    return f"returned {min(unknown)!r} (expected resources and oom_score_adj)" if unknown else ""
