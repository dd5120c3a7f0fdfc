"""The tables of a state file as a person writes them, short forms included: the one definition of the language.

From these types come both the checks and the JSON Schema. `resolve` turns a checked `StateFile` into the nouns of
`model`. Keys are Compose's wherever it has a word for the thing.
"""

# ruff: noqa: RUF012 (pydantic copies the defaults of fields)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from holdfast.grammar import capabilities, images, kernel, names, network
from holdfast.spec import forms, model
from holdfast.spec.resources import STRING, Memory, ResourcesTable
from holdfast.spec.restart import RestartTable
from holdfast.tables import Checked, Duration, Short, Size, Table, Text, text_of

PORT_FORM = "[HOST_IP:]HOST:CONTAINER[/PROTOCOL]"
VOLUME_FORM = "SOURCE:TARGET[:ro]"
TMPFS_FORM = "TARGET[:size=64m,mode=1777]"
DEVICE_FORM = "/dev/NAME[:/dev/NAME[:rwm]]"
STRINGS = {"type": "array", "items": STRING}

Name = Annotated[str, Checked(names.name, {"title": "name", "pattern": f"^{names.NAME.pattern}$"})]
Reference = Annotated[str, Checked(names.reference, {"description": "a name, or app/name for another app's"})]
Words = Annotated[list[str], Short(forms.words, ({**STRING, "description": "split as a shell would, run by none"},))]
Pairs = Annotated[
    dict[Annotated[str, Checked(names.variable, {})], Text],
    Short(forms.pairs, ({**STRINGS, "description": "NAME=VALUE"},)),
]
Absolute = Annotated[str, Checked(names.absolute, {"title": "absolute path"})]
Mode = Annotated[int, Short(forms.mode, ()), WithJsonSchema({**STRING, "title": "octal text", "examples": ["0644"]})]
Signal = Annotated[str, Short(forms.stop_signal, ({"type": "integer"},))]
OnChange = Annotated[
    str, Checked(forms.on_change, {"description": "restart, none, or a signal as SIGHUP", "examples": ["restart"]})
]
Capability = Annotated[str, Checked(capabilities.canonical, {"examples": ["NET_BIND_SERVICE", "ALL"]})]
Address = Annotated[str, Checked(network.address, {"title": "IPv4 address", "examples": ["10.90.1.2"]})]
Ports = Annotated[Text, Checked(lambda text: text, {"title": "port or range", "examples": ["8000-8010"]})]
Id = Annotated[int, Field(ge=0, le=names.LARGEST_ID)]


def _from(read: Callable[[str], Any], form: str) -> Short:
    """The marker of a table that may be one string instead."""
    return Short(lambda value: read(value) if isinstance(value, str) else value, ({**STRING, "description": form},))


Reached = Annotated[str, Checked(forms.reached, {"enum": ["started", "completed"]})]


class WhenTable(Table):
    """Which nodes the app is for: any of the name globs, and all of the labels."""

    nodes: Annotated[list[str], Field(description="globs of node names; any of them")] = []
    labels: Annotated[dict[str, Text], Field(description="labels that the node must have; all of them")] = {}


class AppTable(Table):
    """The app that the file describes."""

    not_yet: ClassVar = ("update", "rolling", "window", "rollback")

    name: Annotated[Name | None, Field(description="default: the file's name without .toml")] = None
    depends_on: Annotated[list[Name], Field(description="apps that come up first")] = []
    when: Annotated[WhenTable, Field(description="absent: every node")] = WhenTable()
    network: Annotated[
        model.AppNetwork | None,
        Field(description="what containers join that name no network: the app's own, or the shared bridge"),
    ] = None


