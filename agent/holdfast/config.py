"""agent.toml → Config: the agent's own settings, which no commit can change.

Read by `cli` and `daemon`, once at the start and again on SIGHUP. What is wrong is said all at once, line by line, as
for state files.
"""

# ruff: noqa: RUF012 (pydantic copies the defaults of fields)

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from socket import gethostname
from typing import Annotated, Literal

from pydantic import Field

from holdfast.errors import WrongConfig
from holdfast.grammar import capabilities
from holdfast.grammar.names import absolute
from holdfast.spec.model import PRIVATE, AppNetwork, NodeFacts
from holdfast.spec.policy import RULES
from holdfast.tables import Checked, Duration, Fault, Short, Size, Table, Text, read_table
from holdfast.toml import Document, Unreadable, dotted, one_line, suggestion

DEFAULT_PATH = Path("/etc/holdfast/agent.toml")
VARIABLE = "HOLDFAST_CONFIG"


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]{0,7}", value):
        raise ValueError(
            f"'{value}' is not an agent's name (expected a-z and 0-9, at most 8, beginning with a letter)"
        )
    return value


def _runtime(value: str) -> str:
    if value not in ("auto", "crun", "runc") and not value.startswith("/"):
        raise ValueError(f"'{value}' is not a runtime (expected auto, crun, runc or an absolute path)")
    return value


def _pool(value: str) -> str:
    try:
        pool = IPv4Network(value)
    except ValueError:
        raise ValueError(f"'{value}' is not an IPv4 network (expected as 10.209.0.0/16)") from None
    if pool.prefixlen > 24:
        raise ValueError(f"'{value}' has no room for subnets (expected /24 or larger)")
    return str(pool)


def _subnet(value: str) -> str:
    try:
        return str(IPv4Network(value))
    except ValueError:
        raise ValueError(f"'{value}' is not an IPv4 network (expected as 192.168.0.0/16)") from None


def _rule(value: str) -> str:
    if value not in RULES:
        raise ValueError(f"no rule is called '{value}'{suggestion(value, RULES) or f' (expected one of {_LISTED})'}")
    return value


_LISTED = ", ".join(RULES)


def _tree_path(value: str) -> str:
    steps = [step for step in value.split("/") if step not in ("", ".")]
    if ".." in steps or value.startswith("/"):
        raise ValueError(f"'{value}' leaves the repository (expected a folder inside it)")
    return "/".join(steps)


Directory = Annotated[str, Checked(absolute, {"title": "absolute path"})]


class StateTable(Table):
    """Where the state is committed: a directory, or a branch of a git repository."""

    directory: Annotated[Directory | None, Field(description="the directory; as `state` alone, written as text")] = (
        None
    )
    git: Annotated[
        str | None, Field(min_length=1, description="instead of a directory: the repository, URL or path")
    ] = None
    branch: Annotated[str, Field(min_length=1, description="git: the branch to follow")] = "main"
    path: Annotated[
        str, Checked(_tree_path, {}), Field(description="git: the folder that holds this node's files; empty: all")
    ] = ""
    interval: Annotated[Duration, Field(description="git: how often to look; `holdfast sync` looks at once")] = 30.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.directory is None) == (self.git is None):
            yield "", 'names nothing or two things (expected a directory, or git = "URL or path")'
        if self.directory is not None:
            for key in sorted(self.model_fields_set & {"branch", "path", "interval"}):
                yield key, "does not apply to a directory (expected git beside it)"
        if self.interval <= 0:
            yield "interval", "0 is no interval (expected a duration as 30s)"


class NodeTable(Table):
    """What state files may ask about this host."""

    name: Annotated[str | None, Field(description="for `when` and ${node.name}; default: the host name")] = None
    labels: Annotated[dict[str, Text], Field(description="for `when` and ${node.labels.NAME}")] = {}


class EnvTable(Table):
    """What state files may read of the agent's environment."""

    allow: Annotated[list[str], Field(description="the variables that ${env.NAME} may name")] = []


class NetworkSettings(Table):
    """Where networks get their addresses."""

    pool: Annotated[
        str,
        Checked(_pool, {}),
        Field(description="where networks that name no subnet are taken from: IPv4, /24 or larger"),
    ] = "10.209.0.0/16"
    allowed_subnets: Annotated[
        list[Annotated[str, Checked(_subnet, {})]],
        Field(description="where a `subnet` of a state file may lie, besides the pool"),
    ] = list(PRIVATE)
    firewall: Annotated[str, Field(description="the driver of published ports and isolation")] = "nftables"


