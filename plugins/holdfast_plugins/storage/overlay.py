"""Root file systems by overlayfs: shared read-only layers, and one writable layer for each instance.

root/instances/ID/{upper,work}    survive a reboot
run_root/instances/ID/rootfs      where it is mounted
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from holdfast.drivers import Host, Receipt, RootfsWant
from holdfast.errors import NotPermitted, WrongCall, WrongState, explained
from holdfast.files import names_in, remove_tree
from holdfast.mounts import mount_points
from holdfast.syscalls import is_mounted, unmount
from holdfast_plugins.storage import quota
from holdfast_plugins.storage.mounts import mount_overlay

MOST_LAYERS = 500  # OVL_MAX_STACK of the kernel
MANY = 1 << 14  # instances whose receipts are kept from one look to the next


class OverlayRootfs:
    """The rootfs driver `overlay`."""

    name = "overlay"

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: RootfsWant) -> None:
        """Raise WrongState for layers that are missing or too many, UnfitHost where a size can't be limited."""
        if os.geteuid() != 0:
            raise NotPermitted(f"mount root file system of {want.instance!r}: only root may mount")
        if not 0 < len(want.layers) <= MOST_LAYERS:
            raise WrongState(
                f"mount root file system of {want.instance!r}: {len(want.layers)} layers "
                f"(overlayfs takes 1 to {MOST_LAYERS})"
            )
        for layer in want.layers:
            if not layer.is_dir():
                raise WrongState(f"mount root file system of {want.instance!r}: {str(layer)!r} is no directory")
        if want.size is not None:
            quota.check(self.host.root, "storage_opt.size")

    def ensure(self, want: RootfsWant) -> Receipt:
        """Mount it. If it is mounted already, this costs two stat(2)."""
        target, upper, work = self._places(want.instance)
        if not is_mounted(target):
            for folder in (target, work):
                folder.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)  # set-user-ID programs lie below
                folder.parent.mkdir(parents=True, exist_ok=True)
            if want.size is not None:
                with explained(f"limit writable layer of {want.instance!r}"):
                    quota.limit(upper.parent, want.size, f"rootfs {want.instance}")
            for folder in (target, work):
                folder.mkdir(exist_ok=True)
            _make_upper(upper, want.layers[-1])
            with explained(f"mount root file system {str(target)!r}"):
                mount_overlay(self.host.name, want.layers, upper, work, target)
        return self._receipt(want.instance)

    def observe(self) -> Iterable[Receipt]:
        """List what is mounted and, with empty data, what has a writable layer but is not mounted."""
        parent = str(self.host.instance("x").parent) + "/"
        mounted = {
            point.removeprefix(parent).removesuffix("/rootfs")
            for point in (each.point for each in mount_points("overlay"))
            if point.startswith(parent) and point.endswith("/rootfs")
        }
        layers = str(self.host.root / "instances")
        for instance in sorted({*mounted, *names_in(layers)}):
            yield _observed(parent, layers, instance, instance in mounted, self.host.id)

    def remove(self, receipt: Receipt) -> None:
        """Unmount it and delete its writable layer."""
        target, upper, _ = self._places(receipt.id)
        if is_mounted(target):
            unmount(target)
        for folder in (target, target.parent):
            with suppress(OSError):  # gone, or others keep things there
                folder.rmdir()
        with suppress(FileNotFoundError), quota.freed(upper.parent, f"rootfs {receipt.id}"):
            remove_tree(upper.parent)

    def _places(self, instance: str) -> tuple[Path, Path, Path]:
        if not instance or "/" in instance or instance in (".", ".."):
            raise WrongCall(f"mount root file system of {instance!r}: not an instance (expected one path component)")
        layer = self.host.root / "instances" / instance
        return self.host.instance(instance) / "rootfs", layer / "upper", layer / "work"

    def _receipt(self, instance: str) -> Receipt:
        target, upper, _ = self._places(instance)
        return Receipt("rootfs", self.name, instance, instance, _data(str(target), str(upper)))


@lru_cache(MANY)
def _observed(parent: str, layers: str, instance: str, mounted: bool, root: str) -> Receipt:
    data = _data(f"{parent}{instance}/rootfs", f"{layers}/{instance}/upper") if mounted else {}
    return Receipt("rootfs", OverlayRootfs.name, instance, instance, data, root)  # it lies in this root


def _data(target: str, upper: str) -> dict[str, str]:
    return {"path": target, "upper": upper}


def _make_upper(upper: Path, top: Path) -> None:
    """Make the upper directory with the image's owner and mode, because the merged root takes them from it."""
    if not upper.exists():
        like = top.stat()
        upper.mkdir(mode=0o700)
        os.chown(upper, like.st_uid, like.st_gid)
        upper.chmod(like.st_mode & 0o7777)
