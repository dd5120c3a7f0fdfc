"""Find the programs that run containers, and check that they work on this host.

Called by the agent when it starts, and by `holdfast doctor`.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import UnfitHost
from holdfast.grammar.kernel import ULIMITS
from holdfast.runtime import capabilities
from holdfast.runtime.oci import HostLimits

CANDIDATES = ("crun", "runc")
INITS = ("catatonit", "tini")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class RuntimeBinary:
    """An OCI runtime: its kind (crun or runc), absolute path, and version as it prints it ("" if it did not)."""

    name: str
    path: Path
    version: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `holdfast doctor`: what was checked, whether it is good, and what to do if not."""

    subject: str
    ok: bool
    detail: str
    remedy: str = ""


def find_program(name: str) -> Path | None:
    """Find a program in PATH and in the usual directories of root's programs."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), _PATH)))
    return Path(found).resolve() if found else None


def find_runtime(setting: str = "auto") -> RuntimeBinary:
    """Find the runtime that agent.toml names: a path, a name, or `auto`, the first of crun and runc that works here.

    Runs the program once, for its version. Raises UnfitHost with the reason against each.
    """
    if setting != "auto":
        return _named(setting)
    refused = []
    for name in CANDIDATES:
        path = find_program(name)
        obstacle = "not installed" if path is None else obstacle_for(name)
        if path is not None and not obstacle:
            return RuntimeBinary(name, path, version_of(path))
        refused.append(f"{name}: {obstacle}")
    raise UnfitHost(f"runtime 'auto': {'; '.join(refused)} (apt-get install runc)")


def _named(setting: str) -> RuntimeBinary:
    path = Path(setting) if "/" in setting else find_program(setting)
    if path is None or not os.access(path, os.X_OK):
        raise UnfitHost(f"runtime '{setting}': no such program (apt-get install {Path(setting).name})")
    name = "crun" if "crun" in path.name else "runc"
    if obstacle := obstacle_for(name):
        raise UnfitHost(f"runtime '{setting}': {obstacle} (runtime = \"auto\" takes one that works)")
    return RuntimeBinary(name, path, version_of(path))


def obstacle_for(name: str, cgroup_root: Path = _CGROUP_ROOT) -> str:
    """Why a runtime can't work on this host, "" if it can.

    crun refuses a host that uses cgroup v1 while the v2 tree still owns some controllers.
    """
    try:
        owned = (cgroup_root / "unified" / "cgroup.controllers").read_text().split()
    except OSError:
        return ""
    if name == "crun" and owned:
        return f"does not run where cgroup v1 is in use and v2 owns {', '.join(owned)} (mount that one as v1 too)"
    return ""


def find_conmon() -> RuntimeBinary:
    """Find conmon; raises UnfitHost if it is not installed."""
    path = find_program("conmon")
    if path is None:
        raise UnfitHost("program 'conmon': not installed (apt-get install conmon)")
    return RuntimeBinary("conmon", path, version_of(path))


def find_init() -> Path | None:
    """Find the init program that containers with `init = true` are given."""
    return next((path for name in INITS if (path := find_program(name))), None)


def foreign_formats() -> bool:
    """Whether this host runs programs of other formats or machines (binfmt_misc), for example by qemu."""
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})  # noqa: PTH208
    except OSError:
        return False


def version_of(path: Path) -> str:
    """Ask a program for its version."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return version_in(answer.stdout)


def version_in(answer: str) -> str:
    """The version in what a program prints: in the first line, the first word like a number, or the last word."""
    words = [word.rstrip(",") for word in answer.partition("\n")[0].split()]
    return next((word for word in words if re.match(r"v?\d", word)), words[-1] if words else "")


def host_limits() -> HostLimits:
    """Read what this process may give to containers."""
    status = Path("/proc/self/status").read_text()
    masks = dict(line.split(":\t", 1) for line in status.splitlines() if line.startswith("Cap"))
    numbers = {name: getattr(resource, f"RLIMIT_{name.upper()}", None) for name in ULIMITS}
    return HostLimits(
        capabilities=capabilities.from_mask(int(masks["CapPrm"], 16)),
        rlimits={name: resource.getrlimit(number)[1] for name, number in numbers.items() if number is not None},
        oom_score_adj=int(Path("/proc/self/oom_score_adj").read_text()),
    )


def findings() -> Iterator[Finding]:
    """Check everything that running containers needs here; for `holdfast doctor`."""
    for name in CANDIDATES:
        yield _installed(name, find_program(name), name, obstacle_for(name))
    yield _installed("conmon", find_program("conmon"), "conmon")
    yield _installed("init", find_init(), INITS[0])
    if not host_limits().may_exceed:
        yield Finding(
            "CAP_SYS_RESOURCE",
            False,
            "ulimits can't be raised, oom_score_adj can't be lowered",
            "run the agent with CAP_SYS_RESOURCE",
        )


def _installed(subject: str, path: Path | None, package: str, obstacle: str = "") -> Finding:
    if path is None:
        return Finding(subject, False, "not installed", f"apt-get install {package}")
    return Finding(subject, not obstacle, obstacle or f"{version_of(path)} at {path}".strip())
