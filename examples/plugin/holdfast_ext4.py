"""Volumes of a fixed size: root/volumes-ext4/APP/NAME/{image,mnt}, the image ext4-formatted and loop-mounted.

The image is formatted under another name and renamed when that is done, so a volume is whole or not there.
A size that was raised grows the file system, in place where the kernel allows it (CAP_SYS_RESOURCE); a lower one is
refused, for ext4 can't shrink while it is mounted.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.drivers import Driver, Host, VolumeWant
from holdfast.errors import UnfitHost, WrongCall, WrongState
from holdfast.files import discard_tree
from holdfast.hookspecs import hookimpl
from holdfast.mounts import mount_points
from holdfast.observed import Receipt

PROGRAMS = ("mkfs.ext4", "e2fsck", "resize2fs", "debugfs", "losetup", "mount", "umount")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SMALLEST = 1 << 20
LETTING_GO = 1.0  # seconds
BLOCK = 4096
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
ID = re.compile(r"[a-z0-9][a-z0-9_.-]*/[a-z0-9][a-z0-9_.-]*")


@hookimpl
def register_volume_drivers(register: Callable[[Driver[VolumeWant]], None], host: Host) -> None:
    register(Ext4Volume(host))


class Ext4Volume:
    """The volume driver `ext4`; driver_opts: size, as `64MiB`."""

    name = "ext4"

    def __init__(self, host: Host) -> None:
        self.root = host.root / "volumes-ext4"

    def check(self, want: VolumeWant) -> None:
        """Raise WrongState for a size that is missing, malformed or smaller than what is there; UnfitHost for a
        program that this host lacks.
        """
        size = _size(want)
        missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
        if missing:
            raise UnfitHost(f"volume {want.id!r}: {', '.join(missing)} not found (install e2fsprogs and util-linux)")
        image = self._folder(want.id) / "image"
        there = image.stat().st_size if image.exists() else 0
        if there > size:
            raise WrongState(f"volume {want.id!r}: has {there} bytes and can't shrink to {size} (give a larger size)")
        if 0 < there < size and not _may_grow_online() and _in_use(image):
            raise UnfitHost(
                f"volume {want.id!r}: can't grow to {size} bytes while containers use it, for that takes "
                "CAP_SYS_RESOURCE (stop its containers for a moment, or give the agent that capability)"
            )

    def ensure(self, want: VolumeWant) -> Receipt:
        """Format, mount or grow it, whichever is missing."""
        self.check(want)
        folder, size = self._folder(want.id), _size(want)
        image, mounted = folder / "image", folder / "mnt"
        if not image.exists():
            _format(image, size)
        mounted.mkdir(exist_ok=True)
        if image.stat().st_size < size:
            os.truncate(image, size)
        _grow(image, mounted, size)
        if not mounted.is_mount():
            _run("mount", "-o", "loop,noatime", str(image), str(mounted))
        return self._receipt(want.id)

    def observe(self) -> Iterable[Receipt]:
        """Every volume on disk; the data of one that is not mounted (since a reboot) is empty."""
        mounted = {each.point for each in mount_points()}
        for image in sorted(self.root.glob("*/*/image")):
            receipt = self._receipt(f"{image.parent.parent.name}/{image.parent.name}")
            there = receipt.data["path"] in mounted
            yield receipt if there else Receipt("volume", self.name, receipt.id)

    def remove(self, receipt: Receipt) -> None:
        """Unmount it and delete it with its data."""
        folder = self._folder(receipt.id)
        if (folder / "mnt").is_mount():
            _run("umount", "--lazy", str(folder / "mnt"))
        (folder / "image").unlink(missing_ok=True)  # first: without it, the rest is no volume
        discard_tree(folder)
        with suppress(OSError):  # gone, or there are other volumes of the app
            folder.parent.rmdir()
            self.root.rmdir()

    def _folder(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise WrongCall(f"volume {id!r}: not a volume's name (expected APP/NAME)")
        return self.root / id

    def _receipt(self, id: str) -> Receipt:
        folder = self._folder(id)
        return Receipt(
            "volume", self.name, id, data={"path": str(folder / "mnt"), "size": _formatted_size(folder / "image")}
        )


def _size(want: VolumeWant) -> int:
    unknown = set(want.driver_opts) - {"size"}
    if unknown:
        raise WrongState(f"volume {want.id!r}: driver_opts.{min(unknown)}: unknown option (expected size)")
    text = want.driver_opts.get("size", "")
    match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|TiB)", text)
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if size < SMALLEST:
        raise WrongState(f"volume {want.id!r}: driver_opts.size: {text!r} (expected 1MiB or more, as '64MiB')")
    return size


def _format(image: Path, size: int) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    fresh = image.with_name("image.new")
    fresh.unlink(missing_ok=True)
    with fresh.open("xb") as file:
        file.truncate(size)
    _run("mkfs.ext4", "-q", "-m", "0", "-b", str(BLOCK), str(fresh))
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    _empty(fresh)
    fresh.rename(image)


def _empty(image: Path) -> None:
    """Take lost+found away, so that a new volume is as empty as its user expects."""
    _run("debugfs", "-w", "-R", "rmdir lost+found", str(image))


def _grow(image: Path, mounted: Path, size: int) -> None:
    """Bring the file system to the size of its image, also when that was cut off earlier."""
    if _formatted_size(image) >= size - size % BLOCK or (mounted.is_mount() and _grow_online(image)):
        return
    if mounted.is_mount():
        _run("umount", str(mounted))
    if not _is_let_go(image):  # a container has it mounted still: resizing now would destroy it
        raise UnfitHost(
            f"grow {str(image)!r}: in use, and this kernel lets nobody grow it then (stop its containers)"
        )
    _run("e2fsck", "-f", "-p", str(image), worst=1)  # 1: mended, as e2fsck(8) has it
    _run("resize2fs", str(image))


def _is_let_go(image: Path) -> bool:
    """Whether no loop device holds the image; the kernel lets go of one a moment after its last unmount."""
    deadline = time.monotonic() + LETTING_GO
    while _loop_devices(image):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _may_grow_online() -> bool:
    """Whether this process may resize a mounted file system: CAP_SYS_RESOURCE, bit 24 of capabilities(7)."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    return bool(int(status["CapEff"], 16) >> 24 & 1)


