"""Unpack layer streams into directories that overlayfs can stack, and verify their digests on the way.

Each layer is unpacked by a process of its own (`worker`), which is locked into the layer's folder. So several layers
share no interpreter, a hostile layer breaks nothing else, and its memory is not the agent's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from holdfast.errors import HoldfastError, NotPermitted, TryAgain, UnfitHost, WrongState
from holdfast.files import remove_tree
from holdfast.images.unpacking.worker import COMMAND
from holdfast.syscalls import call
from holdfast.words import one_line

LONGEST_MESSAGE = 64 << 10
ERRORS: dict[str, type[HoldfastError]] = {
    "damaged": WrongState,
    "host": UnfitHost,
    "denied": NotPermitted,
    "again": TryAgain,
}
# The worker takes and frees large buffers all the time: they need not go back to the kernel each time.
ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may come to: size bytes of its plain archive, and of its files, holes included; files entries."""

    size: int = 1 << 40
    files: int = 10_000_000


@dataclass(frozen=True, slots=True)
class Expected:
    """What a layer has to be: the digest of its plain archive; digest and size (bytes) of the compressed stream."""

    diff_id: str | None = None
    digest: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive held: digest and size (bytes) of its plain form, the same of the stream it came as (`digest`,
    `compressed`), how many entries, and the newest time (seconds since the epoch) of one."""

    diff_id: str
    size: int
    digest: str = ""
    compressed: int = 0
    files: int = 0
    newest: int = 0


def unpack_stream(
    stream: int,
    folder: Path,
    recipe: Path,
    *,
    limits: Limits,
    expected: Expected = Expected(),
    progress: Callable[[int], None] | None = None,
    stall: float = 0,
) -> Unpacked:
    """Unpack the archive that comes out of the descriptor stream, compressed or not, into the empty directory folder.

    recipe: the file to write from which `recipe.rebuild` makes the same plain archive again. progress is told the
    bytes of the stream that have come so far. stall: seconds without a byte until this gives up; 0: never.
    Blocks until all is verified and on disk. Raises WrongState for what is damaged, hostile, beyond limits or not as
    expected; TryAgain where the same may well work later, as with a stream that breaks off; UnfitHost where the disk
    is full. After an error folder and recipe are the caller's to delete. The stream is not closed, nor read further
    after an error: whoever writes into a pipe waits until the caller closes its other end.
    """
    label = expected.digest or expected.diff_id
    what = f"unpack layer {label!r}" if label else "unpack layer"
    message = _run_worker(stream, folder, recipe, limits, expected.size, progress, stall, what)
    kind, *fields = message
    if kind == "short":
        if fields[1] == expected.digest:
            raise WrongState(f"{what}: its size is {fields[0]} (expected {expected.size})")
        raise TryAgain(f"{what}: the stream ended after {fields[0]} of {expected.size} bytes")
    if kind != "done":
        words = one_line(" ".join(fields))
        if os.strerror(errno.ENOSPC) in words:
            words += f" in {str(folder.parent)!r} (see 'holdfast system df'; 'holdfast system prune' makes room)"
        raise ERRORS[kind](f"{what}: {words}")
    diff_id, size, digest, compressed, files, newest = fields
    found = Unpacked(diff_id, int(size), digest, int(compressed), int(files), int(newest))
    for name, want, have in (
        ("size", expected.size, found.compressed),
        ("digest", expected.digest, found.digest),
        ("diff id", expected.diff_id, found.diff_id),
    ):
        if want not in (None, have):
            raise WrongState(f"{what}: its {name} is {have} (expected {want})")
    _sync(folder, what)
    return found


def discard(folder: Path) -> None:
    """Delete a folder that may have been being unpacked into, once its worker is gone: one whose agent was killed
    takes a moment to notice. Raises OSError, FileNotFoundError among them."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        remove_tree(folder)
    finally:
        os.close(descriptor)


