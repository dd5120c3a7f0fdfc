"""System calls that Python has no function for. Each raises OSError where the kernel refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from holdfast.workers import answer_of

MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 0x2, 0x4, 0x20, 0x1000, 0x4000  # mount(2)
MS_PRIVATE, MS_SHARED = 1 << 18, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8  # umount2(2)
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x04000000, 0x08000000, 0x40000000  # unshare(2)

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None, about: Path | str = "") -> int:
    """Call a function of the C library. about: what the error names."""
    result: int = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(about) or None)
    return result


def mount(source: str | Path, target: Path, kind: str = "none", flags: int = 0, options: str = "") -> None:
    """Mount something at target (mount(2))."""
    places = os.fsencode(source), os.fsencode(target)
    call("mount", *places, kind.encode(), flags, options.encode() or None, about=target)


def unmount(target: Path, *, lazily: bool = False) -> None:
    """Unmount everything at target; succeed when nothing is. lazily: at once, also for what is in use."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazily else 0)
    while True:
        try:
            call("umount2", os.fsencode(target), flags, about=target)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # no mount point (any more)
                return
            if error.errno != errno.EBUSY or flags & MNT_DETACH:
                raise
            flags |= MNT_DETACH


def is_mounted(path: Path) -> bool:
    """Whether another file system is mounted at path, by two stat(2)."""
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except FileNotFoundError:
        return False


def in_thread(work: Callable[[], T], name: str) -> T:
    """Do work in a thread of its own, which may go to other namespaces, and return or raise what it does."""
    done: Future[T] = Future()
    thread = threading.Thread(target=answer_of, args=(work, done), name=name)
    thread.start()
    thread.join()
    return done.result()
