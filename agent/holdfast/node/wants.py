"""Build what drivers, policies and the runtime are asked for, from a state file's own words.

A start, a staging and an update ask the same; so it is written once. Nothing here changes the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from holdfast import kinds
from holdfast.drivers import CgroupWant, Driver, EndpointWant, MountWant, NetworkWant, RootfsWant, VolumeWant
from holdfast.errors import TryAgain
from holdfast.images.kept.lookup import View
from holdfast.node.context import BARE, Base, Context, init_program, limits
from holdfast.node.inside import read_file
from holdfast.observed import Instance, Receipt
from holdfast.plan.diff import folder_files
from holdfast.runtime import apparmor, cgroup, names, seccomp, users
from holdfast.runtime.devices import device_nodes
from holdfast.runtime.mountpoints import Mounted, lacking
from holdfast.runtime.oci import OciRequest, granted_capabilities
from holdfast.spec.model import App, Container, Mount, Network, Volume

MEMORY_TOTAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this host
CPUS = os.cpu_count() or 1

# -- of drivers ----------------------------------------------------------------------------------------------


def _of(instance: Instance) -> dict[str, Any]:
    """Say for which container a want is."""
    return {"app": instance.app, "container": instance.container, "labels": instance.want.labels}


def rootfs_want(instance: Instance, layers: tuple[Path, ...]) -> RootfsWant:
    """What a driver of root file systems is asked for."""
    return RootfsWant(instance=instance.id, layers=layers, size=instance.want.storage_opt.size, **_of(instance))


def rootfs_driver(context: Context, instance: str) -> Driver[RootfsWant]:
    """The driver that made an instance's root file system; for a new one that of agent.toml."""
    made = context.store.receipt("rootfs", instance)
    return context.plugins.driver(kinds.ROOTFS, made.driver if made else context.storage_driver)


def volume_want(volume: str, spec: Volume) -> VolumeWant:
    """What a volume driver is asked for."""
    return VolumeWant(id=volume, driver_opts=spec.driver_opts)


def mount_want(context: Context, instance: Instance, app: App, mount: Mount) -> MountWant:
    """What a mount driver is asked for. Raises TryAgain while the source's own file system is not mounted."""
    if reason := lacking(mount, Mounted.now()):
        raise TryAgain(f"mount '{mount.source}' at '{mount.target}': {reason}")
    content = content_of(context, app, mount)
    return MountWant(instance=instance.id, mount=mount, content=content, roots=context.bind_roots, **_of(instance))


def content_of(context: Context, app: App, mount: Mount) -> Path | None:
    """Where the content of a file mount is stored; None for the other kinds."""
    if mount.kind != "file":
        return None
    digest = app.files.get(mount.source) or context.content.store_tree(folder_files(app, mount))
    return context.content.path(digest)


def network_want(network: str, spec: Network, hosts: int) -> NetworkWant:
    """What a network driver is asked for. hosts: how many containers join the network."""
    return NetworkWant(
        id=network,
        subnet=spec.subnet,
        gateway=spec.gateway,
        internal=spec.internal,
        driver_opts=spec.driver_opts,
        hosts=hosts,
    )


def endpoint_wants(context: Context, instance: Instance, space: Path) -> Iterator[tuple[str, EndpointWant | None]]:
    """Each network of an instance with what its endpoint driver is asked for, None while the network does not stand.

    The first network that leads out of the host has the default route.
    """
    routed = False
    for index, (network, attachment) in enumerate(instance.want.networks.items()):
        bare = Receipt("network", network, network) if network in BARE else None
        receipt = bare or context.store.receipt("network", network)
        if receipt is None:
            yield network, None
            continue
        routes = not routed and not receipt.data.get("internal")
        routed |= routes
        want = EndpointWant(
            instance=instance.id,
            network=receipt,
            netns=space,
            interface=f"eth{index}",
            default_route=routes,
            ipv4_address=attachment.ipv4_address,
            mac_address=attachment.mac_address,
            lease=instance.lease,
            **_of(instance),
        )
        yield network, want


# -- of policies and the runtime ------------------------------------------------------------------------------


def cgroup_settings(context: Context, instance: Instance) -> cgroup.Settings:
    """What the policies of a container make of its resources on this host."""
    chosen = [context.plugins.driver(kinds.POLICY, name) for name in policies_of(context, instance.want)]
    asked = cgroup_want(instance)
    for policy in chosen:
        policy.check(asked)
    return cgroup.compose(chosen, asked, cgroup.features(context.runtime.binary.name))


def policies_of(context: Context, want: Container) -> tuple[str, ...]:
    """The policies that a container names, else those of agent.toml; a service class takes `qos` along."""
    if want.resources.policy or want.resources.service_class:
        return cgroup.policy_names(want.resources)
    return context.policies


def cgroup_want(instance: Instance) -> CgroupWant:
    """What a cgroup policy is asked for."""
    asked, version = instance.want.resources, cgroup.version()
    return CgroupWant(resources=asked, version=version, memory_total=MEMORY_TOTAL, cpus=CPUS, **_of(instance))


def oci_request(context: Context, instance: Instance, base: Base, settings: cgroup.Settings) -> OciRequest:
    """Everything of a config.json that can be said before anything is mounted; staging checks it, too.

    The root file system and the network namespace are stand-ins, and the user is root.
    """
    want = instance.want
    granted = granted_capabilities(want, limits())
    if want.apparmor not in ("default", "unconfined"):
        apparmor.require(want.apparmor)
    return OciRequest(
        want=want,
        image=base.config,
        rootfs=Path("/"),
        netns=None if "host" in want.networks else Path("/"),
        hostname=hostname(instance),
        cgroup=context.runtime.next_cgroup(instance.id),
        resources=settings.resources,
        oom_score_adj=settings.oom_score_adj,
        seccomp=seccomp.profile(want.seccomp, granted.names, privileged=want.privileged),
        init=init_program() if want.init else None,
        devices=device_nodes(want),
        limits=limits(),
    )


def user_of(want: Container, base: Base, view: View) -> users.User:
    """Whom a container runs as, by the passwd and group files that it will see."""
    name = want.user if want.user is not None else base.user
    return users.resolve(name, want.group_add, partial(read_file, view))


# -- of the files that every container has ---------------------------------------------------------------------


def hosts_text(instance: Instance, lines: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """What the hosts file of an instance says; lines: of its neighbours."""
    own = [(address, (instance.container,)) for address in instance.addresses.values() if address]
    return names.hosts_text(hostname(instance), own, lines)


def hostname(instance: Instance) -> str:
    """What a container calls itself: its name unless the state file says otherwise."""
    if "host" in instance.want.networks and not instance.want.hostname:
        return os.uname().nodename
    return instance.want.hostname or instance.container
