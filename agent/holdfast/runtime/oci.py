"""Make config.json of the OCI runtime from a resolved container and what was prepared for it. Pure.

Every field means what it means in Docker; the keys are those of the OCI runtime spec 1.0.2 (config.md,
config-linux.md). Called by the node when it stages (to find errors) and when it starts an instance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import UnfitHost, WrongState
from holdfast.grammar import kernel, signals
from holdfast.grammar.capabilities import ALL
from holdfast.runtime import capabilities
from holdfast.runtime.devices import DeviceNode
from holdfast.runtime.users import User
from holdfast.spec.model import Container

Json = Mapping[str, Any]

OCI_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT_PATH = "/dev/init"  # on the container's own /dev: nothing is left in its root file system
FILE_TARGETS = ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname")

#: What a container that is not privileged has: `maskedPaths`, `readonlyPaths` and `resources.devices` of the OCI
#: runtime spec (null, zero, full, random, urandom, tty, ptmx, pts/*).
CONFINEMENT: Json = json.loads(Path(__file__).with_name("confinement.json").read_text())


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What this agent may give: its capabilities, hard rlimits (name → value, -1 unlimited), oom_score_adj."""

    capabilities: frozenset[str] = frozenset(ALL)
    rlimits: Mapping[str, int] = field(default_factory=dict)
    oom_score_adj: int = 0

    @property
    def may_exceed(self) -> bool:
        """Whether hard limits can be raised and oom_score_adj lowered."""
        return "CAP_SYS_RESOURCE" in self.capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class OciRequest:
    """Everything that config.json is made from.

    image: the OCI image configuration (its `config` object is read). rootfs: the mounted root file system.
    netns: path of the network namespace, None for the host's. mounts: OCI mounts, as the receipts hold them.
    hosts, resolv_conf, hostname_file: files of the host to bind. cgroup: path relative to each hierarchy's root.
    resources, oom_score_adj: what the cgroup policies made. seccomp: `linux.seccomp`, None for no filter.
    apparmor: the name of a profile, "" for none.
    init: program to bind as process 1 if the container asks for one. devices: see `runtime.devices`.
    """

    want: Container
    image: Json
    rootfs: Path
    hostname: str
    cgroup: str
    netns: Path | None = None
    mounts: tuple[Json, ...] = ()
    hosts: Path | None = None
    resolv_conf: Path | None = None
    hostname_file: Path | None = None
    resources: Json = field(default_factory=dict)
    oom_score_adj: int | None = None
    user: User = field(default_factory=User)
    seccomp: Json | None = None
    apparmor: str = ""
    init: Path | None = None
    devices: tuple[DeviceNode, ...] = ()
    limits: HostLimits = field(default_factory=HostLimits)


@dataclass(frozen=True, slots=True)
class OciConfig:
    """A config.json, and warnings about what it can't have."""

    config: dict[str, Any]
    warnings: tuple[str, ...] = ()


def oci_config(request: OciRequest) -> OciConfig:
    """Make the config.json of one container.

    Raises WrongState for what can't be (unknown names, no command, sysctls that are not namespaced) and UnfitHost
    for what the state file asks for by value and this host does not allow.
    """
    granted = granted_capabilities(request.want, request.limits)
    score, score_warning = oom_score_adj(request.want, request.oom_score_adj, request.limits)
    missing = (f"capabilities not available here: {', '.join(granted.missing)}",) if granted.missing else ()
    config = {
        "ociVersion": OCI_VERSION,
        "process": _process(request, granted.names, score),
        "root": {"path": str(request.rootfs), "readonly": request.want.read_only},
        "hostname": request.hostname,
        "mounts": ordered_mounts(request),
        "linux": _linux(request),
    }
    return OciConfig(config, missing + score_warning)


def granted_capabilities(want: Container, limits: HostLimits) -> capabilities.Granted:
    """The capabilities that a container gets on this host; its seccomp profile depends on them."""
    return capabilities.grant(want.cap_add, want.cap_drop, privileged=want.privileged, available=limits.capabilities)


