"""The built-in storage drivers: overlay root file systems, managed volumes; bind, tmpfs and file mounts."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.drivers import Driver, Host, MountWant, RootfsWant, VolumeWant
from holdfast.hookspecs import hookimpl
from holdfast_plugins.storage.bind import BindMount
from holdfast_plugins.storage.file import FileMount
from holdfast_plugins.storage.managed import ManagedVolume
from holdfast_plugins.storage.overlay import OverlayRootfs
from holdfast_plugins.storage.tmpfs import TmpfsMount

__all__ = ["BindMount", "FileMount", "ManagedVolume", "OverlayRootfs", "TmpfsMount"]


@hookimpl
def register_rootfs_drivers(register: Callable[[Driver[RootfsWant]], None], host: Host) -> None:
    register(OverlayRootfs(host))


@hookimpl
def register_volume_drivers(register: Callable[[Driver[VolumeWant]], None], host: Host) -> None:
    register(ManagedVolume(host))


@hookimpl
def register_mount_drivers(register: Callable[[Driver[MountWant]], None], host: Host) -> None:
    register(BindMount(host))
    register(TmpfsMount())
    register(FileMount(host))
