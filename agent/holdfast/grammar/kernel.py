"""Names of the kernel: limits of getrlimit(2), and the settings under /proc/sys that a container has of its own."""

from __future__ import annotations

import re
from typing import Literal

from holdfast.words import suggestion

#: Without RLIMIT_, and in lower case.
ULIMITS = frozenset(
    (
        *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss"),
        *("rtprio", "rttime", "sigpending", "stack"),
    )
)
Namespace = Literal["net", "ipc", "uts"]

#: Beside net.* and fs.mqueue.*: ipc_namespaces(7), uts_namespaces(7).
_OF_IPC = ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
_SYSCTLS: dict[str, Namespace] = {**{f"kernel.{name}": "ipc" for name in _OF_IPC}, "kernel.domainname": "uts"}


def ulimit(text: str) -> str:
    """Check the name of a limit of getrlimit(2)."""
    if text not in ULIMITS:
        near = suggestion(text, ULIMITS) or f" (expected one of {', '.join(sorted(ULIMITS))})"
        raise ValueError(f"'{text}' is not a limit{near}")
    return text


def sysctl(text: str) -> str:
    """Check a kernel setting that is the container's own; others would change the host."""
    namespace_of(text)
    return text


def namespace_of(sysctl: str) -> Namespace:
    """Return the namespace that a kernel setting belongs to."""
    # Runtimes make a path below /proc/sys of it, some of them with '/' and '.' exchanged.
    if re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+", sysctl):
        if sysctl.startswith("net."):
            return "net"
        if sysctl.startswith("fs.mqueue."):
            return "ipc"
        if sysctl in _SYSCTLS:
            return _SYSCTLS[sysctl]
    near = suggestion(sysctl, _SYSCTLS) or f" (expected net.*, fs.mqueue.* or one of {', '.join(_SYSCTLS)})"
    raise ValueError(f"'{sysctl}' is not a setting that a container has of its own{near}")
