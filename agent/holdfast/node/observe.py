"""Reads what is really there: the kernel, the runtime and the receipts → Observed.

Starts no process and asks each driver once, so that a look at a thousand containers costs milliseconds. The memory
is read before the host and asked again after it, so that what is made or removed meanwhile is not taken for strange.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from holdfast.guard import Seen, found_by
from holdfast.kinds import FIREWALL
from holdfast.node import stale
from holdfast.node.context import BARE, Context
from holdfast.node.installed import missing_drivers
from holdfast.node.stop import tell_exit
from holdfast.node.volumes import DEFINED_AS, altered
from holdfast.node.wants import cgroup_settings
from holdfast.observed import (
    Exit,
    FirewallNetwork,
    FirewallWant,
    Instance,
    InstanceId,
    Json,
    NetworkState,
    Observed,
    PublishedPort,
    Receipt,
    Subject,
    VolumeState,
    lack_key,
)
from holdfast.runtime import netns
from holdfast.runtime.conmon import Run
from holdfast.runtime.mountpoints import Mounted, lacking
from holdfast.spec.model import Container, digest_of

Things = Mapping[tuple[str, str], Receipt]
Find = Callable[[str, str], Receipt | None]  # kind, id → what is there
Watches = Callable[[str, Run], bool]


def observe(
    context: Context,
    watches: Watches,
    *,
    busy: frozenset[Subject] = frozenset(),
    deep: bool = False,
    wanted: Iterable[Container] = (),
) -> Observed:
    """Read the host.

    watches: says which runs need not be looked at, for their end would be noticed. busy: subjects that are being
    worked on, whose state is in motion. deep: read cgroups, too. wanted: containers that are to be, for what their
    mounts lack.
    """
    at = time.time()
    instances, building = list(context.store.instances.values()), set(context.builds)
    if deep:
        stale.look(context, instances)
        context.limits_watch.hear({context.runtime.cgroup(each.id) for each in instances})
    looked = context.plugins.observe()
    things: Things = {(each.kind, each.id): each for each in everything(context, looked.seen, deep=deep)}
    look = partial(seen_instance, context, find=lambda *thing: things.get(thing), watches=watches, deep=deep)
    if not context.same_boot():
        look = partial(_lost, context)
    seen = tuple(each if each.key in busy else look(each) for each in instances)
    known = {instance.id for instance in instances} | {InstanceId(each) for each in building | context.builds}
    firewall, published = _firewall(context, things)
    orphans, foreign = _unclaimed(context, things, known)
    return Observed(
        at=at,
        instances=tuple(each for each in seen if each.id in context.store.instances),
        networks=_networks(context, things),
        volumes=_volumes(context, things),
        firewall=firewall,
        published=published,
        limits={each.id: context.limits[each.id] for each in seen if each.id in context.limits},
        orphans=tuple(each for each in orphans if each.kind != "firewall" or firewall is None),
        foreign=foreign,
        busy=busy,
        missing=missing_drivers(context, things.values()),
        lacking=lacking_binds((*wanted, *(each.want for each in instances))),
        findings=looked.findings,
    )


def everything(context: Context, looked: Mapping[str, Mapping[str, Seen]], *, deep: bool) -> Iterator[Receipt]:
    """Everything on the host that bears the agent's name, as the drivers find it. looked: by kind and driver.

    What a driver can't say for now is taken to be as it last said, else as it was made; so is what was made by one
    that no plugin offers any more. An old answer makes nothing missing or an orphan: no action follows from it.
    """
    for kind, answers in looked.items():
        silent: dict[str, dict[str, Receipt]] = {}  # driver → id → what it last said
        for driver, seen in answers.items():
            if seen.heard:
                yield from seen.receipts
            else:
                silent[driver] = {each.id: each for each in seen.receipts if each.data}
        for made in context.store.receipts(kind):
            if made.driver not in answers or made.driver in silent:
                # What a volume was an hour ago would look like drift.
                yield made if kind == "volume" else silent.get(made.driver, {}).get(made.id, made)
    yield from netns.observe(context.host)
    for id in context.runtime.state() | (context.runtime.cgroups() if deep else frozenset()):
        yield Receipt("run", context.runtime.binary.name, id, id)


def lacking_binds(wants: Iterable[Container]) -> dict[str, str]:
    """Why binds of these containers can't be made now (`Observed.lacking`)."""
    mounted, different = Mounted.now(), {id(want): want for want in wants}.values()
    binds = {lack_key(mount): mount for want in different for mount in want.mounts if mount.kind == "bind"}
    return {key: reason for key, mount in binds.items() if (reason := lacking(mount, mounted))}


