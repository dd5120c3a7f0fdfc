"""Layer archives → directories that overlayfs can stack.

`store` calls `unpack` for each layer of an image; `lookup` reads a stack of them.

An archive is hostile until proven otherwise: no name in it is ever handed to the kernel as a path. Each component is
opened on its own, relative to its parent's descriptor and without following links; a link among the parents is
resolved by hand, below the layer's own root. Whiteouts (OCI image spec, layer.md) become what overlayfs reads:
a character device 0/0, and `trusted.overlay.opaque`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, BinaryIO, cast

from holdfast.drivers import remove_tree
from holdfast.errors import WrongState

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
OPAQUE_XATTR = "trusted.overlay.opaque"
OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
PAX_XATTR = "SCHILY.xattr."
MAX_LINKS = 40  # as path_resolution(7)
MAX_HEADER = 8 << 20  # bytes: tarfile holds names and attributes that precede an entry in memory
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
CHUNK = 1 << 20
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may come to: size bytes of its plain archive, and on disk; files entries."""

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
    `compressed`), how many entries, and the newest time (seconds) in it."""

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
    Raises WrongState for what is damaged, hostile, beyond limits or not as expected; TryAgain where the same may
    well work later; UnfitHost where the disk is full. After an error folder and recipe are the caller's to delete.
    """
    from holdfast.images.archives import plain

    hashed = _Hashed(os.fdopen(os.dup(stream), "rb"), progress)
    with hashed.stream, recipe.open("wb") as copy, plain(cast(BinaryIO, hashed)) as archive:
        found = unpack(cast(BinaryIO, _Copied(archive, copy)), folder)
        hashed.drain()
    got = replace(found, digest=f"sha256:{hashed.digest.hexdigest()}", compressed=hashed.size)
    for what, want, have in (
        ("size", expected.size, got.compressed),
        ("digest", expected.digest, got.digest),
        ("diff id", expected.diff_id, got.diff_id),
    ):
        if want not in (None, have):
            raise WrongState(f"unpack layer: its {what} is {have} (expected {want})")
    return got


class _Copied:
    """A stream that is kept while it is read."""

    def __init__(self, stream: BinaryIO, copy: BinaryIO) -> None:
        self.stream = stream
        self.copy = copy

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.copy.write(data)
        return data


def unpack(archive: BinaryIO, root: Path) -> Unpacked:
    """Unpack a plain tar stream into the empty directory root, and sync it to disk.

    Nothing outside root changes, whatever the archive says. Raises WrongState for an archive that is damaged or
    reaches outside; root is then the caller's to delete.
    """
    hashed = _Hashed(archive)
    tree = _Tree(root)
    newest = files = 0
    try:
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=hashed, mode="r|", errors="surrogateescape", bufsize=CHUNK, tarinfo=Entry
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a layer may hold a million files
                with _blamed(member):
                    tree.add(member, tar.extractfile(member) if member.isreg() else None)
                newest = max(newest, int(member.mtime))
                files += 1
        hashed.drain()
        tree.finish()
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:  # numbers that are none
        raise WrongState(f"unpack layer: {error} (expected a tar archive)") from error
    finally:
        tree.close()
    digest = f"sha256:{hashed.digest.hexdigest()}"
    return Unpacked(digest, hashed.size, digest, hashed.size, files, newest)


@contextmanager
def _blamed(member: tarfile.TarInfo) -> Iterator[None]:
    """What the kernel does not take is the archive's fault, but for a disk that is full or broken."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.EPERM):
            raise
        raise WrongState(f"unpack layer: {member.name[:255]!r}: {error.strerror or error}") from error


class Entry(tarfile.TarInfo):
    """An entry of a tar archive whose headers fit into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Called by tarfile with the plain header, before it reads what that announces."""
        if self.type in HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"header of {self.size} bytes is too long (at most {MAX_HEADER})")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


class _Hashed:
    """A stream that is hashed and counted while it is read."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None] | None = None) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        self.progress = progress

    def read(self, size: int = CHUNK) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        self.size += len(data)
        if self.progress is not None:
            self.progress(self.size)
        return data

    def drain(self) -> None:
        """Read what follows the end-of-archive mark: it counts for the digest."""
        while self.read(CHUNK):
            pass