@contextmanager
def piped(write: Callable[[BinaryIO], object]) -> Iterator[int]:
    """Have write write into a pipe, in a thread, while the block reads it; yields the descriptor to read from.

    What write raises is raised at the end, instead of what the block raises because of that.
    """
    ours, theirs = os.pipe()
    failures: list[BaseException] = []

    def fill() -> None:
        try:
            with os.fdopen(theirs, "wb") as pipe:
                write(pipe)
        except BrokenPipeError:
            pass  # the reader had enough, and says why
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fill, name="pipe", daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        os.close(ours)
        thread.join()
        if failures:
            raise failures[0]


def _run_worker(
    stream: int,
    folder: Path,
    recipe: Path,
    limits: Limits,
    compressed: int | None,
    progress: Callable[[int], None] | None,
    stall: float,
    what: str,
) -> list[str]:
    """Run a worker, and return its last message. Raises TryAgain if it was killed, RuntimeError if it broke."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    source = os.dup(stream)  # a number that is none of the standard ones
    target = os.open(recipe, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    numbers = (
        *(theirs.fileno(), source, target, place),
        *(limits.size, limits.files, -1 if compressed is None else compressed, int(stall * 1000)),
    )
    try:
        fcntl.flock(place, fcntl.LOCK_SH)  # for as long as the worker lives: see discard
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-X",
                "utf8",
                "-c",
                COMMAND,
                ":".join(filter(None, sys.path)),
                *map(str, numbers),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs.fileno(),
            pass_fds=(theirs.fileno(), source, target, place),
            start_new_session=True,  # what a terminal signals is for us to act on
            env=ENVIRONMENT | {key: value for key, value in os.environ.items() if key == "LD_LIBRARY_PATH"},
        )
    except OSError as error:
        ours.close()
        raise UnfitHost(f"{what}: start {sys.executable!r}: {error.strerror}") from error
    finally:
        theirs.close()
        os.close(source)
        os.close(target)
        os.close(place)
    try:
        with ours:
            message, said = _listen(ours, progress)
    finally:
        process.kill()
        status = process.wait()
    if message is not None:
        return message
    if status < 0:
        name = signal.Signals(-status).name
        raise TryAgain(f"{what}: its worker was ended by {name} (is there enough memory?)")
    raise RuntimeError(f"{what}: its worker broke: {said}")


def _listen(control: socket.socket, progress: Callable[[int], None] | None) -> tuple[list[str] | None, str]:
    """Wait for the message that is not progress, if one comes; also return what else was said."""
    said = ""
    while data := control.recv(LONGEST_MESSAGE):
        kind, *fields = data.decode("utf-8", "replace").split("\0")
        if kind == "progress":
            if progress is not None:
                progress(int(fields[0]))
        elif kind in ("done", "short", *ERRORS):
            return [kind, *fields], said
        else:
            said = (said + kind)[-LONGEST_MESSAGE:]
    return None, said


class _Syncer:
    """Syncs one file system for several threads: those that ask while it is busy share the next round."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._begun = self._done = 0

    def sync(self, descriptor: int) -> None:
        """Return when all that was written before is on disk. Raises OSError."""
        with self._changed:
            needed = self._begun + 1
            while self._done < needed:
                if self._busy:
                    self._changed.wait()
                else:
                    self._sync_once(descriptor)

    def _sync_once(self, descriptor: int) -> None:
        self._busy = True
        self._begun += 1
        number = self._begun
        self._changed.release()
        try:
            call("syncfs", descriptor)
        except BaseException:
            number = 0
            raise
        finally:
            self._changed.acquire()
            self._busy = False
            self._done = max(self._done, number)
            self._changed.notify_all()


_syncers: defaultdict[int, _Syncer] = defaultdict(_Syncer)


def _sync(folder: Path, what: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _syncers[os.fstat(descriptor).st_dev].sync(descriptor)
    except OSError as error:
        raise UnfitHost(f"{what}: write to disk: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.close(descriptor)
