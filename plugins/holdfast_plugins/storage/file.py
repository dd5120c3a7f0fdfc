"""Mounts of files that are in the revision.

A read-only file whose change restarts the container is mounted from the content store. Every other one is a copy for
the instance, in `Host.files`, because the container or `refresh` may change it. The copy's name is the quoted target,
so that `observe` can read it back.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote

from holdfast.drivers import Host, MountWant, Receipt
from holdfast.errors import WrongCall, WrongState
from holdfast.files import clear, held, mode_of, remove_tree, write_over
from holdfast_plugins.storage.bind import bind_receipt

#: The mode and owner of a mount's files (mode, uid, gid); where None, they are root's and readable by all.
Look = Mapping[str, int | None]
LONGEST_NAME = 255  # NAME_MAX
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FileMount:
    """The mount driver `file`."""

    name = "file"

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: MountWant) -> None:
        """Raise WrongState for content that is not stored, or a target that is too long for a file name."""
        if want.content is None or not want.content.exists():
            raise WrongState(f"mount {want.mount.source!r}: its content is not stored (it is not in the revision)")
        if len(quote(want.mount.target, safe="")) > LONGEST_NAME:
            raise WrongState(f"mount {want.mount.source!r} at {want.mount.target!r}: the target is too long")

    def ensure(self, want: MountWant) -> Receipt:
        """Update the copy, if there has to be one, to the wanted content."""
        self.check(want)
        assert want.content is not None
        mount = want.mount
        if mount.read_only and mount.on_change == "restart" and mount.mode is mount.uid is mount.gid is None:
            return bind_receipt(self.name, want, want.content, read_only=True)
        copy = self._copy(want.instance, mount.target)
        copy.parent.mkdir(parents=True, exist_ok=True)
        look = {"mode": mount.mode, "uid": mount.uid, "gid": mount.gid}
        _bring(copy, want.content, look)
        receipt = bind_receipt(self.name, want, copy, read_only=mount.read_only)
        return replace(receipt, data={**receipt.data, "look": look})

    def refresh(self, receipt: Receipt, content: Path) -> None:
        """Rewrite the copy of a running instance in place: inodes stay, so the container sees it at once."""
        copy = Path(str(receipt.data["source"]))
        if not copy.is_relative_to(self.host.run_root):
            raise WrongCall(f"refresh {receipt.id!r}: it is mounted from the content store (on_change = 'restart')")
        _bring(copy, content, receipt.data["look"])

    def observe(self) -> Iterable[Receipt]:
        """List the copies; how they are mounted can't be read back."""
        for path in sorted(self.host.instance("x").parent.glob("*/files/%2F*")):
            instance = path.parent.parent.name
            yield Receipt("volume", self.name, f"{instance}:{unquote(path.name)}", instance)

    def remove(self, receipt: Receipt) -> None:
        """Delete the copy."""
        instance, _, target = receipt.id.partition(":")
        copy = self._copy(instance, target)
        if copy.is_dir():
            remove_tree(copy)
        else:
            copy.unlink(missing_ok=True)
        for folder in (copy.parent, copy.parent.parent):
            with suppress(OSError):  # gone, or others keep things there
                folder.rmdir()

    def _copy(self, instance: str, target: str) -> Path:
        if not instance or "/" in instance or instance in (".", "..") or not target:
            raise WrongCall(f"mount {instance}:{target}: not a mount of an instance (expected INSTANCE:TARGET)")
        return self.host.files(instance) / quote(target, safe="")


def _bring(copy: Path, content: Path, look: Look) -> None:
    """Make copy equal to content; change only what differs."""
    with held(os.open(copy.parent, FOLDER)) as folder:
        _bring_entry(folder, copy.name, content, look)


def _bring_entry(folder: int, name: str, content: Path, look: Look) -> None:
    """Update one entry, by its folder's descriptor: the container may have replaced files by links."""
    is_folder = content.is_dir()
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(mode_of(folder, name) or 0):
        clear(folder, name)
    if is_folder:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
    with held(os.open(name, FOLDER if is_folder else FILE, 0o644, dir_fd=folder)) as descriptor:
        if is_folder:
            _bring_entries(descriptor, content, look)
        else:
            write_over(descriptor, content.read_bytes())
        _dress(descriptor, content, look)


def _bring_entries(folder: int, content: Path, look: Look) -> None:
    wanted = {path.name: path for path in content.iterdir()}
    for name in os.listdir(folder):
        if name not in wanted:
            clear(folder, name)
    for name, path in wanted.items():
        _bring_entry(folder, name, path, look)


def _dress(descriptor: int, content: Path, look: Look) -> None:
    """Set owner and mode only where they differ, so that the time of change stays otherwise."""
    found, stored = os.fstat(descriptor), stat.S_IMODE(content.stat().st_mode) | stat.S_IWUSR
    owner = (look["uid"] or 0, look["gid"] or 0)
    if owner != (found.st_uid, found.st_gid):
        os.fchown(descriptor, *owner)
    mode = stored if look["mode"] is None else look["mode"]
    if look["mode"] is not None and stat.S_ISDIR(found.st_mode):  # whoever may read a directory may search it
        mode |= (mode & 0o444) >> 2
    if mode != stat.S_IMODE(found.st_mode):
        os.fchmod(descriptor, mode)