class _Tree:
    """A layer's directory while it is filled."""

    def __init__(self, root: Path) -> None:
        self.root = os.open(root, DIRECTORY)
        self.directories: dict[tuple[str, ...], tarfile.TarInfo] = {}
        self._parent: tuple[tuple[str, ...], int] | None = None

    def close(self) -> None:
        self._forget_parent()
        os.close(self.root)

    def add(self, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        """Make one entry of the archive; a later entry of the same name replaces an earlier one."""
        *parent, name = _parts(member.name) or ("",)
        if not name:
            self._add_root(member)
            return
        folder = self._open_parent(tuple(parent))
        if name == OPAQUE:
            os.setxattr(folder, OPAQUE_XATTR, b"y")
        elif name.startswith(WHITEOUT + WHITEOUT):
            return  # aufs bookkeeping, as .wh..wh.plnk
        elif name.startswith(WHITEOUT):
            _whiteout(folder, _whited(member, name))
        else:
            self._make(folder, (*parent, name), member, content)

    def finish(self) -> None:
        """Set the directories' times, which filling them has changed, and sync the file system."""
        self._forget_parent()
        for parts in sorted(self.directories, key=len, reverse=True):
            with suppress(WrongState, OSError), self._opened(parts) as folder:  # replaced by a later entry
                _set_times(folder, self.directories[parts])
        if _libc.syncfs(self.root) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")

    def _add_root(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            _set_owner_and_mode(self.root, member)
            self.directories[()] = member

    def _make(self, folder: int, parts: tuple[str, ...], member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        name = parts[-1]
        hidden = _clear_way(folder, name, keep_directory=member.isdir())
        if member.isdir():
            _make_directory(folder, name, member, hidden=hidden)
            self.directories[parts] = member
            return
        self.directories.pop(parts, None)
        if member.islnk():
            self._link(folder, name, member)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=folder)
            _dress_link(folder, name, member)
        elif content is not None:
            _make_file(folder, name, member, content)
        else:
            _make_node(folder, name, member)

    def _link(self, folder: int, name: str, member: tarfile.TarInfo) -> None:
        *parent, source = _parts(member.linkname) or ("",)
        try:
            with self._opened(tuple(parent)) as origin:
                os.link(source, name, src_dir_fd=origin, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            raise WrongState(
                f"unpack layer: {member.name!r}: links to {member.linkname!r}, which is not in this layer"
            ) from error

    def _open_parent(self, parts: tuple[str, ...]) -> int:
        """The directory parts, made where missing. Entries come sorted mostly, so the last one is kept open."""
        if self._parent is None or self._parent[0] != parts:
            self._forget_parent()
            self._parent = (parts, self._walk(parts, create=True))
        return self._parent[1]

    def _forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    @contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        descriptor = self._walk(parts, create=False)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _walk(self, parts: Sequence[str], *, create: bool) -> int:
        """Open a directory by its components, resolving links among them as chroot(2) would."""
        trail = [os.dup(self.root)]
        todo = list(reversed(parts))
        links = 0
        try:
            while todo:
                name = todo.pop()
                if name == "..":
                    if len(trail) > 1:
                        os.close(trail.pop())
                    continue
                target = _readlink(trail[-1], name)
                if target is None:
                    trail.append(_enter(trail[-1], name, create=create))
                    continue
                links += 1
                if links > MAX_LINKS:
                    raise WrongState(f"unpack layer: {'/'.join(parts)!r}: too many symbolic links")
                if target.startswith("/"):
                    while len(trail) > 1:
                        os.close(trail.pop())
                todo.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
            return trail.pop()
        finally:
            for descriptor in trail:
                os.close(descriptor)


def _parts(name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts or any("\0" in part for part in parts):
        raise WrongState(f"unpack layer: {name!r}: reaches outside of the layer")
    return parts


def _whited(member: tarfile.TarInfo, name: str) -> str:
    hidden = name.removeprefix(WHITEOUT)
    if hidden in ("", ".", ".."):
        raise WrongState(f"unpack layer: {member.name!r}: reaches outside of the layer")
    return hidden


def _readlink(folder: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


def _enter(folder: int, name: str, *, create: bool) -> int:
    try:
        return os.open(name, DIRECTORY, dir_fd=folder)
    except NotADirectoryError as error:
        if not is_whiteout(os.stat(name, dir_fd=folder, follow_symlinks=False)) or not create:
            raise WrongState(f"unpack layer: {name!r}: is a parent of another entry, but no directory") from error
        _clear_way(folder, name, keep_directory=False)
        hidden = True
    except FileNotFoundError:
        if not create:
            raise
        hidden = False
    os.mkdir(name, 0o755, dir_fd=folder)
    descriptor = os.open(name, DIRECTORY, dir_fd=folder)
    os.fchmod(descriptor, 0o755)  # whatever the umask is
    if hidden:
        os.setxattr(descriptor, OPAQUE_XATTR, b"y")
    return descriptor


def is_whiteout(entry: os.stat_result) -> bool:
    return stat.S_ISCHR(entry.st_mode) and entry.st_rdev == 0


def _whiteout(folder: int, name: str) -> None:
    """Hide name of the layers below; what this layer itself holds under the name stays (layer.md)."""
    try:
        entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)
        return
    if stat.S_ISDIR(entry.st_mode):
        descriptor = os.open(name, DIRECTORY, dir_fd=folder)
        os.setxattr(descriptor, OPAQUE_XATTR, b"y")
        os.close(descriptor)


def _clear_way(folder: int, name: str, *, keep_directory: bool) -> bool:
    """Remove what stands at name; say whether that was a whiteout."""
    try:
        entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(entry.st_mode):
        os.unlink(name, dir_fd=folder)
    elif not keep_directory:
        remove_tree(name, dir_fd=folder)
    return is_whiteout(entry)


def _make_directory(folder: int, name: str, member: tarfile.TarInfo, *, hidden: bool) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=folder)
    descriptor = os.open(name, DIRECTORY, dir_fd=folder)
    try:
        _set_owner_and_mode(descriptor, member)
        if hidden:
            os.setxattr(descriptor, OPAQUE_XATTR, b"y")
    finally:
        os.close(descriptor)


def _make_file(folder: int, name: str, member: tarfile.TarInfo, content: IO[bytes]) -> None:
    _check_room(folder, member)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, CHUNK)
        file.flush()
        _set_owner_and_mode(descriptor, member)
        _set_times(descriptor, member)


def _check_room(folder: int, member: tarfile.TarInfo) -> None:
    """A sparse entry of a few bytes may stand for any number of zeros: they must not fill the disk."""
    if member.size < CHUNK:
        return
    system = os.fstatvfs(folder)
    if member.size > (free := system.f_bavail * system.f_frsize):
        raise WrongState(f"unpack layer: {member.name!r}: takes {member.size} bytes (the disk has {free})")


def _make_node(folder: int, name: str, member: tarfile.TarInfo) -> None:
    kinds = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}
    if member.type not in kinds:
        raise WrongState(f"unpack layer: {member.name!r}: entry of unknown type {member.type!r}")
    device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
    os.mknod(name, kinds[member.type] | 0o600, device, dir_fd=folder)
    os.chown(name, member.uid, member.gid, dir_fd=folder, follow_symlinks=False)
    os.chmod(name, member.mode & 0o7777, dir_fd=folder)  # made just now, and no link: nothing to follow
    os.utime(name, ns=_times(member), dir_fd=folder, follow_symlinks=False)


def _dress_link(folder: int, name: str, member: tarfile.TarInfo) -> None:
    os.chown(name, member.uid, member.gid, dir_fd=folder, follow_symlinks=False)
    os.utime(name, ns=_times(member), dir_fd=folder, follow_symlinks=False)


def _set_owner_and_mode(descriptor: int, member: tarfile.TarInfo) -> None:
    """Owner first: chown(2) takes set-user-ID bits and security.capability away."""
    os.fchown(descriptor, member.uid, member.gid)
    os.fchmod(descriptor, member.mode & 0o7777)
    for key, value in member.pax_headers.items():
        name = key.removeprefix(PAX_XATTR)
        if name != key and not name.startswith(OVERLAY_XATTRS):  # these steer overlayfs: never the archive's to set
            os.setxattr(descriptor, name, value.encode("utf-8", "surrogateescape"))


def _set_times(descriptor: int, member: tarfile.TarInfo) -> None:
    os.utime(descriptor, ns=_times(member))


def _times(member: tarfile.TarInfo) -> tuple[int, int]:
    moment = int(member.mtime * 1_000_000_000)
    return moment, moment
