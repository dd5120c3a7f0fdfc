"""Project quotas: limit the size of a directory with all below it, on ext4 and xfs.

A directory gets a project id, which everything below inherits, and the id gets a limit in blocks (quotactl(2),
ioctl_fsgetxattr). The id is stored with the directory; nothing else has to be remembered.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from holdfast.errors import UnfitHost
from holdfast.files import held
from holdfast.runtime.mountpoints import Mounted
from holdfast.syscalls import call

QUOTACTL_FD = 443  # asm-generic/unistd.h; Linux 5.14
PRJQUOTA = 2  # linux/quota.h
Q_GETQUOTA, Q_SETQUOTA = 0x800007, 0x800008
Q_XGETQSTAT = 0x5805  # linux/dqblk_xfs.h
ENFORCED = 1 << 5  # FS_QUOTA_PDQ_ENFD
LIMIT = struct.Struct("=8QI4x")  # struct if_dqblk: hard limit in KiB, …, used bytes, …
BLIMITS = 1  # QIF_BLIMITS
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820  # linux/fs.h
ATTRIBUTES = struct.Struct("=5I8x")  # struct fsxattr: flags, …, project id
PROJINHERIT = 0x200
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
TRIES = 16
HOW = {
    "ext4": "tune2fs -O quota,project on the unmounted device, then mount it with prjquota",
    "xfs": "mount it with pquota; for /, boot with rootflags=pquota",
}


def check(path: Path, what: str) -> None:
    """Raise UnfitHost unless the file system of a path (which may not exist yet) enforces project quotas."""
    there = next(each for each in (path, *path.parents) if each.exists()).resolve()
    with _opened(there) as folder:
        state = ctypes.create_string_buffer(256)
        with suppress(OSError):
            _quotactl(folder, Q_XGETQSTAT, 0, state)
        if struct.unpack_from("=H", state.raw, 2)[0] & ENFORCED:
            return
    kind, point = _file_system(there)
    right = HOW.get(kind, "expected ext4 mounted with prjquota, or xfs with pquota")
    raise UnfitHost(f"{what}: file system '{kind}' at '{point}' has no project quotas ({right})")


def limit(path: Path, size: int, key: str) -> None:
    """Limit a directory with its content to size bytes. key: its name on this file system. Raises OSError."""
    with _opened(path) as folder:
        project = _project(folder)
        if project not in _candidates(key):
            project = next((each for each in _candidates(key) if _is_free(folder, each)), 0)
            if not project:
                raise OSError(errno.EDQUOT, "no project id is free", str(path))
            _set_limit(folder, project, size)  # first, so that nothing is in the project without a limit
            _join(path, project)
        else:
            _set_limit(folder, project, size)


def unlimit(path: Path, key: str) -> None:
    """Remove the limit of a directory, if it has one. Raises OSError."""
    with _opened(path) as folder:
        project = _project(folder)
        if project and project in _candidates(key):
            _set_limit(folder, project, 0)


@contextmanager
def freed(path: Path, key: str) -> Iterator[None]:
    """Remove the limit, if any, of a directory that the block deletes."""
    project = 0
    with suppress(OSError), _opened(path) as folder:
        project = _project(folder)
    yield
    if project and project in _candidates(key) and path.parent.is_dir():
        with suppress(OSError), _opened(path.parent) as parent:
            _set_limit(parent, project, 0)


def _candidates(key: str) -> list[int]:
    """The project ids for a directory, which gets the first that is free."""
    found = (hashlib.sha256(f"{key} {number}".encode()).digest() for number in range(TRIES))
    return [int.from_bytes(digest[:4], "big") % (2**31 - 2**17) + 2**16 for digest in found]


def _is_free(folder: int, project: int) -> bool:
    held = ctypes.create_string_buffer(LIMIT.size)
    try:
        _quotactl(folder, Q_GETQUOTA, project, held)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return True
        raise
    hard, soft, used, _, _, inodes, *_ = LIMIT.unpack(held.raw)
    return not (hard or soft or used or inodes)


def _set_limit(folder: int, project: int, size: int) -> None:
    hard = -(-size // 1024)
    _quotactl(
        folder, Q_SETQUOTA, project, ctypes.create_string_buffer(LIMIT.pack(hard, 0, 0, 0, 0, 0, 0, 0, BLIMITS))
    )


def _join(path: Path, project: int) -> None:
    """Give a directory, and folders and files in it, a project id; no link is followed."""
    for _, _, files, folder in os.fwalk(path, follow_symlinks=False):
        _set_project(folder, project, inherit=True)
        for name in files:
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with suppress(FileNotFoundError), held(os.open(name, flags, dir_fd=folder)) as file:
                    _set_project(file, project, inherit=False)


def _project(folder: int) -> int:
    held = bytearray(ATTRIBUTES.size)
    try:
        fcntl.ioctl(folder, FSGETXATTR, held)
    except OSError:  # a file system without projects
        return 0
    return int(ATTRIBUTES.unpack(held)[3])


def _set_project(descriptor: int, project: int, *, inherit: bool) -> None:
    held = bytearray(ATTRIBUTES.size)
    fcntl.ioctl(descriptor, FSGETXATTR, held)
    flags, extent, extents, _, copy = ATTRIBUTES.unpack(held)
    flags |= PROJINHERIT if inherit else 0
    fcntl.ioctl(descriptor, FSSETXATTR, ATTRIBUTES.pack(flags, extent, extents, project, copy))


def _quotactl(folder: int, command: int, project: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    whole = command << 8 | PRJQUOTA
    call("syscall", QUOTACTL_FD, folder, whole, project, buffer)


def _opened(path: Path) -> AbstractContextManager[int]:
    return held(os.open(path, FOLDER))


def _file_system(path: Path) -> tuple[str, str]:
    """The type and the mount point of the file system of a path."""
    here = Mounted.now().covering(str(path.resolve()))
    return (here.kind, here.point) if here else ("?", "/")
