"""The nouns of the state language: what one node is asked to hold, typed, frozen and JSON-able.

A value of these types is *resolved*: interpolated, validated across files, with qualified names
(network and volume keys are `app/name`, or one of the built-in `none`, `host`, `bridge`).
`spec.load` makes them; everything downstream only reads them.

A key that means the same in a state file and here is declared here, once (`holdfast.keys`). `authored` adds the keys
that `resolve` turns into something else. Units: sizes are bytes, durations are seconds, CPU is in cores, rates are
per second.
"""

# ruff: noqa: RUF012 (pydantic copies the defaults of fields)

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from holdfast.grammar import images, kernel, names, network
from holdfast.keys import Checked, DriverOpts, Duration, Items, NonEmpty, Short, Table, Text, Unique, or_text
from holdfast.spec import forms

# X as X: it can be had from here, too.
from holdfast.spec.parts import BUILTIN_MOUNTS as BUILTIN_MOUNTS
from holdfast.spec.parts import Attachment as Attachment
from holdfast.spec.parts import Device as Device
from holdfast.spec.parts import Logging as Logging
from holdfast.spec.parts import Mount as Mount
from holdfast.spec.parts import Port as Port
from holdfast.spec.parts import RestartPolicy as RestartPolicy
from holdfast.spec.parts import StorageOpt as StorageOpt
from holdfast.spec.parts import Ulimit as Ulimit
from holdfast.spec.parts import UpdateImage as UpdateImage
from holdfast.spec.resources import DEFAULT_PIDS as DEFAULT_PIDS
from holdfast.spec.resources import Resources as Resources
from holdfast.spec.values import (
    STRINGS,
    Absolute,
    Address,
    AppNetwork,
    Capability,
    Memory,
    NameOrNumber,
    Pairs,
    Pull,
    Reference,
    Words,
)
from holdfast.words import one_line

BUILTIN_NETWORKS = ("none", "host", "bridge")
BUILD_NETWORK = "build"  # which builds join, and no container
DEFAULT_NETWORK = "default"  # of an app: what its containers join that name no network

Reached = Annotated[Literal["started", "completed"], Short(forms.reached, ())]
Sysctls = Annotated[
    dict[Annotated[str, Checked(kernel.sysctl, {})], Text],
    Short(forms.pairs, ({**STRINGS, "description": "NAME=VALUE"},)),
]


class When(Table):
    """Which nodes the app is for: those whose name fits one of the globs, and that have all of the labels."""

    nodes: Items[str] = Field((), description="globs of node names; one must fit. Absent: every name")
    labels: dict[str, Text] = Field({}, description="labels that the node must have, all of them")


