"""Count what is being fetched now, in all and for each layer, and note which registries do not answer.

`pull` counts here; `holdfast image pull`, `apply`, `status` and the events read it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from holdfast.errors import Unreachable
from holdfast.observed import Json

STALE = 86_400.0  # seconds after which a question that nobody asks any more is forgotten

LayerState = Literal["waiting", "pulling", "done", "here"]


@dataclass(slots=True)
class LayerProgress:
    """One blob on its way. total, done: bytes as they come from the registry; here: it was in the store already."""

    digest: str
    total: int
    done: int = 0
    state: LayerState = "waiting"


@dataclass(slots=True)
class Transfer:
    """One image on its way; changed by the threads that fetch it, read by anyone through `Transfers.look`."""

    reference: str
    began: float = field(default_factory=time.time)
    state: Literal["resolving", "pulling", "done", "failed"] = "resolving"
    error: str = ""
    layers: dict[str, LayerProgress] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that have to come, or came."""
        return sum(layer.total for layer in self.layers.values() if layer.state != "here")

    @property
    def done(self) -> int:
        """Bytes that came."""
        return sum(layer.done for layer in self.layers.values())  # 0 of those that were here

    def expect(self, digest: str, total: int, *, here: bool = False) -> None:
        """Say that a layer belongs to the image."""
        self.layers[digest] = LayerProgress(digest, total, state="here" if here else "waiting")

    def begin(self, digest: str) -> None:
        """Note that a layer is fetched from its first byte, for the first time or again."""
        self.layers[digest].done, self.layers[digest].state = 0, "pulling"

    def advance(self, digest: str, done: int) -> None:
        """Note how many bytes of a layer have come so far."""
        self.layers[digest].done = done

    def finish(self, digest: str) -> None:
        """Note that a layer is unpacked and verified."""
        layer = self.layers[digest]
        layer.done, layer.state = layer.total, "done"

    def json(self) -> Json:
        """{"ref", "state", "error", "began", "done", "total", "layers": [{"digest", "done", "total", "state"}, …]}"""
        known = {"ref": self.reference, "state": self.state, "error": self.error, "began": self.began}
        layers = [asdict(each) for each in list(self.layers.values())]
        return {**known, "done": self.done, "total": self.total, "layers": layers}


@dataclass(slots=True)
class Unanswered:
    """A question to a registry without an answer. since: when it was first asked; asked: when for the last time.

    asking: how many wait for an answer now. error: why the last try failed.
    """

    ref: str
    since: float
    asked: float
    asking: int = 0
    error: str = ""


class Transfers:
    """The transfers under way, and the questions that no registry answers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: list[Transfer] = []
        self._unanswered: dict[str, Unanswered] = {}

    @contextmanager
    def transfer(self, reference: str) -> Iterator[Transfer]:
        """Count a new transfer while the block runs."""
        transfer = Transfer(reference)
        with self._lock:
            self._current.append(transfer)
        try:
            yield transfer
            transfer.state = "done"
        except BaseException as error:
            transfer.state, transfer.error = "failed", str(error)
            raise
        finally:
            with self._lock:
                self._current.remove(transfer)

    @contextmanager
    def asked(self, reference: str) -> Iterator[None]:
        """Count a question while the block asks it, and until the same has been answered."""
        now = time.time()
        with self._lock:
            for old in [each for each in self._unanswered.values() if not each.asking and now - each.asked > STALE]:
                del self._unanswered[old.ref]
            entry = self._unanswered.setdefault(reference, Unanswered(reference, now, now))
            entry.asked, entry.asking = now, entry.asking + 1
        answered = True
        try:
            yield
        except Unreachable as error:
            answered, entry.error = False, str(error)
            raise
        finally:
            with self._lock:
                entry.asking -= 1
                if answered and self._unanswered.get(reference) is entry:
                    del self._unanswered[reference]

    def unanswered(self) -> list[Json]:
        """List every question without an answer, as `Unanswered`."""
        with self._lock:
            return [asdict(each) for each in self._unanswered.values()]

    def look(self) -> list[Json]:
        """List every transfer under way, oldest first, as `Transfer.json`."""
        with self._lock:
            return [each.json() for each in self._current]