class PortTable(Table):
    """One published port, or a range of them."""

    target: Annotated[Ports, Field(description="the container's port, or a range")]
    published: Annotated[Ports, Field(description="the host's port, or a range as long")]
    host_ip: Annotated[Address | None, Field(description="absent: every address of the host")] = None
    protocol: Annotated[Literal["tcp", "udp"], Field(description="the protocol of the port")] = "tcp"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        found: dict[str, range] = {}
        for key, text in (("published", self.published), ("target", self.target)):
            try:
                found[key] = network.ports(text, f"'{text}'")
            except ValueError as error:
                yield key, str(error)
        if len(found) == 2 and len(found["published"]) != len(found["target"]):
            host, inner = (len(found[key]) for key in ("published", "target"))
            yield "", f"{host} host ports lead to {inner} container ports (expected as many)"

    def port(self) -> model.Port:
        host, inner = network.ports(self.published, "published"), network.ports(self.target, "target")
        host_ip = "" if self.host_ip in (None, "0.0.0.0") else str(self.host_ip)
        return model.Port(
            host_ip=host_ip,
            host_port=host.start,
            container_port=inner.start,
            protocol=self.protocol,
            count=len(host),
        )


class MountTable(Table):
    """Something mounted into the container."""

    type: Annotated[
        Literal["bind", "volume", "tmpfs", "file"] | None,
        Field(description="absent: bind for /path, file for ./path, volume for a name"),
    ] = None
    source: Annotated[str, Field(description="/path of the host, ./path in the repository, or a volume's name")] = ""
    target: Annotated[Absolute, Field(description="where it is in the container: an absolute path")]
    read_only: Annotated[bool, Field(description="the container can't write to it")] = False
    nocopy: Annotated[bool, Field(description="volume: a new one does not start with the image's content")] = False
    create_host_path: Annotated[bool, Field(description="bind: make a missing source directory")] = False
    require_mount: Annotated[
        bool | None,
        Field(description="bind: wait until the source is on a mount; absent: only if fstab names one"),
    ] = None
    on_change: Annotated[
        OnChange | None, Field(description="file: what follows a changed content; absent: restart")
    ] = None
    size: Annotated[Size | None, Field(description="tmpfs: how much it holds")] = None
    mode: Annotated[Mode | None, Field(description="tmpfs, file: permissions, octal")] = None
    uid: Annotated[Id | None, Field(description="tmpfs, file: the owner")] = None
    gid: Annotated[Id | None, Field(description="tmpfs, file: the group")] = None

    @property
    def kind(self) -> Literal["bind", "volume", "tmpfs", "file"]:
        if self.type is not None:
            return self.type
        if self.source.startswith("/"):
            return "bind"
        return "file" if self.source.startswith(".") else "volume"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.target == "/":
            yield "target", "'/' is the container's root (expected a path below it)"
        yield from self._wrong_source()
        belongs = {
            "nocopy": ("volume",),
            "create_host_path": ("bind",),
            "require_mount": ("bind",),
            "on_change": ("file",),
            "size": ("tmpfs",),
            "mode": ("tmpfs", "file"),
            "uid": ("tmpfs", "file"),
            "gid": ("tmpfs", "file"),
        }
        for key, kinds in belongs.items():
            if getattr(self, key) not in (None, False) and self.kind not in kinds:
                yield key, f"does not apply to a mount of type {self.kind} (expected type {' or '.join(kinds)})"

    def _wrong_source(self) -> Iterator[tuple[str, str]]:
        source = self.source
        match self.kind:
            case "tmpfs" if source:
                yield "source", f"'{source}': a tmpfs has no source (leave it out)"
            case "tmpfs":
                pass
            case _ if not source:
                yield (
                    "source",
                    "is missing (expected /path of the host, ./path in the repository, or a volume's name)",
                )
            case "bind" if not source.startswith("/"):
                yield (
                    "source",
                    f"'{source}' is not an absolute path (expected /path; files of the repository are type file)",
                )
            case "bind":
                try:
                    names.absolute(source)
                except ValueError as error:
                    yield "source", str(error)
            case "file" if source.startswith("/"):
                yield "source", f"'{source}' is not a path in the repository (expected ./path; /path is type bind)"
            case "volume" if source.startswith("~"):
                yield "source", f"'{source}': '~' stands for nobody's home here (expected /path or ./path)"
            case "volume":
                try:
                    names.reference(source)
                except ValueError as error:
                    yield "source", f"{error}; a path begins with / or ./"

    def mount(self, source: str) -> model.Mount:
        """The resolved mount; source is what self.source stands for."""
        return model.Mount(
            kind=self.kind,
            source=source,
            target=self.target,
            read_only=self.read_only,
            nocopy=self.nocopy,
            create_host_path=self.create_host_path,
            require_mount=self.require_mount,
            on_change=self.on_change or "restart",
            size=self.size,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
        )


