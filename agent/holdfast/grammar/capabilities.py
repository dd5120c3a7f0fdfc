"""Capabilities, as capabilities(7) has them, in the spelling of the OCI runtime spec."""

from __future__ import annotations

from holdfast.words import suggestion

#: In the order of their numbers, so that a bit mask of the kernel can be read.
ALL = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID"),
    *("CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST"),
    *("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO"),
    *("CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE"),
    *("CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE"),
    *("CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM"),
    *("CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"),
)


def canonical(text: str) -> str:
    """Return `net_admin`, `NET_ADMIN` or `CAP_NET_ADMIN` as the last, `all` as ALL."""
    found = text.upper()
    if found == "ALL":
        return found
    found = found if found.startswith("CAP_") else f"CAP_{found}"
    if found not in ALL:
        known = {capability.removeprefix("CAP_") for capability in ALL}
        near = suggestion(found.removeprefix("CAP_"), known) or " (expected a name of capabilities(7), or ALL)"
        raise ValueError(f"'{text}' is not a capability{near}")
    return found
