"""The tables in the table of a container: ports, mounts, networks, devices, limits, restarts, logs.

A mount's source and the like are *resolved* in what `spec.load` makes: qualified names, paths of the revision.
Units: sizes are bytes, durations are seconds, rates are per second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from holdfast.grammar import names, network
from holdfast.keys import Checked, DriverOpts, Duration, Items, NonEmpty, Size, Table, within
from holdfast.spec import forms
from holdfast.spec.values import Absolute, Address, Id, Memory, Mode, Name, OnChange


class Port(Table):
    """One published port, or a range of `count` consecutive ones. host_ip "" means every address."""

    host_ip: str = ""
    host_port: int
    container_port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    count: int = 1

    def __str__(self) -> str:
        return network.port_text(self.host_ip, self.host_port, self.container_port, self.protocol, self.count)

    def overlaps(self, other: Port) -> bool:
        """Say whether two ports can't be published at the same time."""
        near = -other.count < other.host_port - self.host_port < self.count
        same = not self.host_ip or other.host_ip in ("", self.host_ip)
        return self.protocol == other.protocol and near and same


def _kind_of(read: dict[str, Any]) -> str:
    """Return the kind of a mount without a type: its source is a path of the host or the repository, or a volume."""
    source = read.get("source", "")
    return "bind" if source.startswith("/") else "file" if source.startswith(".") else "volume"


BUILTIN_MOUNTS = ("bind", "volume", "tmpfs", "file")
OF_KINDS = {
    "nocopy": ("volume",),
    "create_host_path": ("bind",),
    "require_mount": ("bind",),
    "on_change": ("file",),
    "size": ("tmpfs",),
    **dict.fromkeys(("mode", "uid", "gid"), ("tmpfs", "file")),
}
"""Keys of a mount that only some kinds have; `driver_opts` is for the kinds that plugins offer."""


class Mount(Table):
    """Something that is mounted into the container."""

    # Once resolved, a volume's source is its qualified name, `app/name`, and a file's is a path of the revision,
    # whose digest is in App.files.
    source: str = Field(
        "",
        description="`/path` of the host, `./path` of the repository, or the name of a volume, `app/name` if another "
        "app defines it",
    )
    kind: Name = Field(
        alias="type",
        default_factory=_kind_of,
        description="`bind`, `volume`, `tmpfs`, `file` or a kind that a plugin offers; default: what the source "
        "looks like: `/path` is a bind mount, `./path` a file, anything else a volume",
    )
    target: Absolute = Field(description="where it is in the container")
    read_only: bool = Field(False, description="whether the container can't write to it")
    nocopy: bool = Field(False, description="volume: whether a new one starts empty, and not with the image's files")
    create_host_path: bool = Field(False, description="bind: whether to make a missing source directory")
    require_mount: bool | None = Field(
        None,
        description="bind: whether to wait until the source is on a mounted file system; default: only if fstab(5) "
        "names one for it",
    )
    on_change: OnChange = Field("restart", description="file: what to do when the content changes")
    size: Size | None = Field(None, description="tmpfs: how much it can hold; default: half of the memory")
    mode: Mode | None = Field(None, description="tmpfs, file: the permissions in octal")
    uid: Id | None = Field(None, description="tmpfs, file: the owner; default: root")
    gid: Id | None = Field(None, description="tmpfs, file: the group; default: root")
    driver_opts: DriverOpts = Field({}, description="a plugin's kind: its options")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.target == "/":
            yield "target", "'/' is the container's root (expected a path below it)"
        if wrong := self._wrong_source():
            yield "source", wrong
        for key in sorted(self.model_fields_set & OF_KINDS.keys(), key=[*OF_KINDS].index):
            if getattr(self, key) and self.kind not in OF_KINDS[key]:
                right = " or ".join(OF_KINDS[key])
                yield key, f"does not apply to a mount of type {self.kind} (expected type {right})"
        if self.driver_opts and self.kind in BUILTIN_MOUNTS:
            yield "driver_opts", f"does not apply to a mount of type {self.kind} (expected a plugin's type)"

    def _wrong_source(self) -> str:
        source = self.source
        match self.kind:
            case "tmpfs":
                return f"'{source}': a tmpfs has no source (leave it out)" if source else ""
            case "bind" | "file" | "volume" if not source:
                return "is missing (expected /path of the host, ./path in the repository, or a volume's name)"
            case "bind" if not source.startswith("/"):
                return f"'{source}' is not an absolute path (expected /path; files of the repository are type file)"
            case "file" if source.startswith("/"):
                return f"'{source}' is not a path in the repository (expected ./path; /path is type bind)"
            case "volume" if source.startswith("~"):
                return f"'{source}': '~' has no meaning here (expected /path or ./path)"
        try:
            if self.kind == "bind":
                names.absolute(source)
            elif self.kind == "volume":
                names.reference(source)
        except ValueError as error:
            return f"{error}; a path starts with / or ./" if self.kind == "volume" else str(error)
        return ""


