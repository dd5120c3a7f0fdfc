"""Every extension point, in the order in which the agent calls them: the plugin author's manual.

A plugin is a module (or object) in the entry-point group `holdfast` that implements any of these with
`from holdfast.hookspecs import hookimpl`. Offering hooks hand over drivers once, when the agent starts. Telling hooks
report what happened, in a thread of the plugin's own, and can't change it: `holdfast plugin list` shows what they
raise, and the rest goes on. An implementation names the parameters that it needs, and gets no others.

Every hook has host (the agent's name and places) and settings (the plugin's `Settings`, read from its table
[plugins.NAME] in agent.toml; None if the plugin has no such model).
Built-in drivers come in by the same door (`holdfast_plugins`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from holdfast.observed import Json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdfast.drivers import (
        CgroupPolicy,
        Driver,
        EndpointWant,
        FirewallWant,
        Host,
        MountWant,
        NetworkWant,
        RootfsWant,
        VolumeWant,
    )

#: What is offered to plugins here: it grows by one when something is added that a plugin may rely on. A plugin that
#: says `api_version = N` is loaded where N is offered; one that says nothing was written for version 1.
API_VERSION = 2
OLDEST_API = 1

hookspec = pluggy.HookspecMarker("holdfast")
hookimpl = pluggy.HookimplMarker("holdfast")


class RegisterNetwork(Protocol):
    """Takes a network driver together with the driver of its endpoints; both bear the same name."""

    def __call__(self, network: Driver[NetworkWant], endpoints: Driver[EndpointWant]) -> None: ...


@hookspec
def register_rootfs_drivers(register: Callable[[Driver[RootfsWant]], None], host: Host, settings: Any) -> None:
    """Offer drivers that make root file systems out of layers; agent.toml names the one for new containers.

    register: call it with each driver.
    """


@hookspec
def register_volume_drivers(register: Callable[[Driver[VolumeWant]], None], host: Host, settings: Any) -> None:
    """Offer drivers of named volumes, as `[volumes.x] driver = "…"` names them."""


@hookspec
def register_mount_drivers(register: Callable[[Driver[MountWant]], None], host: Host, settings: Any) -> None:
    """Offer drivers of unnamed mounts; a driver's name is the `type` of the mounts that it makes."""


@hookspec
def register_network_drivers(register: RegisterNetwork, host: Host, settings: Any) -> None:
    """Offer network drivers, as `[networks.x] driver = "…"` names them, each with its endpoints."""


@hookspec
def register_firewall_drivers(register: Callable[[Driver[FirewallWant]], None], host: Host, settings: Any) -> None:
    """Offer drivers that hold port maps, masquerading and isolation; agent.toml names the one in use."""


@hookspec
def register_cgroup_policies(register: Callable[[CgroupPolicy], None], host: Host, settings: Any) -> None:
    """Offer cgroup policies, as `resources.policy` names them."""


@hookspec
def adjust_oci_config(
    app: str, container: str, labels: Mapping[str, str], config: Json, host: Host, settings: Any
) -> Json | None:
    """Contribute to a container's config.json before it is created.

    app, container, labels: whose it is, and its labels in the state file. config: what the agent would write (OCI
    runtime spec), not to be changed in place. Return a JSON merge patch (RFC 7396), or None.
    """


@hookspec
def after_stage(app: str, generation: int, error: str, host: Host, settings: Any) -> None:
    """Hear that a generation is staged, or with error non-empty that it could not be."""


@hookspec
def after_start(app: str, container: str, instance: str, pid: int, host: Host, settings: Any) -> None:
    """Hear that an instance runs."""


@hookspec
def after_exit(app: str, container: str, instance: str, exit: dict[str, Any], host: Host, settings: Any) -> None:
    """Hear that an instance ended: exit has code, signal, oom, at."""


@hookspec
def after_outcome(outcome: dict[str, Any], host: Host, settings: Any) -> None:
    """Hear what one action did: action, subject, reason, ok, error, took (seconds)."""


@hookspec
def after_pass(status: dict[str, Any], host: Host, settings: Any) -> None:
    """Hear the status at the end of a pass that changed it."""