class ConfigUse(Table):
    """A config of this app, mounted into the container."""

    source: Annotated[Name, Field(description="a name of [configs]")]
    target: Annotated[Absolute | None, Field(description="default: /NAME")] = None
    mode: Annotated[Mode | None, Field(description="permissions, octal; absent: readable by all")] = None
    uid: Annotated[Id | None, Field(description="the owner; absent: root")] = None
    gid: Annotated[Id | None, Field(description="the group; absent: root")] = None
    on_change: Annotated[OnChange | None, Field(description="what follows a changed content; absent: restart")] = None

    @property
    def path(self) -> str:
        return self.target or f"/{self.source}"


class AttachmentTable(Table):
    """How the container is attached to one network."""

    not_yet: ClassVar = ("ipv6_address",)

    aliases: Annotated[
        list[Annotated[str, Checked(names.alias, {})]], Field(description="further names it has in this network")
    ] = []
    ipv4_address: Annotated[Address | None, Field(description="a fixed address of the network's subnet")] = None
    mac_address: Annotated[
        Annotated[str, Checked(network.mac, {"examples": ["02:42:ac:11:00:02"]})] | None,
        Field(description="a fixed MAC address; absent: one is made"),
    ] = None


class DeviceTable(Table):
    """A device node of the host inside the container."""

    source: Annotated[Absolute, Field(description="the device of the host: an absolute path")]
    target: Annotated[Absolute | None, Field(description="its path in the container; default: as source")] = None
    permissions: Annotated[
        str, Checked(forms.access, {"pattern": "^[rwm]{1,3}$"}), Field(description="r: read, w: write, m: mknod")
    ] = "rwm"


class UlimitTable(Table):
    """A resource limit (getrlimit(2)); -1 is unlimited."""

    soft: Annotated[int, Field(ge=-1, description="the limit in force; a process may raise it up to hard")]
    hard: Annotated[int, Field(ge=-1, description="the highest value that soft may have")]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.hard != -1 and (self.soft > self.hard or self.soft == -1):
            yield "soft", f"{self.soft} is more than the hard limit (expected at most {self.hard})"


class LoggingTable(Table):
    """How much of the container's output is kept."""

    max_size: Annotated[Memory, Field(description="of one log file")] = 10 * 1024 * 1024
    max_files: Annotated[int, Field(ge=1, le=10_000, description="log files kept, the current one included")] = 3


class StorageOptTable(Table):
    """What is asked of the container's root file system."""

    size: Annotated[
        Annotated[Size, Field(ge=1)] | None,
        Field(description="how much its writable layer may hold; on ext4 not a limit for CAP_SYS_RESOURCE"),
    ] = None


class UpdateImageTable(Table):
    """Whether and how often a registry is asked for a newer image."""

    policy: Annotated[
        Literal["notify", "apply"], Field(description="notify: status and events say so; apply: it is staged and run")
    ]
    interval: Annotated[Duration, Field(description="how often the registry is asked")] = 3600.0
    tag_pattern: Annotated[
        str | None,
        Field(
            min_length=1,
            description="a glob as 1.*: of the tags that it fits, the newest version; absent: the tag itself",
        ),
    ] = None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.interval < 1:
            yield "interval", f"{self.interval:g}s is too often for a registry (expected at least 1s)"


