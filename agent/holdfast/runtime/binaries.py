"""Find the programs that run containers, and check that they work on this host.

Called by the agent when it starts, and by `holdfast doctor`.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

from holdfast.errors import HoldfastError, TryAgain, UnfitHost, explained
from holdfast.files import names_in, read_text
from holdfast.grammar.kernel import ULIMITS
from holdfast.runtime import capabilities
from holdfast.runtime.oci import HostLimits

CANDIDATES = ("crun", "runc")
INITS = ("catatonit", "tini")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": _PATH, "LANG": "C.UTF-8"}
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
    owned = read_text(cgroup_root / "unified" / "cgroup.controllers").split()
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
    return bool(set(names_in("/proc/sys/fs/binfmt_misc")) - {"register", "status"})


def run(argv: Sequence[str | Path], what: str, *, timeout: float = 60.0, input: str = "") -> CompletedProcess[str]:
    """Run a program of the host with root's usual environment. Raises UnfitHost; TryAgain after timeout (seconds)."""
    try:
        with explained(what):
            return subprocess.run(
                argv, input=input, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
                env=ENVIRONMENT,  # without what is the agent's alone, as NOTIFY_SOCKET
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TryAgain(f"{what}: no answer in {timeout:g} s") from error


def version_of(path: Path) -> str:
    """Ask a program for its version; "" if it does not say."""
    with suppress(HoldfastError):
        return version_in(run([path, "--version"], "version", timeout=10).stdout)
    return ""


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
        lacking = "ulimits can't be raised, oom_score_adj can't be lowered"
        yield Finding("CAP_SYS_RESOURCE", False, lacking, "run the agent with CAP_SYS_RESOURCE")


def _installed(subject: str, path: Path | None, package: str, obstacle: str = "") -> Finding:
    if path is None:
        return Finding(subject, False, "not installed", f"apt-get install {package}")
    return Finding(subject, not obstacle, obstacle or f"{version_of(path)} at {path}".strip())
