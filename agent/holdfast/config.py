"""agent.toml → Config: the agent's own settings, which no commit can change.

Read by `cli` and `daemon`, once at the start and again on SIGHUP. Everything that is wrong is reported at once, line
by line, as for state files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from operator import attrgetter
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, WithJsonSchema

from holdfast.errors import WrongConfig, explained
from holdfast.grammar.names import absolute
from holdfast.keys import (
    Checked,
    Duration,
    Items,
    NonEmpty,
    Short,
    Size,
    Strings,
    Table,
    Text,
    or_text,
    within,
)
from holdfast.spec.model import PRIVATE, NodeFacts
from holdfast.spec.policy import RULES
from holdfast.spec.values import STRING, Absolute, AppNetwork, Capability
from holdfast.tables import read_table
from holdfast.toml import Document, KeyPath, Unreadable, dotted
from holdfast.words import one_line, suggestion

DEFAULT_PATH = Path("/etc/holdfast/agent.toml")
VARIABLE = "HOLDFAST_CONFIG"
#: What only a restart of the agent can change: the names of objects on the host, and who makes them.
FIXED = (
    *("name", "root", "run_root", "runtime", "socket", "group", "network.pool", "network.firewall"),
    *("limits.start_concurrency", "storage.driver", "plugins"),
)


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


def _subnet(value: str) -> str:
    try:
        return str(IPv4Network(value))
    except ValueError:
        raise ValueError(f"'{value}' is not an IPv4 network (expected as 10.209.0.0/16)") from None


def _pool(value: str) -> str:
    if IPv4Network(pool := _subnet(value)).prefixlen > 24:
        raise ValueError(f"'{value}' has no room for subnets (expected /24 or larger)")
    return pool


def _rule(value: str) -> str:
    if value not in RULES:
        raise ValueError(f"no rule is called '{value}'{suggestion(value, RULES) or f' (expected one of {_LISTED})'}")
    return value


_LISTED = ", ".join(RULES)


def _interval(value: float) -> float:
    if value <= 0:
        raise ValueError("0 is no time at all (expected a duration as 30s)")
    return value


def _tree_path(value: str) -> str:
    steps = [step for step in value.split("/") if step not in ("", ".")]
    if ".." in steps or value.startswith("/"):
        raise ValueError(f"'{value}' leaves the repository (expected a folder inside it)")
    return "/".join(steps)


def _directory(value: Any) -> Any:
    return Path(absolute(value)) if isinstance(value, str) else value


Directory = Annotated[Path, Short(_directory, ()), WithJsonSchema({**STRING, "title": "absolute path"})]
Interval = Annotated[Duration, Checked(_interval, {})]
Count = Annotated[int, within(1)]
Percent = Annotated[float, within(above=0, high=100)]


class StateSource(Table):
    """Where the state is committed: a directory, or a branch of a git repository."""

    directory: Directory = Field(
        Path("/etc/holdfast/state"), description='the directory; in short: `state = "/path"`'
    )
    git: str = Field("", description="instead of a directory: the URL or path of the repository")
    branch: NonEmpty = Field("main", description="git: the branch to follow")
    path: Annotated[str, Checked(_tree_path, {})] = Field(
        "", description="git: the folder that holds this node's files; empty: all"
    )
    interval: Interval = Field(30.0, description="git: how often to look for commits; `holdfast sync` looks at once")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if ("directory" in self.model_fields_set) == bool(self.git):
            yield "", 'has neither or both of directory and git (expected a directory, or git = "URL or path")'
        if not self.git:
            for key in sorted(self.model_fields_set & {"branch", "path", "interval"}):
                yield key, "does not apply to a directory (expected git as well)"


class NodeTable(Table):
    """What state files may ask about this host."""

    name: str = Field(
        default_factory=gethostname, description="for `when` and `${node.name}`; default: the host name"
    )
    labels: dict[str, Text] = Field({}, description="for `when` and `${node.labels.NAME}`")


class EnvTable(Table):
    """What state files may read of the agent's environment."""

    allow: Items[str] = Field((), description="the variables that `${env.NAME}` may name")


class NetworkSettings(Table):
    """Where networks get their addresses."""

    pool: Annotated[str, Checked(_pool, {})] = Field(
        "10.209.0.0/16", description="the IPv4 range of networks that name no subnet; /24 or larger"
    )
    allowed_subnets: Items[Annotated[str, Checked(_subnet, {})]] = Field(
        PRIVATE, description="where a `subnet` of a state file may be, besides the pool"
    )
    firewall: str = Field("nftables", description="the driver of published ports and isolation")


class LimitsTable(Table):
    """How much the agent does at a time."""

    start_concurrency: Annotated[int, within(1, 1024)] = Field(8, description="how many containers start at a time")