class ContainerTable(Table):
    """One container."""

    not_yet: ClassVar = (
        *("healthcheck", "replicas", "scale", "deploy", "secrets", "update", "update_config"),
        "rolling",
    )
    hints: ClassVar = {
        "network_mode": 'networks = ["none"] or ["host"]',
        "container_name": "the name in [containers.NAME]",
        "mem_limit": "memory in [containers.NAME.resources]",
        "memory": "memory in [containers.NAME.resources]",
        "mem_reservation": "memory_reservation in [containers.NAME.resources]",
        "memswap_limit": "memory_swap in [containers.NAME.resources]",
        "cpus": "cpus in [containers.NAME.resources]",
        "cpu_shares": "cpu_weight in [containers.NAME.resources]",
        "cpuset": "cpuset in [containers.NAME.resources]",
        "pids_limit": "pids in [containers.NAME.resources]",
        "oom_score_adj": "oom_score_adj in [containers.NAME.resources]",
        "security_opt": "seccomp, apparmor or no_new_privileges",
        "pull_policy": "pull",
        "build": 'image = "images.NAME", and [images.NAME]',
        "env": "environment",
        "workdir": "working_dir",
        "env_file": "environment",
        "size": 'storage_opt = { size = "…" }',
        "expose": "nothing: containers of one network reach every port of each other",
        "links": "networks: containers of one network find each other by name",
    }

    image: Annotated[
        Annotated[str, Checked(forms.image, {"examples": ["nginx:1.27"]})] | None,
        Field(description="REGISTRY/PATH:TAG@DIGEST, images.NAME, or an archive of the host as oci:/path"),
    ] = None
    pull: Annotated[
        Literal["missing", "always", "newer", "never"] | None,
        Field(
            description="missing (the default): what is here is taken; always, newer: the registry is asked when the "
            "app is staged; newer: what is here will do while the registry can't be reached; never: no registry"
        ),
    ] = None
    update_image: Annotated[
        Annotated[UpdateImageTable, _from(lambda policy: {"policy": policy}, "notify or apply")] | None,
        Field(description="ask the registry for a newer image every so often; absent: never"),
    ] = None
    rootfs: Annotated[Absolute | None, Field(description="instead of an image: a directory of the host")] = None
    command: Annotated[Words | None, Field(description="instead of the image's command")] = None
    entrypoint: Annotated[Words | None, Field(description="instead of the image's entrypoint")] = None
    working_dir: Annotated[Absolute | None, Field(description="an absolute path; absent: the image's")] = None
    user: Annotated[
        Annotated[str, Short(text_of, ({"type": "integer"},)), Checked(names.user, {"examples": ["1000:1000"]})]
        | None,
        Field(description="USER[:GROUP], names of the image's or numbers"),
    ] = None
    environment: Annotated[Pairs, Field(description="variables, added to the image's")] = {}
    hostname: Annotated[
        Annotated[str, Checked(names.hostname, {})] | None, Field(description="default: the container's name")
    ] = None
    labels: Annotated[Pairs, Field(description="marks of your own, shown by inspect")] = {}
    ports: Annotated[
        list[Annotated[PortTable, _from(forms.port, PORT_FORM)]], Field(description="ports published on the host")
    ] = []
    networks: Annotated[
        Annotated[dict[Reference, AttachmentTable], Short(forms.named, (STRINGS,))] | None,
        Field(description="absent: the app's own network, default"),
    ] = None
    volumes: Annotated[
        list[Annotated[MountTable, _from(forms.volume, VOLUME_FORM)]], Field(description="what is mounted into it")
    ] = []
    volumes_from: Annotated[
        dict[Annotated[str, Checked(names.reference, {})], Literal["rw", "ro"]],
        Short(forms.volumes_from, ({**STRINGS, "description": "CONTAINER[:ro]"},)),
        Field(description="containers of this file whose mounts it has, too"),
    ] = {}
    tmpfs: Annotated[
        list[Annotated[str, Checked(lambda text: forms.tmpfs(text) and text, {"description": TMPFS_FORM})]],
        Short(forms.several, (STRING,)),
        Field(description="file systems in memory, empty at each start"),
    ] = []
    configs: Annotated[
        list[Annotated[ConfigUse, _from(lambda name: {"source": name}, "a name of [configs]")]],
        Field(description="configs of this app that are mounted into it"),
    ] = []
    cap_add: Annotated[list[Capability], Field(description="capabilities it has besides the default ones")] = []
    cap_drop: Annotated[list[Capability], Field(description="default capabilities it does without")] = []
    privileged: Annotated[bool, Field(description="every capability and device of the host")] = False
    no_new_privileges: Annotated[bool, Field(description="setuid programs gain nothing")] = True
    seccomp: Annotated[str, Field(description="default, unconfined, or a profile's absolute path")] = "default"
    apparmor: Annotated[str, Field(description="default, unconfined, or a profile that the host has loaded")] = (
        "default"
    )
    read_only: Annotated[bool, Field(description="the root file system can't be written")] = False
    devices: Annotated[
        list[Annotated[DeviceTable, _from(forms.device, DEVICE_FORM)]], Field(description="devices of the host")
    ] = []
    sysctls: Annotated[
        dict[Annotated[str, Checked(kernel.sysctl, {})], Text],
        Short(forms.pairs, ({**STRINGS, "description": "NAME=VALUE"},)),
        Field(description="kernel settings of its own namespaces: net.*, fs.mqueue.*, and kernel.* of IPC"),
    ] = {}
    ulimits: Annotated[
        dict[
            Annotated[str, Checked(kernel.ulimit, {"enum": sorted(kernel.ULIMITS)})],
            Annotated[UlimitTable, Short(forms.both, ({"type": "integer"},))],
        ],
        Field(description="resource limits; one number is both, soft and hard"),
    ] = {}
    group_add: Annotated[
        list[Annotated[str, Short(text_of, ({"type": "integer"},)), Checked(names.group, {})]],
        Field(description="further groups of its user, names of the image's or numbers"),
    ] = []
    init: Annotated[bool, Field(description="a tiny init reaps zombies and passes signals on")] = False
    shm_size: Annotated[Memory, Field(description="how much /dev/shm holds")] = 64 * 1024 * 1024
    pid: Annotated[Literal["host"] | None, Field(description="host: it sees the host's processes")] = None
    ipc: Annotated[Literal["host"] | None, Field(description="host: it shares the host's IPC")] = None
    stop_signal: Annotated[
        Signal | None, Field(description="as SIGINT, or its number; absent: the image's, or SIGTERM")
    ] = None
    stop_grace_period: Annotated[Duration, Field(description="between stop_signal and SIGKILL")] = 10.0
    restart: Annotated[
        Annotated[str, Checked(lambda v: forms.restart(v) and v, {"examples": ["always", "on-failure:5"]})] | None,
        Field(description="no, on-failure[:N], always or unless-stopped; absent: as no, but again after a reboot"),
    ] = None
    restart_policy: Annotated[RestartTable | None, Field(description="the long form of restart")] = None
    depends_on: Annotated[
        dict[Reference, Reached],
        Short(forms.dependencies, (STRINGS,)),
        Field(description="containers that must be started, or completed, before it; a list means started"),
    ] = {}
    resources: Annotated[ResourcesTable, Field(description="what it may use")] = ResourcesTable()
    logging: Annotated[LoggingTable, Field(description="how much of its output is kept")] = LoggingTable()
    storage_opt: Annotated[StorageOptTable, Field(description="limits of its root file system")] = StorageOptTable()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.image is not None and self.rootfs is not None:
            yield "image", "and rootfs exclude each other (expected one of them)"
        if self.rootfs is not None and not (self.command or self.entrypoint):
            yield "rootfs", "says nothing about what to run (expected command or entrypoint beside it)"
        yield from self._wrong_fetching()
        if self.restart is not None and self.restart_policy is not None:
            yield "restart", "and restart_policy exclude each other (expected one of them)"
        if self.seccomp not in ("default", "unconfined") and not self.seccomp.startswith("/"):
            yield "seccomp", f"'{self.seccomp}' is not known (expected default, unconfined or an absolute path)"
        yield from self._wrong_networks()
        if self.ipc == "host":
            for key in self.sysctls:
                if not key.startswith("net."):
                    yield "sysctls", f"'{key}' belongs to the host with ipc = \"host\" (leave one of them out)"

    def _wrong_fetching(self) -> Iterator[tuple[str, str]]:
        """pull and update_image are about images that a registry has."""
        source = "a rootfs" if self.image is None else forms.not_of_a_registry(self.image)
        for key in ("pull", "update_image"):
            if source and getattr(self, key) is not None:
                yield key, f"does not apply to {source} (expected an image of a registry, or leave it out)"
        if source or self.image is None or self.update_image is None:
            return
        if "@" in self.image:
            yield "update_image", "the image is pinned by its digest (expected a tag alone)"
        elif self.update_image.tag_pattern and not images.is_version(self.image):
            yield "update_image", f"tag_pattern: '{self.image}' has no version as its tag (expected one as :1.27.3)"

    def _wrong_networks(self) -> Iterator[tuple[str, str]]:
        if self.networks is None:
            return
        if not self.networks:
            yield "networks", 'is empty (expected ["none"] for no network at all; absent: the app\'s own)'
        for alone in ("none", "host"):
            if alone not in self.networks:
                continue
            if len(self.networks) > 1:
                yield "networks", f"'{alone}' stands alone (expected no other network beside it)"
            if self.networks[alone] != AttachmentTable():
                yield "networks", f"'{alone}' takes no settings (expected networks = [\"{alone}\"])"
            if self.ports:
                yield (
                    "ports",
                    f"can't be published from network '{alone}' (expected a network with addresses, as default)",
                )
        if "host" in self.networks:
            for key in self.sysctls:
                if key.startswith("net."):
                    yield "sysctls", f"'{key}' belongs to the host with networks = [\"host\"] (leave one of them out)"


