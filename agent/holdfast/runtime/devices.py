"""Find the device nodes of the host that a container asks for: their type, numbers and permissions.

Called by the node before it makes a config.json.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import WrongState
from holdfast.spec.model import Container

#: Names below /dev of which a container has its own.
_OWN = frozenset(("pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "core", "ptmx", "console", "init"))


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """One device inside a container. kind is "b" or "c"; mode, uid and gid are those of the host's node."""

    path: str
    kind: str
    major: int
    minor: int
    permissions: str = "rwm"
    mode: int = 0o600
    uid: int = 0
    gid: int = 0


def device_nodes(want: Container) -> tuple[DeviceNode, ...]:
    """Look up the devices that a container asks for, all of the host's if it is privileged.

    A directory stands for every device below it. Raises WrongState for a path that is no device.
    """
    found = {node.path: node for node in (_below(Path("/dev"), "/dev", "rwm") if want.privileged else ())}
    for device in want.devices:
        source = Path(device.source)
        if source.is_dir():
            found |= {node.path: node for node in _below(source, device.target, device.permissions)}
        elif node := _node(source, device.target, device.permissions):
            found[node.path] = node
        else:
            raise WrongState(f"device '{device.source}': no such device on this host")
    return tuple(found.values())


def _below(folder: Path, target: str, permissions: str) -> Iterator[DeviceNode]:
    for entry in sorted(folder.iterdir()):
        if entry.name in _OWN or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _below(entry, f"{target}/{entry.name}", permissions)
        elif node := _node(entry, f"{target}/{entry.name}", permissions):
            yield node


def _node(path: Path, target: str, permissions: str) -> DeviceNode | None:
    with suppress(OSError):
        status = path.stat()
        kind = "b" if stat.S_ISBLK(status.st_mode) else "c" if stat.S_ISCHR(status.st_mode) else None
        numbers, mode = (os.major(status.st_rdev), os.minor(status.st_rdev)), stat.S_IMODE(status.st_mode)
        if kind is not None:
            return DeviceNode(target, kind, *numbers, permissions, mode, status.st_uid, status.st_gid)
    return None
