"""The nouns of the state language: what one node is asked to hold, typed, frozen and JSON-able.

A value of these types is *resolved*: interpolated, validated across files, with qualified names
(network and volume keys are `app/name`, or one of the built-in `none`, `host`, `bridge`).
`spec.load` makes them; everything downstream only reads them.

Units: sizes are bytes, durations are seconds, CPU is in cores, rates are per second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from holdfast.grammar.network import port_text
from holdfast.toml import one_line

BUILTIN_NETWORKS = ("none", "host", "bridge")
BUILD_NETWORK = "build"  # which builds join, and no container
DEFAULT_NETWORK = "default"  # of an app: what its containers join that name no network

AppNetwork = Literal["default", "bridge"]

DEFAULT_PIDS = 2048  # processes and threads of a container that names no limit

OnChange = Literal["restart", "none"] | str  # or a signal's name, as "SIGHUP"


class Frozen(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))


class When(Frozen):
    """Which nodes an app is for: any of the name globs, and all of the labels."""

    nodes: tuple[str, ...] = ()
    labels: dict[str, str] = {}


class Port(Frozen):
    """One published port, or a range of `count` consecutive ones. host_ip "" means every address."""

    host_ip: str = ""
    host_port: int
    container_port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    count: int = 1

    def __str__(self) -> str:
        return port_text(self.host_ip, self.host_port, self.container_port, self.protocol, self.count)

    def overlaps(self, other: Port) -> bool:
        """Say whether both can't be published at once."""
        places = {self.host_ip, other.host_ip}
        near = -other.count < other.host_port - self.host_port < self.count
        return self.protocol == other.protocol and near and ("" in places or len(places) == 1)


class Mount(Frozen):
    """Something mounted into a container.

    kind      source
    bind      an absolute path of the host
    volume    a volume's qualified name, `app/name`
    tmpfs     "" (size and mode apply)
    file      a path in the revision, file or directory; its digest is in App.files

    nocopy: a new volume does not start with what the image has at the target. require_mount: the source must lie on
    a file system that is mounted below /; None: on the one that fstab(5) names, if it names one.
    """

    kind: Literal["bind", "volume", "tmpfs", "file"]
    source: str = ""
    target: str
    read_only: bool = False
    nocopy: bool = False
    create_host_path: bool = False
    require_mount: bool | None = None
    on_change: OnChange = "restart"
    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None


class Attachment(Frozen):
    """How a container is attached to one network."""

    aliases: tuple[str, ...] = ()
    ipv4_address: str | None = None
    mac_address: str | None = None


class Device(Frozen):
    """A device node of the host inside the container; permissions as in cgroup v1's devices.allow."""

    source: str
    target: str
    permissions: str = "rwm"


class Ulimit(Frozen):
    """A resource limit (getrlimit(2)); -1 is unlimited."""

    soft: int
    hard: int


class RestartPolicy(Frozen):
    """When an exited container runs again. The n-th restart in a row waits delay * factor**(n-2); the first none.

    once: restart = "no" was written, so what a shutdown of the host has ended is not begun again either.
    """

    policy: Literal["no", "on-failure", "always", "unless-stopped"] = "no"
    max_attempts: int | None = None
    delay: float = 0.1
    factor: float = 2.0
    max_delay: float = 60.0
    reset_after: float = 10.0
    jitter: float = 0.1
    once: bool = False


class Resources(Frozen):
    """What a container may use; every field is changeable while it runs. None: no limit.

    pids: -1 is no limit. None stands for it, too, in what an earlier version wrote down.
    """

    memory: int | None = None
    memory_swap: int | None = None
    memory_reservation: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpuset: str | None = None
    pids: int | None = DEFAULT_PIDS
    io_weight: int | None = None
    device_read_bps: dict[str, int] = {}
    device_write_bps: dict[str, int] = {}
    device_read_iops: dict[str, int] = {}
    device_write_iops: dict[str, int] = {}
    oom_score_adj: int | None = None
    service_class: Literal["guaranteed", "burstable", "besteffort"] | None = None
    policy: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """All of it as JSON: equal tables have equal texts."""
        return self.model_dump_json()


class Logging(Frozen):
    """How much of a container's output is kept: max_files files of max_size bytes."""

    max_size: int = 10 * 1024 * 1024
    max_files: int = 3


class UpdateImage(Frozen):
    """Whether and how often a registry is asked for a newer image than the one that runs.

    policy: notify says so, apply stages it. tag_pattern: a glob (fnmatch(3)) of the tags that count, of which the
    newest version above the tag of `image` is taken; None: what that tag itself names now.
    """

    policy: Literal["notify", "apply"]
    interval: float = 3600.0
    tag_pattern: str | None = None


class StorageOpt(Frozen):
    """What is asked of a container's root file system. size: how much its writable layer may hold."""

    size: int | None = None


