"""What differs between an instance and what its generation wants, field by field, and what each change takes.

Least disruption is decided here, in one table: a field that it does not name replaces the container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from holdfast.keys import Table, shown_as
from holdfast.observed import Generation, Instance
from holdfast.plan.actions import Change, Effect, Live, Record, Replace, Signal
from holdfast.spec.model import App, Attachment, Container, Mount, digest_of

EFFECTS: Mapping[str, Effect] = {
    "resources": Live(),  # written into the running container's cgroup
    "restart_policy": Record(),  # what only the agent reads: noted, the process knows nothing of it
    "labels": Record(),
    "volumes_from": Record(),  # what it brings are mounts
    "pull": Record(),
    "update_image": Record(),
    "ports": Record(),  # the firewall follows in a plan of its own
    "stop_signal": Record(),
    "stop_grace_period": Record(),
    "depends_on": Record(),
    "logging": Record(),
}


def changes(instance: Instance, want: Container, image: str, files: Mapping[str, str]) -> tuple[Change, ...]:
    """List what has to change for an instance to be as wanted; empty when it is."""
    same = instance.want is want or instance.want == want
    if same and instance.image == image and instance.files == files:
        return ()
    found = [*_image(instance, want, image), *_files(instance, want, files)]
    for name in Container.model_fields:
        old, new = getattr(instance.want, name), getattr(want, name)
        if name != "image" and old != new:
            found.extend(_field(name, old, new, EFFECTS.get(name, Replace())))
    return tuple(found)


def volume_changes(instance: Instance, generation: Generation) -> tuple[Change, ...]:
    """Whether the volumes that images declare are others than the instance has.

    One of an earlier version has none and its data in its writable layer: no reason to replace it.
    """
    old, new = instance.image_volumes, generation.volumes_of(instance.container, instance.slot)
    if old is None or new is None or old == new:
        return ()
    before, after = (readable(tuple(mount.target for mount in each)) for each in (old, new))
    return (Change("volumes of the image", before, after, Replace()),)


def replaces(found: tuple[Change, ...]) -> bool:
    """Whether any of these changes takes a new container."""
    return any(isinstance(change.effect, Replace) for change in found)


def mounted_files(app: App, container: Container) -> dict[str, str]:
    """Mount target → digest of the revision's content mounted there (a file's sha256, or a folder's digest)."""
    return {
        mount.target: app.files.get(mount.source) or digest_of(folder_files(app, mount))
        for mount in container.mounts
        if mount.kind == "file"
    }


def folder_files(app: App, mount: Mount) -> dict[str, str]:
    """Relative path → sha256 of the files below a mounted folder of the revision."""
    prefix = mount.source.rstrip("/") + "/"
    return {path.removeprefix(prefix): sha for path, sha in app.files.items() if path.startswith(prefix)}


def readable(value: Any, show: Callable[[Any], str] | None = None) -> str:
    """A value as a person reads it; show: as its key's declaration says."""
    match value:
        case None | () | "":
            return "none"
        case _ if show is not None:
            return show(value)
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case tuple():
            return "[" + ", ".join(map(readable, value)) + "]"
        case Attachment() if value == Attachment():
            return "attached"
        case Table():
            return str(value) if type(value).__str__ is not Table.__str__ else _set_fields(value)
        case _:
            return str(value)


def _set_fields(value: Table) -> str:
    given = value.model_dump(exclude_defaults=True)
    found = [f"{key}={readable(getattr(value, key), shown_as(type(value), key))}" for key in given]
    return ", ".join(found) or "defaults"


def _image(instance: Instance, want: Container, image: str) -> Iterator[Change]:
    old, new = (each.image or each.rootfs or "" for each in (instance.want, want))
    if instance.image != image:
        if old == new:
            old, new = f"{old} ({_short(instance.image)})", f"({_short(image)})"
        yield Change("image", old, new, Replace())
    elif instance.want.image != want.image:
        yield Change("image", old, new, Record())


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _files(instance: Instance, want: Container, files: Mapping[str, str]) -> Iterator[Change]:
    for mount in want.mounts:
        old, new = instance.files.get(mount.target), files.get(mount.target)
        if old and new and old != new:
            yield Change(
                f"content of {mount.target}", _short(old), _short(new), _when_changed(mount), target=mount.target
            )


def _when_changed(mount: Mount) -> Effect:
    match mount.on_change:
        case "restart":
            return Replace()
        case "none":
            return Record()
        case signal:
            return Signal(signal)


def _field(name: str, old: Any, new: Any, effect: Effect) -> Iterator[Change]:
    """One change for a plain field; one per key for a table, so that the reason names just what differs."""
    match old, new:
        case Table(), Table():
            for key in type(new).model_fields:
                before, after = getattr(old, key), getattr(new, key)
                if before != after:
                    show = shown_as(type(new), key)
                    yield Change(f"{name}.{key}", readable(before, show), readable(after, show), effect)
        case dict(), dict():
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    yield Change(f"{name}.{key}", readable(old.get(key)), readable(new.get(key)), effect)
        case _:
            show = shown_as(Container, name)
            yield Change(name, readable(old, show), readable(new, show), effect)