class Attachment(Table):
    """How the container is attached to one network."""

    not_yet: ClassVar = ("ipv6_address",)

    aliases: Items[Annotated[str, Checked(names.alias, {})]] = Field(
        (), description="more names by which other containers of this network find it"
    )
    ipv4_address: Address | None = Field(
        None, description="a fixed address of the network's subnet; absent: a free one"
    )
    mac_address: Annotated[str, Checked(network.mac, {"examples": ["02:42:ac:11:00:02"]})] | None = Field(
        None, description="a fixed MAC address; absent: one is made"
    )


class Device(Table):
    """A device node of the host inside the container."""

    source: Absolute = Field(description="the device on the host")
    target: Absolute = Field(
        default_factory=lambda read: read["source"], description="its path in the container; default: the source"
    )
    permissions: Annotated[str, Checked(forms.access, {"pattern": "^[rwm]{1,3}$"})] = Field(
        "rwm", description="what the container may do: `r` read, `w` write, `m` mknod"
    )


Limit = Annotated[int, within(-1)]


class Ulimit(Table):
    """A resource limit (getrlimit(2)); -1 is unlimited."""

    soft: Limit = Field(description="the limit in force; a process may raise it up to the hard limit")
    hard: Limit = Field(description="the highest value that the soft limit may have")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.hard != -1 and (self.soft > self.hard or self.soft == -1):
            yield "soft", f"{self.soft} is more than the hard limit (expected at most {self.hard})"


Restart = Literal["no", "on-failure", "always", "unless-stopped"]


class RestartTable(Table):
    """When a container that has ended runs again, and how long each try waits."""

    policy: Restart = Field(description="as in `restart`")
    max_attempts: Annotated[int, within(1)] | None = Field(
        None, description="on-failure: give up after so many restarts in a row"
    )
    delay: Duration = Field(0.1, description="the wait before the second restart; the first is immediate")
    factor: Annotated[float, within(1)] = Field(2.0, description="how many times longer each further restart waits")
    max_delay: Duration = Field(60.0, description="the longest wait")
    reset_after: Duration = Field(
        10.0, description="after it has run for so long, earlier failures do not count any more"
    )
    jitter: Annotated[float, within(0, 1)] = Field(0.1, description="the share of each wait that is random")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.max_attempts is not None and self.policy != "on-failure":
            yield "max_attempts", f"does not apply to policy '{self.policy}' (expected policy on-failure)"
        if self.max_delay < self.delay:
            yield "max_delay", f"{self.max_delay:g}s is less than delay (expected at least {self.delay:g}s)"


class RestartPolicy(RestartTable):
    """When a container that has ended runs again.

    The n-th restart in a row waits delay * factor**(n-2); the first waits for nothing. once: restart = "no" was
    written, so what a shutdown of the host has ended is not started again either.
    """

    policy: Restart = "no"
    once: bool = False


class Logging(Table):
    """How much of the container's output is kept."""

    max_size: Memory = Field(10 * 1024 * 1024, description="how large one log file may become")
    max_files: Annotated[int, within(1, 10_000)] = Field(
        3, description="how many log files are kept, the current one included"
    )


class StorageOpt(Table):
    """Limits of the container's root file system."""

    size: Annotated[Size, within(1)] | None = Field(
        None,
        description="how much its writable layer can hold; on ext4, a container with CAP_SYS_RESOURCE can exceed it",
    )


class UpdateImage(Table):
    """Whether and how often a registry is asked for a newer image than the one that runs."""

    policy: Literal["notify", "apply"] = Field(
        description="notify: show it in status and events; apply: stage it and run it"
    )
    interval: Duration = Field(3600.0, description="how often the registry is asked")
    # fnmatch(3); the newest version above the tag of the image is taken.
    tag_pattern: NonEmpty | None = Field(
        None,
        description="a glob, for example `1.*`: take the newest version whose tag fits; absent: what the image's own "
        "tag means now",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.interval < 1:
            yield "interval", f"{self.interval:g}s is too often for a registry (expected at least 1s)"
