"""The files of a bundle → the directory that an agent reads, in one step: a reader sees the old tree or the new one.

A directory is exchanged with a new one beside it (renameat2(2)), and what was there stays as NAME.previous. What
can't be renamed, because something is mounted on it, is changed inside, behind a mark that makes `directory` wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.errors import Conflict, HoldfastError, NotPermitted, explained
from holdfast.files import held, remove_tree, sync_folder
from holdfast.mounts import mount_points
from holdfast.source.directory import REPLACING, DirectorySource
from holdfast.syscalls import call

NEXT, PREVIOUS = "..next", "..previous"  # inside a mount point; such names are no part of any revision
KEPT = (NEXT, PREVIOUS, REPLACING, f"{REPLACING}.new", "lost+found")
OUT, IN = b"out\n", b"in\n"
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100


def holds(directory: Path, files: Mapping[str, bytes], executable: frozenset[str]) -> bool:
    """Whether a revision of the directory has exactly these files now."""
    try:
        revision = DirectorySource(directory).current()
    except HoldfastError:
        return False
    return revision.files == files and revision.executable == executable and not revision.left_out


def check_replaceable(directory: Path) -> None:
    """Raise what `replace_tree` would raise, as far as that is known before; change nothing."""
    real = directory.resolve()
    if real == Path("/"):
        raise Conflict(f"replace '{directory}': is the root of this host (expected a folder for state files)")
    if real.exists() and not real.is_dir():
        raise Conflict(f"replace '{directory}': is no directory (expected a folder for state files)")
    if (real / ".git").exists():
        raise Conflict(
            f"replace '{directory}': is a git work tree, which a bundle would take away (move it, or name another "
            "folder with --state)"
        )
    points = (each.point for each in mount_points())
    if inner := next((each for each in points if each.startswith(f"{real}/")), None):
        raise Conflict(f"replace '{directory}': something is mounted inside of it, at '{inner}' (unmount that first)")
    place = real if os.path.ismount(real) else real.parent
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise NotPermitted(f"replace '{directory}': may not write to '{place}' (needs root)")


def replace_tree(directory: Path, files: Mapping[str, bytes], executable: frozenset[str]) -> Path | None:
    """Make these the only files of the directory; returns where what was there lies now, None if nothing was.

    The directory may be missing, a link (what it leads to is replaced) or a mount point; its owner and mode stay, and
    all files get that owner. After a crash the directory is as it was, as it should be, or, for a mount point, marked
    as unfinished, and calling again finishes it. Raises Conflict, NotPermitted, UnfitHost.
    """
    check_replaceable(directory)
    real = directory.resolve()
    inside = os.path.ismount(real)
    with explained(f"replace '{directory}'"):
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            with _alone(real if inside else real.parent, directory):
                return (_replace_inside if inside else _replace_whole)(real, files, executable)
        except PermissionError as error:
            raise NotPermitted(
                f"replace '{directory}': '{error.filename}': permission denied (needs root)"
            ) from error


def _replace_whole(real: Path, files: Mapping[str, bytes], executable: frozenset[str]) -> Path | None:
    """Exchange the directory with the new tree, which gets the name of the older one first: a crash loses nothing."""
    fresh, previous = real.with_name(f".{real.name}.next"), real.with_name(f"{real.name}.previous")
    _remove(fresh)
    try:
        _write_tree(fresh, files, executable, like=next((each for each in (real, previous) if each.exists()), None))
        if not real.exists():
            _rename(fresh, real, RENAME_NOREPLACE)
            sync_folder(real.parent)
            return None
        _remove(previous)
        fresh.rename(previous)
    except BaseException:
        _remove(fresh)
        raise
    try:
        _rename(previous, real, RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # This file system can't exchange: for a moment there is no directory, which no agent takes for an empty one.
        previous.rename(fresh)
        real.rename(previous)
        fresh.rename(real)
    sync_folder(real.parent)
    return previous


def _replace_inside(real: Path, files: Mapping[str, bytes], executable: frozenset[str]) -> Path:
    """Move what is there away and the new files in, behind the mark; the whole of it again after a crash."""
    fresh, previous, mark = real / NEXT, real / PREVIOUS, real / REPLACING
    _remove(fresh)
    _write_tree(fresh, files, executable, like=real)
    if not mark.exists():  # else a crash was in the way of the last one, and PREVIOUS holds what came before that
        _remove(previous)
        previous.mkdir(mode=0o700)
        _write_mark(mark, OUT)
    for entry in [each for each in real.iterdir() if each.name not in KEPT]:
        if mark.read_bytes() == OUT:
            entry.rename(previous / entry.name)
        else:
            _remove(entry)
    _write_mark(mark, IN)
    for entry in list(fresh.iterdir()):
        entry.rename(real / entry.name)
    fresh.rmdir()
    sync_folder(real)
    mark.unlink()
    sync_folder(real)
    return previous


def _write_mark(mark: Path, text: bytes) -> None:
    """Record the stage: OUT, the old files are moved away; IN, the new files are moved in."""
    fresh = mark.with_name(f"{mark.name}.new")
    with fresh.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(mark)
    sync_folder(mark.parent)


def _write_tree(root: Path, files: Mapping[str, bytes], executable: frozenset[str], *, like: Path | None) -> None:
    """Write files below root, which is made, and sync them; owner (and root's mode) as those of like."""
    model = like.stat() if like else None
    root.mkdir(mode=0o700)
    for path, content in files.items():
        target = root / path
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755 if path in executable else 0o644)
    own = (os.geteuid(), os.getegid())
    for folder, _, names in os.walk(root):
        for place in (Path(folder), *(Path(folder, name) for name in names)):
            if model and (model.st_uid, model.st_gid) != own:
                os.chown(place, model.st_uid, model.st_gid)
        Path(folder).chmod(0o755)  # whatever the umask is
    root.chmod(model.st_mode & 0o7777 if model else 0o755)
    with held(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        call("syncfs", descriptor, about=root)


@contextmanager
def _alone(folder: Path, directory: Path) -> Iterator[None]:
    """Prevent a second replacement at the same time."""
    with held(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"replace '{directory}': somebody else does that right now (try again later)") from None
        yield


def _rename(source: Path, target: Path, flags: int) -> None:
    call("renameat2", AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags, about=source)


def _remove(path: Path) -> None:
    removal: Callable[[Path], None] = remove_tree if path.is_dir() and not path.is_symlink() else Path.unlink
    with suppress(FileNotFoundError):
        removal(path)
