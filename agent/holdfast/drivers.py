"""The driver contracts: what a driver gets, what it returns, and the four verbs that all drivers have.

    check(want)    raises what would go wrong, touches nothing
    ensure(want)   makes it so, idempotent → Receipt
    observe()      what of this driver is really on the host → Receipts (data as far as it can be read back)
    remove(receipt)  takes it away; succeeds when it is already gone

Drivers are plain blocking functions, called from worker threads, several at once for different ids and never twice
at once for one id. They raise `holdfast.errors`; any other exception is reported as a bug in the driver.
Every host object that a driver makes bears `Host.name`, so that `observe` finds it without a receipt, and says by
`Host.id` for which root it was made: `Receipt.root` of what `observe` yields.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

# X as X: plugins can have it from here, too.
from holdfast.files import open_source as open_source
from holdfast.files import remove_tree as remove_tree
from holdfast.files import roots_above as roots_above
from holdfast.observed import Finding as Finding
from holdfast.observed import FirewallWant as FirewallWant
from holdfast.observed import InstanceId, Json
from holdfast.observed import Receipt as Receipt
from holdfast.spec.model import Mount, Resources

if TYPE_CHECKING:
    from pydantic import BaseModel

COMPLETE_CONTENT = ".holdfast-complete"  # a directory in a volume: its entries are moved up before the next start
BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Host:
    """What a driver may know of its agent: its name and its folders.

    root: survives a reboot (volumes, layers, writable layers). run_root: on tmpfs, does not.
    pool: the IPv4 range that subnets are taken from. name is [a-z][a-z0-9]{0,7}.
    id: of the root, eight hex digits; "" in a command that only looks at a root which no agent has used yet. What is
    made on the host carries it: by the instance's id, which begins with it, or as a mark of its own.
    cgroup_root: the cgroup that is the agent's to write in, "" for the root of the tree.
    """

    name: str
    root: Path
    run_root: Path
    pool: str = "10.209.0.0/16"
    id: str = ""
    cgroup_root: str = field(default="", kw_only=True)

    def link(self, kind: str, id: str) -> str:
        """A link name for id, at most 15 characters (IFNAMSIZ - 1): `NAME-xxxxxx`."""
        number = int.from_bytes(hashlib.sha256(f"{kind}:{id}".encode()).digest()[:8], "big")
        tail = "".join(BASE36[number // 36**place % 36] for place in range(6))
        return f"{self.name}-{tail}"

    def netns(self, instance: str) -> Path:
        """Where the network namespace of an instance is bound, as ip-netns(8) has it."""
        return Path("/run/netns") / f"{self.name}-{instance}"

    def instance(self, instance: str) -> Path:
        """The run folder of an instance (bundle, mounted root file system)."""
        return self.run_root / "instances" / instance

    def files(self, instance: str) -> Path:
        """What an instance may write to below run_root: hosts, hostname, resolv.conf, copies of files.

        A small file system of its own, and an empty one at each start. What is not the agent's has a name that
        begins with `%2F`: the quoted path in the container.
        """
        return self.instance(instance) / "files"

    def new_instance(self) -> InstanceId:
        """An id for a new instance, `ROOTID-xxxxxxxx`: whatever is named after it says whose it is."""
        return InstanceId(f"{self.id}-{secrets.token_hex(4)}")

    @property
    def cgroup(self) -> str:
        """The parent cgroup of every container, relative to each hierarchy's root."""
        return f"{self.cgroup_root}/{self.name}"

    @property
    def cgroups(self) -> tuple[str, ...]:
        """Where containers of this agent can be: in `cgroup`, and where earlier versions have put them."""
        return tuple(dict.fromkeys((self.cgroup, f"/{self.name}")))


