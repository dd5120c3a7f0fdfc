"""Mount overlays and descriptors by system calls: a fork of mount(8) costs more than the mount.

System call numbers are the same on every architecture since Linux 5.1.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path

from holdfast.files import held
from holdfast.syscalls import MS_PRIVATE, MS_REC, call, mount

OPEN_TREE, MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT = 428, 429, 430, 431, 432  # asm-generic/unistd.h
OPEN_TREE_CLONE, AT_EMPTY_PATH, AT_RECURSIVE = 1, 0x1000, 0x8000
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6  # linux/mount.h
CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD = -100
LONGEST_OPTION = 255  # fsconfig(2) takes 256 bytes with the terminating zero


def mount_overlay(source: str, layers: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    """Mount layers (lowest first) under upper at target.

    It uses fsopen(2) with one `lowerdir+` for each layer, for as many layers as the kernel allows (500). Kernels
    before 6.5 need mount(2), whose page of options has room for about 200. Raises OSError, with the kernel's own
    message if there is one.
    """
    singly = _takes_single_layers()
    with ExitStack() as stack:
        short = [
            str(path) if singly and len(os.fsencode(path)) <= LONGEST_OPTION else _by_descriptor(path, stack)
            for path in (*layers[::-1], upper, work)
        ]
        (_mount_by_context if singly else _mount_by_page)(source, short[:-2], short[-2], short[-1], target)


def _by_descriptor(path: Path, stack: ExitStack) -> str:
    """A short name for path, without a colon or comma, valid until the stack is closed."""
    return f"/proc/self/fd/{stack.enter_context(held(os.open(path, os.O_PATH | os.O_CLOEXEC)))}"


def bind_descriptor(descriptor: int, target: Path) -> None:
    """Mount an open file (O_PATH), with all mounts below it, privately at target (Linux 5.2)."""
    tree = _syscall(OPEN_TREE, descriptor, b"", OPEN_TREE_CLONE | AT_EMPTY_PATH | AT_RECURSIVE | os.O_CLOEXEC)
    with held(tree):
        _syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    # If the host shares its mounts, unmounting it would otherwise unmount what is mounted below the source.
    mount("none", target, flags=MS_REC | MS_PRIVATE)


@lru_cache(maxsize=1)
def _takes_single_layers() -> bool:
    """Whether this kernel's overlayfs accepts layers one by one (Linux 6.5 does); asked once.

    An older one accepts every option, known or not, and fails at the end without a reason.
    """
    with suppress(OSError), held(_syscall(FSOPEN, b"overlay", CLOEXEC)) as context:
        return not _accepts(context, b"no_such_option", b"") and _accepts(context, b"lowerdir+", b"/")
    return False


def _accepts(context: int, option: bytes, value: bytes) -> bool:
    try:
        _syscall(FSCONFIG, context, FSCONFIG_SET_STRING, option, value, 0)
    except OSError:
        return False
    return True


def _mount_by_context(source: str, lowers: Sequence[str], upper: str, work: str, target: Path) -> None:
    layers = [("source", source), *(("lowerdir+", path) for path in lowers), ("upperdir", upper), ("workdir", work)]
    with held(_syscall(FSOPEN, b"overlay", CLOEXEC)) as context:
        try:
            for key, value in layers:
                _syscall(FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
            _syscall(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
            mount = _syscall(FSMOUNT, context, CLOEXEC, 0)
        except OSError as error:
            raise OSError(error.errno, _account(context) or error.strerror) from error
    with held(mount):
        _syscall(MOVE_MOUNT, mount, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)


def _mount_by_page(source: str, lowers: Sequence[str], upper: str, work: str, target: Path) -> None:
    options = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={work}"
    if len(options.encode()) >= os.sysconf("SC_PAGE_SIZE"):
        raise OSError(errno.E2BIG, f"{len(lowers)} layers are too many for this kernel (Linux 6.5 takes 500)")
    mount(source, target, "overlay", options=options)


def _account(context: int) -> str:
    """The messages in the context's log, lines like `e overlay: …`."""
    lines = []
    with suppress(OSError):  # ENODATA: all read
        while line := os.read(context, 4096):
            lines.append(line.decode(errors="replace").strip().removeprefix("e ").removeprefix("w "))
    return "; ".join(lines)


_syscall = partial(call, "syscall")
