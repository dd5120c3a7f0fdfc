"""Make an image or an archive of a container as it is now; its processes are paused meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from holdfast.errors import Conflict, NotFound, WrongCall
from holdfast.images.formats.references import parse, parse_changes
from holdfast.images.kept.image import Image
from holdfast.images.outgoing.commit import Note, changed, commit_image
from holdfast.images.outgoing.pack import pack_changes, pack_merged
from holdfast.node.context import ROOTFS, Context
from holdfast.observed import Instance, Receipt
from holdfast.questions import Sink
from holdfast.runtime import cgroup
from holdfast.spec.model import Container

PAUSED = "Pause"  # the verb of the intent that a crash leaves: `recover` lets the container go on


def commit_container(
    context: Context, target: str, name: str, changes: Sequence[str], *, message: str, author: str, pause: bool
) -> Image:
    """Make an image of a container's image and what it has written since, and give it a name.

    Its configuration is the image's, with what the state file says of the container's process, and with changes (as
    `docker commit --change`). What lies in volumes and mounts is not in it. Raises Conflict when the container has
    no root file system just now, or its driver keeps no writable layer; WrongCall for one that is no image's.
    """
    full = parse(name)
    if full.transport != "docker" or full.digest:
        raise WrongCall(f"commit '{target}': {name!r} is not a name to give (expected [HOST/]NAME[:TAG])")
    instance, made = _rootfs(context, target, "commit")
    if not made.data.get("upper"):
        told = f"rootfs driver '{made.driver}' keeps no writable layer of its own"
        raise Conflict(f"commit '{target}': {told} ('holdfast export' writes all of it)")
    upper = Path(made.data["upper"])
    if instance.image.startswith(ROOTFS):
        raise WrongCall(
            f"commit '{target}': its root file system is a directory of this host, and no image "
            "('holdfast export' writes it as a tar archive, 'holdfast image import' makes an image of that)"
        )
    additions = parse_changes(changes)
    base = context.images.get(instance.image)
    config = changed(_config(base.config, instance.want), additions)

    def write(out: Sink) -> None:
        with paused(context, instance) if pause else nullcontext():
            pack_changes(upper, out, _mount_points(context, instance))

    note = Note(f"holdfast commit {target}", message, author, time.time())
    return commit_image(context.images, base, write, full.name, config, note)


def export_container(context: Context, target: str, out: Sink, *, pause: bool) -> None:
    """Write the root file system of a container as a tar archive, as `docker export` does: without what is mounted.

    Raises Conflict when it has none just now.
    """
    instance, made = _rootfs(context, target, "export")
    with context.images.keep():
        upper = made.data.get("upper")
        layers = (*context.base(instance.image).layers, Path(upper)) if upper else (Path(made.data["path"]),)
        with paused(context, instance) if pause else nullcontext():
            pack_merged(layers, out, _mount_points(context, instance))


def export_image(context: Context, ref: str, out: Sink) -> Image:
    """Write the root file system of an image as a tar archive."""
    with context.images.keep():
        image = context.images.resolve(ref)
        pack_merged(image.layers, out)
    return image


@contextmanager
def paused(context: Context, instance: Instance) -> Iterator[None]:
    """Pause the processes of an instance while the block runs, one such block at a time.

    They go on whatever happens: an agent that is killed meanwhile leaves an intent, and the next one sees to it.
    """
    if instance.phase != "running":
        yield
        return
    path, subject = context.runtime.cgroup(instance.id), f"pause {instance.id}"
    with context.images.locks.hold(f"pause-{instance.id}"):
        context.store.put_intent(subject, {"verb": PAUSED, "reason": "its files are read", "instance": instance.id})
        try:
            cgroup.freeze(path)
            yield
        finally:
            cgroup.thaw(path)
            context.store.drop_intent(subject)


def _rootfs(context: Context, target: str, verb: str) -> tuple[Instance, Receipt]:
    """Find the newest instance of a container, and its root file system."""
    found = sorted(
        (each for each in context.store.instances.values() if each.key == target),
        key=lambda each: (each.phase == "running", each.created_at),
    )
    if not found:
        raise NotFound(f"{verb} '{target}': it has no instance (see 'holdfast status')")
    made = context.store.receipt("rootfs", found[-1].id)
    if made is None:
        raise Conflict(f"{verb} '{target}': it has no root file system just now (start it)")
    return found[-1], made


def _mount_points(context: Context, instance: Instance) -> list[str]:
    """List where something is mounted in the container: what the runtime made there is not content."""
    try:
        bundle = json.loads((context.host.instance(instance.id) / "config.json").read_text())
        return [str(each["destination"]) for each in bundle["mounts"]]
    except (FileNotFoundError, ValueError, KeyError):
        return [mount.target for mount in instance.mounts]


def _config(image: Any, want: Container) -> dict[str, Any]:
    """Merge what the state file says of the process into the image's configuration."""
    config = dict(image)
    if want.entrypoint is not None:
        config["Entrypoint"] = [word for word in want.entrypoint if word] or None
        config["Cmd"] = None
    if want.command is not None:
        config["Cmd"] = list(want.command)
    process = {"User": want.user, "WorkingDir": want.working_dir, "StopSignal": want.stop_signal}
    config |= {key: value for key, value in process.items() if value}
    grown = {"Env": [f"{name}={value}" for name, value in want.environment.items()], "Labels": dict(want.labels)}
    config = changed(config, {key: value for key, value in grown.items() if value})
    return {key: value for key, value in config.items() if value is not None}