class CgroupTable(Table):
    """How the limits of containers are set."""

    policy: Strings = Field(
        ("limits",),
        description="the cgroup policies of containers that name none; of several, the later ones win",
    )


class StorageTable(Table):
    """Where root file systems come from."""

    driver: NonEmpty = Field("overlay", description="the driver of new root file systems: `overlay`, or a plugin's")


class PolicyTable(Table):
    """What state files may not do."""

    forbid: Items[Annotated[str, Checked(_rule, {"enum": [*RULES]})]] = Field((), description="what is refused")
    bind_roots: Items[Absolute] | None = Field(
        None, description="where bind mounts and archives may come from; absent: anywhere"
    )


class DefaultsTable(Table):
    """What containers get unless they say otherwise."""

    cap_add: Items[Capability] = Field((), description="capabilities that all containers get, unless they drop them")
    network: AppNetwork = Field(
        "default", description="the network of containers that name none: their app's own, or the shared bridge"
    )


class ImageSettings(Table):
    """Where images come from, and how much of the host they may use."""

    authfile: Directory | None = Field(
        None, description="logins (containers-auth.json(5)); absent: where skopeo looks"
    )
    registries_conf: Directory | None = Field(
        None, description="mirrors, plain HTTP (containers-registries.conf(5)); absent: where skopeo looks"
    )
    policy: Directory | None = Field(
        None, description="required signatures (containers-policy.json(5)); absent: where skopeo looks"
    )
    offline: bool = Field(False, description="whether no registry is asked: images are loaded, or they are missing")
    concurrent_downloads: Annotated[int, within(1, 64)] = Field(
        3, description="how many layers come from one registry at a time"
    )
    connect_timeout: Interval = Field(
        60.0, description="how long `apply` and `sync --wait` wait for a registry that does not answer"
    )
    stall_timeout: Interval = Field(
        60.0, description="after how long without a byte a transfer is given up and tried again"
    )
    max_layer_size: Annotated[Size, within(1)] = Field(
        32 << 30, description="a layer that is larger when unpacked is refused"
    )
    max_layer_files: Count = Field(4_000_000, description="a layer with more files is refused")
    min_free: Annotated[Size, within(0)] = Field(512 << 20, description="how much of the disk a pull leaves free")
    high_watermark: Percent = Field(
        85.0, description="the percentage of the disk in use above which unused images are deleted"
    )
    low_watermark: Percent = Field(80.0, description="the percentage of the disk in use at which deleting stops")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.low_watermark > self.high_watermark:
            yield "low_watermark", f"{self.low_watermark:g} is above high_watermark (expected at most that)"


class BuildSettings(Table):
    """How much of the host building images may use."""

    memory: Annotated[Size, within(32 << 20)] | None = Field(
        None, description="the memory of one build, which gets no swap; at least 32MiB; absent: 3/4 of the host's"
    )
    pids: Annotated[int, within(16)] = Field(4096, description="the most processes and threads of one build")
    concurrency: Annotated[int, within(1, 12)] | None = Field(
        None, description="how many builds run at a time; absent: one for each processor, at most 8"
    )
    cache: Annotated[Size, within(0)] = Field(
        10 << 30, description="the size of the layers that are kept for later builds"
    )


class AgentTable(Table):
    """The keys of agent.toml."""

    name: Annotated[str, Checked(_name, {})] = Field(
        "holdfast",
        description="part of the name of everything it makes: a-z and 0-9, at most 8; each root has its own",
    )
    state: Annotated[StateSource, or_text(lambda path: {"directory": path}, "a directory")] = Field(
        StateSource(), description="where the state is; default: the directory /etc/holdfast/state"
    )
    root: Directory = Field(
        default_factory=lambda read: Path(f"/var/lib/{read['name']}"),
        description="what survives a reboot: images, volumes, writable layers, the store; default: /var/lib/NAME",
    )
    run_root: Directory = Field(
        default_factory=lambda read: Path(f"/run/{read['name']}"),
        description="what does not survive a reboot: the socket, bundles, exit files; default: /run/NAME",
    )
    runtime: Annotated[str, Checked(_runtime, {})] = Field(
        "auto", description="`crun`, `runc` or an absolute path; `auto`: the first that works on this host"
    )
    socket: Directory = Field(
        default_factory=lambda read: read["run_root"] / "agent.sock",
        description="where commands reach the agent; default: RUN_ROOT/agent.sock",
    )
    group: NonEmpty | None = Field(
        None, description="members may use the socket, which makes them as powerful as root; absent: only root"
    )
    on_invalid: Literal["keep-app", "reject-revision"] = Field(
        "keep-app", description="what stays as it is when a state file does not load: its app, or all apps"
    )
    full_pass_interval: Interval = Field(
        60.0, description="how long a change that no event told of can stay unnoticed"
    )
    debounce: Duration = Field(
        0.02, description="how long the files of a state directory must be quiet before they are read"
    )
    shutdown_timeout: Duration = Field(
        60.0, description="how long all containers together have to stop when the host goes down"
    )
    node: NodeTable = Field(default_factory=NodeTable, description="what state files may ask about this host")
    vars: dict[str, Text] = Field(
        {}, description="`${vars.NAME}` in state files; wins over vars.toml of the repository"
    )
    env: EnvTable = Field(EnvTable(), description="what state files may read of the environment")
    network: NetworkSettings = Field(NetworkSettings(), description="addresses of networks")
    limits: LimitsTable = Field(LimitsTable(), description="how much the agent does at a time")
    cgroup: CgroupTable = Field(CgroupTable(), description="how the limits of containers are set")
    storage: StorageTable = Field(StorageTable(), description="where root file systems come from")
    policy: PolicyTable = Field(PolicyTable(), description="what state files may not do")
    defaults: DefaultsTable = Field(DefaultsTable(), description="what containers get unless they say otherwise")
    images: ImageSettings = Field(ImageSettings(), description="images of registries, and the disk")
    builds: BuildSettings = Field(BuildSettings(), description="how much builds may use")
    plugins: dict[str, dict[str, Any]] = Field(
        {}, description="settings of plugins, each in a table of the plugin's name"
    )


