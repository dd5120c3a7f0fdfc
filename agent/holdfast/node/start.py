"""StartInstance: from a staged generation to a running process, receipt by receipt.

Each step is idempotent, so that a first start, a restart and a start after a reboot are the same walk: what stands
already costs a look. A first start that fails is undone; a restart that fails leaves the instance as it was, ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from holdfast import kinds
from holdfast.errors import TryAgain
from holdfast.files import open_source
from holdfast.images.kept.lookup import find
from holdfast.node.context import ROOTFS, Base, Context, volume_of
from holdfast.node.inside import mounted
from holdfast.node.stale import where
from holdfast.node.stop import release_mount, remove_instance, sweep
from holdfast.node.volumes import ensure_volume
from holdfast.node.wants import (
    cgroup_settings,
    endpoint_wants,
    hostname,
    hosts_text,
    mount_want,
    oci_request,
    rootfs_driver,
    rootfs_want,
    user_of,
)
from holdfast.observed import Generation, Instance, InstanceId, Json, Receipt, free_slot
from holdfast.plan.actions import StartInstance
from holdfast.plan.derived import name_table, names_of
from holdfast.plan.diff import mounted_files
from holdfast.plugins import Adjusted
from holdfast.runtime import apparmor, bounded, cgroup, device_access, names, netns
from holdfast.runtime.logs import begin
from holdfast.runtime.oci import oci_config
from holdfast.spec.model import App, Container, Mount
from holdfast.spec.volumes import defined_as

HOST_NETNS = Path("/proc/1/ns/net")


def start_instance(context: Context, action: StartInstance) -> Json:
    """Bring an instance up. Raises what the drivers and the runtime raise, after undoing what it began."""
    generation = context.store.generation(action.app, action.generation)
    instance = _admit(context, action, generation)
    try:
        ground = _lay_ground(context, instance, generation.app)
        bundle = _write_bundle(context, instance, ground)
        _run(context, instance, bundle)
    except Exception as failure:
        _undo(context, instance, failure, first=action.instance is None)
        raise
    finally:
        _release(context, instance)
    context.store.mark_generation(action.app, action.generation, "active")
    run = context.run_of(instance.id)
    running = context.store.change_instance(
        instance.id,
        want=instance.want,
        image=instance.image,
        files=instance.files,
        phase="running",
        pid=run.pid if run else None,
        generation=generation.number,
        started_at=time.time(),
        exit=None,
        addresses=ground.addresses,
        names=ground.names,
        warnings=bundle.warnings,
        patched=bundle.adjusted.asked,
        streak=action.streak,
        restarts=instance.restarts + 1 if action.instance else 0,
    )
    _end_request(context, instance.key, running.started_at or 0.0)
    context.plugins.tell(
        "after_start", app=action.app, container=action.container, instance=running.id, pid=run.pid if run else 0
    )
    return {"instance": running.id, "pid": run.pid if run else None}


def _release(context: Context, instance: Instance) -> None:
    """Have drivers let go of what only the start needed; what fails is tried again when the instance goes."""
    for mount in instance.want.mounts:
        receipt = context.store.receipt("volume", f"{instance.id}:{mount.target}")
        if receipt is not None and mount.kind != "volume":
            release_mount(context, receipt)


def _end_request(context: Context, key: str, started_at: float) -> None:
    """Forget that a person asked for a start or restart: this was it. Only a stop holds on."""
    hold = context.store.history().holds.get(key)
    if hold is not None and hold.kind != "stopped" and hold.at <= started_at:
        context.store.release(key)


def _undo(context: Context, instance: Instance, failure: Exception, *, first: bool) -> None:
    """Leave nothing of a first start, nothing running of a restart; what goes wrong then is told beside failure."""
    try:
        if first:
            remove_instance(context, instance)
            sweep(context)
        else:
            _end_run(context, instance.id)
    except Exception as error:
        raise ExceptionGroup(f"start '{instance.key}'", [failure, error]) from failure


@dataclass(frozen=True, slots=True)
class Ground:
    """What a container stands on once its drivers have done their part."""

    base: Base
    rootfs: Path
    netns: Path | None
    addresses: dict[str, str]
    mounts: tuple[Json, ...]
    names: str


def _admit(context: Context, action: StartInstance, generation: Generation) -> Instance:
    """The instance that is to run: the known one brought to the generation, or a new one, written down first."""
    want = generation.app.containers[action.container]
    image, files = generation.images[action.container], mounted_files(generation.app, want)
    if action.instance is not None:
        known = context.store.instances.get(action.instance)
        if known is None:
            raise TryAgain(f"start '{action.subject}': instance {action.instance} is gone")
        return replace(known, want=want, image=image, files=files)
    slot = free_slot(context.store.instances.values(), action.app, action.container)
    instance = Instance(
        id=context.host.new_instance(),
        app=action.app,
        container=action.container,
        generation=generation.number,
        want=want,
        image=image,
        image_volumes=generation.volumes_of(action.container, slot),
        files=files,
        created_at=time.time(),
        slot=slot,
    )
    context.store.put_instance(instance)
    return instance


# -- what it stands on ---------------------------------------------------------------------------------------


def _lay_ground(context: Context, instance: Instance, app: App) -> Ground:
    place = context.host.instance(instance.id)
    for folder in (place.parent, place):  # environments are in there
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    bounded.renew(context.host.files(instance.id))
    base = context.base(instance.image)
    rootfs = _rootfs(context, instance, base)
    space = None if "host" in instance.want.networks else _keep(context, netns.ensure(context.host, instance.id))
    attached = _endpoints(context, instance, Path(space.data["path"]) if space else HOST_NETNS)
    addresses = {network: address for network, address in attached if address}
    mounts = tuple(_mount(context, instance, app, mount, rootfs) for mount in instance.mounts)
    named = _write_names(context, replace(instance, addresses=addresses))
    bounded.bound(context.host.files(instance.id))
    return Ground(base, rootfs, Path(space.data["path"]) if space else None, addresses, mounts, named)


def _keep(context: Context, receipt: Receipt) -> Receipt:
    context.store.put_receipt(receipt)
    return receipt


def _rootfs(context: Context, instance: Instance, base: Base) -> Path:
    driver = rootfs_driver(context, instance.id)
    with _layers(context, instance, base) as layers:
        receipt = _keep(context, driver.ensure(rootfs_want(instance, layers)))
    return Path(str(receipt.data["path"]))


@contextmanager
def _layers(context: Context, instance: Instance, base: Base) -> Iterator[tuple[Path, ...]]:
    """The layers of a root file system; a directory of the host, by what was opened and checked."""
    if context.bind_roots is None or not instance.image.startswith(ROOTFS):
        yield base.layers
        return
    handle = open_source(instance.image.removeprefix(ROOTFS), context.bind_roots)
    try:
        yield (Path(f"/proc/self/fd/{handle}"),)
    finally:
        os.close(handle)


def _endpoints(context: Context, instance: Instance, space: Path) -> Iterator[tuple[str, str]]:
    """Attach to each network in turn. Raises TryAgain for one that does not stand."""
    for network, want in endpoint_wants(context, instance, space):
        if want is None:
            raise TryAgain(f"attach '{instance.key}' to network '{network}': it does not stand")
        made = context.plugins.driver(kinds.ENDPOINT, want.network.driver).ensure(want)
        yield network, str(_keep(context, made).data.get("address") or "")


def attach_again(context: Context, instance: Instance) -> None:
    """Put a running instance's endpoints right after somebody took them apart."""
    space = context.store.receipt("netns", instance.id)
    if space is not None:
        list(_endpoints(context, instance, Path(space.data["path"])))


