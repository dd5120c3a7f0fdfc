"""Make `linux.seccomp` of one container from a profile in the format of the containers project.

The profile (seccomp.json(5): rules with `includes` and `excludes`) comes with the host's package
golang-github-containers-common. It allows what nested containers need; `harden` denies that, unless the container has
the capability that Docker's profile asks for. Called by the node before it makes a config.json.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from base64 import b64encode
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.errors import UnfitHost, WrongState

ANNOTATION = "run.oci.seccomp_bpf_data"
LARGEST = 1 << 20  # bytes of a profile
MOST = 64  # filters whose text is kept
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")

#: System calls that `harden` allows only with one of these capabilities (Docker's documentation, "Seccomp security
#: profiles for Docker"). No capability: never.
_GUARDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("CAP_SYS_ADMIN",),
        "fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount mount_setattr move_mount"
        " open_tree open_tree_attr pivot_root quotactl quotactl_fd setdomainname sethostname setns statmount"
        " umount umount2 unshare",
    ),
    (("CAP_SYS_ADMIN", "CAP_BPF"), "bpf"),
    (("CAP_SYS_ADMIN", "CAP_PERFMON"), "perf_event_open"),
    (("CAP_SYS_ADMIN", "CAP_SYSLOG"), "syslog"),
    (("CAP_SYS_PTRACE",), "kcmp pidfd_getfd process_madvise"),
    (("CAP_SYS_NICE",), "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ((), "add_key io_uring_enter io_uring_register io_uring_setup keyctl request_key"),
)
#: clone(2): CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_AF_VSOCK, _AF_NETLINK, _NETLINK_AUDIT = 40, 16, 9

#: uname(2)'s machine → as Go names it, and as libseccomp does.
_ARCHITECTURES = {
    "x86_64": ("amd64", "X86_64"),
    "aarch64": ("arm64", "AARCH64"),
    "armv7l": ("arm", "ARM"),
    "i686": ("x86", "X86"),
    "ppc64le": ("ppc64le", "PPC64LE"),
    "s390x": ("s390x", "S390X"),
    "riscv64": ("riscv64", "RISCV64"),
}
_NATIVE = {go: f"SCMP_ARCH_{scmp}" for go, scmp in _ARCHITECTURES.values()}


class Filters:
    """Keeps filters that crun has compiled, and gives them to it again: compiling is a third of crun's start.

    crun leaves the compiled filter in its state of a container, and accepts one in an annotation (crun(1),
    `run.oci.seccomp_bpf_data`). They are kept in memory only, so that nobody can weaken one on a disk. Thread-safe.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        #: id of a filter → the filter, which keeps the id its own, and its text.
        self._written: dict[int, tuple[object, str]] = {}
        self._mark = f"seccomp {os.urandom(16).hex()}"

    def annotate(self, config: dict[str, Any]) -> None:
        """Add the compiled form of a config.json's `linux.seccomp`, if it is known."""
        known = self._known.get(self._text(config))
        if known is not None:
            config["annotations"] = {**config.get("annotations", {}), ANNOTATION: known}

    def learn(self, config: Mapping[str, Any], state: Path) -> None:
        """Keep what crun compiled for a config.json; state: its folder for that container."""
        key = self._text(config)
        if key and key not in self._known:
            with suppress(OSError):
                self._known[key] = b64encode((state / "seccomp.bpf").read_bytes()).decode()

    def dumps(self, config: Mapping[str, Any]) -> str:
        """A config.json as text. The filter is half of it and usually the same, so its text is made once."""
        text = self._text(config)
        if not text:
            return json.dumps(config, separators=(",", ":"))
        bare = {**config, "linux": {**config["linux"], "seccomp": self._mark}}
        return json.dumps(bare, separators=(",", ":")).replace(f'"{self._mark}"', text)

    def _text(self, config: Mapping[str, Any]) -> str:
        """The text of a config.json's filter, which is the key of its compiled form, too; "" if it has none."""
        wanted = config.get("linux", {}).get("seccomp")
        if not wanted:
            return ""
        known = self._written.get(id(wanted))
        if known is None:
            if len(self._written) >= MOST:
                self._written.clear()
            known = wanted, json.dumps(wanted, sort_keys=True, separators=(",", ":"))
            self._written[id(wanted)] = known
        return known[1]