class LimitsTable(Table):
    """What the agent does at a time."""

    start_concurrency: Annotated[int, Field(ge=1, le=1024, description="container starts at a time")] = 8


class CgroupTable(Table):
    """How the limits of containers are set."""

    policy: Annotated[
        list[str],
        Short(lambda v: [v] if isinstance(v, str) else v, ({"type": "string"},)),
        Field(description="drivers for containers that name none (limits, qos or a plugin's); later ones win"),
    ] = ["limits"]


class PolicyTable(Table):
    """What state files may not do."""

    forbid: Annotated[
        list[Annotated[str, Checked(_rule, {"enum": [*RULES]})]], Field(description="what is refused")
    ] = []
    bind_roots: Annotated[
        list[Directory] | None,
        Field(description="where bind mounts and archives may come from; absent: anywhere"),
    ] = None


Percent = Annotated[float, Field(gt=0, le=100)]


class DefaultsTable(Table):
    """What containers get besides, unless they say otherwise."""

    cap_add: Annotated[
        list[Annotated[str, Checked(capabilities.canonical, {"examples": ["NET_RAW"]})]],
        Field(description="capabilities that all containers get, unless they drop them"),
    ] = []
    network: Annotated[
        AppNetwork,
        Field(description="what containers join that name no network: their app's own, or the shared bridge"),
    ] = "default"


class ImagesTable(Table):
    """Where images come from, and how much of the host they may take."""

    authfile: Annotated[
        Directory | None, Field(description="logins (containers-auth.json(5)); absent: as skopeo does")
    ] = None
    registries_conf: Annotated[
        Directory | None,
        Field(description="mirrors, plain HTTP (containers-registries.conf(5)); absent: as skopeo does"),
    ] = None
    policy: Annotated[
        Directory | None, Field(description="required signatures (containers-policy.json(5)); absent: as skopeo does")
    ] = None
    offline: Annotated[bool, Field(description="ask no registry; what is needed is loaded, or is missing")] = False
    concurrent_downloads: Annotated[int, Field(ge=1, le=64, description="layers at once from one registry")] = 3
    connect_timeout: Annotated[
        Duration,
        Field(description="how long `apply` and `sync --wait` wait for a registry that does not answer"),
    ] = 60.0
    stall_timeout: Annotated[
        Duration, Field(description="a transfer that brings nothing for so long is given up and tried again")
    ] = 60.0
    max_layer_size: Annotated[Size, Field(ge=1, description="a layer that is larger unpacked is refused")] = 32 << 30
    max_layer_files: Annotated[int, Field(ge=1, description="a layer with more files is refused")] = 4_000_000
    min_free: Annotated[Size, Field(ge=0, description="what a pull leaves free of the disk")] = 512 << 20
    high_watermark: Annotated[
        Percent, Field(description="percent of the disk in use above which unused images go")
    ] = 85.0
    low_watermark: Annotated[Percent, Field(description="they go until so much is in use")] = 80.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.low_watermark > self.high_watermark:
            yield "low_watermark", f"{self.low_watermark:g} is above high_watermark (expected at most that)"
        for key, value in (("connect_timeout", self.connect_timeout), ("stall_timeout", self.stall_timeout)):
            if value <= 0:
                yield key, "0 is no time at all (expected a duration as 60s)"


class BuildsTable(Table):
    """What building images may take of the host."""

    memory: Annotated[
        Size | None,
        Field(ge=32 << 20, description="of one build, which gets no swap; at least 32MiB; absent: 3/4 of the host's"),
    ] = None
    pids: Annotated[int, Field(ge=16, description="processes and threads of one build")] = 4096
    concurrency: Annotated[
        int | None, Field(ge=1, le=12, description="builds at a time; absent: one for each processor, at most 8")
    ] = None
    cache: Annotated[Size, Field(ge=0, description="layers that are kept for later builds")] = 10 << 30


