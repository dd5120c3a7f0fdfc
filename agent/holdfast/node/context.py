"""What the verbs of the node work with: the agent's places, its memory, its drivers, its runtime."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from holdfast import kinds
from holdfast.drivers import Host
from holdfast.errors import NotFound
from holdfast.files import open_source
from holdfast.images.builds.build import Builder
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfers
from holdfast.images.kept.store import ImageStore
from holdfast.mounts import MountPoint
from holdfast.observed import Instance, InstanceId, Json, Limits, Receipt
from holdfast.plan.diff import folder_files
from holdfast.plugins import Plugins
from holdfast.runtime.binaries import find_init, host_limits
from holdfast.runtime.conmon import Run, Runtime, boot_id
from holdfast.runtime.content import ContentStore
from holdfast.runtime.limits_watch import LimitsWatch
from holdfast.runtime.seccomp import Filters
from holdfast.spec.model import App, Container, Network, Volume
from holdfast.store import Store

Judged = tuple[Sequence[MountPoint], int | None, tuple[str, ...]]  # all mounts, the pid, what is outdated
ROOTFS = "rootfs:"  # how an image digest starts that is a directory of the host
BARE = frozenset({"none", "host"})  # networks that are not made: loopback alone, and the host's own
limits, init_program = cache(host_limits), cache(find_init)  # of this host, asked once


class Ending:
    """Says that the agent is about to end, to threads that wait for something else as well (fd is readable then)."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False

    def __del__(self) -> None:
        os.close(self.fd)

    def set(self) -> None:
        self.is_set = True
        os.eventfd_write(self.fd, 1)


@dataclass(slots=True)
class Context:
    """All that the code of `node` works with: one per agent, shared by its threads.

    resolved: image reference → what its registry said last: the digest it leads to,
    and that of the image for this host.
    limits: what the cgroup of each running instance held when it was last written or read.
    builds: the owners of builds under way, whose resources on this host carry the agent's name.
    policy_digests: instance → what it and agent.toml ask for, and the digest of what the cgroup policies make of it.
    records_exits: whether the end of a process is stored when it is found. False in a command that runs without an
    agent: it only looks, and an agent that starts meanwhile must not find its own record overwritten.
    """

    host: Host
    store: Store
    plugins: Plugins
    images: ImageStore
    puller: Puller
    builder: Builder
    content: ContentStore
    runtime: Runtime
    storage_driver: str = "overlay"
    firewall: str = "nftables"
    policies: tuple[str, ...] = ("limits",)
    bind_roots: tuple[str, ...] | None = None
    filters: Filters = field(default_factory=Filters)
    transfers: Transfers = field(default_factory=Transfers)
    records_exits: bool = True
    ending: Ending = field(default_factory=Ending)
    _volume_locks: dict[str, threading.Lock] = field(default_factory=dict)
    builds: set[str] = field(default_factory=set)
    limits: dict[InstanceId, Limits] = field(default_factory=dict)
    limits_watch: LimitsWatch = field(default_factory=LimitsWatch)
    stale: dict[InstanceId, tuple[str, ...]] = field(default_factory=dict)  # see node.stale
    stale_judged: dict[InstanceId, tuple[Sequence[MountPoint], int | None, tuple[str, ...]]] = field(
        default_factory=dict
    )
    runs: dict[str, tuple[Receipt, Run]] = field(default_factory=dict)  # see run_of
    resolved: dict[str, tuple[str, str]] = field(default_factory=dict)
    policy_digests: dict[InstanceId, tuple[tuple[Container, tuple[str, ...]], str]] = field(default_factory=dict)

    def base(self, digest: str) -> Base:
        """What a container's root file system starts from. Raises NotFound if it is not there any more."""
        if digest.startswith(ROOTFS):
            path = Path(digest.removeprefix(ROOTFS))
            self.check_bind(str(path))
            if not path.is_dir():
                raise NotFound(f"rootfs '{path}': is not a directory of this host")
            return Base((path,), {})
        layers, config = self.images.base(digest)
        return Base(layers, {"config": config})

    def check_bind(self, path: str) -> None:
        """Raise WrongState for a path of the host that leads out of agent.toml's bind_roots, links followed.

        The state language compares the words; what a link on the host makes of them is known here only.
        """
        if self.bind_roots is not None:
            with suppress(FileNotFoundError):  # whoever needs it says so
                os.close(open_source(path, self.bind_roots))

    @property
    def apparmor_profile(self) -> str:
        """What the AppArmor profile of this agent's containers is called."""
        return f"{self.host.name}-default"

    def volume_lock(self, volume: str) -> threading.Lock:
        """What whoever makes, fills or removes a volume holds meanwhile."""
        return self._volume_locks.setdefault(volume, threading.Lock())

    def log_path(self, target: str) -> Path:
        """Where the output of `app/container` goes, whichever instance writes it."""
        return self.host.root / "logs" / f"{target}.log"

    def prune_content(self, wanted: Iterable[str]) -> None:
        """Delete stored files that neither a kept generation mounts nor wanted (what may be staged now) names."""
        keep = set(wanted)
        for app in [each.app for kept in self.store.history().generations.values() for each in kept]:
            keep.update(app.files.values())
            mounts = (mount for want in app.containers.values() for mount in want.mounts if mount.kind == "file")
            folders = (mount for mount in mounts if mount.source not in app.files)
            keep.update(self.content.store_tree(folder_files(app, mount)) for mount in folders)
        self.content.prune(keep)

    def run_of(self, instance: str) -> Run | None:
        """The processes of an instance, from its receipt."""
        receipt = self.store.receipt("run", instance)
        if receipt is None:
            self.runs.pop(instance, None)
            return None
        known = self.runs.get(instance)
        if known is None or known[0] is not receipt:
            known = self.runs[instance] = receipt, Run(**receipt.data["run"])
        return known[1]

    def same_boot(self) -> bool:
        """Whether the run root is the one that the instances were started under: a reboot takes it away."""
        return bool(self.boot) and self.store.fact("boot") == self.boot

    @property
    def boot(self) -> str:
        """What names this life of the run root: the kernel's boot id and a token kept in it; "" when it is gone."""
        try:
            return f"{boot_id()} {(self.host.run_root / 'boot').read_text()}"
        except FileNotFoundError:
            return ""

    @property
    def empty(self) -> bool:
        """Whether nothing on the host is the agent's, data aside."""
        return not (self.store.instances or self.store.receipts("network") or self.store.receipts("firewall"))

    def leave(self) -> None:
        """Take the run root away when nothing is held that it could tell of; what others put there stays."""
        if self.store.instances:
            return
        self.runtime.leave()
        (self.host.run_root / "boot").unlink(missing_ok=True)
        with suppress(OSError):
            for place in (*self.host.run_root.iterdir(), self.host.run_root):
                place.rmdir()

    def mark_boot(self) -> None:
        """Give a new run root its token."""
        token = self.host.run_root / "boot"
        if not token.exists():
            self.host.run_root.mkdir(parents=True, exist_ok=True)
            token.write_text(uuid.uuid4().hex)
        self.store.put_fact("boot", self.boot)