def profile(name: str, capabilities: Collection[str], *, privileged: bool = False) -> Mapping[str, Any] | None:
    """Resolve `default`, `unconfined` or a profile's path for a container with these capabilities; None: no filter.

    Cached: callers share the result and must not change it. Raises UnfitHost without Debian's profile, WrongState
    for a path that can't be read.
    """
    if name == "unconfined" or privileged:
        return None
    path = DEFAULT_PROFILE if name == "default" else Path(name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise ValueError(f"no regular file of at most {LARGEST} bytes")
        stamp = status.st_mtime_ns
        return _resolved(path, stamp, frozenset(capabilities))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if name == "default":
            raise UnfitHost(
                f"seccomp profile '{path}': {_cause(error)} (apt-get install golang-github-containers-common)"
            ) from error
        raise WrongState(
            f"seccomp profile '{path}': {_cause(error)} (default, unconfined or a profile's path)"
        ) from error


def _cause(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else f"not a profile: {error}"


@lru_cache(maxsize=64)
def _resolved(path: Path, stamp: int, capabilities: frozenset[str]) -> Mapping[str, Any]:
    kernel = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    arch, _ = _ARCHITECTURES.get(platform.machine(), (platform.machine(), ""))
    source = resolve(json.loads(path.read_bytes()), capabilities, arch, kernel)
    return harden(source, capabilities, arch) if path == DEFAULT_PROFILE else source


def resolve(
    source: Mapping[str, Any], capabilities: Collection[str], arch: str, kernel: tuple[int, ...]
) -> dict[str, Any]:
    """Keep the rules that apply to these capabilities, this architecture (GOARCH) and kernel version; pure."""
    rules = [_rule(rule) for rule in source.get("syscalls") or () if _holds(rule, set(capabilities), arch, kernel)]
    kept = {key: source[key] for key in ("defaultErrnoRet",) if key in source}
    architectures = _architectures(source, arch)
    return {"defaultAction": source["defaultAction"], "architectures": architectures, "syscalls": rules, **kept}


def harden(profile: Mapping[str, Any], capabilities: Collection[str], arch: str) -> dict[str, Any]:
    """Deny what Docker's profile denies a container with these capabilities; pure.

    profile: the result of `resolve`. clone3 passes its flags by a pointer, so it fails with ENOSYS: the C library
    then uses clone, whose flags can be compared.
    """
    held = set(capabilities)
    allowed = [name for needed, names in _GUARDED if held & set(needed) for name in names.split()]
    refused = [name for needed, names in _GUARDED if not held & set(needed) for name in names.split()]
    added = [_refuse(refused, errno.EPERM), *_sockets(held)]
    if allowed:
        added.append({"names": allowed, "action": "SCMP_ACT_ALLOW"})
    replaced = {*allowed, *refused, "socket"}
    if "CAP_SYS_ADMIN" not in held:
        flags = 1 if arch in ("s390", "s390x") else 0  # which argument has them
        added += [_allow("clone", (flags, "MASKED_EQ", sum(_NAMESPACE_FLAGS), 0))]
        added += [_refuse(["clone"], errno.EPERM, (flags, "MASKED_EQ", bit, bit)) for bit in _NAMESPACE_FLAGS]
        added += [_refuse(["clone3"], errno.ENOSYS)]
        replaced |= {"clone", "clone3"}
    kept = [
        {**rule, "names": [each for each in rule["names"] if each not in replaced]} for rule in profile["syscalls"]
    ]
    return {**profile, "syscalls": [*(rule for rule in kept if rule["names"]), *added]}


def _sockets(held: set[str]) -> list[dict[str, Any]]:
    """Allow no sockets to the hypervisor (vsock), and to the audit log only with CAP_AUDIT_WRITE."""
    vsock = _refuse(["socket"], errno.EPERM, (0, "EQ", _AF_VSOCK))
    if "CAP_AUDIT_WRITE" in held:
        return [vsock, _allow("socket", (0, "NE", _AF_VSOCK))]
    return [
        vsock,
        _refuse(["socket"], errno.EINVAL, (0, "EQ", _AF_NETLINK), (2, "EQ", _NETLINK_AUDIT)),
        _allow("socket", (0, "LT", _AF_NETLINK)),
        _allow("socket", (0, "GT", _AF_VSOCK)),
        *(_allow("socket", (0, "EQ", family)) for family in range(_AF_NETLINK + 1, _AF_VSOCK)),
        _allow("socket", (0, "EQ", _AF_NETLINK), (2, "NE", _NETLINK_AUDIT)),
    ]


def _allow(name: str, *args: tuple[int, str, int] | tuple[int, str, int, int]) -> dict[str, Any]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [_compared(*each) for each in args]}


def _refuse(names: list[str], code: int, *args: tuple[int, str, int] | tuple[int, str, int, int]) -> dict[str, Any]:
    rule = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": code}
    return {**rule, "args": [_compared(*each) for each in args]} if args else rule


def _compared(index: int, operation: str, value: int, masked: int = 0) -> dict[str, Any]:
    """One comparison of an argument; for MASKED_EQ, value is the mask."""
    return {"index": index, "value": value, "valueTwo": masked, "op": f"SCMP_CMP_{operation}"}


def _holds(rule: Mapping[str, Any], capabilities: set[str], arch: str, kernel: tuple[int, ...]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    return (
        capabilities >= set(includes.get("caps") or ())
        and arch in (includes.get("arches") or (arch,))
        and kernel >= _version(includes.get("minKernel"))
        and not capabilities & set(excludes.get("caps") or ())
        and arch not in (excludes.get("arches") or ())
        and not ("minKernel" in excludes and kernel >= _version(excludes["minKernel"]))
    )


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")) if text else ()


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: rule[key] for key in ("errnoRet", "args") if rule.get(key) not in (None, [])}
    return {"names": rule.get("names") or [rule["name"]], "action": rule["action"], **kept}


def _architectures(source: Mapping[str, Any], arch: str) -> list[str]:
    """The native architecture and those that run beside it, except x32: no distribution's kernel runs it, and the
    runtime compiles the whole filter for every architecture (about 10 ms with runc).
    """
    native = _NATIVE.get(arch)
    if native is None:
        return list(source.get("architectures") or ())
    for entry in source.get("archMap") or ():
        if entry["architecture"] == native:
            others = (other for other in entry.get("subArchitectures") or () if other != "SCMP_ARCH_X32")
            return [native, *others]
    return [native]