def _mount(context: Context, instance: Instance, app: App, mount: Mount, rootfs: Path) -> Json:
    """Have one mount's source ready and say how to mount it, as the OCI runtime spec does."""
    if mount.kind == "volume":
        seed = find((rootfs,), mount.target)  # never through the image's links to the host's own folders
        fills = seed is not None and seed.is_dir() and not mount.nocopy
        defined = defined_as(instance.app, instance.container, mount, instance.slot)
        spec = volume_of(context, app, defined)
        made = ensure_volume(context, mount.source, spec, seed=seed if fills else None, defined=defined)
        options = ["rbind", "rprivate", "ro" if mount.read_only else "rw"]
        return {"destination": mount.target, "type": "bind", "source": made.data["path"], "options": options}
    made = context.plugins.driver(kinds.MOUNT, mount.kind).ensure(mount_want(context, instance, app, mount))
    if mount.kind == "bind":
        made = replace(made, data={**made.data, **where(mount.source)})
    _keep(context, made)
    return {**{key: made.data[key] for key in ("type", "source", "options")}, "destination": mount.target}


def _write_names(context: Context, instance: Instance) -> str:
    """Write hosts, resolv.conf and hostname; return the digest of what hosts says of the neighbours."""
    place = context.host.files(instance.id)
    others = (each for each in context.store.instances.values() if each.id != instance.id)
    known = names_of(instance, name_table((*others, instance), instance.want.networks))
    names.write_in_place(place / "hosts", hosts_text(instance, known.lines))
    names.write_in_place(place / "resolv.conf", names.read_resolv_conf())
    names.write_in_place(place / "hostname", hostname(instance) + "\n")
    return known.digest