class ContainerKeys(Table):
    """The keys of a container that need no resolving but for the name of its image."""

    image: Annotated[str, Checked(forms.image, {"examples": ["nginx:1.27"]})] | None = Field(
        None,
        description="REGISTRY/PATH:TAG@DIGEST, `images.NAME` for one that is built here, or an archive of the host as"
        " `oci:/path`",
    )
    pull: Pull = Field(
        "missing",
        description="when the registry is asked: `missing`: if the image is not here; `always`, `newer`: each time "
        "the app is staged, and `newer` uses what is here if the registry can't be reached; `never`: not "
        "at all",
    )
    update_image: Annotated[UpdateImage, or_text(lambda policy: {"policy": policy}, "notify or apply")] | None = (
        Field(None, description="ask the registry for a newer image from time to time; absent: never")
    )
    rootfs: Absolute | None = Field(None, description="a directory of the host instead of an image")
    command: Words | None = Field(None, description="replaces the image's command")
    entrypoint: Words | None = Field(None, description="replaces the image's entrypoint")
    working_dir: Absolute | None = Field(None, description="the directory that it starts in; absent: the image's")
    user: Annotated[NameOrNumber, Checked(names.user, {"examples": ["1000:1000"]})] | None = Field(
        None, description="USER[:GROUP], numbers or names that the image defines; absent: the image's"
    )
    environment: Pairs = Field({}, description="environment variables, added to the image's")
    hostname: Annotated[str, Checked(names.hostname, {})] | None = Field(
        None, description="its host name; default: the container's name"
    )
    labels: Pairs = Field({}, description="labels of your own, shown by inspect")
    volumes_from: Annotated[
        dict[Annotated[str, Checked(names.reference, {})], Literal["rw", "ro"]],
        Short(forms.volumes_from, ({**STRINGS, "description": "CONTAINER[:ro]"},)),
    ] = Field({}, description="containers of this file whose mounts it gets, too")
    storage_opt: StorageOpt = Field(StorageOpt(), description="limits of its root file system")
    cap_add: Unique[Capability] = Field((), description="capabilities that it has in addition to the default ones")
    cap_drop: Unique[Capability] = Field((), description="capabilities that it does not have")
    privileged: bool = Field(False, description="whether it has every capability and every device of the host")
    no_new_privileges: bool = Field(True, description="whether setuid programs and file capabilities have no effect")
    seccomp: str = Field(
        "default", description="`default`, `unconfined`, or the absolute path of a profile on the host"
    )
    apparmor: str = Field(
        "default", description="`default`, `unconfined`, or the name of a profile that the host has loaded"
    )
    read_only: bool = Field(False, description="whether its root file system can't be written")
    devices: Items[Annotated[Device, or_text(forms.device, "/dev/NAME[:/dev/NAME[:rwm]]")]] = Field(
        (), description="devices of the host that it can use"
    )
    sysctls: Sysctls = Field(
        {}, description="kernel settings of its own namespaces: net.*, fs.mqueue.*, and kernel.* of IPC"
    )
    ulimits: dict[
        Annotated[str, Checked(kernel.ulimit, {"enum": sorted(kernel.ULIMITS)})],
        Annotated[Ulimit, Short(forms.both, ({"type": "integer"},))],
    ] = Field({}, description="resource limits of its processes; one number sets both, soft and hard")
    group_add: Unique[Annotated[NameOrNumber, Checked(names.group, {})]] = Field(
        (), description="more groups of its user, numbers or names that the image defines"
    )
    init: bool = Field(False, description="whether a small init process reaps zombies and passes signals on")
    shm_size: Memory = Field(64 * 1024 * 1024, description="how much /dev/shm can hold")
    pid: Literal["host"] | None = Field(None, description="`host`: it sees the host's processes")
    ipc: Literal["host"] | None = Field(None, description="`host`: it shares the host's IPC")
    stop_signal: Annotated[str, Short(forms.stop_signal, ({"type": "integer"},))] | None = Field(
        None, description="the signal that stops it, for example `SIGINT`; absent: the image's, or SIGTERM"
    )
    stop_grace_period: Duration = Field(10.0, description="the time between stop_signal and SIGKILL")
    depends_on: Annotated[dict[Reference, Reached], Short(forms.dependencies, (STRINGS,))] = Field(
        {}, description="containers that must have started, or completed, before it starts; a list means started"
    )
    resources: Resources = Field(Resources(), description="what it may use")
    logging: Logging = Field(Logging(), description="how much of its output is kept")


class Container(ContainerKeys):
    """One container, resolved. Exactly one of image and rootfs is set.

    image: a reference, or `images.app/name` for one of App.images.
    networks: qualified network key → attachment; {"none": …} and {"host": …} stand alone.
    mounts: volumes and configs, in the order in which they are mounted; those of volumes_from come last.
    """

    ports: tuple[Port, ...] = ()
    networks: dict[str, Attachment] = {"bridge": Attachment()}
    mounts: tuple[Mount, ...] = ()
    restart_policy: RestartPolicy = RestartPolicy()

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all that the state asks of the container."""
        return digest_of(self.model_dump(mode="json"))


class Network(Table):
    """A network that this app defines."""

    not_yet: ClassVar = ("enable_ipv6", "ipv6_subnet")
    hints: ClassVar = {"ipam": "subnet and gateway"}

    driver: str = Field("bridge", description="`bridge`, or a plugin's driver")
    subnet: Annotated[str, Checked(network.subnet, {"examples": ["10.90.1.0/24"]})] | None = Field(
        None, description="its range of addresses; absent: one of the node's pool"
    )
    gateway: Address | None = Field(None, description="default: the first address of the subnet")
    internal: bool = Field(False, description="whether nothing leads out of the host")
    driver_opts: DriverOpts = Field({}, description="options of the driver; `bridge` takes mtu and port_security")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.gateway is None:
            return
        if self.subnet is None:
            yield "gateway", "needs a subnet (expected subnet as well)"
        elif reason := network.unusable(self.gateway, self.subnet):
            yield "gateway", reason

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the definition. It is stored: a network made of another definition is made anew.

        Keys of later versions count only where they are set, so that no network is made anew for an upgrade.
        """
        first = self.model_dump(mode="json", include={"driver", "subnet", "gateway", "internal", "driver_opts"})
        return digest_of({**first, **self.model_dump(mode="json", exclude_defaults=True)})


