"""The layers of one image, side by side: each is fetched by one puller at most, whoever else wants it as well.

`pull` says which are missing. A layer's content goes from skopeo's pipe straight to the store's worker.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast.errors import HoldfastError, Stopping, TryAgain, UnfitHost, WrongState
from holdfast.grammar.images import Reference
from holdfast.images.formats.manifests import Descriptor
from holdfast.images.incoming.transfers import Transfer
from holdfast.images.kept.store import ImageStore
from holdfast.images.registry.faults import REFUSED, UNFIT, SkopeoError, failure
from holdfast.images.registry.proxy import Proxy
from holdfast.images.registry.skopeo import Skopeo
from holdfast.images.unpacking.unpack import Expected

PAUSES = (0.2, 1.0)  # seconds before a layer is tried again after a passing fault


@dataclass(frozen=True, slots=True)
class Job:
    """A layer that is missing here: what it is plain, and how the registry has it."""

    diff_id: str
    blob: Descriptor


@dataclass(slots=True)
class _Flight:
    """A layer on its way, and who wants to know how far it has come."""

    landed: threading.Event = field(default_factory=threading.Event)
    watchers: list[Callable[[int], None]] = field(default_factory=list)

    def progress(self, done: int) -> None:
        for watcher in list(self.watchers):
            watcher(done)


class Flights:
    """What all pulls of one puller share: the layers under way, and each registry's turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._hosts: dict[str, threading.Semaphore] = {}

    def turn_to(self, turns: int) -> None:
        """Let so many layers come from one registry at once from now on; those under way count no more."""
        with self._lock:
            if turns != self.turns:
                self.turns = turns
                self._hosts.clear()

    def join(self, diff_id: str, watcher: Callable[[int], None]) -> tuple[_Flight, bool]:
        """The flight of a layer, and whether the caller is the one to fetch it."""
        with self._lock:
            mine = diff_id not in self._flights
            flight = self._flights.setdefault(diff_id, _Flight())
            flight.watchers.append(watcher)
            return flight, mine

    def land(self, diff_id: str) -> None:
        """The layer is here, or was given up."""
        with self._lock:
            self._flights.pop(diff_id).landed.set()

    def host(self, name: str) -> threading.Semaphore:
        """As many may hold it as may fetch from a registry at once."""
        with self._lock:
            return self._hosts.setdefault(name, threading.Semaphore(self.turns))

    def close(self) -> None:
        self.closed.set()
        with self._lock:
            for flight in self._flights.values():
                flight.landed.set()


