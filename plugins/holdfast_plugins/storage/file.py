"""Mounts of files that are in the revision.

A read-only file that the container restarts for is mounted straight from the content store. Every other one is a
copy of the instance's own, below run_root/instances/ID/files/, because something may change it: the container,
or `refresh`, in place. The copy's name is the quoted target, so that `observe` can tell it.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from holdfast.drivers import Host, MountWant, Receipt
from holdfast.errors import WrongCall, WrongState
from holdfast_plugins.storage.bind import bind_receipt

LONGEST_NAME = 255  # NAME_MAX


class FileMount:
    """The mount driver `file`."""

    name = "file"

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: MountWant) -> None:
        """Raise WrongState for content that is not stored, or a target that is too long to name a copy after."""
        if want.content is None or not want.content.exists():
            raise WrongState(f"mount {want.mount.source!r}: its content is not stored (it is not in the revision)")
        if len(quote(want.mount.target, safe="")) > LONGEST_NAME:
            raise WrongState(f"mount {want.mount.source!r} at {want.mount.target!r}: the target is too long")

    def ensure(self, want: MountWant) -> Receipt:
        """Bring the copy, where there has to be one, to the wanted content."""
        self.check(want)
        assert want.content is not None
        mount = want.mount
        if mount.read_only and mount.on_change == "restart" and mount.mode is mount.uid is mount.gid is None:
            return bind_receipt(self.name, want, want.content, read_only=True)
        copy = self._copy(want.instance, mount.target)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _bring(copy, want.content)
        _dress(copy, mount.mode, mount.uid, mount.gid)
        return bind_receipt(self.name, want, copy, read_only=mount.read_only)

    def refresh(self, receipt: Receipt, content: Path) -> None:
        """Rewrite the copy of a running instance in place: same inodes, so the container sees it at once."""
        copy = Path(str(receipt.data["source"]))
        if not copy.is_relative_to(self.host.run_root):
            raise WrongCall(f"refresh {receipt.id!r}: it is mounted from the content store (on_change = 'restart')")
        like = copy.stat()
        _bring(copy, content)
        if copy.is_dir():  # new files get the look of the rest
            _dress(copy, None, like.st_uid, like.st_gid)

    def observe(self) -> Iterable[Receipt]:
        """The copies; how they are mounted is not to be read back."""
        for path in sorted(self.host.instance("x").parent.glob("*/files/*")):
            instance = path.parent.parent.name
            yield Receipt("volume", self.name, f"{instance}:{unquote(path.name)}", instance)

    def remove(self, receipt: Receipt) -> None:
        """Delete the copy."""
        instance, _, target = receipt.id.partition(":")
        copy = self._copy(instance, target)
        if copy.is_dir():
            shutil.rmtree(copy)
        else:
            copy.unlink(missing_ok=True)
        for folder in (copy.parent, copy.parent.parent):
            with suppress(OSError):  # gone, or others keep things there
                folder.rmdir()

    def _copy(self, instance: str, target: str) -> Path:
        if not instance or "/" in instance or instance in (".", "..") or not target:
            raise WrongCall(f"mount {instance}:{target}: not a mount of an instance (expected INSTANCE:TARGET)")
        return self.host.instance(instance) / "files" / quote(target, safe="")


def _bring(copy: Path, content: Path) -> None:
    """Make copy equal to content, touching only what differs."""
    if content.is_dir():
        _bring_folder(copy, content)
        return
    data = content.read_bytes()
    if not copy.exists():
        copy.write_bytes(data)
        copy.chmod(0o644)
    elif copy.read_bytes() != data:
        with copy.open("r+b") as file:
            file.write(data)
            file.truncate()


def _bring_folder(copy: Path, content: Path) -> None:
    if not copy.is_dir():
        copy.mkdir()
        copy.chmod(0o755)
    for path in copy.iterdir():
        wanted = content / path.name
        if path.is_symlink() or not wanted.exists() or wanted.is_dir() != path.is_dir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for wanted in content.iterdir():
        _bring(copy / wanted.name, wanted)


def _dress(copy: Path, mode: int | None, uid: int | None, gid: int | None) -> None:
    """Set owner and mode; mode is that of files, directories can be searched by whom it lets read."""
    for path in (copy, *copy.rglob("*")) if copy.is_dir() else (copy,):
        found = path.stat()
        owner = (found.st_uid if uid is None else uid, found.st_gid if gid is None else gid)
        if owner != (found.st_uid, found.st_gid):
            os.chown(path, *owner)
        wanted = None if mode is None else mode | (mode & 0o444) >> 2 if path.is_dir() else mode
        if wanted is not None and wanted != stat.S_IMODE(path.stat().st_mode):
            path.chmod(wanted)
