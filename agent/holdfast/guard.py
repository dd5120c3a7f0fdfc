"""Drivers as plugins offer them → drivers that keep to their contract, or say whose fault it is.

`plugins` puts a guard around every driver and policy, the built-in ones included. What a verb returns is checked
before anybody relies on it. What it raises by mistake, SystemExit included, carries the driver's name and is recorded
as the plugin's fault. `observe` gets a deadline, because every pass waits for it.
"""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from holdfast.drivers import Driver
from holdfast.errors import HoldfastError, UnfitHost, WrongState
from holdfast.kinds import KINDS, DriverKind, kind_of_want
from holdfast.observed import Finding, Receipt
from holdfast.tables import WrongOptions, read_options
from holdfast.workers import NoAnswer, Worker, answer_of, failed

UNASKED = ("observe", "findings", "watch", "migrate")  # verbs without a want that could be at fault
OBSERVE_DEADLINE = 5.0  # seconds that a pass waits for `observe`
SLOW = 10.0  # seconds after which any other call is shown in `status`

T = TypeVar("T")
Fault = Callable[[str, str], None]  # (of what, error); an error of "" takes the fault back


def described(error: BaseException) -> str:
    """Put an exception into words, whatever its own __str__ does."""
    try:
        words = str(error)
        return words if words and isinstance(error, HoldfastError) else f"{type(error).__name__}: {words}"
    except BaseException:
        return type(error).__name__


def unsound(offered: Any, kind: DriverKind[Any]) -> str:
    """Say why what a plugin offers is no driver (or policy), "" if it is one."""
    if not isinstance(getattr(offered, "name", None), str) or not offered.name:
        return 'has no name (expected name = "…")'
    version = getattr(offered, "receipt_version", 1)
    if type(version) is not int or version < 1:
        return f"receipt_version is {version!r} (expected a whole number from 1)"
    options = getattr(offered, "options", None)
    if options is not None and not (isinstance(options, type) and issubclass(options, BaseModel)):
        return f"options is {options!r} (expected a class derived from holdfast.keys.Table)"
    verbs = (*kind.verbs, "migrate") if version > 1 else kind.verbs
    for verb in verbs:
        method = getattr(offered, verb, None)
        if not callable(method):
            return f"has no verb {verb!r} (expected {', '.join(verbs)})"
        if inspect.iscoroutinefunction(method):
            return f"{verb} is async (verbs are plain blocking functions)"
    return ""


def breach(name: str, want: Any, receipt: Any) -> str:
    """Say how what `ensure(want)` of driver `name` returned breaks the contract, "" if it does not."""
    kind = kind_of_want(want)
    return _unfit(kind, name, receipt, kind.subject(want))


def _unfit(kind: DriverKind[Any], name: str, receipt: Any, subject: tuple[str, str] | None) -> str:
    """Say what is wrong with a receipt of a driver. subject: the id and owner that it must have."""
    if not isinstance(receipt, Receipt):
        return f"returned {type(receipt).__name__} (expected a Receipt)"
    if (receipt.kind, receipt.driver) != (kind.receipt, name):
        return f"returned a receipt of {receipt.kind} driver {receipt.driver!r} (expected {kind.receipt} {name!r})"
    if subject is not None and subject != (receipt.id, receipt.owner):
        id, owner = subject
        return f"returned a receipt of {receipt.id!r}, owner {receipt.owner!r} (expected {id!r}, {owner!r})"
    if wrong := _not_json(receipt.data):
        return f"returned a receipt that is not JSON-able: {wrong}"
    for key in kind.required:
        if not isinstance(receipt.data.get(key), str):
            return f"returned a receipt whose data[{key!r}] is {receipt.data.get(key)!r} (expected text)"
    wrong = kind.misfit(receipt.data)
    return f"returned a receipt whose {wrong}" if wrong else ""


def is_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl-C, which Python raises in the main thread only, and not a plugin's doing."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class Look(NamedTuple):
    """What a driver answers in a pass. Each raises what the driver raised, or NoAnswer."""

    receipts: Future[list[Receipt]]
    findings: Future[list[Finding]]


