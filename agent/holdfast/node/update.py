"""What is changed while it runs: limits, recorded settings, files, networks, the firewall, hosts files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from holdfast import kinds
from holdfast.drivers import Host
from holdfast.errors import TryAgain, UnfitHost
from holdfast.node.context import Context, network_of
from holdfast.node.context import limits as host_limits
from holdfast.node.start import attach_again
from holdfast.node.wants import cgroup_settings, content_of, hosts_text, network_want
from holdfast.observed import Instance, InstanceId, Json, Receipt
from holdfast.plan.actions import (
    EnsureNetwork,
    Live,
    RemoveNetwork,
    Signal,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)
from holdfast.plan.diff import mounted_files
from holdfast.runtime import bounded, cgroup, names, netns
from holdfast.runtime.oci import oom_score_adj
from holdfast.syscalls import is_mounted


def update_instance(context: Context, action: UpdateInstance) -> Json:
    """Bring an instance to its generation without a new process, and put right what was altered by hand."""
    instance = context.store.instances.get(action.instance)
    if instance is None:
        raise TryAgain(f"update '{action.subject}': instance {action.instance} is gone")
    generation = context.store.generation(action.app, action.generation)
    want = generation.app.containers[action.container]
    limits = not action.changes or any(isinstance(change.effect, Live) for change in action.changes)
    settings: cgroup.Settings | None = None
    if instance.phase == "running":
        settings = apply_limits(context, replace(instance, want=want)) if limits else None
        if not action.changes:
            _mend_network(context, instance)
        _refresh_files(context, instance, action)
    context.store.mark_generation(action.app, action.generation, "active")
    context.store.change_instance(
        instance.id,
        want=want,
        image=generation.images[action.container],
        files=mounted_files(generation.app, want),
        generation=action.generation,
    )
    if instance.phase == "running" and settings is not None:
        limits_now = cgroup.snapshot(context.runtime.cgroup(instance.id))
        context.limits[instance.id] = cgroup.limits_of(limits_now)
        _keep_limits(context, instance.id, limits_now, settings.digest)
    return {"instance": instance.id, "fields": [change.field for change in action.changes]}


def apply_limits(context: Context, instance: Instance) -> cgroup.Settings:
    """Write a container's resources into its cgroup; they are in doubt until what the kernel made of them is kept."""
    settings = cgroup_settings(context, instance)
    _keep_limits(context, instance.id, None)
    context.runtime.update(instance.id, settings.resources)
    score, _ = oom_score_adj(instance.want, settings.oom_score_adj, host_limits())
    context.runtime.set_oom_score_adj(instance.id, score)
    return settings


def _keep_limits(context: Context, id: InstanceId, limits: Json | None, settings: str = "") -> None:
    receipt = context.store.receipt("run", id)
    if receipt is not None:
        context.store.put_receipt(replace(receipt, data={**receipt.data, "limits": limits, "settings": settings}))


def _mend_network(context: Context, instance: Instance) -> None:
    run = context.run_of(instance.id)
    if "host" not in instance.want.networks and run is not None:
        netns.ensure(context.host, instance.id, run.pid)
        attach_again(context, instance)


def _refresh_files(context: Context, instance: Instance, action: UpdateInstance) -> None:
    """Put new content in place of old, then send each signal that was asked for once."""
    app = context.store.generation(action.app, action.generation).app
    changed = {change.target for change in action.changes}
    for mount in app.containers[action.container].mounts:
        if mount.kind == "file" and mount.target in changed:
            receipt = context.store.receipt("volume", f"{instance.id}:{mount.target}")
            content = content_of(context, app, mount)
            if receipt is not None and content is not None:
                _doubt(context, instance.id, mount.target)
                bounded.make_room(context.host.files(instance.id), *_size(content))
                driver = context.plugins.driver(kinds.MOUNT, "file")
                assert hasattr(driver, "refresh")
                driver.refresh(receipt, content)
    effects = (change.effect for change in action.changes)
    for signal in dict.fromkeys(effect.name for effect in effects if isinstance(effect, Signal)):
        context.runtime.kill(instance.id, signal)