def command_line(want: Container, image: Json) -> tuple[str, ...]:
    """Combine entrypoint and command as Docker does: with an entrypoint, the image's command does not count."""
    config = image.get("config") or {}
    entrypoint, command = want.entrypoint, want.command
    if entrypoint is None:
        entrypoint, command = config.get("Entrypoint"), config.get("Cmd") if command is None else command
    args = [*(() if entrypoint == ("",) else entrypoint or ()), *(command or ())]
    if not args:
        raise WrongState('command: neither the state file nor the image names a program (command = ["…"])')
    return tuple(args)


def environment(want: Container, image: Json, hostname: str, home: str = "") -> dict[str, str]:
    """Merge, later wins: PATH and HOSTNAME, the image's, the state file's; HOME if nobody set it."""
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    for entry in (image.get("config") or {}).get("Env") or ():
        name, _, value = entry.partition("=")
        merged[name] = value
    merged |= want.environment
    if home:
        merged.setdefault("HOME", home)
    return merged


def working_dir(want: Container, image: Json) -> str:
    """Where the first process starts: the state file's, the image's, or /."""
    folder = want.working_dir or (image.get("config") or {}).get("WorkingDir") or "/"
    if not folder.startswith("/"):
        raise WrongState(f"working_dir '{folder}': not an absolute path (/{folder})")
    return folder


def stop_signal(want: Container, image: Json) -> str:
    """The signal that asks a container to end: the state file's, the image's, or SIGTERM."""
    return want.stop_signal or (image.get("config") or {}).get("StopSignal") or "SIGTERM"


def signal_number(text: int | str) -> int:
    """The number of a signal, from a state file or an image. Raises WrongState."""
    try:
        return signals.number_of(text if isinstance(text, int) else text[:40])
    except ValueError as error:
        raise WrongState(f"signal {error}") from None


def _process(request: OciRequest, names: tuple[str, ...], score: int) -> dict[str, Any]:
    want, user = request.want, request.user
    args = command_line(want, request.image)
    if want.init:
        args = (INIT_PATH, "--", *args)
    env = environment(want, request.image, request.hostname, user.home)
    process: dict[str, Any] = {
        "terminal": False,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(args),
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": working_dir(want, request.image),
        "capabilities": {kind: list(names) for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": want.no_new_privileges and not want.privileged,
        "oomScoreAdj": score,
    }
    if request.apparmor and not want.privileged:
        process["apparmorProfile"] = request.apparmor
    if want.ulimits:
        process["rlimits"] = [_rlimit(name, request) for name in sorted(want.ulimits)]
    return process


def _rlimit(name: str, request: OciRequest) -> dict[str, Any]:
    limit, largest = request.want.ulimits[name], request.limits.rlimits.get(name, -1)
    if _unsigned(limit.hard) > _unsigned(largest) and not request.limits.may_exceed:
        raise UnfitHost(f"ulimits '{name}': {limit.hard} is more than this agent may give (at most {largest})")
    return {"type": f"RLIMIT_{name.upper()}", "soft": _unsigned(limit.soft), "hard": _unsigned(limit.hard)}


def _unsigned(value: int) -> int:
    """-1 as the kernel's RLIM_INFINITY."""
    return value % 2**64


def oom_score_adj(want: Container, composed: int | None, limits: HostLimits) -> tuple[int, tuple[str, ...]]:
    """The oom_score_adj of a container, raised to what is allowed, and a warning if it was; pure.

    composed: the value of the cgroup policies. There is always a value: a container must not inherit the agent's.
    Raises UnfitHost if the state file asks for a value that this host does not allow.
    """
    asked = want.resources.oom_score_adj
    wanted = asked if asked is not None else composed or 0
    least = limits.oom_score_adj
    if wanted >= least or limits.may_exceed:
        return wanted, ()
    if asked is not None:
        raise UnfitHost(f"oom_score_adj '{asked}': needs CAP_SYS_RESOURCE, which this agent lacks (at least {least})")
    if composed is None:
        return least, ()
    return least, (f"oom_score_adj is {least} instead of {wanted}: the agent lacks CAP_SYS_RESOURCE",)


def ordered_mounts(request: OciRequest) -> list[dict[str, Any]]:
    """The mounts in order: the container's own file systems, our files, then the state file's, parents first.

    A mount of the state file replaces one of ours at the same place.
    """
    ours = [*_default_mounts(request), *_files(request)]
    theirs = sorted(map(dict, request.mounts), key=lambda mount: _clean(mount["destination"]).count("/"))
    taken = {_clean(mount["destination"]) for mount in theirs}
    return [mount for mount in ours if mount["destination"] not in taken] + theirs


def _clean(path: str) -> str:
    return path.rstrip("/") or "/"


def _mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source or kind, "options": list(options)}