class Container(Frozen):
    """One container, resolved. Exactly one of image and rootfs is set.

    image: a reference, or `images.app/name` for one of App.images.
    networks: qualified network key → attachment; {"none": …} and {"host": …} stand alone.
    mounts: volumes and configs, in the order in which they are mounted; those of volumes_from come last.
    volumes_from: containers of the same app whose mounts it has, too → rw or ro.
    depends_on: name of a container of the same app → what it must have reached.
    """

    image: str | None = None
    pull: Literal["missing", "always", "newer", "never"] = "missing"
    update_image: UpdateImage | None = None
    rootfs: str | None = None
    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    environment: dict[str, str] = {}
    hostname: str | None = None
    labels: dict[str, str] = {}
    ports: tuple[Port, ...] = ()
    networks: dict[str, Attachment] = {"bridge": Attachment()}
    mounts: tuple[Mount, ...] = ()
    volumes_from: dict[str, Literal["rw", "ro"]] = {}
    storage_opt: StorageOpt = StorageOpt()
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    no_new_privileges: bool = True
    seccomp: str = "default"  # default | unconfined | an absolute path of the host
    apparmor: str = "default"  # default | unconfined | a profile that the host has loaded
    read_only: bool = False
    devices: tuple[Device, ...] = ()
    sysctls: dict[str, str] = {}
    ulimits: dict[str, Ulimit] = {}
    group_add: tuple[str, ...] = ()
    init: bool = False
    shm_size: int = 64 * 1024 * 1024
    pid: Literal["host"] | None = None
    ipc: Literal["host"] | None = None
    stop_signal: str | None = None
    stop_grace_period: float = 10.0
    restart_policy: RestartPolicy = RestartPolicy()
    depends_on: dict[str, Literal["started", "completed"]] = {}
    resources: Resources = Resources()
    logging: Logging = Logging()


class Network(Frozen):
    """A network that an app defines."""

    driver: str = "bridge"
    subnet: str | None = None
    gateway: str | None = None
    internal: bool = False
    driver_opts: dict[str, str] = {}

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the definition: a network made of another one is made anew."""
        return digest_of(self.model_dump(mode="json"))


class Volume(Frozen):
    """A volume that an app defines. Its data outlives the app unless on_remove is "delete"."""

    driver: str = "managed"
    driver_opts: dict[str, str] = {}
    on_remove: Literal["keep", "delete"] = "keep"


class Build(Frozen):
    """An image that is built on the node from files of the revision.

    key: sha256 (hex) of all that the result depends on: the context's files after .dockerignore, the Dockerfile,
    args, target, platforms, labels, network, and the keys of bases. What has been built by a key is not built again.
    context, dockerfile: paths in the revision, for people. tree: digest (hex) of the context's listing, a blob of
    canonical JSON: path below the context → [sha256 (hex) of the content, executable?]. instructions: digest of the
    Dockerfile's content. bases: a name as the Dockerfile writes it → the qualified name of the image it stands for.
    tags: further names of the result; push brings them to their registries. platforms: () is this node's alone.
    network: what its steps reach; default is a network of their own that leads out.
    """

    key: str
    context: str
    dockerfile: str
    tree: str
    instructions: str
    args: dict[str, str] = {}
    target: str | None = None
    platforms: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    network: Literal["default", "host", "none"] = "default"
    bases: dict[str, str] = {}
    tags: tuple[str, ...] = ()
    push: bool = False
    pull: Literal["missing", "always", "newer", "never"] = "missing"
    no_cache: bool = False


class App(Frozen):
    """One state file: the unit of change, of failure and of rollback.

    path: the state file in the revision. files: every revision file that a container mounts → its digest (hex), as
    `digest_of_file` makes it.
    networks and volumes are keyed by their short names; their qualified names are `app/name`. The network `default`
    is there if a container joins it, whether the state file defines it or not.
    images: by qualified name, whatever app defines it, all that must be built for this app: what its containers
    run, what it pushes, and what these are built from.
    """

    name: str
    path: str
    depends_on: tuple[str, ...] = ()
    containers: dict[str, Container] = {}
    networks: dict[str, Network] = {}
    volumes: dict[str, Volume] = {}
    images: dict[str, Build] = {}
    files: dict[str, str] = {}

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the app's canonical JSON, mounted files included."""
        return digest_of(self.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in one state file; str() is the line that a person reads."""

    path: str
    line: int
    message: str
    key: str = ""
    column: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))
        object.__setattr__(self, "key", one_line(self.key))

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" + (f":{self.column}" if self.column else "")
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
"""The addresses that belong to nobody in particular: RFC 1918."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the state language may ask about the node: names for `when`, values for `${…}`, rules for privilege.

    forbid: rules of agent.toml's [policy] that a state file may not break, as `spec.policy` names them.
    bind_roots: where bind mounts may come from; None means anywhere. cap_add: capabilities that every container gets
    besides, unless it drops them. subnets: the ranges that a network's subnet may be in.
    network: what containers join that name none, in apps that do not say: a network of the app's own, or the bridge
    that all such apps share.
    drivers: kind of driver (volume, network, policy) → the names that plugins offer; None where that is not known.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    vars: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    forbid: frozenset[str] = frozenset()
    bind_roots: tuple[str, ...] | None = None
    cap_add: tuple[str, ...] = ()
    subnets: tuple[str, ...] = PRIVATE
    drivers: Mapping[str, frozenset[str]] | None = None
    network: AppNetwork = "default"


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything one revision asks of this node.

    apps: what loads, by name. broken: state files that do not load → the names that their apps may have
    (those apps stay at their last good generation). problems: all of them, in file and line order.
    blobs: digest (hex, `digest_of_file`) → content of every file that some app mounts, or builds an image from.
    hints: what is not wrong and yet may not be what somebody meant, a line each. revision: its id (`Revision.id`).
    """

    apps: Mapping[str, App] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    hints: tuple[str, ...] = ()
    revision: str = ""


def digest_of_file(content: bytes, *, executable: bool = False) -> str:
    """The sha256 (hex) of a file of the revision; that of a program is another one than that of its bytes alone."""
    return hashlib.sha256(b"executable\0" + content if executable else content).hexdigest()


def digest_of(value: Any) -> str:
    """The sha256 (hex) of a JSON-able value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