def _size(content: Path) -> tuple[int, int]:
    """How many bytes something stored takes on a file system, about, and in how many files."""
    files = [content, *content.rglob("*")] if content.is_dir() else [content]
    return sum(file.stat().st_size for file in files), len(files)


def _doubt(context: Context, id: InstanceId, target: str) -> None:
    """Note that what is mounted there may be neither old nor new, until the record says again which it is."""
    files = {**context.store.instances[id].files, target: "in doubt"}
    context.store.change_instance(id, files=files)


# -- networks ------------------------------------------------------------------------------------------------


def ensure_network(context: Context, action: EnsureNetwork) -> Json:
    """Make or mend a network, or let it grow.

    Kept beside its receipt: what it was made from (want), and for how many containers (joined).
    """
    known = context.store.receipt("network", action.network)
    if known is not None and "joined" not in known.data:
        _say_subnet(context, known)
    driver = context.plugins.driver(kinds.NETWORK, action.spec.driver)
    receipt = driver.ensure(network_want(action.network, action.spec, action.hosts))
    context.store.put_receipt(
        replace(receipt, data={**receipt.data, "want": action.spec.digest, "joined": action.hosts})
    )
    enabled = receipt.data.get("enabled")
    if enabled:
        context.store.event(
            "host", action.subject, f"turned on {enabled}, which {action.network} needs to lead outside"
        )
    return dict(receipt.data)


def _say_subnet(context: Context, network: Receipt) -> None:
    """Note with endpoints of an earlier version which subnet they have, before it may grow: they grow with it."""
    for each in context.store.receipts("endpoint"):
        if each.id.partition("/")[2] == network.id and "subnet" in network.data:
            context.store.put_receipt(replace(each, data={"subnet": network.data["subnet"], **each.data}))


def remove_network(context: Context, action: RemoveNetwork) -> Json:
    """Take a network away."""
    receipt = context.store.receipt("network", action.network)
    if receipt is None:
        receipt = Receipt("network", network_of(context, action.network).driver, action.network)
    context.plugins.driver(kinds.NETWORK, receipt.driver).remove(receipt)
    context.store.drop_receipt(receipt)
    return {}


# -- derived files -------------------------------------------------------------------------------------------


def write_firewall(context: Context, action: WriteFirewall) -> Json:
    """Replace the table, or take it away when it has nothing to say; remember what it says."""
    driver = context.plugins.driver(kinds.FIREWALL, context.firewall)
    if action.want.empty:
        receipt = Receipt("firewall", context.firewall, context.host.name)
        driver.remove(receipt)
        context.store.put_fact("firewall", None)
        context.store.drop_receipt(receipt)
        return {}
    receipt = driver.ensure(action.want)
    context.store.put_fact("firewall", asdict(action.want))
    context.store.put_receipt(receipt)
    return {"ports": len(action.want.ports), "networks": len(action.want.networks)}


def write_names(context: Context, action: WriteNames) -> Json:
    """Bring hosts files up to date. One that does not run needs none: its start writes it, perhaps just now."""
    for id, found in action.hosts.items():
        instance = context.store.instances.get(id)
        if instance is not None and instance.phase == "running" and context.host.instance(id).is_dir():
            try:
                _write_hosts(context.host, instance, hosts_text(instance, found.lines))
            except (OSError, UnfitHost) as error:  # it fills its files faster than we do: nobody else waits for that
                context.store.event("failed", instance.key, f"write its hosts file: {error}")
            context.store.note_names(id, found.digest)
    return {"files": len(action.hosts)}


def _write_hosts(host: Host, instance: Instance, text: str) -> None:
    files = host.files(instance.id)
    bounded.make_room(files, len(text.encode()), 1)
    earlier = host.instance(instance.id) / "hosts"  # where an earlier version put it, until the next start
    names.write_in_place(files / "hosts" if is_mounted(files) else earlier, text)