# -- the bundle, and the process -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bundle:
    """The config.json that was written, whose work it is, and what of it is less than was asked for."""

    adjusted: Adjusted
    settings: cgroup.Settings
    warnings: tuple[str, ...]


def _write_bundle(context: Context, instance: Instance, ground: Ground) -> Bundle:
    """Write config.json, adjusted by every plugin that does so."""
    settings = cgroup_settings(context, instance)
    request = oci_request(context, instance, ground.base, settings)
    files = context.host.files(instance.id)
    profile, unconfined = _apparmor(context, instance.want)
    made = oci_config(
        replace(
            request,
            apparmor=profile,
            user=user_of(instance.want, ground.base, mounted(ground.base, ground.mounts)),
            rootfs=ground.rootfs,
            netns=ground.netns,
            mounts=ground.mounts,
            hosts=files / "hosts",
            resolv_conf=files / "resolv.conf",
            hostname_file=files / "hostname",
        )
    )
    adjusted = context.plugins.adjust_oci_config(instance.app, instance.container, made.config, instance.want.labels)
    context.filters.annotate(adjusted.config)
    (context.host.instance(instance.id) / "config.json").write_text(context.filters.dumps(adjusted.config))
    return Bundle(
        adjusted, settings, (*made.warnings, *settings.warnings, *filter(None, (unconfined,)), *adjusted.warnings)
    )


def _apparmor(context: Context, want: Container) -> tuple[str, str]:
    """The AppArmor profile of a container, "" for none, and what is less than meant; the agent's own gets loaded."""
    if want.privileged or want.apparmor == "unconfined":
        return "", ""
    if want.apparmor == "default":
        return apparmor.ensure(context.apparmor_profile)
    return apparmor.require(want.apparmor), ""


def _run(context: Context, instance: Instance, bundle: Bundle) -> None:
    """Create the container anew and let it run; what an earlier run left of it goes first.

    An error names the plugins that have adjusted config.json: it may be their doing.
    """
    try:
        _create(context, instance, bundle)
    except Exception as error:
        if bundle.adjusted.by:
            error.add_note(f"with a config.json that was adjusted by plugin {', '.join(bundle.adjusted.by)}")
        raise


def _create(context: Context, instance: Instance, bundle: Bundle) -> None:
    id, key = instance.id, instance.key
    earlier = context.store.receipt("run", id)
    if earlier is not None or id in context.runtime.state():
        _end_run(context, id)
    log, kept = context.log_path(instance.key), instance.want.logging
    log_size = begin(log, kept.max_size, kept.max_files)
    run = context.runtime.create(id, context.host.instance(id), log, name=key, log_size=log_size)
    limits = cgroup.snapshot(context.runtime.cgroup(id))
    context.limits[id] = cgroup.limits_of(limits)
    data: dict[str, Any] = {"run": asdict(run), "limits": limits, "settings": bundle.settings.digest}
    context.store.put_receipt(Receipt("run", context.runtime.binary.name, id, id, data))
    if not device_access.asked_for(bundle.adjusted.config):
        device_access.deny(context.runtime.cgroup(id))
    context.runtime.start(id, name=key)
    context.filters.learn(bundle.adjusted.config, context.runtime.root / id)


def _end_run(context: Context, id: InstanceId) -> None:
    """End whatever runs of an instance, and forget the run."""
    context.runtime.delete(id, force=True)
    context.store.drop_receipt(Receipt("run", context.runtime.binary.name, id, id))