class Guarded:
    """Calls the verbs of a driver or policy and checks what they return.

    fault: told of each verb that fails by mistake, and again once it works. observer: calls what passes wait for.
    last: what `observe` returned when it last returned. tells: whether it has findings.
    """

    def __init__(self, driver: Any, kind: DriverKind[Any], fault: Fault, observer: Worker) -> None:
        self.driver = driver
        self.kind = kind
        self.name: str = driver.name
        self.title = kind.title(self.name)
        self.options: type[BaseModel] | None = getattr(driver, "options", None)
        self.receipt_version: int = getattr(driver, "receipt_version", 1)
        self.tells = hasattr(driver, "findings")
        self.last: list[Receipt] = []
        self._fault = fault
        self._observer = observer
        self._faulty: set[str] = set()
        self._running: dict[int, tuple[str, float]] = {}  # thread → verb, time.time() of its beginning

    def __getattr__(self, name: str) -> Any:
        """Return a verb that a kind may have or leave out, guarded, or any other attribute as it is."""
        found = getattr(self.driver, name)
        if name not in self.kind.optional:
            return found
        return lambda *arguments: self._call(name, lambda: found(*arguments))

    def check(self, want: Any) -> None:
        self._check_options(want)
        self._call("check", lambda: self.driver.check(want))

    def ensure(self, want: Any) -> Receipt:
        self._check_options(want)
        receipt: Receipt = self._call(
            "ensure", lambda: self.driver.ensure(want), lambda made: breach(self.name, want, made)
        )
        return receipt if self.receipt_version == 1 else replace(receipt, version=self.receipt_version)

    def migrate(self, receipt: Receipt) -> Receipt:
        """Bring a stored receipt of an older version to today's; what the core keeps in its data stays."""
        kept = {key: value for key, value in receipt.data.items() if key in self.kind.kept}
        plain = replace(receipt, data={key: value for key, value in receipt.data.items() if key not in kept})
        migrated: Receipt = self._call(
            "migrate",
            lambda: self.driver.migrate(plain),
            lambda made: _unfit(self.kind, self.name, made, (receipt.id, receipt.owner)),
        )
        return replace(migrated, data={**migrated.data, **kept}, version=self.receipt_version)

    def settings(self, want: Any) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self._call("settings", lambda: self.driver.settings(want), _no_settings)
        return settings

    def remove(self, receipt: Receipt) -> None:
        self._call("remove", lambda: self.driver.remove(receipt))

    def observe(self, seen: Future[list[Receipt]] | None = None) -> list[Receipt]:
        """Return what the driver observes. Raises NoAnswer after the deadline. seen: what a look has got already."""
        self.last = self._call("observe", (seen or self._ask(self._read)).result, self._strange)
        return self.last

    def findings(self, told: Future[list[Finding]] | None = None) -> list[Finding]:
        """Return what the driver has to tell of the host (`drivers.Telling`). Raises NoAnswer after the deadline."""
        return self._call("findings", (told or self._ask(self._listen)).result, _no_findings)

    def look(self) -> Look:
        """Ask all that a pass asks of the driver, for the observer: to the end, so that generators raise here."""
        return Look(answer_of(self._read), answer_of(self._listen))

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Have the driver look after what it made, if it can (`drivers.Watching`); return what ends that.

        Both raise NoAnswer after the deadline.
        """
        if not hasattr(self.driver, "watch"):
            return lambda: None
        end: Callable[[], None] = self._call(
            "watch",
            self._ask(lambda: self.driver.watch(tell)).result,
            lambda end: "" if callable(end) else "returned nothing to call",
        )
        return lambda: self._call("watch", self._ask(end).result)

    def slow(self) -> list[str]:
        """Name the calls that have been running for more than SLOW seconds."""
        now = time.time()
        return [
            f"{self.title}: {verb}: has been running since {time.strftime('%H:%M:%S', time.localtime(since))}"
            for verb, since in list(self._running.values())
            if now - since > SLOW
        ]

    def _check_options(self, want: Any) -> None:
        """Raise WrongState for options that the driver's model refuses: an older version may have taken them."""
        if self.options is not None and self.kind.driver_opts is not None:
            title, driver_opts = self.kind.driver_opts(want)
            try:
                read_options(self.options, driver_opts)
            except WrongOptions as error:
                raise WrongState(f"{title}: {error}") from error

    def _read(self) -> list[Receipt]:
        return list(self.driver.observe()) if self.kind.observed else []

    def _listen(self) -> list[Finding]:
        return list(self.driver.findings()) if self.tells else []

    def _ask(self, work: Callable[[], T]) -> Future[T]:
        return self._observer.call_all({self.title: work})[self.title]

    def _call(self, verb: str, work: Callable[[], T], wrong: Callable[[T], str] = lambda result: "") -> T:
        """Do the work of a verb and return what it did, if nothing is wrong with that. Raises UnfitHost if it is."""
        thread = threading.get_ident()
        self._running[thread] = verb, time.time()
        try:
            result = work()
            found = _not_plain(result) or wrong(result)
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
        self._note(verb, found)
        if found:
            raise UnfitHost(f"{self.title}: {verb}: {found}")
        return result

    def _note(self, verb: str, error: str) -> None:
        """Tell of a verb's fault, or with "" that it has none any more."""
        if error or verb in self._faulty:
            (self._faulty.add if error else self._faulty.discard)(verb)
            self._fault(f"{self.title}: {verb}", error)

    def _strange(self, found: list[Any]) -> str:
        known = {id(each) for each in self.last}
        for each in (each for each in found if id(each) not in known):
            if not isinstance(each, Receipt):
                return f"yielded {type(each).__name__} (expected Receipts)"
            if (each.kind, each.driver) != (self.kind.receipt, self.name):
                return f"yielded a receipt of {each.kind} driver {each.driver!r}"
            if not all(isinstance(text, str) for text in (each.id, each.owner, each.root)):
                return f"yielded a receipt of {each.id!r}, owner {each.owner!r}, root {each.root!r} (expected texts)"
            if not isinstance(each.data, Mapping):
                return f"yielded a receipt whose data is {type(each.data).__name__} (expected a table)"
            if self.kind.receipt == "volume" and (wrong := _not_json(each.data)):  # that of others is not read
                return f"yielded a receipt that is not JSON-able: {wrong}"
        return ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a driver observes; heard: now. What it observed when it could last say is to be used with care."""

    receipts: list[Receipt]
    heard: bool = True


@dataclass(frozen=True, slots=True)
class Observation:
    """What drivers observe, by kind of receipt and name of driver, and what they have to tell."""

    seen: Mapping[str, Mapping[str, Seen]]
    findings: tuple[Finding, ...] = ()


def guarded(driver: Any, kind: DriverKind[Any], fault: Fault, observer: Worker) -> Guarded:
    """Put a guard around what a plugin offers. Raises WrongState for what lacks a name or a verb."""
    if wrong := unsound(driver, kind):
        raise WrongState(f"{kind.name} driver {getattr(driver, 'name', driver)!r}: {wrong}")
    return Guarded(driver, kind, fault, observer)


def found_by(driver: Driver[Any]) -> list[Receipt] | None:
    """Return what a driver observes; None when it can't say, which is recorded as its plugin's fault."""
    with suppress(Exception):
        return list(driver.observe())
    return None


def observe_all(observer: Worker, drivers: Iterable[Guarded]) -> Observation:
    """Have all drivers observe and tell, in one thread: handing over to it costs more than most of them do."""
    asked = {each.title: each for each in drivers if each.tells or each.kind.observed}
    answers = observer.call_all({title: each.look for title, each in asked.items()})
    seen: dict[str, dict[str, Seen]] = {str(kind.receipt): {} for kind in KINDS if kind.observed}
    told: list[Finding] = []
    for title, driver in asked.items():
        try:
            look = answers[title].result()
        except NoAnswer as error:
            look = Look(failed(error), failed(error))
        if driver.kind.observed:
            try:
                found = Seen(driver.observe(look.receipts))
            except Exception:
                found = Seen(driver.last, heard=False)
            seen[str(driver.kind.receipt)][driver.name] = found
        with suppress(Exception):  # recorded as the plugin's fault, here as above
            told.extend(driver.findings(look.findings))
    order = sorted(dict.fromkeys(told), key=lambda each: (not each.breaks, each.subject, each.text))
    return Observation(seen, tuple(order))


def _not_plain(result: Any) -> str:
    if not inspect.iscoroutine(result):
        return ""
    result.close()
    return "returned a coroutine (verbs are plain blocking functions)"


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
