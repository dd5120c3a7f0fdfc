"""Root file systems by copying: root/copies/INSTANCE has what the layers of the image come to.

A copy is made under another name and renamed when it is complete, so it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.drivers import Driver, Host, RootfsWant
from holdfast.errors import WrongCall, WrongState
from holdfast.files import remove_tree
from holdfast.hookspecs import hookimpl
from holdfast.observed import Receipt

api_version = 2

OPAQUE = "trusted.overlay.opaque"  # "y" on a directory of a layer: it hides what lower layers have there
OF_OVERLAY = "trusted.overlay."


@hookimpl
def register_rootfs_drivers(register: Callable[[Driver[RootfsWant]], None], host: Host) -> None:
    register(CopiedRootfs(host))


class CopiedRootfs:
    """The rootfs driver `copy`."""

    name = "copy"

    def __init__(self, host: Host) -> None:
        self.host = host
        self.root = host.root / "copies"

    def check(self, want: RootfsWant) -> None:
        """Raise WrongState for layers that are missing, and for a size, which a copy can't be limited to."""
        if want.size is not None:
            raise WrongState(
                f"copy root file system of {want.instance!r}: storage_opt.size: driver 'copy' has no limits"
            )
        for layer in want.layers:
            if not layer.is_dir():
                raise WrongState(f"copy root file system of {want.instance!r}: {str(layer)!r} is no directory")

    def ensure(self, want: RootfsWant) -> Receipt:
        """Copy the layers, lowest first, unless that is done."""
        self.check(want)
        place, fresh = self._places(want.instance)
        if not place.exists():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # set-user-ID programs lie below
            _discard(fresh)  # what an agent that was killed had begun
            fresh.mkdir()
            for layer in want.layers:
                _lay(layer, fresh)
            fresh.rename(place)
        return self._receipt(want.instance)

    def observe(self) -> Iterable[Receipt]:
        """List the complete copies."""
        for place in sorted(self.root.glob("[!.]*")):
            yield self._receipt(place.name)

    def remove(self, receipt: Receipt) -> None:
        """Delete the copy; it is renamed first, so that no half of it is ever taken for a whole one."""
        place, doomed = self._places(receipt.id)
        _discard(doomed)
        with suppress(FileNotFoundError):
            place.rename(doomed)
            _discard(doomed)

    def _places(self, instance: str) -> tuple[Path, Path]:
        if not instance or "/" in instance or instance.startswith("."):
            raise WrongCall(f"root file system of {instance!r}: not an instance (expected one path component)")
        return self.root / instance, self.root / f".{instance}"

    def _receipt(self, instance: str) -> Receipt:
        data = {"path": str(self.root / instance)}
        return Receipt("rootfs", self.name, instance, instance, data, self.host.id)  # it lies in this root


def _lay(layer: Path, root: Path) -> None:
    """Put a layer over what is there. Whatever a lower layer has in the place of a directory is never followed."""
    copied: dict[int, Path] = {}  # inode → where its first name was copied to: hard links stay links
    folders = [(layer, root)]
    for above, names, files in os.walk(layer):
        place = root / Path(above).relative_to(layer)
        for name in (*names, *files):
            source, target = Path(above, name), place / name
            found = source.lstat()
            if not stat.S_ISDIR(found.st_mode):
                _clear(target)
                _copy(source, target, found, copied)
                continue
            if _is_opaque(source) or not stat.S_ISDIR(_mode(target)):
                _clear(target)
            target.mkdir(exist_ok=True)
            folders.append((source, target))
    for source, target in reversed(folders):  # last, because writing into a directory changes its time
        _dress(source, target, source.lstat())


def _copy(source: Path, target: Path, found: os.stat_result, copied: dict[int, Path]) -> None:
    """Copy what is no directory. A whiteout (character device 0/0) is no file: it hides one, which is gone by now."""
    if found.st_ino in copied:
        os.link(copied[found.st_ino], target, follow_symlinks=False)
        return
    if stat.S_ISREG(found.st_mode):
        shutil.copyfile(source, target)
    elif stat.S_ISLNK(found.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
        return
    else:
        os.mknod(target, found.st_mode, found.st_rdev)
    _dress(source, target, found)
    if found.st_nlink > 1:
        copied[found.st_ino] = target


def _dress(source: Path, target: Path, found: os.stat_result) -> None:
    """Give a copy the owner, mode, times and extended attributes of its source."""
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)
    for name in os.listxattr(target, follow_symlinks=False):
        if name.startswith(OF_OVERLAY):
            os.removexattr(target, name, follow_symlinks=False)


def _is_opaque(folder: Path) -> bool:
    try:
        return os.getxattr(folder, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:  # it has no such attribute
        return False


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _clear(path: Path) -> None:
    if stat.S_ISDIR(_mode(path)):
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(folder)
