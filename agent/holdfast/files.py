"""Delete and open directories that others may change meanwhile, without following their links; write files whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from holdfast.errors import WrongState

# openat2(2), linux/openat2.h
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH, IN_ROOT = 0x01, 0x02, 0x04, 0x08, 0x10

_OPENAT2 = 437  # the same number on every architecture (asm-generic/unistd.h)
_AT_FDCWD = -100
_MOST_LINKS = 40
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


def remove_tree(path: Path | str, *, dir_fd: int | None = None) -> None:
    """Delete a directory with its content, which a container may have written. Raises OSError.

    No link is followed, and nothing that is mounted is entered: a mount point in the tree, or at its top, is an error
    (EXDEV, EBUSY), and what is mounted there keeps its content.

    shutil.rmtree calls itself, and keeps a descriptor open, for each level: a program that nests a thousand
    directories could keep itself from ever being removed. Here inner directories are moved up and taken in turn.
    """
    above, name = os.path.split(str(path).rstrip("/"))
    with held(os.open(above or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)) as parent:
        with held(_enter(name, parent)) as top:
            _empty(top)
        os.rmdir(name, dir_fd=parent)


def discard_tree(path: Path | str) -> None:
    """Delete as much of a directory as can be deleted, as `remove_tree` does; what is left is no error."""
    with contextlib.suppress(OSError):
        remove_tree(path)


def _empty(top: int) -> None:
    mark, moved = secrets.token_hex(8), 0
    left = _unlink_files(top)
    while left:
        name = left.pop()
        with held(_enter(name, top)) as folder:
            for inner in _unlink_files(folder):
                left.append(f"{mark}{moved}")
                moved += 1
                os.rename(inner, left[-1], src_dir_fd=folder, dst_dir_fd=top)
        os.rmdir(name, dir_fd=top)


def _enter(name: str, parent: int) -> int:
    """Open a directory whose content is to be deleted; never what is mounted on it."""
    return openat2(name, _FOLDER, NO_XDEV | NO_SYMLINKS | BENEATH, dir_fd=parent)


def _unlink_files(folder: int) -> list[str]:
    """Delete all that is no directory, and say which directories there are."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def open_source(path: str, roots: Sequence[str] | None = None, *, create: bool = False) -> int:
    """Open a file or directory of the host that a commit names, and return its descriptor (O_PATH).

    roots: where it may lie; None: anywhere. What is checked is what was opened: a container that puts a link in the
    place of a folder meanwhile changes nothing. create: make missing directories. Raises WrongState, OSError.
    """
    try:
        handle = _open(path, magic=roots is None)
    except FileNotFoundError:
        if not create:
            raise
        return _create(path, roots)
    try:
        _check_inside(handle, path, roots)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _create(path: str, roots: Sequence[str] | None) -> int:
    """Make a directory in its parent's descriptor: no link that is put there meanwhile is followed."""
    folder, name = os.path.split(path.rstrip("/"))
    with held(open_source(folder or "/", roots_above(path, roots), create=True)) as parent:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def roots_above(path: str, roots: Sequence[str] | None) -> Sequence[str] | None:
    """Where the parent of a directory that is to be made may lie: anywhere for a root itself and what leads there.

    That is the operator's ground, unless it lies in another root.
    """
    folder = str(Path(path).parent)
    leads_there = any(_within(root, path.rstrip("/")) for root in roots or ())
    return None if leads_there and not any(_within(folder, root) for root in roots or ()) else roots


def _check_inside(handle: int, path: str, roots: Sequence[str] | None) -> None:
    if roots is None:
        return
    meant = _opened(handle)
    if not any(_within(meant, root) for root in _real_roots(roots)):
        allowed = ", ".join(roots) or "none is allowed"
        raise WrongState(
            f"mount '{path}': leads to '{meant}', outside the bind_roots of agent.toml's [policy] ({allowed})"
        )


def _real_roots(roots: Sequence[str]) -> Iterator[str]:
    """Where the roots lie. One that is reached through another is part of that one: containers may move it."""
    for root in roots:
        others = [other for other in roots if other != root]
        if not _passes(root, others):
            with contextlib.suppress(OSError), held(_open(root, magic=False)) as handle:
                yield _opened(handle)


def _passes(path: str, others: Sequence[str]) -> bool:
    """Whether a path, as its links are followed one by one, ever lies below one of the others."""
    for _ in range(_MOST_LINKS):
        if any(path != other and _within(path, other) for other in others):
            return True
        steps = path.split("/")
        for length in range(2, len(steps) + 1):
            prefix = Path("/".join(steps[:length]))
            if prefix.is_symlink():
                target = prefix.parent / prefix.readlink()
                path = os.path.normpath("/".join([str(target), *steps[length:]]))
                break
        else:
            return False
    return True


def _opened(handle: int) -> str:
    """Where what is open lies now, without links."""
    return str(Path(f"/proc/self/fd/{handle}").readlink())


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _open(path: str, *, magic: bool) -> int:
    """Open with O_PATH. magic: follow links of /proc, too, which lead anywhere."""
    if magic:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    return openat2(path, os.O_PATH | os.O_CLOEXEC, NO_MAGICLINKS)


def openat2(path: str, flags: int, resolve: int, *, dir_fd: int = _AT_FDCWD) -> int:
    """Open a path by openat2(2) and return the descriptor. resolve: which links are followed, and where to."""
    how = struct.pack("QQQ", flags, 0, resolve)
    handle: int = _libc.syscall(_OPENAT2, dir_fd, ctypes.c_char_p(os.fsencode(path)), how, ctypes.c_size_t(len(how)))
    if handle < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return handle


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, after a crash of the agent too."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.replace(path)


def write_setting(path: str, value: str) -> None:
    """Write a setting below /proc/sys; succeed where this kernel has no such setting, as of IPv6. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), open(path, "wb", buffering=0) as file:  # noqa: PTH123 - at every start
        file.write(value.encode())


def write_over(descriptor: int, content: bytes) -> None:
    """Make content what an open file holds, without a moment in which it is empty; touch nothing if it is that.

    Raises OSError where not all of it can be written: a full disk takes what it has room for.
    """
    if os.pread(descriptor, len(content) + 1, 0) == content:
        return
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, memoryview(content)[done:], done)
    os.ftruncate(descriptor, len(content))


def sync_folder(folder: Path) -> None:
    """Write the entries of a directory to disk."""
    with held(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        os.fsync(descriptor)


def mode_of(folder: int, name: str) -> int | None:
    """The st_mode of an entry of an open directory, no link followed; None if it is not there."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def clear(folder: int, name: str) -> None:
    """Delete an entry of an open directory, whatever it is; succeed when it is not there."""
    mode = mode_of(folder, name)
    if mode is not None and stat.S_ISDIR(mode):
        remove_tree(name, dir_fd=folder)
    elif mode is not None:
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def held(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end of a with block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_text(path: Path | str) -> str:
    """The text of a file of the host; "" for one that is not there or can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - hundreds in one pass
            return file.read()
    except OSError:
        return ""


def names_in(folder: Path | str) -> list[str]:
    """The names in a directory; none if it does not exist."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - names, not paths: there may be thousands
    except FileNotFoundError:
        return []