# -- instances -----------------------------------------------------------------------------------------------


def _lost(context: Context, instance: Instance) -> Instance:
    """An instance after a reboot."""
    if instance.phase not in ("running", "creating"):
        return instance
    if not context.records_exits:
        return replace(instance, phase="lost")
    return context.store.change_instance(instance.id, phase="lost")


def seen_instance(context: Context, instance: Instance, find: Find, watches: Watches, *, deep: bool) -> Instance:
    """An instance as it is now: the very same object when nothing about it is new."""
    if instance.phase != "running":
        return instance
    receipt, run = context.store.receipt("run", instance.id), context.run_of(instance.id)
    if run is None or receipt is None:
        return _ended(context, instance)
    watched = watches(instance.id, run)
    if not watched and not context.runtime.alive(run):
        return _ended(context, instance)
    faults, drifted = list(_faults(context, instance, find)), list(_altered(context, instance, find))
    if "limits" in receipt.data and receipt.data["limits"] is None:
        drifted.append("writing its limits was cut short or refused")
    elif deep:
        drifted.extend(_limits_altered(context, instance, run, receipt.data))
        drifted.extend(_policy_changed(context, instance, receipt.data))
    warnings = instance.warnings
    if not watched and not context.runtime.supervised(run):
        warnings = (*warnings, "its conmon is gone: output is lost and its exit status will not be known")
    warnings = (*warnings, *context.stale.get(instance.id, ()))
    if not faults and not drifted and warnings == instance.warnings:
        return instance
    return replace(instance, faults=tuple(faults), drifted=tuple(drifted), warnings=warnings)


def _ended(context: Context, instance: Instance) -> Instance:
    """Note the end of a process; while conmon still writes it down, the instance counts as running."""
    ended = context.runtime.exit_of(instance.id)
    run = context.run_of(instance.id)
    if ended is None:
        if run is not None and context.runtime.supervised(run):
            return instance
        ended = Exit(code=None, at=time.time())
    if instance.exit is not None and instance.exit.asked:  # its stop was cut short, or gave up waiting
        ended = replace(ended, asked=True)
    changed = replace(instance, phase="exited", exit=ended, pid=None)
    if not context.records_exits:
        return changed
    if not context.store.exchange_instance(instance, changed):
        return instance  # somebody else has it in hand; the next look will tell
    tell_exit(context, instance, ended)
    return changed


def _faults(context: Context, instance: Instance, find: Find) -> Iterator[str]:
    """What only a new start puts right."""
    rootfs = context.store.receipt("rootfs", instance.id)
    if rootfs is not None and not _healthy(rootfs, find):
        yield "its root file system is not mounted any more"
    for mount in instance.mounts:
        if mount.kind == "volume" and find("volume", mount.source) is None:
            yield f"volume {mount.source} is gone"
    if instance.patched is not None and (lacking := context.plugins.lacking(instance.patched)):
        with suppress(OSError, ValueError):  # without its configuration, nothing can be tried
            config = json.loads((context.host.instance(instance.id) / "config.json").read_text())
            if context.plugins.would_adjust(instance.app, instance.container, config, instance.want.labels):
                yield f"plugin '{', '.join(lacking)}' has not adjusted its configuration"


def _altered(context: Context, instance: Instance, find: Find) -> Iterator[str]:
    """What can be put right while it runs."""
    for receipt in context.store.owned(instance.id):
        if receipt.kind == "netns" and not _healthy(receipt, find):
            yield "its network namespace was unbound"
        elif receipt.kind == "endpoint" and receipt.driver not in BARE:
            id = receipt.id.partition("/")[2]
            network = context.store.receipt("network", id)
            if not _healthy(receipt, find):
                yield f"its link to network {id} was removed or altered"
            elif network and receipt.data.get("subnet", network.data.get("subnet")) != network.data.get("subnet"):
                yield f"network {id} has grown to {network.data.get('subnet')}"


def _healthy(receipt: Receipt, find: Find) -> bool:
    found = find(receipt.kind, receipt.id)
    return found is not None and bool(found.data)


