"""Decide which images to delete when the disk is full: unused ones, least recently used first.

Above the high watermark unused images are deleted until the low one is reached. These are never deleted: what is in
use (`node` says by whom: instances, exited ones too, and every generation that is kept for a rollback); anything
while something is put in (`ImageStore.keep`); what was used or came within `GRACE`, because whoever has just pulled
an image means to use it; and what has a name that no registry and no build gave it, because nobody could get it back.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.images.kept.image import Freed, InUse
from holdfast.images.kept.store import ImageStore

GRACE = 600.0  # seconds: ten minutes
REPLACEABLE = ("registry", "build")  # where a name comes from whose image can be had again
# Seconds that layers of a pull that broke off wait for its next try, while there is room; no prune by hand waits.
ORPHANS = 86_400.0


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as the collector sees it.

    layers: diff ids. used_at: seconds since the epoch. unique: a person brought it here, and nobody else could.
    """

    digest: str
    layers: tuple[str, ...]
    used_at: float
    unique: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: bytes used, and bytes that whoever is no root could have. df(1) counts so."""

    used: int
    free: int

    @property
    def percent(self) -> float:
        """How full it is."""
        return 100.0 * self.used / max(self.used + self.free, 1)

    def excess(self, percent: float) -> int:
        """Count the bytes that have to be freed until it is no fuller than that."""
        return max(int(self.used - percent / 100.0 * (self.used + self.free)) + 1, 0) if self.percent > percent else 0


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection came to. full: the disk is above the high watermark and nothing more may go."""

    freed: Freed
    percent: float
    full: bool


def choose(
    images: Sequence[Stored], sizes: Mapping[str, int], in_use: Collection[str], excess: int, now: float
) -> list[str]:
    """Choose which images to delete to free excess bytes: unused ones, least recently used first.

    sizes: bytes, by diff id. An image frees those of its layers that no image needs which stays; one that would free
    nothing stays.
    """
    needs = Counter(layer for each in images for layer in set(each.layers))
    doomed: list[Stored] = []
    for image in sorted(images, key=lambda each: (each.used_at, each.digest)):
        if excess <= 0:
            break
        if image.digest in in_use or image.unique or image.used_at > now - GRACE:
            continue
        doomed.append(image)
        needs.subtract(set(image.layers))
        excess -= sum(sizes.get(layer, 0) for layer in set(image.layers) if not needs[layer])
    return [each.digest for each in doomed if any(not needs[layer] for layer in each.layers)]


def collect(
    store: ImageStore, in_use: InUse, *, look: Callable[[], Disk] | None = None, now: float | None = None
) -> Collected:
    """Note what is used now, delete what crashes have left, and free what the watermarks ask for.

    in_use is asked again while nothing can be put in. look: how full the disk is (of the store, unless given). While
    something is being put in nothing but the noting is done.
    """
    now = time.time() if now is None else now
    look = look or (lambda: disk_of(store.root))
    high, low = store.settings.high_watermark, store.settings.low_watermark
    store.touch(in_use().keys())
    store.layers.sweep()
    freed, goal = Freed(), high
    while True:
        with store.alone() as alone:
            if not alone:
                return Collected(freed, look().percent, full=False)
            disk = look()
            excess = disk.excess(low) if disk.percent > goal else 0
            gone = store.delete_orphans(now - (GRACE if excess else ORPHANS))
            if excess and not gone.size:
                used = in_use()
                sizes = {diff_id: store.layers.facts(diff_id).size for diff_id in store.layers.all()}
                gone = store.delete(choose(_stored(store), sizes, used.keys(), excess, now), used)
        freed, goal = freed + gone, low  # it is off the disk by now, and how much that is the disk says
        if not excess or not (gone.images or gone.layers):
            break
    percent = look().percent
    return Collected(freed, percent, full=percent > high)


def disk_of(path: Path) -> Disk:
    """Measure the file system that path is on, as df(1) counts."""
    system = os.statvfs(path)
    unit = system.f_frsize
    return Disk((system.f_blocks - system.f_bfree) * unit, system.f_bavail * unit)


def _stored(store: ImageStore) -> list[Stored]:
    unique = {each.digest for each in store.names().values() if each.source not in REPLACEABLE}
    return [
        Stored(each.digest, each.diff_ids, store.used_at(each.digest), each.digest in unique)
        for each in store.list(dangling=True)
    ]
