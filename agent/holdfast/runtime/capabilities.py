"""Compute the capabilities(7) of a container from what its state file adds and drops.

Called by `runtime.oci`; the seccomp profile depends on the same set.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from holdfast.errors import UnfitHost
from holdfast.grammar.capabilities import ALL

#: The capabilities of a container that asks for none: Docker's set without NET_RAW, which allows to forge packets.
DEFAULT = frozenset(
    (
        *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETGID", "CAP_SETUID"),
        *("CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"),
    )
)


@dataclass(frozen=True, slots=True)
class Granted:
    """The capabilities of a container, sorted. missing: those that this host can't give."""

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()


def from_mask(mask: int) -> frozenset[str]:
    """Read a bit mask as /proc/PID/status prints it (CapBnd and the like)."""
    return frozenset(name for number, name in enumerate(ALL) if mask >> number & 1)


def grant(add: Collection[str], drop: Collection[str], *, privileged: bool, available: Collection[str]) -> Granted:
    """Apply add and drop to the default set with Docker's precedence: a name beats ALL, drop beats an added ALL.

    add, drop: as `grammar.capabilities` spells them. available: what the host can give at all. Raises UnfitHost for
    one that was added by name and can't be given.
    """
    added, dropped = set(add), set(drop)
    if privileged:
        wanted = set(ALL)
    elif "ALL" in added:
        wanted = set(ALL) - dropped
    else:
        wanted = added if "ALL" in dropped else set(DEFAULT) - dropped | added
    missing = wanted - set(available)
    if named := sorted(missing & added):
        raise UnfitHost(f"cap_add '{named[0]}': this agent does not have it (run it with that capability)")
    return Granted(tuple(sorted(wanted - missing)), tuple(sorted(missing)))