class Fetch:
    """The fetching of one image's layers.

    source: NAME@DIGEST of its manifest, set before anything is fetched. as_written: the reference for messages.
    moved: called after any progress.
    """

    source: str

    def __init__(
        self,
        store: ImageStore,
        skopeo: Skopeo,
        flights: Flights,
        reference: Reference,
        as_written: str,
        transfer: Transfer,
        moved: Callable[[], None],
    ) -> None:
        self._store, self._skopeo, self._flights = store, skopeo, flights
        self._reference, self._as_written = reference, as_written
        self._transfer, self._moved = transfer, moved
        self._idle: list[Proxy] = []
        self._lock = threading.Lock()
        self._errors: list[Exception] = []

    def small(self, blob: Descriptor) -> bytes:
        """A blob that is no layer, verified. Raises HoldfastError."""
        proxy = None
        try:
            proxy = self._proxy()
            data = proxy.read(blob.digest, blob.size)
        except BaseException as error:
            if proxy:
                self._skopeo.end(proxy)
            if isinstance(error, SkopeoError):
                raise self._skopeo.explain(error, self._reference, self._as_written) from error
            raise
        self._put_back(proxy)
        return data

    def warm_up(self) -> None:
        """Start skopeo before it is known what is to be asked of it."""
        self._put_back(self._skopeo.proxy(self._reference))

    def layers(self, jobs: Sequence[Job]) -> None:
        """Have every layer in the store. Raises the first error when those under way are done."""
        todo = deque(sorted(jobs, key=lambda job: -job.blob.size))
        elsewhere: list[tuple[Job, _Flight]] = []

        def work() -> None:
            while not self._errors and (job := self._next(todo)):
                try:
                    if flight := self._attempt(job):
                        elsewhere.append((job, flight))
                except Exception as error:
                    self._errors.append(error)

        threads = [
            threading.Thread(target=work, name=f"pull-{number}", daemon=True)
            for number in range(1, min(self._flights.turns, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        for job, flight in elsewhere:
            self._await(job, flight)
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        for proxy in idle:
            self._skopeo.end(proxy)

    def _next(self, todo: deque[Job]) -> Job | None:
        with self._lock:
            return todo.popleft() if todo else None

    def _attempt(self, job: Job) -> _Flight | None:
        """Fetch a layer; where somebody else is doing that, return it as it is."""
        digest = job.blob.digest

        def watch(done: int) -> None:
            self._transfer.advance(digest, done)
            self._moved()

        flight, mine = self._flights.join(job.diff_id, watch)
        if not mine:
            self._transfer.begin(digest)
            return flight
        try:
            with self._flights.host(self._reference.host):
                self._transfer.begin(digest)
                self._persist(job, flight)
        finally:
            self._flights.land(job.diff_id)
        self._transfer.finish(digest)
        self._moved()
        return None

    def _await(self, job: Job, flight: _Flight | None) -> None:
        """Wait for a layer that somebody else fetches; do it here if that fails."""
        while flight and not self._errors:
            flight.landed.wait()
            if self._flights.closed.is_set():
                self._errors.append(Stopping(f"pull {self._as_written!r}: the agent is stopping"))
            elif self._store.has_layer(job.diff_id):
                self._transfer.finish(job.blob.digest)
                return
            else:
                try:
                    flight = self._attempt(job)
                except Exception as error:
                    self._errors.append(error)

    def _persist(self, job: Job, flight: _Flight) -> None:
        """Fetch a layer, and again after faults that may pass at once."""
        for pause in (*PAUSES, None):
            if self._store.has_layer(job.diff_id):
                return
            try:
                self._fetch(job, flight)
                return
            except TryAgain as error:
                if pause is None or error.wait or self._flights.closed.wait(pause):
                    raise
                self._transfer.begin(job.blob.digest)

    def _fetch(self, job: Job, flight: _Flight) -> None:
        blob = job.blob
        expected = Expected(job.diff_id, blob.digest, blob.size)
        proxy = None
        try:
            proxy = self._proxy()
            with proxy.blob(blob.digest, blob.size) as pipe:
                self._store.add_layer(pipe, expected, flight.progress, stall=self._skopeo.settings.stall_timeout)
        except BaseException as error:
            if proxy:
                self._skopeo.end(proxy)
            if isinstance(error, SkopeoError):
                if self._store.has_layer(job.diff_id):  # another process was faster, and so nobody read the rest
                    return
                raise self._skopeo.explain(error, self._reference, self._as_written) from error
            if isinstance(error, HoldfastError):
                raise self._blame(error) from error
            raise
        self._put_back(proxy)

    def _blame(self, error: HoldfastError) -> HoldfastError:
        """The store's error as one of this pull."""
        if self._flights.closed.is_set():
            return Stopping(f"pull {self._as_written!r}: the agent is stopping")
        least = UNFIT if isinstance(error, WrongState) else REFUSED if isinstance(error, UnfitHost) else 0.0
        return failure(type(error), f"pull {self._as_written!r}: {error}", max(error.wait, least))

    def _proxy(self) -> Proxy:
        """A process that has the image open."""
        with self._lock:
            proxy = self._idle.pop() if self._idle else None
        proxy = proxy or self._skopeo.proxy(self._reference)
        try:
            proxy.open(self.source)
        except BaseException:
            self._skopeo.end(proxy)
            raise
        return proxy

    def _put_back(self, proxy: Proxy) -> None:
        with self._lock:
            self._idle.append(proxy)