class AgentTable(Table):
    """agent.toml as it is written."""

    name: Annotated[
        str,
        Checked(_name, {}),
        Field(description="in the name of all it makes: a-z and 0-9, at most 8; one root a name"),
    ] = "holdfast"
    state: Annotated[
        StateTable,
        Short(
            lambda value: {"directory": value} if isinstance(value, str) else value,
            ({"type": "string", "description": "a directory"},),
        ),
        Field(description="where the state is; default: the directory /etc/holdfast/state"),
    ] = StateTable(directory="/etc/holdfast/state")
    root: Annotated[
        Directory | None,
        Field(description="survives a reboot: images, volumes, writable layers, memory; default: /var/lib/NAME"),
    ] = None
    run_root: Annotated[
        Directory | None,
        Field(description="does not survive one: the socket, bundles, exit files; default: /run/NAME"),
    ] = None
    runtime: Annotated[
        str,
        Checked(_runtime, {}),
        Field(description="crun, runc or an absolute path; auto: the first that works on this host"),
    ] = "auto"
    socket: Annotated[
        Directory | None, Field(description="where commands reach the agent; default: RUN_ROOT/agent.sock")
    ] = None
    group: Annotated[
        str | None,
        Field(
            min_length=1, description="members may use the socket, which is as much as being root; absent: root alone"
        ),
    ] = None
    on_invalid: Annotated[
        Literal["keep-app", "reject-revision"],
        Field(description="what a state file that does not load keeps from changing: its app, or all apps"),
    ] = "keep-app"
    full_pass_interval: Annotated[
        Duration, Field(description="how long what events have missed may stay unnoticed")
    ] = 60.0
    debounce: Annotated[
        Duration, Field(description="how long files of a state directory must be quiet before they are read")
    ] = 0.02
    shutdown_timeout: Annotated[
        Duration, Field(description="how long all containers together get to end when the host goes down")
    ] = 60.0
    node: Annotated[NodeTable, Field(description="what state files may ask about this host")] = NodeTable()
    vars: Annotated[
        dict[str, Text], Field(description="${vars.NAME} in state files; wins over vars.toml of the repository")
    ] = {}
    env: Annotated[EnvTable, Field(description="what state files may read of the environment")] = EnvTable()
    network: Annotated[NetworkSettings, Field(description="addresses")] = NetworkSettings()
    limits: Annotated[LimitsTable, Field(description="what the agent does at a time")] = LimitsTable()
    cgroup: Annotated[CgroupTable, Field(description="how the limits of containers are set")] = CgroupTable()
    policy: Annotated[PolicyTable, Field(description="what state files may not do")] = PolicyTable()
    defaults: Annotated[DefaultsTable, Field(description="what containers get besides")] = DefaultsTable()
    images: Annotated[ImagesTable, Field(description="images of registries, and the disk")] = ImagesTable()
    builds: Annotated[BuildsTable, Field(description="what builds may take")] = BuildsTable()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.full_pass_interval <= 0:
            yield "full_pass_interval", "0 is no interval (expected a duration as 60s)"


