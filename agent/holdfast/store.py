"""What must survive a crash: one SQLite database (WAL) below the agent's root, and the same values in memory.

Every write goes to the database first and to memory second; reads never touch the disk. Commits are not synced one
by one (synchronous = NORMAL): after a power cut the database is consistent, and what it forgot of the last moments
is found again on the host, as any other crash's traces are.

    instances    the intent and the last known state of every container run
    receipts     what drivers made
    generations  the last few of every app; how far each has come (state) is a column of its own
    containers   what these generations ask of each container, once for all that ask the same
    holds        what people did by hand
    failures     what went wrong, how often, when to try again
    intents      actions under way: those found at start were cut short
    events       the log that `holdfast events` reads
    facts        single values (the firewall as it was last written, the revision in force)

A disk without room ends nothing: what can't be written is kept in memory and written later, in its order, so that
containers are stopped and removed all the same (`late`, `catch_up`). Whoever makes something asks `need_room` first.
A reserve beside the database is given up when something was ended and there is still no room to write that down.

Threads share one Store; a lock makes each verb atomic. `instances` is read without it: a dict that gains or loses a
key is a new one, so that whoever walks over the old one is not disturbed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter

from holdfast.database import PASSING, open_database
from holdfast.errors import UnfitHost
from holdfast.observed import (
    Failure,
    Generation,
    GenerationState,
    History,
    Hold,
    Instance,
    InstanceId,
    NewerImage,
    Receipt,
    Subject,
)
from holdfast.spec.model import Container

Event = dict[str, Any]

RESERVE = 4 << 20  # bytes
KEPT_GENERATIONS = 5
KEPT_EVENTS = 20_000
log = structlog.get_logger("holdfast")

_instance: TypeAdapter[Instance] = TypeAdapter(Instance)
_receipt: TypeAdapter[Receipt] = TypeAdapter(Receipt)
_generation: TypeAdapter[Generation] = TypeAdapter(Generation)
_hold: TypeAdapter[Hold] = TypeAdapter(Hold)
_failure: TypeAdapter[Failure] = TypeAdapter(Failure)


class Store:
    """The agent's memory. Raises UnfitHost if the database can't be opened, or is damaged, and NotPermitted.

    trouble: why the last write failed, "" when all is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._late: dict[tuple[object, ...], tuple[str, tuple[object, ...]]] = {}  # row → the statement to come
        self._lock = threading.RLock()
        self._listeners: list[Callable[[Event], None]] = []
        self._noted: set[InstanceId] = set()
        self._db = open_database(path)
        self.instances: dict[InstanceId, Instance] = {
            InstanceId(id): _instance.validate_json(value) for id, value in self._rows("id, value", "instances")
        }
        self._receipts: dict[str, dict[str, Receipt]] = {}  # kind → id → receipt
        self._owned: dict[str, dict[tuple[str, str], Receipt]] = {}
        for (value,) in self._rows("value", "receipts ORDER BY at"):
            self._remember(_receipt.validate_json(value))
        containers: dict[str, dict[str, Container]] = {}  # app → digest → container
        for app, digest, value in self._rows("app, digest, value", "containers"):
            containers.setdefault(app, {})[digest] = Container.model_validate_json(value)
        self._containers = {app: set(known) for app, known in containers.items()}  # what is written down
        self._generations: dict[str, tuple[Generation, ...]] = {}
        for app, value, state in self._rows("app, value, state", "generations ORDER BY app, number"):
            read = _generation_of(value, containers.get(app, {}))
            self._generations[app] = (*self._generations.get(app, ()), replace(read, state=state or read.state))
        self._holds = {key: _hold.validate_json(value) for key, value in self._rows("key, value", "holds")}
        self._failures = {
            Subject.parse(key): _failure.validate_json(value)
            for key, value in self._rows("subject, value", "failures")
        }
        self._facts = {name: json.loads(value) for name, value in self._rows("name, value", "facts")}
        self._newer = {key: NewerImage(**value) for key, value in (self._facts.get("newer") or {}).items()}
        self._history: History | None = None  # as of the last change
        self._share_wants()

    @property
    def used(self) -> bool:
        """Whether an agent has made anything by this memory, or has staged it."""
        return bool(self.instances or any(self._receipts.values()) or self._generations)

    def close(self) -> None:
        """Keep what was only noted and close the database; the Store is of no use afterwards."""
        with self._lock:
            for id in self._noted & self.instances.keys():
                self.put_instance(self.instances[id])
            if self._late and not self.catch_up():
                log.error("not recorded", store=str(self.path), changes=len(self._late), error=self.trouble)
            self._db.close()

    # -- a disk without room --

    @property
    def lacks(self) -> str:
        """What is wrong with the disk, in a line; "" when all is written down."""
        changes = f"{len(self._late)} change{'s' if len(self._late) != 1 else ''}"
        return f"use store '{self.path}': {self.trouble}: {changes} not written down yet" if self._late else ""

    @property
    def late(self) -> int:
        """How many changes are not on disk yet."""
        return len(self._late)

    def need_room(self) -> None:
        """Raise UnfitHost while something could not be written: what is made has to be on record before."""
        if not self.catch_up():
            raise UnfitHost(
                f"use store '{self.path}': {self.trouble} (free some space there; nothing new is made until then, "
                "stopping and removing go on)"
            )

    def catch_up(self, *, give_up: bool = False) -> bool:
        """Write what could not be written so far; False while that is not possible.

        give_up: whether the reserve may go for it. It is made again once there is room.
        """
        with self._lock:
            if self._late and not self._write_late() and give_up and self._drop_reserve():
                self._write_late()
            return not self._late

    def keep_reserve(self) -> None:
        """Have some room put by, where there is plenty of it."""
        place = self.path.with_name("reserve")
        try:
            room = os.statvfs(self.path.parent)
            if place.exists() or room.f_bavail * room.f_frsize < 4 * RESERVE:
                return
            file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, RESERVE)
            finally:
                os.close(file)
        except OSError as error:
            log.warning("no reserve", path=str(place), error=str(error))
            self._drop_reserve()

    def _drop_reserve(self) -> bool:
        try:
            self.path.with_name("reserve").unlink()
        except OSError:
            return False
        return True

    def _write_late(self) -> bool:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for statement, values in self._late.values():
                self._db.execute(statement, values)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._set_trouble(error)
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            return False
        self._late.clear()
        self.trouble = ""
        return True

    def _save(self, row: tuple[object, ...], statement: str, values: tuple[object, ...]) -> None:
        """Write one row, or keep it for later, after all that is late already."""
        self._history = None
        if not self._late:
            try:
                self._db.execute(statement, values)
            except sqlite3.Error as error:
                self._set_trouble(error)
            else:
                return
        self._late.pop(row, None)
        self._late[row] = (statement, values)

    def _set_trouble(self, error: sqlite3.Error) -> None:
        """Note why a write failed. Raises UnfitHost for what waiting does not mend."""
        if (getattr(error, "sqlite_errorcode", 0) & 0xFF) not in PASSING:
            raise UnfitHost(f"use store '{self.path}': {error}") from error
        self.trouble = str(error)

    # -- what decisions are made from --

    def history(self) -> History:
        """The past as a value: the same object until something of it changes."""
        with self._lock:
            if self._history is None:
                self._history = History(
                    dict(self._generations), dict(self._holds), dict(self._failures), dict(self._newer)
                )
            return self._history

    # -- instances and receipts --

    def put_instance(self, instance: Instance) -> None:
        """Keep an instance, new or changed."""
        with self._lock:
            self._put("instances", instance.id, _instance.dump_json(instance))
            if instance.id in self.instances:
                self.instances[instance.id] = instance
            else:
                self.instances = {**self.instances, instance.id: instance}

    def change_instance(self, id: InstanceId, **fields: Any) -> Instance:
        """Change some fields of an instance and return it; KeyError if it is gone."""
        with self._lock:
            changed = replace(self.instances[id], **fields)
            self.put_instance(changed)
            return changed

    def exchange_instance(self, known: Instance, changed: Instance) -> bool:
        """Put changed in the place of known; False, and nothing is done, if that is no longer what is kept."""
        with self._lock:
            if self.instances.get(known.id) != known:
                return False
            self.put_instance(changed)
            return True

    def note_names(self, id: InstanceId, digest: str) -> None:
        """Note what an instance's hosts file says, in memory until `close`: after a crash it is written once more."""
        with self._lock:
            if id in self.instances:
                self._noted.add(id)
                self.instances[id] = replace(self.instances[id], names=digest)

    def drop_instance(self, id: InstanceId) -> None:
        """Forget an instance: the last step of its removal."""
        with self._lock:
            self._drop("instances", "id", id)
            self.instances = {known: each for known, each in self.instances.items() if known != id}

    def put_receipt(self, receipt: Receipt) -> None:
        """Keep what a driver made."""
        with self._lock:
            if self.receipt(receipt.kind, receipt.id) == receipt:
                return
            self._save(
                ("receipts", receipt.kind, receipt.id),
                "INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?)",
                (receipt.kind, receipt.id, time.time_ns(), _receipt.dump_json(receipt)),
            )
            self._remember(receipt)

    def _remember(self, receipt: Receipt) -> None:
        self._receipts.setdefault(receipt.kind, {})[receipt.id] = receipt
        self._owned.setdefault(receipt.owner, {})[receipt.kind, receipt.id] = receipt

    def drop_receipt(self, receipt: Receipt) -> None:
        """Forget a receipt: only once the thing is gone."""
        with self._lock:
            row = (receipt.kind, receipt.id)
            self._save(("receipts", *row), "DELETE FROM receipts WHERE kind = ? AND id = ?", row)
            self._receipts.get(receipt.kind, {}).pop(receipt.id, None)
            owned = self._owned.get(receipt.owner, {})
            owned.pop((receipt.kind, receipt.id), None)
            if not owned:
                self._owned.pop(receipt.owner, None)

    def receipt(self, kind: str, id: str) -> Receipt | None:
        """The receipt of one thing."""
        return self._receipts.get(kind, {}).get(id)

    def receipts(self, kind: str) -> list[Receipt]:
        """Receipts of a kind."""
        with self._lock:
            return list(self._receipts.get(kind, {}).values())

    def owned(self, owner: str) -> list[Receipt]:
        """What belongs to an instance ("": to none), in the order in which it was made."""
        with self._lock:
            return list(self._owned.get(owner, {}).values())

    # -- generations --

    def put_generation(self, generation: Generation) -> None:
        """Keep a generation; of an app's older ones the last few stay, and always the one in force."""
        app = generation.app.name
        with self._lock:
            written = self._containers.setdefault(app, set())
            for container in generation.app.containers.values():
                if (digest := container.digest) not in written:
                    row = (app, digest)
                    text = container.model_dump_json().encode()
                    self._save(
                        ("containers", *row), "INSERT OR REPLACE INTO containers VALUES (?, ?, ?)", (*row, text)
                    )
                    written.add(digest)
            self._save(
                ("generations", app, generation.number),
                "INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?)",
                (app, generation.number, _generation_text(generation), generation.state),
            )
            known = {each.number: each for each in self._generations.get(app, ())}
            known[generation.number] = generation
            ordered = tuple(known[number] for number in sorted(known))
            self._generations[app] = self._pruned(app, ordered)

    def mark_generation(self, app: str, number: int, state: GenerationState) -> None:
        """Move a generation on: staged → active → good, never back."""
        order: tuple[GenerationState, ...] = ("staged", "active", "good")
        with self._lock:
            known = self._generations.get(app, ())
            for each in known:
                if each.number == number and order.index(each.state) < order.index(state):
                    self._save(  # a row of its own while it is late: that of the generation comes before it
                        ("generation states", app, number),
                        "UPDATE generations SET state = ? WHERE app = ? AND number = ?",
                        (state, app, number),
                    )
                    marked = tuple(replace(one, state=state) if one is each else one for one in known)
                    self._generations[app] = self._pruned(app, marked)

    def generation(self, app: str, number: int) -> Generation:
        """One generation; KeyError if it is not kept any more."""
        for each in self._generations.get(app, ()):
            if each.number == number:
                return each
        raise KeyError(f"{app} generation {number}")

    def images(self) -> list[tuple[str, str]]:
        """(APP/NAME, digest) of every container of a kept generation and of every instance.

        As the database has it: a command that began without an agent may end beside one that has staged meanwhile.
        """
        with self._lock:
            found = [
                (f"{app}/{name}", digest)
                for app, value in self._rows("app, value", "generations")
                for name, digest in json.loads(value)["images"].items()
            ]
            instances = [json.loads(value) for _, value in self._rows("id, value", "instances")]
            found += [(f"{each['app']}/{each['container']}", each["image"]) for each in instances]
            if self._late:  # what the database does not have yet
                found += [
                    (f"{app}/{name}", digest)
                    for app, known in self._generations.items()
                    for each in known
                    for name, digest in each.images.items()
                ]
                found += [(each.key, each.image) for each in self.instances.values()]
        return found

    def forget_app(self, app: str) -> None:
        """Drop everything that is kept of an app."""
        with self._lock:
            for key in [key for key in self._holds if key.startswith(f"{app}/")]:
                self.release(key)
            for subject in [each for each in self._failures if each.app == app]:
                self.clear_failure(subject)
            for key in [key for key in self._newer if key.startswith(f"{app}/")]:
                self.put_newer(key, None)
            self._drop("generations", "app", app)
            self._drop("containers", "app", app)
            self._generations.pop(app, None)
            self._containers.pop(app, None)

    def _pruned(self, app: str, known: tuple[Generation, ...]) -> tuple[Generation, ...]:
        in_force = next((each for each in reversed(known) if each.state != "staged"), None)
        old = known[:-KEPT_GENERATIONS]
        kept = tuple(each for each in old if each is in_force) + known[-KEPT_GENERATIONS:]
        for each in (each for each in old if each is not in_force):
            row = (app, each.number)
            self._save(("generations", *row), "DELETE FROM generations WHERE app = ? AND number = ?", row)
        if len(kept) < len(known):
            needed = {container.digest for each in kept for container in each.app.containers.values()}
            for digest in self._containers.get(app, set()) - needed:
                self._save(
                    ("containers", app, digest), "DELETE FROM containers WHERE app = ? AND digest = ?", (app, digest)
                )
                self._containers[app].discard(digest)
        return kept

    # -- holds, failures, intents, facts --

    def hold(self, key: str, hold: Hold) -> None:
        """Note what a person did to `app/container`."""
        with self._lock:
            self._put("holds", key, _hold.dump_json(hold))
            self._holds[key] = hold

    def release(self, key: str) -> bool:
        """End a hold; False if there was none."""
        with self._lock:
            self._drop("holds", "key", key)
            return self._holds.pop(key, None) is not None

    def put_failure(self, subject: Subject, failure: Failure) -> None:
        """Remember that an action on a subject failed."""
        with self._lock:
            self._put("failures", subject, _failure.dump_json(failure))
            self._failures[subject] = failure

    def failure(self, subject: Subject) -> Failure | None:
        """The failure that a subject is remembered by."""
        return self._failures.get(subject)

    def clear_failure(self, subject: Subject) -> None:
        """Forget it: the action went well, or what was tried is no longer wanted."""
        with self._lock:
            if subject in self._failures:
                self._drop("failures", "subject", subject)
                del self._failures[subject]

    def retry_now(self) -> None:
        """Let everything that failed be tried at once, also what waits for a change: the host may be another now."""
        with self._lock:
            for subject, failure in list(self._failures.items()):
                self.put_failure(subject, replace(failure, retry_at=0.0))

    def put_intent(self, subject: str, intent: Mapping[str, Any]) -> None:
        """Write down what is about to be done."""
        with self._lock:
            self._put("intents", subject, json.dumps(intent).encode())

    def drop_intent(self, subject: str) -> None:
        """It is done, or has failed and been undone."""
        with self._lock:
            self._drop("intents", "subject", subject)

    def intents(self) -> dict[Subject, Any]:
        """Subject → what was under way. Right after a start: what a crash cut short."""
        with self._lock:
            rows = self._rows("subject, value", "intents")
            return {Subject.parse(subject): json.loads(value) for subject, value in rows}

    def put_newer(self, key: str, newer: NewerImage | None) -> None:
        """Note what a registry has for `app/container` by now; None: nothing newer than what it runs."""
        with self._lock:
            changed = {name: each for name, each in self._newer.items() if name != key}
            if newer is not None:
                changed[key] = newer
            self.put_fact("newer", {name: asdict(each) for name, each in changed.items()})
            self._newer = changed

    def put_fact(self, name: str, value: Any) -> None:
        """Keep one JSON-able value by its name."""
        with self._lock:
            if self._facts.get(name) != value:
                self._put("facts", name, json.dumps(value).encode())
                self._facts[name] = value

    def fact(self, name: str) -> Any:
        """A kept value, None if there is none."""
        return self._facts.get(name)

    # -- events --

    def event(self, kind: str, subject: str, message: str, **more: Any) -> None:
        """Append to the log and tell the listeners. Nothing is held up by the log: what can't be kept is lost.

        Keys: seq, at, kind, subject, app, container, message, and what else is given. subject: `app`,
        `app/container`, `network app/name`, or a thing of the node's own.
        """
        about = Subject.parse(subject)
        value = {"at": time.time(), "kind": kind, "subject": subject, "message": message}
        value["app"] = about.app if about.name else ""
        value |= {"container": about.name if about.kind == "container" else "", **more}
        with self._lock:
            try:
                seq = self._append(json.dumps(value, default=str))
            except UnfitHost as error:
                log.error("event lost", kind=kind, subject=subject, message=message, error=str(error))
                return
            listeners = list(self._listeners)
        for listener in listeners:
            listener({"seq": seq, **value})

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with a seq above `after`, oldest first; the newest `limit` of them."""
        with self._lock:
            rows = self._execute(
                "SELECT seq, value FROM events WHERE seq > ? ORDER BY seq DESC LIMIT ?", (after, limit)
            ).fetchall()
        return [{"seq": seq, **json.loads(value)} for seq, value in reversed(rows)]

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have every later event told to a callable, in the thread that appends it."""
        self._listeners.append(listener)

    # -- the database --

    def _append(self, text: str) -> int:
        seq = self._execute("INSERT INTO events (value) VALUES (?)", (text,)).lastrowid or 0
        if seq % 1000 == 0:
            self._execute("DELETE FROM events WHERE seq <= ?", (seq - KEPT_EVENTS,))
        return seq

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise UnfitHost(f"use store '{self.path}': {error}") from error

    def _rows(self, columns: str, table: str) -> Iterable[tuple[Any, ...]]:
        return self._execute(f"SELECT {columns} FROM {table}").fetchall()

    def _put(self, table: str, key: str, value: bytes) -> None:
        self._save((table, key), f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (key, value))

    def _drop(self, table: str, column: str, key: str) -> None:
        self._save((table, key), f"DELETE FROM {table} WHERE {column} = ?", (key,))

    def _share_wants(self) -> None:
        """Let instances share the objects of their generations: equal values then compare by identity."""
        for id, instance in self.instances.items():
            for generation in self._generations.get(instance.app, ()):
                want = generation.app.containers.get(instance.container)
                if want == instance.want and want is not None:
                    self.instances[id] = replace(instance, want=want)


def _generation_text(generation: Generation) -> bytes:
    """A generation as JSON, with digests in the place of its containers: only what is new costs much."""
    value = _generation.dump_python(generation, mode="json", exclude={"app": {"containers"}})
    value["app"]["containers"] = {name: each.digest for name, each in generation.app.containers.items()}
    return json.dumps(value).encode()


def _generation_of(text: bytes, containers: Mapping[str, Container]) -> Generation:
    """The generation of a JSON text. Earlier versions wrote the containers themselves."""
    value = json.loads(text)
    written = value["app"]["containers"]
    value["app"]["containers"] = {
        name: containers[each] if isinstance(each, str) else each for name, each in written.items()
    }
    return _generation.validate_python(value)