@dataclass(frozen=True, slots=True)
class Base:
    """Layers, lowest first, and the OCI image configuration that comes with them."""

    layers: tuple[Path, ...]
    config: Json

    @property
    def user(self) -> str:
        """Whom the image runs as, "" if it does not say."""
        return str((self.config.get("config") or {}).get("User") or "")


def network_of(context: Context, network: str, app: App | None = None) -> Network:
    """How a network is defined: by the app itself, or by the newest generation of the app that it belongs to."""
    return _definer(context, network, app).networks.get(network.rpartition("/")[2], Network())


def volume_of(context: Context, app: App, volume: str) -> Volume:
    """How a volume is defined: by the app itself, or by the newest generation of the app that it belongs to."""
    return _definer(context, volume, app).volumes.get(volume.rpartition("/")[2], Volume())


def _definer(context: Context, thing: str, app: App | None) -> App:
    owner = thing.rpartition("/")[0]
    if app is not None and owner == app.name:
        return app
    newest = context.store.history().newest(owner)
    return newest.app if newest else App(name=owner, path="")


def fallback_receipts(context: Context, instance: Instance) -> list[Receipt]:
    """What an instance may have left without a receipt, in the order in which it is made."""
    left = [Receipt("rootfs", name, instance.id, instance.id) for name in context.plugins.of_kind(kinds.ROOTFS)]
    left.append(Receipt("netns", "kernel", instance.id, instance.id))
    for network in instance.want.networks:
        driver = network_of(context, network).driver
        if network not in BARE and driver in context.plugins.of_kind(kinds.ENDPOINT):
            left.append(Receipt("endpoint", driver, f"{instance.id}/{network}", instance.id))
    return left