@dataclass(frozen=True, slots=True)
class StateSource:
    """Where the state comes from: git is empty for a plain directory. interval: seconds between polls."""

    directory: Path = Path("/etc/holdfast/state")
    git: str = ""
    branch: str = "main"
    path: str = ""
    interval: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """How images are fetched and kept. Sizes are bytes, times seconds, watermarks percent of the file system.

    authfile, registries_conf, policy: instead of the places where skopeo looks by itself, None: those
    (containers-auth.json(5), containers-registries.conf(5), containers-policy.json(5)). offline: no registry is
    asked. concurrent_downloads: layers at once from one registry. connect_timeout: how long `apply` and `sync --wait`
    wait for a registry that does not answer. stall_timeout: a transfer that brings nothing for so long is given up.
    min_free: what a pull leaves free. Above high_watermark, unused images go until
    low_watermark is reached.
    """

    authfile: Path | None = None
    registries_conf: Path | None = None
    policy: Path | None = None
    offline: bool = False
    concurrent_downloads: int = 3
    connect_timeout: float = 60.0
    stall_timeout: float = 60.0
    max_layer_size: int = 32 << 30
    max_layer_files: int = 4_000_000
    min_free: int = 512 << 20
    high_watermark: float = 85.0
    low_watermark: float = 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What builds may take. memory (bytes; None: three quarters of the host's) and pids: of one build, all its
    processes together. concurrency: builds at a time, None: one for each processor, at most 8. cache: bytes of the
    layers that are kept for later builds."""

    memory: int | None = None
    pids: int = 4096
    concurrency: int | None = None
    cache: int = 10 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The agent's settings, resolved. Durations are seconds.

    name: what every host object of this agent bears. root survives a reboot, run_root does not; both default to
    places of that name. group: who besides root may use the socket, None: nobody.
    shutdown_timeout: what all containers together get when the host goes down.
    start_concurrency: how many containers start at once. cgroup_policy: for containers that name none.
    allowed_subnets: where the subnets of state files may lie, besides pool.
    env: the variables of the agent's environment that state files may read. default_cap_add: capabilities that
    containers get besides, unless they drop them. default_network: what containers join that name no network, in apps
    that do not say.
    """

    name: str = "holdfast"
    state: StateSource = StateSource()
    root: Path = Path("/var/lib/holdfast")
    run_root: Path = Path("/run/holdfast")
    runtime: str = "auto"
    socket: Path = Path("/run/holdfast/agent.sock")
    group: str | None = None
    on_invalid: Literal["keep-app", "reject-revision"] = "keep-app"
    full_pass_interval: float = 60.0
    debounce: float = 0.02
    shutdown_timeout: float = 60.0
    node_name: str = ""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    vars: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    pool: str = "10.209.0.0/16"
    allowed_subnets: tuple[str, ...] = PRIVATE
    firewall: str = "nftables"
    start_concurrency: int = 8
    cgroup_policy: tuple[str, ...] = ("limits",)
    forbid: frozenset[str] = frozenset()
    bind_roots: tuple[str, ...] | None = None
    default_cap_add: tuple[str, ...] = ()
    default_network: AppNetwork = "default"
    images: ImageSettings = ImageSettings()
    builds: BuildSettings = BuildSettings()

    def facts(self) -> NodeFacts:
        """What state files may ask about this node."""
        return NodeFacts(
            name=self.node_name,
            labels=self.node_labels,
            vars=self.vars,
            env=self.env,
            forbid=self.forbid,
            bind_roots=self.bind_roots,
            cap_add=self.default_cap_add,
            subnets=tuple(dict.fromkeys((*self.allowed_subnets, self.pool))),
            network=self.default_network,
        )


def load_config(path: Path | None = None, env: Mapping[str, str] | None = None) -> Config:
    """Read agent.toml: path, else HOLDFAST_CONFIG, else /etc/holdfast/agent.toml, which alone may be missing.

    env: the environment (os.environ if None). Raise WrongConfig with one line for each thing that is wrong.
    """
    env = os.environ if env is None else env
    named = path or (Path(env[VARIABLE]) if env.get(VARIABLE) else DEFAULT_PATH)
    try:
        raw = named.read_bytes()
    except FileNotFoundError:
        if named == DEFAULT_PATH:
            return _config(AgentTable(), env)
        raise WrongConfig(f"read '{named}': no such file (expected the agent's settings)") from None
    except OSError as error:
        raise WrongConfig(f"read '{named}': {(error.strerror or str(error)).lower()}") from error
    try:
        document = Document(raw)
    except Unreadable as error:
        column = f":{error.column}" if error.column else ""
        raise WrongConfig(f"{named}:{error.line}{column}: {error}") from error
    table, faults = read_table(AgentTable, document.data)
    if faults or table is None:
        raise WrongConfig("\n".join(_line(named, document, fault) for fault in _in_order(document, faults)))
    return _config(table, env)


def _in_order(document: Document, faults: list[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: document.line(fault.path))


def _line(path: Path, document: Document, fault: Fault) -> str:
    key = dotted(document.written(fault.path))
    return f"{path}:{document.line(fault.path)}: {one_line(key)}: {one_line(fault.message)}"


def _config(table: AgentTable, env: Mapping[str, str]) -> Config:
    run_root = Path(table.run_root or f"/run/{table.name}")
    roots = table.policy.bind_roots
    return Config(
        name=table.name,
        state=_source(table.state),
        root=Path(table.root or f"/var/lib/{table.name}"),
        run_root=run_root,
        runtime=table.runtime,
        socket=Path(table.socket or run_root / "agent.sock"),
        group=table.group,
        on_invalid=table.on_invalid,
        full_pass_interval=table.full_pass_interval,
        debounce=table.debounce,
        shutdown_timeout=table.shutdown_timeout,
        node_name=table.node.name or gethostname(),
        node_labels=table.node.labels,
        vars=table.vars,
        env={name: env[name] for name in table.env.allow if name in env},
        pool=table.network.pool,
        allowed_subnets=tuple(table.network.allowed_subnets),
        firewall=table.network.firewall,
        start_concurrency=table.limits.start_concurrency,
        cgroup_policy=tuple(table.cgroup.policy),
        forbid=frozenset(table.policy.forbid),
        bind_roots=None if roots is None else tuple(roots),
        default_cap_add=tuple(table.defaults.cap_add),
        default_network=table.defaults.network,
        images=_images(table.images),
        builds=BuildSettings(**table.builds.model_dump()),
    )


def _images(table: ImagesTable) -> ImageSettings:
    values = table.model_dump()
    for name in ("authfile", "registries_conf", "policy"):
        values[name] = Path(values[name]) if values[name] else None
    return ImageSettings(**values)


def _source(table: StateTable) -> StateSource:
    if table.git is None:
        return StateSource(directory=Path(table.directory or "/"))
    return StateSource(git=table.git, branch=table.branch, path=table.path, interval=table.interval)