def _in_use(image: Path) -> bool:
    """Whether another mount namespace than our own has the image mounted."""
    devices = {
        f" {os.major(rdev)}:{os.minor(rdev)} "
        for device in _loop_devices(image)
        if (rdev := Path(device).stat().st_rdev)
    }
    ours = Path("/proc/self/ns/mnt").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "ns/mnt").readlink() == ours:
                continue
            mounts = (process / "mountinfo").read_text(errors="surrogateescape")
            if any(device in mounts for device in devices):
                return True
    return False


def _grow_online(image: Path) -> bool:
    (device,) = _loop_devices(image)
    _run("losetup", "--set-capacity", device)
    try:
        _run("resize2fs", device)
    except UnfitHost:
        return False
    return True


def _formatted_size(image: Path) -> int:
    """The size that the superblock holds (kernel documentation, ext4/super.rst: s_blocks_count, s_log_block_size)."""
    with image.open("rb") as file:
        file.seek(1024)
        low, log = struct.unpack_from("<4xI16xI", file.read(1024))
    return int(low) << (10 + int(log))


def _loop_devices(image: Path) -> list[str]:
    return _run("losetup", "--noheadings", "--output", "NAME", "--associated", str(image)).split()


def _run(program: str, *arguments: str, worst: int = 0) -> str:
    """Run a program of the system. Raises UnfitHost with its own words."""
    done = subprocess.run(
        [shutil.which(program, path=PATH) or program, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode > worst:
        raise UnfitHost(f"{program} {arguments[-1]!r}: {done.stderr.strip()}")
    return done.stdout
