"""Run a law where a wrong driver can do no harm, and damage what a driver made.

A law runs in a process of its own, in a private mount namespace in which every file system is read-only but for the
folders of the test and what the kernel shows of itself. Laws about networks have a network namespace of their own.
`take_away` works in such a process only, and enters no mount.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast import syscalls
from holdfast.files import remove_tree
from holdfast.mounts import mount_points

CLONE_NEWNS = 0x00020000  # unshare(2)
_MOUNT_SETATTR = 442  # the same number on every architecture (asm-generic/unistd.h); Linux 5.12
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_RDONLY = 1  # MOUNT_ATTR_RDONLY, linux/mount.h
NAMESPACES = Path("/run/netns")

#: File systems that show the kernel's own state and hold no files: drivers write settings there.
KERNEL = ("proc", "sysfs", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf")

_places: tuple[Path, ...] = ()  # where this process may write; () in a process that is not confined


@contextmanager
def forked(work: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> Iterator[Callable[[], Any]]:
    """Fork a process, and yield a function that has it do the work, and returns what that returned (as JSON).

    The process has the memory of this moment, and a thread of its own for each call. What the work raises is raised
    here as an AssertionError with the traceback; a skipped test is skipped here. prepare is called there first.
    """
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts its own
        child = os.fork()
    if child == 0:
        try:
            ours.close()
            _serve(theirs, work, prepare)
        finally:
            os._exit(0)
    theirs.close()
    answers = ours.makefile("r")

    def ask() -> Any:
        ours.sendall(b"?")
        kind, value = json.loads(answers.readline() or '["failed", "the process has ended"]')
        if kind == "skipped":
            pytest.skip(value)
        if kind == "failed":
            raise AssertionError(value)
        return value

    try:
        yield ask
    except BaseException:
        os.kill(child, signal.SIGKILL)  # it may be at work still
        raise
    finally:
        answers.close()
        ours.close()
        os.waitpid(child, 0)


def run_confined(work: Callable[[], object], places: Sequence[Path], *, network: bool, namespaces: bool) -> None:
    """Do the work in a process that may write files below places only. Skips the test where only root may do this.

    network: in a network namespace of its own. namespaces: with an empty /run/netns of its own.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root: each law runs in a mount namespace of its own")
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    missing = namespaces and not NAMESPACES.exists()
    if missing:
        NAMESPACES.mkdir()
    try:
        with forked(work, lambda: _confine(places, network=network, namespaces=namespaces)) as confined:
            confined()
    finally:
        if missing:
            with suppress(OSError):  # somebody else uses it by now
                NAMESPACES.rmdir()


def take_away(path: Path) -> bool:
    """Take away by hand what was made at a path, and return whether there was something.

    What is mounted at the path, below it or above it is unmounted, and no more. Where nothing is mounted, the file or
    the directory is deleted. Only below the places of a confined process.
    """
    place = _place_of(path)
    if place is None:
        return False
    within = (point for each in mount_points() if place in (point := Path(each.point)).parents)
    mounted = [each for each in within if each.is_relative_to(path) or path.is_relative_to(each)]
    for point in sorted(mounted, key=lambda each: len(each.parts), reverse=True):
        syscalls.call("umount2", os.fsencode(point), syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH, about=point)
    there = os.path.lexists(path)
    if there and not mounted:
        remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return bool(mounted) or there


def _place_of(path: Path) -> Path | None:
    """Return the place of this process that a path lies strictly below, None if there is none."""
    if not _places or not os.statvfs("/").f_flag & os.ST_RDONLY:
        raise AssertionError(f"damage '{path}': this process is not confined")
    if ".." in path.parts or Path(os.path.realpath(path.parent)) != path.parent:  # a link leads there
        return None
    return next((place for place in _places if path != place and path.is_relative_to(place)), None)


def _serve(line: socket.socket, work: Callable[[], object], prepare: Callable[[], None]) -> None:
    ready = _answer(prepare)
    while line.recv(1):
        # In a new thread, because sockets that this one has are shared with the process that it came from.
        answer = ready if ready[0] != "done" else syscalls.in_thread(lambda: _answer(work), "law")
        line.sendall(json.dumps(answer).encode() + b"\n")


def _answer(work: Callable[[], object]) -> list[object]:
    try:
        return ["done", work()]
    except pytest.skip.Exception as skipped:
        return ["skipped", str(skipped)]
    except BaseException as error:
        return ["failed", _described(error)]


def _described(error: BaseException) -> str:
    """Put what a law raised into words: first what was wrong, then where."""
    what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    if _is_read_only(error):
        what += "\n(a driver may write below host.root and host.run_root only)"
    return f"{what}\n\n{''.join(traceback.format_exception(error))}"


def _is_read_only(error: BaseException | None) -> bool:
    if error is None or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return error is not None
    return _is_read_only(error.__cause__ or error.__context__)


def _confine(places: Sequence[Path], *, network: bool, namespaces: bool) -> None:
    """Make every file system read-only for this process but places and the kernel's own. Raises OSError."""
    global _places
    syscalls.call("unshare", CLONE_NEWNS | (syscalls.CLONE_NEWNET if network else 0), about="make namespaces")
    syscalls.mount("none", Path("/"), flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    for place in places:
        syscalls.mount(place, place, flags=syscalls.MS_BIND)  # by itself, without what is mounted below it
    writable = [each.point for each in mount_points(*KERNEL) if "rw" in each.line.split(" ")[5].split(",")]
    _set_read_only("/", True, deep=True)
    for place in places:
        _set_read_only(str(place), False)
    for point in writable:
        with suppress(OSError):  # another mount hides it
            _set_read_only(point, False)
    if namespaces:
        syscalls.mount("netns", NAMESPACES, "tmpfs")
    _places = tuple(places)


def _set_read_only(point: str, wanted: bool, *, deep: bool = False) -> None:
    attributes = struct.pack("QQQQ", _RDONLY if wanted else 0, 0 if wanted else _RDONLY, 0, 0)  # struct mount_attr
    where = _AT_FDCWD, os.fsencode(point), _AT_RECURSIVE if deep else 0
    syscalls.call("syscall", _MOUNT_SETATTR, *where, attributes, len(attributes), about=point)
