"""Volumes that are kept under the agent's root: root/volumes/APP/NAME/_data.

A volume outlives power loss between any two steps: content that a new volume starts with is copied aside (.seed),
synced, declared complete (.seeded), and only then moved in, which the next `ensure` resumes.
Deletion starts with a rename, so that no half-deleted volume is ever taken for a whole one.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.drivers import Host, Receipt, VolumeWant, remove_tree
from holdfast.errors import WrongCall, WrongState
from holdfast_plugins.storage.mounts import sync_filesystem

ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}/[a-z0-9][a-z0-9_.-]{0,62}")


class ManagedVolume:
    """The volume driver `managed`."""

    name = "managed"

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: VolumeWant) -> None:
        """Raise WrongState for options: there are none."""
        self._folder(want.id)
        if want.driver_opts:
            option = min(want.driver_opts)
            raise WrongState(f"volume {want.id!r}: driver_opts.{option}: driver 'managed' takes no options")

    def ensure(self, want: VolumeWant) -> Receipt:
        """Create it; fill it from the seed while it is empty, as Docker does."""
        self.check(want)
        folder = self._folder(want.id)
        data = folder / "_data"
        folder.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)  # set-user-ID programs may lie below
        data.mkdir(parents=True, exist_ok=True)
        if (folder / ".seeded").exists() or (want.seed is not None and _is_empty(data)):
            _fill(folder, want.seed)
        return self._receipt(want.id)

    def observe(self) -> Iterable[Receipt]:
        """Every volume on disk, used or not."""
        root = self.host.root / "volumes"
        for data in sorted(root.glob("[!.]*/[!.]*/_data")):
            yield self._receipt(str(data.parent.relative_to(root)))

    def remove(self, receipt: Receipt) -> None:
        """Delete it with its data."""
        folder = self._folder(receipt.id)
        doomed = folder.with_name(f".removed-{folder.name}")
        _delete(doomed)
        with suppress(FileNotFoundError):
            folder.rename(doomed)
            _delete(doomed)
        with suppress(OSError):  # gone, or there are other volumes of the app
            folder.parent.rmdir()

    def _folder(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise WrongCall(f"volume {id!r}: not a volume's name (expected APP/NAME)")
        return self.host.root / "volumes" / id

    def _receipt(self, id: str) -> Receipt:
        return Receipt("volume", self.name, id, data={"path": str(self._folder(id) / "_data")})


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def _delete(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(folder)


def _fill(folder: Path, seed: Path | None) -> None:
    """Move the seed into _data, which is never replaced: containers may have it mounted already."""
    partial, complete, data = folder / ".seed", folder / ".seeded", folder / "_data"
    if not complete.exists():
        assert seed is not None
        _delete(partial)
        copy_tree(seed, partial)
        sync_filesystem(folder)
        partial.rename(complete)
    for entry in list(complete.iterdir()):
        if not os.path.lexists(data / entry.name):
            entry.rename(data / entry.name)
    _copy_looks(complete, data)
    sync_filesystem(folder)
    _delete(complete)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory with owners, modes, times, extended attributes, links, devices and fifos; target is new."""
    _copy_folder(source, target, {})


def _copy_folder(source: Path, target: Path, links: dict[tuple[int, int], Path]) -> None:
    target.mkdir(mode=0o700)
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _copy_folder(Path(entry.path), target / entry.name, links)
            else:
                _copy_entry(Path(entry.path), target / entry.name, links)
    _copy_looks(source, target)


def _copy_entry(source: Path, target: Path, links: dict[tuple[int, int], Path]) -> None:
    found = source.lstat()
    twin = links.setdefault((found.st_dev, found.st_ino), target)
    if twin is not target:
        os.link(twin, target, follow_symlinks=False)
        return
    if stat.S_ISLNK(found.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(found.st_mode):
        shutil.copyfile(source, target)
    elif not stat.S_ISSOCK(found.st_mode):  # a socket without its process is nothing
        os.mknod(target, found.st_mode, found.st_rdev)
    else:
        return
    _copy_looks(source, target)


def _copy_looks(source: Path, target: Path) -> None:
    """Owner before mode and attributes: chown(2) takes set-user-ID bits and security.capability away."""
    found = source.lstat()
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        target.chmod(stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)
