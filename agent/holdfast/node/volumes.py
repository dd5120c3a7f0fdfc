"""Make and fill volumes: once, by one thread at a time, whatever their driver.

A driver makes an empty volume; its first content is brought by `runtime.filling`, and what is kept beside the
receipt says how far that is:

    content: [uid, gid, mode]   new: empty, and the directory looked like this when it was made
    content: "settled"          filled, or in use; never filled again. Earlier versions kept no content
    asked: {…}                  the driver_opts that the driver was last called with
    defined_as: app/name        whose definition it has, where that is another volume's
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from holdfast import kinds
from holdfast.drivers import COMPLETE_CONTENT
from holdfast.errors import NotFound, UnfitHost, WrongState
from holdfast.guard import found_by
from holdfast.images.kept.lookup import find
from holdfast.node.context import Context, volume_of
from holdfast.node.wants import rootfs_driver, rootfs_want, volume_want
from holdfast.observed import Instance, Json, Receipt
from holdfast.plan.actions import EnsureVolume
from holdfast.runtime import filling
from holdfast.spec.model import App, Mount, Volume
from holdfast.spec.volumes import defined_as, image_volumes, of_slot

SETTLED = "settled"
DEFINED_AS = "defined_as"


def altered(kept: Receipt, seen: Receipt) -> tuple[str, ...]:
    """Describe how a volume differs from what its driver made. What the driver does not read back is ignored."""
    if all(kept.data.get(key) == value for key, value in seen.data.items()):
        return ()
    before, now = (json.loads(json.dumps(dict(each.data))) for each in (kept, seen))  # a tuple is a list by now
    return tuple(
        f"its {key} is {value}, and was {before.get(key)} when it was made"
        for key, value in now.items()
        if before.get(key) != value
    )


def change_volume(context: Context, action: EnsureVolume) -> Json:
    """Bring a volume to its new definition. Raises UnfitHost if its driver then observes something else."""
    made = ensure_volume(context, action.volume, action.spec)
    driver = context.plugins.driver(kinds.VOLUME, action.spec.driver)
    for seen in found_by(driver) or ():
        if seen.id == action.volume and (wrong := altered(made, seen)):
            raise UnfitHost(f"volume driver {driver.name!r}: observe: right after ensure, {'; '.join(wrong)}")
    return {"volume": action.volume}


def ensure_volume(
    context: Context, volume: str, spec: Volume, *, seed: Path | None = None, defined: str = ""
) -> Receipt:
    """Make sure a volume exists as it is defined now; fill a new one from seed, a directory of an image.

    defined: the volume that is defined so, where that is another.
    Whoever else starts on it waits until that is done. A volume that is empty but was in use, or is somebody's by its
    owner or mode, is left alone.
    """
    with context.volume_lock(volume):
        known = context.store.receipt("volume", volume)
        if known is not None and not Path(str(known.data.get("path", ""))).is_dir():
            known = None  # it was deleted behind our back, and is a new one now
        made = context.plugins.driver(kinds.VOLUME, spec.driver).ensure(volume_want(volume, spec))
        try:
            content = _settle(context, made, known, spec, seed)
        except OSError as error:
            raise UnfitHost(f"fill volume '{volume}' from '{seed}': {error}") from error
        name = defined or (known.data.get(DEFINED_AS) if known else None) or volume
        made = replace(made, data={**made.data, **({} if name == volume else {DEFINED_AS: name})})
        return _keep(context, made, content, spec)


def _settle(context: Context, made: Receipt, known: Receipt | None, spec: Volume, seed: Path | None) -> object:
    """Fill a volume that is new; return what is known of its content then."""
    path = Path(str(made.data["path"]))
    content = known.data.get("content") if known else filling.owner_and_mode(path)
    if content != SETTLED and (path / COMPLETE_CONTENT).is_dir():  # copied before a crash
        filling.finish(path)
        return SETTLED
    # An earlier version kept no content, and what it made is in use.
    if content in (SETTLED, None) or not filling.is_empty(path) or filling.owner_and_mode(path) != content:
        return SETTLED
    if seed is None:
        return content
    _keep(context, made, content, spec)  # first: a crash from here on finds a volume that is new
    filling.fill(path, seed)
    return SETTLED


def _keep(context: Context, made: Receipt, content: object, spec: Volume) -> Receipt:
    kept = replace(made, data={**made.data, "content": content, "asked": dict(spec.driver_opts)})
    context.store.put_receipt(kept)
    return kept


# -- volumes that images declare -----------------------------------------------------------------------------


def declared_volumes(context: Context, app: App, images: Mapping[str, str]) -> dict[str, tuple[Mount, ...]]:
    """Return container → the mounts that its image declares. images: container → digest."""
    found = {image: (context.base(image).config.get("config") or {}).get("Volumes") for image in set(images.values())}
    targets = {image: list(map(str, value)) if isinstance(value, Mapping) else [] for image, value in found.items()}
    try:
        return image_volumes(app, {name: targets[image] for name, image in images.items()})
    except ValueError as error:
        raise WrongState(f"volumes of the images of '{app.name}': {error}") from error


def save_volumes(context: Context, instance: Instance) -> None:
    """Copy what a container of an earlier version wrote below its image's volumes into real volumes, before it goes.

    There it lies in the writable layer, which goes with the container.
    """
    if instance.image_volumes is not None or instance.phase == "creating":
        return
    lone = App(name=instance.app, path="", containers={instance.container: instance.want})
    try:
        found = declared_volumes(context, lone, {instance.container: instance.image})[instance.container]
    except (NotFound, WrongState):  # its image can't be asked any more
        return
    mounts = of_slot(instance.app, instance.container, found, instance.slot)
    if not mounts:
        return
    newest = context.store.history().newest(instance.app)
    app = newest.app if newest else lone
    made = rootfs_driver(context, instance.id).ensure(rootfs_want(instance, context.base(instance.image).layers))
    for mount in mounts:
        held = find((Path(str(made.data["path"])),), mount.target)
        if held is not None and held.is_dir():
            defined = defined_as(instance.app, instance.container, mount, instance.slot)
            ensure_volume(context, mount.source, volume_of(context, app, defined), seed=held, defined=defined)
            message = f"what it wrote to {mount.target} is in volume {mount.source} now"
            context.store.event("volume", instance.key, message)