@dataclass(frozen=True, slots=True, kw_only=True)
class OfContainer:
    """For which container a want is: the names of its app and of itself, and its labels in the state file.

    All empty where it is made for a build.
    """

    app: str = ""
    container: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RootfsWant(OfContainer):
    """A root file system for one instance: read-only layers, lowest first, under a writable one of its own.

    size: how many bytes the writable layer may hold (None: no limit); a driver that can't see to that refuses it in
    `check`. Receipt: kind "rootfs", id = owner = instance, data["path"] = the mounted directory,
    data["upper"] = the writable layer.
    """

    instance: str
    layers: tuple[Path, ...]
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeWant:
    """A named volume. A new one is empty: the core fills it from the image, once, and before anything runs on it.

    driver_opts: tables and lists as they are written, numbers and booleans as text; `tables.read_options` reads them
    with a model (`Optioned`). app: the first part of id.
    Receipt: kind "volume", id = `app/name`, owner "", data["path"] = the directory to mount.
    """

    id: str
    driver_opts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def app(self) -> str:
        return self.id.partition("/")[0]

    @property
    def seed(self) -> None:
        """None: what a driver written for an earlier version would have filled a volume from."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MountWant(OfContainer):
    """A mount of one instance that is not a named volume. mount.kind is the driver's name: bind, tmpfs, file, …

    mount.driver_opts: as of a VolumeWant.
    content: for kind file, where the revision's content is stored (file or directory). roots: for kind bind, where on
    this host the source may lie once its links are followed (`files.open_source`); None: anywhere.
    Receipt: kind "volume", id = `instance:target`, owner = instance, data = {"type", "source", "options"} as an
    entry of `mounts` in the OCI runtime spec.
    """

    instance: str
    mount: Mount
    content: Path | None = None
    roots: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkWant:
    """A network. subnet None: taken from Host.pool, and kept. hosts: how many containers are to have addresses.

    driver_opts: as of a VolumeWant. app: whose it is, "" for the networks of the agent (`bridge`, `build`).
    Receipt: kind "network", id = `app/name` or `bridge`, owner "", data["interface"], data["subnet"],
    data["gateway"], data["internal"], data["hosts"] (how many containers it has addresses for now, where it can grow:
    it is ensured again when more are to join it; absent where it can't).
    """

    id: str
    subnet: str | None = None
    gateway: str | None = None
    internal: bool = False
    driver_opts: Mapping[str, Any] = field(default_factory=dict)
    hosts: int = 0

    @property
    def app(self) -> str:
        return self.id.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointWant(OfContainer):
    """The attachment of one instance's network namespace to one network.

    network: the receipt of the network. interface: its name inside (eth0, …). default_route: whether this network is
    its way out. lease: whose address it is, `app/container/slot`: who comes after the instance under that name gets
    the same address. "" is the instance's own.
    predecessor: in `check` alone, the endpoint that stands now and will be gone when this one is made, so that what
    it holds is free by then. None: nothing will go. In `check`, instance and netns are stand-ins.
    Receipt: kind "endpoint", id = `instance/network`, owner = instance, data["address"] (without prefix length; "" if
    it has none), data["interface"], data["host_interface"].
    """

    instance: str
    network: Receipt
    netns: Path
    interface: str
    default_route: bool
    ipv4_address: str | None = None
    mac_address: str | None = None
    lease: str = ""
    predecessor: Receipt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupWant(OfContainer):
    """What a cgroup policy turns into kernel settings, and the host it does so for."""

    resources: Resources
    version: int  # of the cgroup tree that owns the memory and cpu controllers: 1 or 2
    memory_total: int
    cpus: int


W = TypeVar("W", contravariant=True)


class Driver(Protocol[W]):
    """The four verbs; W is one of the wants above."""

    name: str

    def check(self, want: W) -> None:
        """Raise what `ensure(want)` would, as far as that is knowable; touch nothing."""

    def ensure(self, want: W) -> Receipt:
        """Make it so and say what was made. Calling it again changes nothing and returns an equal receipt."""
        ...

    def observe(self) -> Iterable[Receipt]:
        """Read what of this driver is on the host: one receipt for each, with an empty data where unreadable."""
        ...

    def remove(self, receipt: Receipt) -> None:
        """Take it away, even from a receipt without data; succeed when it is gone already."""


class Optioned(Protocol):
    """What a driver may have besides: a model of its `driver_opts`, a `keys.Table`; state files are checked by it."""

    options: type[BaseModel]


class Versioned(Protocol):
    """What a driver may have besides: a number for the form of its receipts, which grows when that changes.

    A driver without has version 1. While receipts of a newer version are stored, the driver is not used.
    """

    receipt_version: int

    def migrate(self, receipt: Receipt) -> Receipt:
        """Return a receipt of an older version (`Receipt.version`) in today's form; change nothing on the host."""
        ...


class Watching(Protocol):
    """What a driver may have besides: it notices by itself when something that it made is changed."""

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Start to look, in a thread of the driver's own, and return a function that ends it.

        tell(subject, what): have the host looked at anew, and what, unless it is "", written to the event log. The
        subject is that of the plan: `firewall`, `network shop/front`.
        """
        ...


class Releasing(Protocol):
    """What a mount driver may have beside the four verbs."""

    def release(self, receipt: Receipt) -> None:
        """Let go of what the runtime needed for the start alone; called once the container has its own mount."""


class Telling(Protocol):
    """What a driver may have besides: it reports what others did to the host that defeats its work."""

    def findings(self) -> Iterable[Finding]:
        """Say what a person should know now. Part of every pass: quick, and without a process."""
        ...


class CgroupPolicy(Protocol):
    """Pure: turns a resources table into OCI settings. Several policies compose, later ones win key by key."""

    name: str

    def check(self, want: CgroupWant) -> None:
        """Raise WrongState if the table can't be turned into settings on this host."""

    def settings(self, want: CgroupWant) -> Json:
        """The contribution: {"resources": linux.resources of the OCI runtime spec, "oom_score_adj": int}."""
        ...