def _not_builtin(name: str) -> str:
    if name in model.BUILTIN_NETWORKS:
        raise ValueError(f"'{name}' is always there and can't be defined (expected another name)")
    return name


class NetworkTable(Table):
    """A network that this app defines."""

    not_yet: ClassVar = ("enable_ipv6", "ipv6_subnet")
    hints: ClassVar = {"ipam": "subnet and gateway"}

    driver: Annotated[str, Field(description="bridge, or a plugin's")] = "bridge"
    subnet: Annotated[
        Annotated[str, Checked(network.subnet, {"examples": ["10.90.1.0/24"]})] | None,
        Field(description="absent: taken from the node's pool"),
    ] = None
    gateway: Annotated[Address | None, Field(description="default: the subnet's first address")] = None
    internal: Annotated[bool, Field(description="no way out of the host")] = False
    driver_opts: Annotated[
        dict[str, Text], Field(description="what the driver takes; bridge: mtu, port_security")
    ] = {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.gateway is None:
            return
        if self.subnet is None:
            yield "gateway", "needs a subnet (expected subnet beside it)"
            return
        reason = network.unusable(self.gateway, self.subnet)
        if reason:
            yield "gateway", reason


class VolumeTable(Table):
    """A volume that this app defines; its data outlives the app unless on_remove says otherwise."""

    hints: ClassVar = {"size": 'driver_opts = { size = "…" }'}

    driver: Annotated[str, Field(description="managed, or a plugin's")] = "managed"
    driver_opts: Annotated[dict[str, Text], Field(description="what the driver takes; managed: size")] = {}
    on_remove: Annotated[Literal["keep", "delete"], Field(description="what becomes of the data")] = "keep"


class ConfigTable(Table):
    """A file, or a text, that containers mount by name."""

    file: Annotated[str | None, Field(description="./path in the repository")] = None
    content: Annotated[str | None, Field(description="the text itself")] = None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.file is None) == (self.content is None):
            yield "", "holds nothing or two things (expected either file or content)"
        if self.file is not None and (not self.file or self.file.startswith("/")):
            yield "file", f"'{self.file}' is not a path in the repository (expected ./path)"


