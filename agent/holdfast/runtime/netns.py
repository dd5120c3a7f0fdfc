"""Make network namespaces for instances, bound under /run/netns, where ip-netns(8) sees them. Called by node.

A thread unshares its network, brings lo up, binds the namespace to a file and ends: no process is forked, and the
mount alone keeps the namespace. Namespaces of others are neither read nor changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from holdfast import syscalls
from holdfast.drivers import Host
from holdfast.errors import NotPermitted, explained
from holdfast.files import held, names_in, write_setting
from holdfast.mounts import mount_points
from holdfast.observed import Receipt

SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1

FOLDER = Path("/run/netns")
MANY = 1 << 14  # namespaces whose receipts are kept from one look to the next
#: Off, so that neighbours can't change the routes of a container, on all links that drivers give it.
REDIRECTS = tuple(
    f"/proc/sys/net/{setting}/accept_redirects"
    for setting in ("ipv4/conf/all", "ipv4/conf/default", "ipv6/conf/all", "ipv6/conf/default")
)
MARK = "netns-shared"
BUSY_TRIES = 200


def ensure(host: Host, instance: str, pid: int | None = None) -> Receipt:
    """Ensure that an instance has a network namespace with lo up. Raises NotPermitted, UnfitHost.

    pid: a process that is in the namespace already; the namespace is bound again if its binding was lost.
    Receipt: kind "netns", id = owner = instance, data["path"] = the file that it is bound to.
    """
    path = host.netns(instance)
    if not syscalls.is_mounted(path):  # only then its file is on another device than the folder's
        _claim(host, path)
        with _told(f"make network namespace '{path.name}'"):
            try:
                if pid is None:
                    syscalls.in_thread(lambda: _make(path), f"netns {path.name}")
                else:
                    syscalls.mount(f"/proc/{pid}/ns/net", path, flags=syscalls.MS_BIND)
            except OSError:
                path.unlink(missing_ok=True)
                raise
    return _receipt(path, instance)


def observe(host: Host) -> Iterable[Receipt]:
    """List the namespaces with the agent's name, and (with empty data) files that lost their namespace."""
    prefix = f"{host.name}-"
    ours = [name for name in names_in(FOLDER) if name.startswith(prefix)]
    bound = _bound() if ours else frozenset()
    return [_receipt(f"{FOLDER}/{name}", name.removeprefix(prefix), name in bound) for name in sorted(ours)]


def remove(host: Host, receipt: Receipt) -> None:
    """Unbind a namespace; the kernel removes it with its links once no process is left in it."""
    path = host.netns(receipt.id)
    syscalls.unmount(path, lazily=True)
    path.unlink(missing_ok=True)
    _unshare_folder(host)


@lru_cache(MANY)
def _receipt(path: Path | str, instance: str, bound: bool = True) -> Receipt:
    data = {"path": str(path)} if bound else {}
    return Receipt("netns", "kernel", instance, instance, data)


def _bound() -> frozenset[str]:
    """The names under /run/netns that are mounts of nsfs."""
    points = (each.point for each in mount_points("nsfs"))
    return frozenset(point.rpartition("/")[2] for point in points if point.startswith(f"{FOLDER}/"))


def _make(path: Path) -> None:
    """Make the namespace, in a thread that lives in it, and bind it."""
    syscalls.call("unshare", syscalls.CLONE_NEWNET)
    _raise_loopback()
    for setting in REDIRECTS:
        write_setting(setting, "0")
    syscalls.mount("/proc/thread-self/ns/net", path, flags=syscalls.MS_BIND)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def _claim(host: Host, path: Path) -> None:
    """Make the shared folder and the file in it under one lock: nobody removes a folder that is not empty."""
    with _folder_lock():
        FOLDER.mkdir(mode=0o755, exist_ok=True)
        _share_folder(host)
        path.touch(mode=0o444)


def _share_folder(host: Host) -> None:
    """Make /run/netns a shared mount, as ip-netns(8) does on first use: if it did so later, its mount would hide
    ours. A mark in the run root tells `_unshare_folder` that we did it.
    """
    try:
        syscalls.mount("none", FOLDER, flags=syscalls.MS_SHARED | syscalls.MS_REC)
    except OSError:  # it is not a mount point
        host.run_root.mkdir(parents=True, exist_ok=True)
        (host.run_root / MARK).touch()
        with _told(f"share '{FOLDER}'"):
            syscalls.mount(FOLDER, FOLDER, flags=syscalls.MS_BIND | syscalls.MS_REC)
            # First apart from /run: else each namespace is mounted there, too, and every mount slows down each start.
            for flag in (syscalls.MS_PRIVATE, syscalls.MS_SHARED):
                syscalls.mount("none", FOLDER, flags=flag | syscalls.MS_REC)


def _unshare_folder(host: Host) -> None:
    """Undo `_share_folder` if we did it and nobody has a namespace there."""
    mark = host.run_root / MARK
    if not mark.exists():
        return
    with _folder_lock():
        for _ in range(BUSY_TRIES):
            if FOLDER.is_dir() and os.listdir(FOLDER):  # noqa: PTH208 - an iterator left open would keep it busy
                return
            try:
                syscalls.call("umount2", bytes(FOLDER), syscalls.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    time.sleep(0.001)  # somebody looks into it at the moment; the kernel announces no end of that
                    continue
            break
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            FOLDER.rmdir()


@contextlib.contextmanager
def _folder_lock() -> Iterator[None]:
    """Keep other agents from the folder. Its parent is locked, because an open folder can't be unmounted."""
    with held(os.open(FOLDER.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _told(operation: str) -> Iterator[None]:
    """Say what was attempted when the kernel refuses it."""
    with explained(operation):
        try:
            yield
        except PermissionError as error:
            raise NotPermitted(f"{operation}: not permitted (root with CAP_SYS_ADMIN)") from error
