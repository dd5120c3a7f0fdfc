"""Volumes as the core handles them, whatever driver makes them: made once, filled once, one thread at a time.

A driver makes an empty volume; its first content is brought by `runtime.filling`, and what is kept beside the
receipt says how far that is:

    content: [uid, gid, mode]   new: empty, and the directory looked like this when it was made
    content: "settled"          filled, or in use; never filled again
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from holdfast.drivers import COMPLETE_CONTENT, VolumeWant
from holdfast.errors import UnfitHost
from holdfast.node.rig import Rig, volume_of
from holdfast.observed import Receipt
from holdfast.runtime import filling
from holdfast.spec.model import App, Volume

SETTLED = "settled"


def volume_want(volume: str, spec: Volume) -> VolumeWant:
    """What a volume driver is asked for."""
    return VolumeWant(id=volume, driver_opts=spec.driver_opts)


def ensure_volume(rig: Rig, app: App, volume: str, *, seed: Path | None = None) -> Receipt:
    """Have a volume there, as it is defined now, and filled from seed (a directory of an image) if it is new.

    Whoever else starts on it waits until that is done. A volume that is empty but was in use, or is somebody's by its
    owner or mode, is left alone.
    """
    spec = volume_of(rig, app, volume)
    with rig.volume_locks.of(volume):
        known = rig.store.receipt("volume", volume)
        if known is not None and not Path(str(known.data.get("path", ""))).is_dir():
            known = None  # it was deleted behind our back, and is a new one now
        made = rig.plugins.driver("volume", spec.driver).ensure(volume_want(volume, spec))
        try:
            content = _settle(rig, made, known, seed)
        except OSError as error:
            raise UnfitHost(f"fill volume '{volume}' from '{seed}': {error}") from error
        return _keep(rig, made, content)


def _settle(rig: Rig, made: Receipt, known: Receipt | None, seed: Path | None) -> object:
    """Fill a volume that is new; return what is known of its content then."""
    path = Path(str(made.data["path"]))
    content = known.data.get("content", SETTLED) if known else filling.owner_and_mode(path)
    if (path / COMPLETE_CONTENT).is_dir():  # copied before a crash
        filling.finish(path)
        return SETTLED
    if content == SETTLED:
        return SETTLED
    if not filling.is_empty(path) or filling.owner_and_mode(path) != content:
        return SETTLED
    if seed is None:
        return content
    _keep(rig, made, content)  # first: a crash from here on finds a volume that is new
    filling.fill(path, seed)
    return SETTLED


def _keep(rig: Rig, made: Receipt, content: object) -> Receipt:
    kept = replace(made, data={**made.data, "content": content})
    rig.store.put_receipt(kept)
    return kept
