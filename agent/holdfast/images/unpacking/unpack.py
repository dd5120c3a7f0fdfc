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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from holdfast.errors import HoldfastError, NotPermitted, TryAgain, UnfitHost, WrongState
from holdfast.files import remove_tree
from holdfast.syscalls import call
from holdfast.words import one_line

Progress = Callable[[int], None]  # told the bytes of the stream that have come so far
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
    progress: Progress | None = None,
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
    size = -1 if expected.size is None else expected.size
    settings = (limits.size, limits.files, size, int(stall * 1000))
    kind, *fields = _run_worker(stream, folder, recipe, settings, progress, what)
    if kind == "short":
        if fields[1] == expected.digest:
            raise WrongState(f"{what}: its size is {fields[0]} (expected {expected.size})")
        raise TryAgain(f"{what}: the stream ended after {fields[0]} of {expected.size} bytes")
    if kind != "done":
        words = one_line(" ".join(fields))
        if os.strerror(errno.ENOSPC) in words:
            words += f" in {str(folder.parent)!r} (see 'holdfast system df'; 'holdfast system prune' makes room)"
        raise ERRORS[kind](f"{what}: {words}")
    diff_id, plain, digest, compressed, files, newest = fields
    found = Unpacked(diff_id, int(plain), digest, int(compressed), int(files), int(newest))
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


def own_process(module: str, *arguments: int) -> list[str]:
    """Make the command of a process that runs `main` of a module of ours, without the site, which takes long.

    sys.argv has sys.path before the arguments.
    """
    start = f"import sys; sys.path[:] = sys.argv[1].split(':'); from {module} import main; main()"
    words = ["-I", "-S", "-X", "utf8", "-c", start, ":".join(filter(None, sys.path))]
    return [sys.executable, *words, *map(str, arguments)]


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
    stream: int, folder: Path, recipe: Path, settings: Sequence[int], progress: Progress | None, what: str
) -> list[str]:
    """Run a worker, and return its last message. Raises TryAgain if it was killed, RuntimeError if it broke.

    settings: the numbers that follow the descriptors (`worker.main`).
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    source = os.dup(stream)  # a number that is none of the standard ones
    target = os.open(recipe, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    handed = (theirs.fileno(), source, target, place)
    try:
        fcntl.flock(place, fcntl.LOCK_SH)  # for as long as the worker lives: see discard
        process = subprocess.Popen(
            own_process("holdfast.images.unpacking.worker", *handed, *settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs.fileno(),
            pass_fds=handed,
            start_new_session=True,  # what a terminal signals is for us to act on
            env=ENVIRONMENT | {key: value for key, value in os.environ.items() if key == "LD_LIBRARY_PATH"},
        )
    except OSError as error:
        ours.close()
        raise UnfitHost(f"{what}: start {sys.executable!r}: {error.strerror}") from error
    finally:
        theirs.close()
        for descriptor in handed[1:]:
            os.close(descriptor)
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


def _listen(control: socket.socket, progress: Progress | None) -> tuple[list[str] | None, str]:
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


_syncing = threading.Lock()
_synced: dict[int, float] = {}  # file system → when its last sync that has ended began (monotonic)


def _sync(folder: Path, what: str) -> None:
    """Have all of the folder's file system on disk. Those that ask while it is busy share the next round."""
    asked = time.monotonic()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        system = os.fstat(descriptor).st_dev
        with _syncing:
            if _synced.get(system, 0.0) < asked:
                began = time.monotonic()
                call("syncfs", descriptor)
                _synced[system] = began
    except OSError as error:
        raise UnfitHost(f"{what}: write to disk: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.close(descriptor)
