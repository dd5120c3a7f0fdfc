"""Make `linux.seccomp` of one container from a profile in the format of the containers project.

The profile (seccomp.json(5): rules with `includes` and `excludes`) comes with the host's package
golang-github-containers-common. It allows what nested containers need; `harden` denies that, unless the container has
the capability that Docker's profile asks for. Called by the node before it makes a config.json.
"""

from __future__ import annotations

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

#: What replaces a profile's rules for the system calls that it names, in the same format. Docker's documentation,
#: "Seccomp security profiles for Docker", says which system calls need a capability. Refused are sockets to the
#: hypervisor (vsock), those to the audit log without CAP_AUDIT_WRITE, and clone(2)'s flags that make namespaces.
#: clone3 passes its flags by a pointer, so it fails with ENOSYS: the C library then uses clone.
HARDENING = Path(__file__).with_name("hardening.json")

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
    kept = {key: source[key] for key in ("defaultErrnoRet",) if key in source}
    rules = _applying(source, capabilities, arch, kernel)
    architectures = _architectures(source, arch)
    return {"defaultAction": source["defaultAction"], "architectures": architectures, "syscalls": rules, **kept}


def harden(profile: Mapping[str, Any], capabilities: Collection[str], arch: str) -> dict[str, Any]:
    """Deny what Docker's profile denies a container with these capabilities. profile: the result of `resolve`."""
    added = _applying(_hardening(), capabilities, arch)
    replaced = {name for rule in added for name in rule["names"]}
    kept = [
        {**rule, "names": [name for name in rule["names"] if name not in replaced]} for rule in profile["syscalls"]
    ]
    return {**profile, "syscalls": [*(rule for rule in kept if rule["names"]), *added]}


@lru_cache(maxsize=1)
def _hardening() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(HARDENING.read_bytes())
    return found


def _applying(
    source: Mapping[str, Any], capabilities: Collection[str], arch: str, kernel: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    held = set(capabilities)
    return [_rule(rule) for rule in source.get("syscalls") or () if _holds(rule, held, arch, kernel)]


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
