"""Copy the first content of a new volume from the image, completely or not at all.

The copy is made in a directory inside the volume (PARTIAL), synced, marked complete by a rename (COMPLETE), and its
entries are then moved up. A crash leaves a PARTIAL, which is deleted, or a COMPLETE, which `finish` moves up without
the image. Nothing that was in the volume before is touched.

A hostile container may have the volume mounted already. So everything in the volume is reached by descriptors, below
the directory that was made here, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from holdfast.drivers import COMPLETE_CONTENT as COMPLETE
from holdfast.files import BENEATH, NO_MAGICLINKS, NO_SYMLINKS, clear, held, mode_of, openat2
from holdfast.syscalls import call

PARTIAL = ".holdfast-partial"
LOST_FOUND = "lost+found"  # what mkfs leaves in a file system of its own
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK = 1 << 30


def is_empty(path: Path) -> bool:
    """Whether a volume has no content."""
    with os.scandir(path) as entries:
        return all(entry.name in (PARTIAL, LOST_FOUND) for entry in entries)


def owner_and_mode(path: Path) -> list[int]:
    """The uid, gid and permissions of a volume's directory."""
    found = path.stat()
    return [found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)]


def fill(path: Path, seed: Path) -> None:
    """Copy the content of seed, and its owner, mode and attributes, into an empty volume. Raises OSError."""
    with held(os.open(path, FOLDER)) as volume:
        for name in (PARTIAL, COMPLETE):
            clear(volume, name)
        os.mkdir(PARTIAL, 0o700, dir_fd=volume)
        try:
            with held(os.open(PARTIAL, FOLDER | os.O_NOFOLLOW, dir_fd=volume)) as copy:
                copy_tree(seed, copy)
        except BaseException:
            clear(volume, PARTIAL)  # room again on a full disk
            raise
        call("syncfs", volume)
        os.rename(PARTIAL, COMPLETE, src_dir_fd=volume, dst_dir_fd=volume)
    finish(path)


def finish(path: Path) -> None:
    """Move up what `fill` has copied, if there is a COMPLETE. Raises OSError."""
    with held(os.open(path, FOLDER)) as volume:
        try:
            complete = os.open(COMPLETE, FOLDER | os.O_NOFOLLOW, dir_fd=volume)
        except (FileNotFoundError, NotADirectoryError):
            return
        with held(complete) as copy:
            for name in os.listdir(copy):  # noqa: PTH208 - of a descriptor
                if mode_of(volume, name) is None:
                    os.rename(name, name, src_dir_fd=copy, dst_dir_fd=volume)
            _copy_looks(f"/proc/self/fd/{copy}", os.fstat(copy), volume)
        call("syncfs", volume)
        clear(volume, COMPLETE)


def copy_tree(source: Path, target: int) -> None:
    """Copy the content and the attributes of a directory into the open directory target. Raises OSError.

    Owners, modes, times, extended attributes, hard links, links, devices and fifos are kept.
    """
    twins: dict[tuple[int, int], str] = {}
    folders = ["."]
    for folder in folders:  # it grows meanwhile
        with held(_open_below(target, folder, FOLDER)) as inner, os.scandir(source / folder) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    os.mkdir(entry.name, 0o700, dir_fd=inner)
                    folders.append(relative)
                else:
                    _copy_entry(entry, relative, target, inner, twins)
    for folder in reversed(folders):  # afterwards, because writing into a directory changes its times
        with held(_open_below(target, folder, FOLDER)) as inner:
            _copy_looks(source / folder, (source / folder).lstat(), inner)


def _copy_entry(
    entry: os.DirEntry[str], relative: str, target: int, inner: int, twins: dict[tuple[int, int], str]
) -> None:
    found, name = entry.stat(follow_symlinks=False), entry.name
    twin = twins.setdefault((found.st_dev, found.st_ino), relative) if found.st_nlink > 1 else relative
    if twin != relative:  # a second name, by descriptor: a container may have put links into its path
        with held(_open_below(target, twin, PLACE)) as there:
            os.link(f"/proc/self/fd/{there}", name, dst_dir_fd=inner, follow_symlinks=True)
        return
    if stat.S_ISREG(found.st_mode):
        _copy_file(entry.path, inner, name)
    elif stat.S_ISLNK(found.st_mode):
        os.symlink(Path(entry.path).readlink(), name, dir_fd=inner)
    elif stat.S_ISSOCK(found.st_mode):  # of no use without its process
        return
    else:
        os.mknod(name, found.st_mode, found.st_rdev, dir_fd=inner)
    with held(os.open(name, PLACE, dir_fd=inner)) as made:
        _copy_looks(entry.path, found, made)


def _copy_file(source: str, inner: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        held(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as read,
        held(os.open(name, flags, 0o600, dir_fd=inner)) as write,
    ):
        while os.sendfile(write, read, None, CHUNK):
            pass


def _copy_looks(source: Path | str, found: os.stat_result, target: int) -> None:
    """Copy owner, mode, attributes and times. Owner first: chown(2) removes set-user-ID and security.capability."""
    made = f"/proc/self/fd/{target}"
    os.chown(made, found.st_uid, found.st_gid)
    if not stat.S_ISLNK(found.st_mode):
        Path(made).chmod(stat.S_IMODE(found.st_mode))
    follow = str(source).startswith("/proc/self/fd/")
    for name in os.listxattr(source, follow_symlinks=follow):
        if not name.startswith("trusted.overlay."):
            _set_attribute(made, name, os.getxattr(source, name, follow_symlinks=follow))
    os.utime(made, ns=(found.st_atime_ns, found.st_mtime_ns))


def _set_attribute(made: str, name: str, value: bytes) -> None:
    """Set an attribute. What the file system does not support is left out, except what makes a program privileged."""
    try:
        os.setxattr(made, name, value)
    except OSError as error:
        if error.errno != errno.ENOTSUP or name == "security.capability":
            raise


def _open_below(target: int, path: str, flags: int) -> int:
    """Open a path below a directory, through no link (openat2(2))."""
    return openat2(path, flags, BENEATH | NO_SYMLINKS | NO_MAGICLINKS, dir_fd=target)
