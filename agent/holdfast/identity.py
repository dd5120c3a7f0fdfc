"""Who a root is, and whose a name is on this host.

    ROOT/id                    eight hex digits, made once by the first agent or `apply`; what is made on the host
                               carries them
    /run/holdfast-names/NAME   locked as long as a process acts under the name; says for which root. It stays while
                               that root has anything on the host, and is gone after a reboot

The lock is an open file description lock (fcntl(2)): the kernel releases it when the process ends, and whether it is
held can be asked without taking it. Called by `daemon`; `cli` only looks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from holdfast.errors import Conflict, NotPermitted, UnfitHost, explained, reason
from holdfast.files import held, names_in, sync_folder

PLACE = Path("/run/holdfast-names")
FILE = "id"
ID = re.compile("[0-9a-f]{8}")
LARGEST = 65_536  # bytes of a record
CLAIM = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of fcntl(2), over a whole file


def read_id(root: Path) -> str:
    """The id of a root; "" for one that has none yet. Raises UnfitHost for a file that holds something else, and
    NotPermitted."""
    place = root / FILE
    try:
        text = place.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except PermissionError as error:
        raise NotPermitted(f"read '{place}': {reason(error)} (become root)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UnfitHost(f"read '{place}': {getattr(error, 'strerror', None) or error}") from error
    if not ID.fullmatch(text):
        raise UnfitHost(f"read '{place}': '{text[:20]}' is not the id of a root (expected 8 hex digits)")
    return text


def make_id(root: Path) -> str:
    """The id of a root, which gets one if it has none. It is on disk before anything can carry it."""
    if known := read_id(root):
        return known
    draft = root / f".{FILE}.{os.urandom(4).hex()}"
    with explained(f"write '{root / FILE}'"):
        try:
            with draft.open("w") as file:
                file.write(os.urandom(4).hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was quicker: its id is the one
                os.link(draft, root / FILE)
            sync_folder(root)
        finally:
            draft.unlink(missing_ok=True)
    return read_id(root)


@dataclass(frozen=True, slots=True)
class Record:
    """For which root a name was used last. device and inode: of the root, which is known by them after a move."""

    root: str
    id: str
    run_root: str
    pid: int
    device: int = 0
    inode: int = 0

    def is_of(self, root: Path) -> bool:
        """Whether it is the record of this root, under whatever path that is found now."""
        if self.root == str(root):
            return True
        try:
            found = root.stat()
        except OSError:
            return os.path.realpath(self.root) == os.path.realpath(root)
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


class Name:
    """A name that this process holds."""

    def __init__(self, name: str, file: int) -> None:
        self.name, self._file = name, file
        self.known = _read(file)

    def bind(self, root: Path, id: str, run_root: Path) -> None:
        """Note that the name is this root's from now on."""
        found = root.stat()
        record = Record(str(root), id, str(run_root), os.getpid(), found.st_dev, found.st_ino)
        text = json.dumps(asdict(record)).encode()
        try:
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))
        except OSError as error:  # what carries the id says the same
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UnfitHost(f"write '{PLACE / self.name}': {reason(error)}") from error

    def forget(self) -> None:
        """Take the record away: its root has nothing on the host any more."""
        (PLACE / self.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are other names
            PLACE.rmdir()


@contextlib.contextmanager
def hold_name(name: str, root: Path) -> Iterator[Name]:
    """Hold a name for the time of a with block. Raises Conflict with both places when another process has it."""
    file = _take(name)
    if isinstance(file, Record | None):
        raise taken(name, root, file)
    held = Name(name, file)
    try:
        yield held
    finally:
        if _read(file) is None:  # it was not bound
            held.forget()
        os.close(file)


def taken(name: str, root: Path, holder: Record | None) -> Conflict:
    """What to say to a second agent of a name."""
    if holder is None:
        return Conflict(f"run the agent '{name}' on '{root}': another process is just taking the name (try again)")
    if holder.is_of(root):
        return same_root(root, holder.pid)
    return Conflict(
        f"run the agent '{name}' on '{root}': process {holder.pid} uses the name for '{holder.root}' "
        "(another name in agent.toml)"
    )


def same_root(root: Path, pid: int | str) -> Conflict:
    """What to say to a second agent of a root."""
    return Conflict(
        f"run the agent on '{root}': process {pid} does already (one agent a root; "
        "another needs its own name and root in agent.toml)"
    )


def look_up(name: str) -> tuple[Record | None, bool]:
    """The record of a name, and whether a process holds it now; takes nothing. Raises PermissionError."""
    try:
        file = os.open(PLACE / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None, False
    with held(file):
        told = fcntl.fcntl(file, fcntl.F_OFD_GETLK, CLAIM)
        return _read(file), struct.unpack_from("h", told)[0] != fcntl.F_UNLCK


def names_of(root: Path) -> list[str]:
    """The names that are recorded for a root."""
    found = [(name, look_up(name)[0]) for name in sorted(names_in(PLACE))]
    return [name for name, record in found if record is not None and record.is_of(root)]


def drop(name: str) -> None:
    """Take away the record of a name that nobody holds."""
    file = _take(name)
    if isinstance(file, int):
        Name(name, file).forget()
        os.close(file)


def _take(name: str) -> int | Record | None:
    """Open and lock the file of a name; the record of its holder when that is another."""
    path = PLACE / name
    while True:
        try:
            PLACE.mkdir(mode=0o755, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(path, flags, 0o600)  # a reader could lock it
        except (FileNotFoundError, FileExistsError) as error:
            if not PLACE.parent.is_dir() or (PLACE.exists() and not PLACE.is_dir()):
                raise UnfitHost(f"lock '{path}': {reason(error)}") from None
            continue  # the folder was taken away just now, with the last name in it
        except OSError as error:
            raise UnfitHost(f"lock '{path}': {reason(error)}") from error
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, CLAIM)
        except BlockingIOError:
            holder = _read(file)
            os.close(file)
            return holder
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)  # whoever had it has taken it away


def _read(file: int) -> Record | None:
    try:
        return Record(**json.loads(os.pread(file, LARGEST, 0)))
    except (ValueError, TypeError):
        return None