@dataclass(frozen=True, slots=True)
class Written:
    """agent.toml as it stands on the disk. Equal to any other: Config compares by its settings alone."""

    file: Path = field(compare=False)
    document: Document = field(compare=False)

    def where(self, path: KeyPath) -> str:
        """Return the file, line and key of what is at a key path, as errors name it."""
        return f"{self.file}:{self.document.line(path)}: {one_line(dotted(self.document.written(path)))}"


class Config(AgentTable):
    """The agent's settings as they are in force. Sizes are bytes, durations seconds.

    environment: the variables of the agent's environment that state files may read.
    """

    environment: dict[str, str] = Field({})
    _written: Written = PrivateAttr(default_factory=lambda: Written(DEFAULT_PATH, Document(b"")))

    def where(self, path: KeyPath) -> str:
        """The file, line and key of a setting, as errors name it: `/etc/holdfast/agent.toml:12: plugins.x.y`."""
        return self._written.where(path)

    def reloaded(self, new: Config) -> tuple[Config, list[str]]:
        """Return the settings after a reload, and the changed keys that need a restart and stay as they were."""
        waiting = [key for key in FIXED if attrgetter(key)(self) != attrgetter(key)(new)]
        for table, _, key in (path.rpartition(".") for path in waiting):
            if table:
                inner = getattr(new, table).model_copy(update={key: getattr(getattr(self, table), key)})
                new = new.model_copy(update={table: inner})
            else:
                new = new.model_copy(update={key: getattr(self, key)})
        return new, waiting

    def facts(self) -> NodeFacts:
        """Return what state files may ask about this node."""
        return NodeFacts(
            name=self.node.name,
            labels=self.node.labels,
            vars=self.vars,
            env=self.environment,
            forbid=frozenset(self.policy.forbid),
            bind_roots=self.policy.bind_roots,
            cap_add=self.defaults.cap_add,
            subnets=tuple(dict.fromkeys((*self.network.allowed_subnets, self.network.pool))),
            network=self.defaults.network,
        )


def load_config(path: Path | None = None, env: Mapping[str, str] | None = None) -> Config:
    """Read agent.toml: path, else HOLDFAST_CONFIG, else /etc/holdfast/agent.toml, which alone may be missing.

    env: the environment (os.environ if None). Raise WrongConfig with one line for each thing that is wrong.
    """
    env = os.environ if env is None else env
    named = path or (Path(env[VARIABLE]) if env.get(VARIABLE) else DEFAULT_PATH)
    try:
        document = Document(_content(named))
    except Unreadable as error:
        column = f":{error.column}" if error.column else ""
        raise WrongConfig(f"{named}:{error.line}{column}: {error}") from error
    written = Written(named, document)
    table, faults = read_table(AgentTable, document.data)
    if faults or table is None:
        faults.sort(key=lambda fault: document.line(fault.path))
        raise WrongConfig("\n".join(f"{written.where(fault.path)}: {one_line(fault.message)}" for fault in faults))
    environment = {name: env[name] for name in table.env.allow if name in env}
    config = table.passed_to(Config, environment=environment)
    config._written = written
    return config


def _content(path: Path) -> bytes:
    with explained(f"read '{path}'", WrongConfig):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if path == DEFAULT_PATH:
                return b""
            raise WrongConfig(f"read '{path}': no such file (expected the agent's settings)") from None