class ImageTable(Table):
    """An image that the node builds from files of the repository, whenever these change."""

    not_yet: ClassVar = ("secrets", "ssh", "cache_from", "cache_to", "additional_contexts", "dockerfile_inline")
    hints: ClassVar = {
        "build_args": "args",
        "tag": "tags",
        "platform": "platforms",
        "file": "dockerfile",
        "containerfile": "dockerfile",
    }

    context: Annotated[str, Field(min_length=1, description="the folder that COPY copies from: ./path")]
    dockerfile: Annotated[
        str | None, Field(min_length=1, description="path in the context; default: Dockerfile, then Containerfile")
    ] = None
    args: Annotated[Pairs, Field(description="values of the Dockerfile's ARGs")] = {}
    target: Annotated[str | None, Field(min_length=1, description="the stage to build; absent: the last")] = None
    platforms: Annotated[
        list[Annotated[str, Checked(images.platform, {"examples": ["linux/amd64"]})]],
        Field(description="this node's must be among them; the others are built to be pushed. Absent: this node's"),
    ] = []
    tags: Annotated[
        list[Annotated[str, Checked(forms.tag, {"examples": ["registry.example:5000/shop/web:7"]})]],
        Field(description="further names: [REGISTRY/]PATH[:TAG]"),
    ] = []
    push: Annotated[bool, Field(description="bring the result to the registries of its tags")] = False
    labels: Annotated[Pairs, Field(description="labels of the image")] = {}
    network: Annotated[
        Literal["default", "host", "none"] | None,
        Field(description="what RUN reaches: default (a network of its own that leads out), host or none"),
    ] = None
    pull: Annotated[
        Literal["missing", "always", "newer", "never"] | None,
        Field(description="whether a build asks registries for what it starts FROM; default: missing"),
    ] = None
    no_cache: Annotated[bool, Field(description="run every step again, whenever it is built")] = False

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.context.startswith(("/", "~")) or "://" in self.context:
            yield "context", f"'{self.context}' is not a path in the repository (expected ./path)"
        if self.dockerfile is not None and self.dockerfile.startswith("/"):
            yield "dockerfile", f"'{self.dockerfile}' is not a path in the context (expected one relative to it)"
        if self.push and not self.tags:
            yield "push", 'leads nowhere (expected tags = ["REGISTRY/PATH:TAG"] beside it)'
        for key, values in (("tags", self.tags), ("platforms", self.platforms)):
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                yield key, f"'{twice}' is named twice"


class StateFile(Table):
    """One state file: one app."""

    not_yet: ClassVar = ("secrets",)
    hints: ClassVar = {"services": "[containers.NAME]", "container": "[containers.NAME]", "image": "[images.NAME]"}

    app: Annotated[AppTable, Field(description="the app itself")] = AppTable()
    containers: Annotated[dict[Name, ContainerTable], Field(description="its containers")] = {}
    networks: Annotated[
        dict[Annotated[Name, Checked(_not_builtin, {})], NetworkTable], Field(description="networks of its own")
    ] = {}
    volumes: Annotated[dict[Name, VolumeTable], Field(description="volumes of its own")] = {}
    configs: Annotated[dict[Name, ConfigTable], Field(description="files and texts that containers mount")] = {}
    images: Annotated[dict[Name, ImageTable], Field(description="images that the node builds")] = {}
