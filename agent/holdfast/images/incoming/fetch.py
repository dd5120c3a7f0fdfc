"""Fetch the layers of one image side by side; a layer that several pulls need is fetched by one of them.

`pull` says which layers are missing. Their content goes from skopeo's pipe straight to the store's worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from holdfast.errors import HoldfastError, Stopping, TryAgain, UnfitHost, WrongState
from holdfast.grammar.images import Reference
from holdfast.images.disk import check_room
from holdfast.images.formats.manifests import Descriptor, Layer
from holdfast.images.incoming.transfers import Transfer
from holdfast.images.kept.store import ImageStore
from holdfast.images.registry.faults import REFUSED, UNFIT, SkopeoError, failure
from holdfast.images.registry.proxy import Proxy
from holdfast.images.registry.skopeo import Skopeo
from holdfast.images.unpacking.unpack import Expected

T = TypeVar("T")
GROWTH = 3  # bytes on disk that one compressed byte comes to, at a guess
PAUSES = (0.2, 1.0)  # seconds before a layer is tried again after a passing fault


def missing(store: ImageStore, transfer: Transfer, layers: Iterable[Layer], what: str) -> list[Layer]:
    """Choose the layers that are not here, each once, and tell the transfer of all.

    Compares what will have to be written with what is free, before the first byte comes.
    """
    found: dict[str, Layer] = {}
    for layer in layers:
        here = store.layers.has(layer.diff_id)
        if layer.diff_id not in found:
            transfer.expect(layer.blob.digest, layer.blob.size, here=here)
        if not here:
            found.setdefault(layer.diff_id, layer)
    blobs = [layer.blob for layer in found.values()]
    if blobs:
        needed = sum(blob.size * (1 if blob.media_type.endswith("tar") else GROWTH) for blob in blobs)
        check_room(store.root, needed, store.settings.min_free, what)
    return list(found.values())


def do_all(work: Callable[[T], object], items: Sequence[T], most: int) -> None:
    """Do work for each item, most at a time. After a failure nothing new is begun; raises what was raised."""
    pool = ThreadPoolExecutor(most, "layer")
    under_way = [pool.submit(work, each) for each in items]
    try:
        wait(under_way, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    begun = [each for each in under_way if not each.cancelled()]
    wait(begun)
    for each in begun:
        each.result()


class Downloads:
    """What all pulls of one puller share: the layers under way, who watches them, and each registry's turns."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._layers: dict[str, tuple[threading.Lock, list[Callable[[int], None]]]] = {}
        self._hosts: dict[tuple[str, int], threading.Semaphore] = {}

    @contextmanager
    def alone(self, diff_id: str, watcher: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Wait until nobody else fetches a layer, then fetch it in the block. Yields whom to tell how far it is.

        watcher: told how far it is, whoever fetches it.
        """
        with self._lock:
            lock, watchers = self._layers.setdefault(diff_id, (threading.Lock(), []))
            watchers.append(watcher)

        def progress(done: int) -> None:
            for each in list(watchers):
                each(done)

        try:
            with lock:
                yield progress
        finally:
            with self._lock:
                watchers.remove(watcher)
                if not watchers:
                    del self._layers[diff_id]

    def host(self, name: str, turns: int) -> threading.Semaphore:
        """Find what lets so many layers come from a registry at once; after a change of turns, those under way count
        no more."""
        with self._lock:
            return self._hosts.setdefault((name, turns), threading.Semaphore(turns))


@dataclass(slots=True)
class Fetch:
    """The fetching of one image's layers.

    as_written: the reference for messages. moved: called after any progress. source: NAME@DIGEST of its manifest, set
    before anything is fetched.
    """

    store: ImageStore
    skopeo: Skopeo
    downloads: Downloads
    reference: Reference
    as_written: str
    transfer: Transfer
    moved: Callable[[], None]
    source: str = ""
    _idle: list[Proxy] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def small(self, blob: Descriptor) -> bytes:
        """Fetch a blob that is no layer. Raises HoldfastError."""
        with self._lent() as proxy:
            return proxy.read(blob.digest, blob.size)

    def warm_up(self) -> None:
        """Start skopeo before it is known what is to be asked of it."""
        self._idle.append(self.skopeo.proxy(self.reference))

    def layers(self, jobs: Sequence[Layer]) -> None:
        """Have every layer in the store, the largest first. Raises the first error when those under way are done."""
        in_order = sorted(jobs, key=lambda job: -job.blob.size)
        do_all(self._bring, in_order, self.skopeo.settings.concurrent_downloads)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        for proxy in idle:
            self.skopeo.end(proxy)

    def _bring(self, job: Layer) -> None:
        """Have a layer in the store; one that another pull fetches is waited for."""
        digest = job.blob.digest

        def watch(done: int) -> None:
            self.transfer.advance(digest, done)
            self.moved()

        self.transfer.begin(digest)
        turn = self.downloads.host(self.reference.host, self.skopeo.settings.concurrent_downloads)
        with self.downloads.alone(job.diff_id, watch) as progress, turn:
            self._persist(job, progress)
        self.transfer.finish(digest)
        self.moved()

    def _persist(self, job: Layer, progress: Callable[[int], None]) -> None:
        """Fetch a layer, and again after faults that may pass at once."""
        for pause in (*PAUSES, None):
            if self.store.layers.has(job.diff_id):
                return
            try:
                self._fetch(job, progress)
                return
            except TryAgain as error:
                if pause is None or error.wait or self.downloads.closed.wait(pause):
                    raise
                self.transfer.begin(job.blob.digest)

    def _fetch(self, job: Layer, progress: Callable[[int], None]) -> None:
        blob = job.blob
        expected = Expected(job.diff_id, blob.digest, blob.size)
        try:
            with self._lent() as proxy, proxy.blob(blob.digest, blob.size) as pipe:
                try:
                    self.store.layers.add(pipe, expected, progress, stall=self.skopeo.settings.stall_timeout)
                except HoldfastError as error:
                    raise self._blame(error) from error
        except HoldfastError:
            if not self.store.layers.has(job.diff_id):  # else another process was faster, and nobody read the rest
                raise

    def _blame(self, error: HoldfastError) -> HoldfastError:
        """Make the store's error one of this pull."""
        if self.downloads.closed.is_set():
            return Stopping(f"pull {self.as_written!r}: the agent is stopping")
        least = UNFIT if isinstance(error, WrongState) else REFUSED if isinstance(error, UnfitHost) else 0.0
        return failure(type(error), f"pull {self.as_written!r}: {error}", max(error.wait, least))

    @contextmanager
    def _lent(self) -> Iterator[Proxy]:
        """Lend a process that has the image open; after an error of the block it is ended."""
        with self._lock:
            proxy = self._idle.pop() if self._idle else None
        proxy = proxy or self.skopeo.proxy(self.reference)
        try:
            proxy.open(self.source)
            yield proxy
        except BaseException as error:
            self.skopeo.end(proxy)
            if isinstance(error, SkopeoError):
                raise self.skopeo.explain(error, self.reference, self.as_written) from error
            raise
        with self._lock:
            self._idle.append(proxy)