class Volume(Table):
    """A volume that this app defines. Its data stays when the app goes, unless on_remove says otherwise."""

    hints: ClassVar = {"size": 'driver_opts = { size = "…" }'}

    driver: str = Field("managed", description="`managed`, or a plugin's driver")
    driver_opts: DriverOpts = Field({}, description="options of the driver; `managed` takes size")
    on_remove: Literal["keep", "delete"] = Field(
        "keep", description="what happens to the data when the volume is removed"
    )


class BuildKeys(Table):
    """The keys of an image that need no resolving."""

    args: Pairs = Field({}, description="values of the Dockerfile's ARGs")
    target: NonEmpty | None = Field(None, description="the stage to build; absent: the last")
    platforms: Items[Annotated[str, Checked(images.platform, {"examples": ["linux/amd64"]})]] = Field(
        (), description="must name this node's; the others are built to be pushed. Absent: this node's alone"
    )
    tags: Items[Annotated[str, Checked(forms.tag, {"examples": ["registry.example:5000/shop/web:7"]})]] = Field(
        (), description="more names of the result: [REGISTRY/]PATH[:TAG]"
    )
    push: bool = Field(False, description="whether to push the result to the registries of its tags")
    labels: Pairs = Field({}, description="labels of the image")
    network: Literal["default", "host", "none"] = Field(
        "default",
        description="what RUN steps can reach: `default` is a network of their own with access to the outside",
    )
    pull: Pull = Field("missing", description="when registries are asked for the images it starts FROM")
    no_cache: bool = Field(False, description="whether every step runs again each time it is built")


class Build(BuildKeys):
    """An image that is built on the node from files of the revision.

    key: sha256 (hex) of all that the result depends on: the context's files after .dockerignore, the Dockerfile,
    args, target, platforms, labels, network, and the keys of bases. What has been built by a key is not built again.
    context, dockerfile: paths in the revision, for people. tree: digest (hex) of the context's listing, a blob of
    canonical JSON: path below the context → [sha256 (hex) of the content, executable?]. instructions: digest of the
    Dockerfile's content. bases: a name as the Dockerfile writes it → the qualified name of the image it stands for.
    """

    key: str
    context: str
    dockerfile: str
    tree: str
    instructions: str
    bases: dict[str, str] = {}


class App(Table):
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
        """The sha256 (hex) of the app, mounted files included, made of those of its containers."""
        digests = {name: container.digest for name, container in self.containers.items()}
        return digest_of({**self.model_dump(mode="json", exclude={"containers"}), "containers": digests})


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
    drivers: kind of driver (volume, network, mount, policy) → what plugins offer of it: name → the table of its
    options, None where it declares none. None where the plugins are not known.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    vars: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    forbid: frozenset[str] = frozenset()
    bind_roots: tuple[str, ...] | None = None
    cap_add: tuple[str, ...] = ()
    subnets: tuple[str, ...] = PRIVATE
    drivers: Mapping[str, Mapping[str, type[BaseModel] | None]] | None = None
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
    """Return the sha256 (hex) of a file of the revision; the same bytes as a program have another one."""
    return hashlib.sha256(b"executable\0" + content if executable else content).hexdigest()


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON-able value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