def _limits_altered(context: Context, instance: Instance, run: Run, kept: Json) -> Iterator[str]:
    """Compare the cgroup with what it was right after we wrote it."""
    wrote = kept.get("limits") or {}
    now, context.limits[instance.id] = context.limits_watch.read(context.runtime.cgroup(instance.id), run)
    for name, value in wrote.items():
        if name in now and now[name] != value:
            yield f"cgroup {name} was altered: {value} → {now[name]}"


def _policy_changed(context: Context, instance: Instance, kept: Json) -> Iterator[str]:
    """Compare what the cgroup policies make of its resources now with what they made when it was written."""
    wrote, asked = kept.get("settings"), (instance.want, context.policies)
    if not wrote:
        return
    known = context.policy_digests.get(instance.id)
    if known is None or known[0][0] is not asked[0] or known[0][1] != asked[1]:
        try:
            known = asked, cgroup_settings(context, instance).digest
        except Exception:  # the guard has recorded whose fault it is
            return
        context.policy_digests[instance.id] = known
    if known[1] != wrote:
        yield "its cgroup policies ask for other limits than they did"


# -- what instances share ------------------------------------------------------------------------------------


def _networks(context: Context, things: Things) -> dict[str, NetworkState]:
    found = {}
    for receipt in context.store.receipts("network"):
        whole = receipt.driver in BARE or _healthy(receipt, lambda *thing: things.get(thing))
        found[receipt.id] = network_state(receipt, () if whole else ("it was removed or altered",))
    return found


def network_state(receipt: Receipt, faults: tuple[str, ...] = ()) -> NetworkState:
    """A network as its receipt says."""
    return NetworkState(receipt.id, receipt.driver, str(receipt.data.get("want", "")), receipt.data, faults)


def _volumes(context: Context, things: Things) -> dict[str, VolumeState]:
    found = {}
    for seen in things.values():
        if seen.kind == "volume" and not seen.owner:
            kept = context.store.receipt("volume", seen.id)
            asked = kept.data.get("asked", {}) if kept and kept.driver == seen.driver else None
            faults = altered(kept, seen) if kept and asked is not None else ()
            defined = str(kept.data.get(DEFINED_AS, "")) if kept else ""
            found[seen.id] = VolumeState(seen.id, seen.driver, seen.data, asked, faults, defined)
    return found


def _firewall(context: Context, things: Things) -> tuple[FirewallWant | None, tuple[PublishedPort, ...] | None]:
    """What the table holds, if it is what we wrote last; and the ports that it publishes, if its driver says so."""
    kept, seen = context.store.fact("firewall"), things.get(("firewall", context.host.name))
    if seen is None:
        return None, ()
    if kept is not None and seen.data.get("digest") == digest_of(kept):
        want = firewall_kept(kept)
        return want, want.ports
    ports = seen.data.get("ports")
    return None, None if ports is None else tuple(PublishedPort(**port) for port in ports)


def firewall_kept(kept: Json) -> FirewallWant:
    """What the table held when it was written last, as the store has it."""
    return FirewallWant(
        tuple(FirewallNetwork(**network) for network in kept["networks"]),
        tuple(PublishedPort(**port) for port in kept["ports"]),
    )


def published_now(context: Context) -> tuple[PublishedPort, ...] | None:
    """The ports that the firewall publishes at this moment; None when its driver does not say."""
    driver = context.plugins.of_kind(FIREWALL).get(context.firewall)
    found = found_by(driver) if driver else None
    return None if found is None else _firewall(context, {(each.kind, each.id): each for each in found})[1]


def _unclaimed(
    context: Context, things: Things, known: set[InstanceId]
) -> tuple[tuple[Receipt, ...], tuple[Receipt, ...]]:
    """What nobody has a receipt for: what carries the id of this root, and the rest. What is being made is neither.

    Nor are volumes, which are data. A table is an orphan when it is not as we wrote it last, receipt or none.
    """
    orphans: list[Receipt] = []
    foreign: list[Receipt] = []
    for (kind, id), thing in things.items():
        if kind == "volume" or InstanceId(thing.owner) in known or InstanceId(thing.owner) in context.store.instances:
            continue
        kept = context.store.receipt(kind, id) is not None
        ours = bool(context.host.id) and thing.of_root == context.host.id
        if not kept or kind == "firewall":
            (orphans if ours or kept else foreign).append(thing)
    return tuple(orphans), tuple(foreign)