def _bind(target: str, source: Path | str, *options: str) -> dict[str, Any]:
    return _mount(target, "bind", "rbind", "rprivate", *options, source=str(source))


def _default_mounts(request: OciRequest) -> Iterable[dict[str, Any]]:
    want = request.want
    secure = ("nosuid", "noexec", "nodev")
    access = "rw" if want.privileged else "ro"
    yield _mount("/proc", "proc", *secure)
    yield _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k")
    yield _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
    yield _mount("/sys", "sysfs", *secure, access)
    yield _mount("/sys/fs/cgroup", "cgroup", *secure, "relatime", access)
    if want.ipc == "host":
        yield _bind("/dev/mqueue", "/dev/mqueue", *secure)
        yield _bind("/dev/shm", "/dev/shm", *secure)
    else:
        yield _mount("/dev/mqueue", "mqueue", *secure)
        yield _mount("/dev/shm", "tmpfs", *secure, "mode=1777", f"size={want.shm_size}", source="shm")


def _files(request: OciRequest) -> Iterable[dict[str, Any]]:
    files = (request.hosts, request.resolv_conf, request.hostname_file)
    for target, source in zip(FILE_TARGETS, files, strict=True):
        if source is not None:
            yield _bind(target, source, "rw")
    if request.want.init:
        if request.init is None:
            raise UnfitHost("init 'true': neither catatonit nor tini is installed (apt-get install catatonit)")
        if request.want.pid == "host":
            raise WrongState("init 'true': it can't be process 1 with pid = \"host\" (take one of them away)")
        yield _bind(INIT_PATH, request.init, "ro")


def _linux(request: OciRequest) -> dict[str, Any]:
    want = request.want
    linux: dict[str, Any] = {
        "namespaces": _namespaces(request),
        "cgroupsPath": request.cgroup,
        "resources": {**request.resources, "devices": _device_rules(request)},
        "rootfsPropagation": "private",
    }
    if sysctls := _sysctls(request):
        linux["sysctl"] = sysctls
    if request.devices:
        linux["devices"] = [_device(node) for node in request.devices]
    if not want.privileged:
        linux |= {key: CONFINEMENT[key] for key in ("maskedPaths", "readonlyPaths")}
        if request.seccomp is not None:
            linux["seccomp"] = request.seccomp
    return linux


def _namespaces(request: OciRequest) -> list[dict[str, str]]:
    shared = {"pid": request.want.pid, "ipc": request.want.ipc}
    own = ["mount", "uts", "cgroup", *(kind for kind, with_whom in shared.items() if with_whom is None)]
    network = [] if request.netns is None else [{"type": "network", "path": str(request.netns)}]
    return [*({"type": kind} for kind in own), *network]


def _sysctls(request: OciRequest) -> dict[str, str]:
    """Check that each sysctl is of a namespace of the container, and add Docker's two defaults."""
    want = request.want
    shared = {"net": request.netns is None, "ipc": want.ipc == "host", "uts": False}
    for name in want.sysctls:
        if shared[namespace := kernel.namespace_of(name)]:
            what = "network" if namespace == "net" else namespace
            raise WrongState(f"sysctls '{name}': would change the host, whose {what} is shared")
    if request.netns is None:
        return dict(want.sysctls)
    return {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647", **want.sysctls}


def _device(node: DeviceNode) -> dict[str, Any]:
    shared = {name: getattr(node, name) for name in ("path", "major", "minor", "uid", "gid")}
    return {**shared, "type": node.kind, "fileMode": node.mode}


def _device_rules(request: OciRequest) -> list[dict[str, Any]]:
    if request.want.privileged:
        return [{"allow": True, "access": "rwm"}]
    asked = [
        {"allow": True, "type": node.kind, "major": node.major, "minor": node.minor, "access": node.permissions}
        for node in request.devices
    ]
    return [*CONFINEMENT["devices"], *asked]
