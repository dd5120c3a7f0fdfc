"""Every kind of driver in one table: whatever differs between the kinds is written in their entries.

Loading (`plugins`), checking what drivers return (`guard`), observing, removing (`node`) and testing (`testing`) ask
this table. A new kind is its want (`drivers`), its hook (`hookspecs`) and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Generic, TypeVar

from holdfast import drivers, hookspecs
from holdfast.observed import Json, Kind, Receipt

D = TypeVar("D")

VERBS = ("check", "ensure", "observe", "remove")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DriverKind(Generic[D]):
    """What the agent knows of one kind of driver. D is the type that callers get.

    name          as in `holdfast plugin list`
    want          what its verbs are asked for
    hook          the hook that offers its drivers; kinds that share a hook are offered together
    verbs         what each driver must have; optional: what it may have besides
    receipt       the kind of its receipts, None if it makes none; owned: whether they belong to an instance
    subject       want → the id and the owner that its receipt must have
    required      the keys of a receipt's data that others read, all of them text
    misfit        what else in the data others could not make sense of, "" if nothing
    kept          the keys that the core adds to the data of a receipt that it stores
    driver_opts   want → what messages call it, and the options in it; None if it has none
    chosen        whether state files name its drivers; reserved: names that a driver can't have
    observed      whether every pass asks its drivers what is there; if not, only receipts say so
    """

    name: str
    want: type
    hook: Callable[..., None]
    verbs: tuple[str, ...] = VERBS
    optional: tuple[str, ...] = ()
    receipt: Kind | None = None
    owned: bool = False
    subject: Callable[[Any], tuple[str, str] | None] = lambda want: None
    required: tuple[str, ...] = ()
    misfit: Callable[[Json], str] = lambda data: ""
    kept: tuple[str, ...] = ()
    driver_opts: Callable[[Any], tuple[str, Mapping[str, Any]]] | None = None
    chosen: bool = False
    reserved: tuple[str, ...] = ()
    observed: bool = True

    @property
    def conformance(self) -> str:
        """The class in `holdfast.testing` that its drivers have to pass."""
        return f"{self.name.title()}Conformance"

    def title(self, driver: str) -> str:
        """What messages call a driver of this kind."""
        return f"{self.name} driver {driver!r}" if self.receipt else f"cgroup {self.name} {driver!r}"


def _unlike(form: Callable[[str], object], key: str, data: Json) -> str:
    """Addresses go into everybody's firewall; a driver without addresses says "" for them."""
    try:
        if data[key]:
            form(data[key])
    except ValueError as error:
        return f"data[{key!r}] is no {key}: {error}"
    return ""


def _no_options(data: Json) -> str:
    """The options go into config.json."""
    options = data.get("options")
    return "" if isinstance(options, list | tuple) else f"data['options'] is {options!r} (expected a list)"


ROOTFS: DriverKind[drivers.Driver[drivers.RootfsWant]] = DriverKind(
    name="rootfs",
    want=drivers.RootfsWant,
    hook=hookspecs.register_rootfs_drivers,
    receipt="rootfs",
    owned=True,
    subject=lambda want: (want.instance, want.instance),
    required=("path",),
)
VOLUME: DriverKind[drivers.Driver[drivers.VolumeWant]] = DriverKind(
    name="volume",
    want=drivers.VolumeWant,
    hook=hookspecs.register_volume_drivers,
    receipt="volume",
    subject=lambda want: (want.id, ""),
    required=("path",),
    kept=("content", "asked", "defined_as"),
    driver_opts=lambda want: (f"volume {want.id!r}", want.driver_opts),
    chosen=True,
)
MOUNT: DriverKind[drivers.Driver[drivers.MountWant]] = DriverKind(
    name="mount",
    want=drivers.MountWant,
    hook=hookspecs.register_mount_drivers,
    optional=("release", "refresh"),
    receipt="volume",
    owned=True,
    subject=lambda want: (f"{want.instance}:{want.mount.target}", want.instance),
    required=("type", "source"),
    misfit=_no_options,
    driver_opts=lambda want: (f"{want.mount.kind} mount at {want.mount.target!r}", want.mount.driver_opts),
    chosen=True,
    reserved=("volume",),
    observed=False,
)
NETWORK: DriverKind[drivers.Driver[drivers.NetworkWant]] = DriverKind(
    name="network",
    want=drivers.NetworkWant,
    hook=hookspecs.register_network_drivers,
    receipt="network",
    subject=lambda want: (want.id, ""),
    required=("interface", "subnet", "gateway"),
    misfit=partial(_unlike, IPv4Network, "subnet"),
    kept=("want", "joined"),
    driver_opts=lambda want: (f"network {want.id!r}", want.driver_opts),
    chosen=True,
)
ENDPOINT: DriverKind[drivers.Driver[drivers.EndpointWant]] = DriverKind(
    name="endpoint",
    want=drivers.EndpointWant,
    hook=hookspecs.register_network_drivers,
    receipt="endpoint",
    owned=True,
    subject=lambda want: (f"{want.instance}/{want.network.id}", want.instance),
    required=("address", "interface", "host_interface"),
    misfit=partial(_unlike, IPv4Address, "address"),
)
FIREWALL: DriverKind[drivers.Driver[drivers.FirewallWant]] = DriverKind(
    name="firewall",
    want=drivers.FirewallWant,
    hook=hookspecs.register_firewall_drivers,
    receipt="firewall",
)
POLICY: DriverKind[drivers.CgroupPolicy] = DriverKind(
    name="policy",
    want=drivers.CgroupWant,
    hook=hookspecs.register_cgroup_policies,
    verbs=("check", "settings"),
    chosen=True,
    observed=False,
)

#: In the order in which drivers are offered.
KINDS: tuple[DriverKind[Any], ...] = (ROOTFS, VOLUME, MOUNT, NETWORK, ENDPOINT, FIREWALL, POLICY)

_BY_WANT = {kind.want: kind for kind in KINDS}
_BY_RECEIPT = {(kind.receipt, kind.owned): kind for kind in KINDS}


def kind_of(receipt: Receipt) -> DriverKind[Any] | None:
    """The kind of driver that made a thing; None for what the core makes itself."""
    return _BY_RECEIPT.get((receipt.kind, bool(receipt.owner)))


def kind_of_want(want: Any) -> DriverKind[Any]:
    """The kind of driver that a want is for."""
    return _BY_WANT[type(want)]


def offers() -> list[tuple[str, tuple[DriverKind[Any], ...]]]:
    """Each hook that offers drivers, with the kinds that it offers together."""
    hooks = dict.fromkeys(kind.hook for kind in KINDS)
    return [(hook.__name__, tuple(kind for kind in KINDS if kind.hook is hook)) for hook in hooks]
