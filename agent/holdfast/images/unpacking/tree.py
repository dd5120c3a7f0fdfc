"""Make a directory that overlayfs can stack from the entries of a hostile archive.

`worker` owns one `Tree`. No name of the archive is ever handed to the kernel as a path: each component is opened on
its own, relative to its parent's descriptor and without following links; a link among the parents is resolved by
hand, below the layer's own root. Whiteouts (OCI image spec, layer.md) become what overlayfs reads: a character device
0/0, and `trusted.overlay.opaque`. It imports little, because the worker has to start fast.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from struct import Struct

from holdfast.images.unpacking.tarstream import (
    BLOCKDEV,
    CHAR,
    DIRECTORY,
    FIFO,
    FILE,
    HARD,
    LINK,
    Damaged,
    Entry,
    TarStream,
    shown,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.images.unpacking.recipe import Writer

WHITEOUT = b".wh."
AUFS = b".wh..wh."
OPAQUE = b".wh..wh..opq"
OPAQUE_XATTR = "trusted.overlay.opaque"
DEFAULT_ACL = b"system.posix_acl_default"
STEERING = (b"trusted.overlay.", b"user.overlay.")  # xattrs that overlayfs obeys: never the archive's to set
KEPT = (b"user.", b"trusted.", b"system.posix_acl_", b"security.capability")  # labels are the host's to give
MAX_LINKS = 40  # as path_resolution(7)
MAX_DETOUR = 4096  # components that links may add to one path
MAX_NAME = 16 << 10  # bytes: four times what the kernel takes for a path, and the cost grows with the square
MAX_OPEN = 200  # directories whose descriptors are kept
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NODES = {CHAR: stat.S_IFCHR, BLOCKDEV: stat.S_IFBLK, FIFO: stat.S_IFIFO}
NOBODY = 0xFFFFFFFF  # to chown(2): leave it as it is
HOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_late = Struct("<Iqi")  # of a directory: length of its path, time, length of its default ACL (-1: none)


class Tree:
    """A layer's directory while it is filled; root is its descriptor. The umask has to be 0.

    files: how many entries there are so far, directories made on the way included; more than most raise Damaged.
    newest: the newest time (seconds) of an entry.
    """

    def __init__(self, root: int, stream: TarStream, recipe: Writer, most: int) -> None:
        self.files = 0
        self.newest = 0
        self._root = root
        self._stream = stream
        self._recipe = recipe
        self._most = most
        self._uid, self._gid = os.geteuid(), os.getegid()
        top = os.fstat(root)
        # Whether what is made belongs to us just so: below a set-group-ID directory it would not.
        self._plain = top.st_gid == self._gid and not top.st_mode & stat.S_ISGID
        self._open: dict[bytes, tuple[int, bytes]] = {}  # parent as the archive has it → descriptor, real path + "/"
        self._stale = False
        self._ever_stale = False
        self._late = _DirectoryLog()

    def add(self, entry: Entry) -> None:
        """Make one entry and take its content; a later entry of the same name replaces an earlier one."""
        self._count()
        if self._stale or len(self._open) > MAX_OPEN:
            self._forget()
        name = entry.name
        if name.startswith(b"./"):
            name = name[2:]
        if (
            b"//" in name
            or b"/." in name
            or name[:1] in (b".", b"/", b"")
            or name[-1:] == b"/"
            or b"\0" in name
            or len(name) > 4096
        ):
            name = b"/".join(_parts(name))
        moment = entry.mtime // 1_000_000_000
        if moment > self.newest:
            self.newest = moment
        if not name:
            self._add_root(entry)
            return
        parent, _, base = name.rpartition(b"/")
        if AUFS in name and _is_bookkeeping(name):
            self._stream.keep_content()
            return
        folder, path = self._open.get(parent) or self._enter(parent)
        if base.startswith(WHITEOUT):
            self._whiteout(folder, base)
        elif entry.kind == FILE:
            self._file(folder, base, path + base, entry)
        elif entry.kind == DIRECTORY:
            self._directory(folder, base, path + base, entry)
        elif entry.kind == LINK:
            self._link(folder, base, path + base, entry)
        elif entry.kind == HARD:
            self._hard_link(folder, base, path + base, entry)
        else:
            self._node(folder, base, path + base, entry)

    def finish(self) -> None:
        """Set the directories' times and default ACLs, which filling them would have changed or spread."""
        self._forget()
        for path, moment, acl in self._late:
            if len(self._open) > MAX_OPEN:
                self._forget()
            try:
                self._finish_directory(path, moment, acl)
            except (Damaged, FileNotFoundError, NotADirectoryError):
                if not self._ever_stale:  # else a later entry has replaced it
                    raise

    def close(self) -> None:
        """Let go of the directories that are kept open; root stays."""
        self._forget()

    def _finish_directory(self, path: bytes, moment: int, acl: bytes | None) -> None:
        if not path:
            _set_times(self._root, moment)
            return
        parent, _, base = path.rpartition(b"/")
        folder, _ = self._open.get(parent) or self._enter(parent, create=False, follow=False)
        if acl is None and not self._ever_stale:
            os.utime(base, ns=(moment, moment), dir_fd=folder, follow_symlinks=False)
            return
        descriptor = os.open(base, FOLDER, dir_fd=folder)
        if acl is not None:
            os.setxattr(descriptor, DEFAULT_ACL, acl)
        _set_times(descriptor, moment)
        os.close(descriptor)

    def _count(self) -> None:
        self.files += 1
        if self.files > self._most:
            raise Damaged(f"holds more than {self._most} entries")

    def _add_root(self, entry: Entry) -> None:
        if entry.kind != DIRECTORY:
            raise Damaged(f"{shown(entry.name)}: an entry without a name")
        os.fchown(self._root, _owner(entry.uid), _owner(entry.gid))
        os.fchmod(self._root, entry.mode & 0o7777)
        self._note_directory(b"", entry)
        if entry.xattrs:
            _set_xattrs(self._root, entry.xattrs)

    def _file(self, folder: int, base: bytes, path: bytes, entry: Entry) -> None:
        mode = entry.mode & 0o7777
        try:
            descriptor = os.open(base, NEW, mode, dir_fd=folder)
        except FileExistsError:
            self._clear_way(folder, base, path)
            descriptor = os.open(base, NEW, mode, dir_fd=folder)
        if entry.sparse is not None:
            self._write_sparse(descriptor, path, entry.sparse, entry.realsize)
        elif entry.size:
            stream = self._stream
            stream.content()
            left = entry.size
            while left:
                part = stream.take(left)
                written = os.write(descriptor, part)
                while written < len(part):
                    part = part[written:]
                    left -= written
                    written = os.write(descriptor, part)
                left -= written
            self._recipe.file(path, entry.size)
        if entry.uid != self._uid or entry.gid != self._gid or not self._plain:
            os.fchown(descriptor, _owner(entry.uid), _owner(entry.gid))
            os.fchmod(descriptor, mode)  # afterwards: chown(2) takes set-user-ID bits away
        elif mode & 0o6000:
            os.fchmod(descriptor, mode)
        if entry.xattrs:
            _set_xattrs(descriptor, entry.xattrs)
        os.utime(descriptor, ns=(entry.mtime, entry.mtime))
        os.close(descriptor)

    def _write_sparse(self, descriptor: int, path: bytes, pieces: list[tuple[int, int]], size: int) -> None:
        os.ftruncate(descriptor, size)
        self._stream.content()
        for offset, length in pieces:
            while length:
                part = self._stream.take(length)
                while part:
                    written = os.pwrite(descriptor, part, offset)
                    offset += written
                    length -= written
                    part = part[written:]
        self._recipe.sparse(path, [piece for piece in pieces if piece[1]])

    def _directory(self, folder: int, base: bytes, path: bytes, entry: Entry) -> None:
        mode = entry.mode & 0o7777
        made, hidden = True, False
        try:
            os.mkdir(base, mode, dir_fd=folder)
        except FileExistsError:
            found = os.stat(base, dir_fd=folder, follow_symlinks=False)
            if made := not stat.S_ISDIR(found.st_mode):
                hidden = is_whiteout(found)
                self._clear_way(folder, base, path)
                os.mkdir(base, mode, dir_fd=folder)
        if not made or entry.uid != self._uid or entry.gid != self._gid or mode & 0o6000 or not self._plain:
            os.chown(base, _owner(entry.uid), _owner(entry.gid), dir_fd=folder, follow_symlinks=False)
            os.chmod(base, mode, dir_fd=folder)  # a directory, made just now or looked at: nothing to follow
        self._note_directory(path, entry)
        if hidden:
            _set_opaque(folder, base)
        if entry.xattrs:
            descriptor = os.open(base, FOLDER, dir_fd=folder)
            _set_xattrs(descriptor, entry.xattrs)
            os.close(descriptor)

    def _note_directory(self, path: bytes, entry: Entry) -> None:
        if entry.gid != self._gid or entry.mode & stat.S_ISGID:
            self._plain = False
        # What a default ACL hands down would be on everything that follows.
        self._late.append(path, entry.mtime, entry.xattrs.pop(DEFAULT_ACL, None) if entry.xattrs else None)

    def _link(self, folder: int, base: bytes, path: bytes, entry: Entry) -> None:
        try:
            os.symlink(entry.link, base, dir_fd=folder)
        except FileExistsError:
            self._clear_way(folder, base, path)
            os.symlink(entry.link, base, dir_fd=folder)
        if entry.uid != self._uid or entry.gid != self._gid or not self._plain:
            os.chown(base, _owner(entry.uid), _owner(entry.gid), dir_fd=folder, follow_symlinks=False)
        self._dress(folder, base, entry)

    def _hard_link(self, folder: int, base: bytes, path: bytes, entry: Entry) -> None:
        parent, _, source = b"/".join(_parts(entry.link)).rpartition(b"/")
        try:
            self._clear_way(folder, base, path)
            origin, _ = self._open.get(parent) or self._enter(parent, create=False)
            if is_whiteout(os.stat(source, dir_fd=origin, follow_symlinks=False)):
                raise FileNotFoundError(errno.ENOENT, "a whiteout")
            os.link(source, base, src_dir_fd=origin, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in HOST:
                raise
            raise Damaged(f"links to {shown(entry.link)}, which is not in this layer") from error

    def _node(self, folder: int, base: bytes, path: bytes, entry: Entry) -> None:
        if entry.major > 0xFFF or entry.minor > 0xFFFFF:
            raise Damaged(f"device {entry.major}/{entry.minor} (at most 4095/1048575)")
        mode = entry.mode & 0o7777
        device = 0 if entry.kind == FIFO else os.makedev(entry.major, entry.minor)
        self._clear_way(folder, base, path)
        os.mknod(base, NODES[entry.kind] | mode, device, dir_fd=folder)
        os.chown(base, _owner(entry.uid), _owner(entry.gid), dir_fd=folder, follow_symlinks=False)
        os.chmod(base, mode, dir_fd=folder)  # made just now, and no link: nothing to follow
        self._dress(folder, base, entry)

    def _dress(self, folder: int, base: bytes, entry: Entry) -> None:
        if entry.xattrs:
            os.fchdir(folder)  # setxattr(2) has no form with a directory's descriptor
            _set_xattrs(base, entry.xattrs)
        os.utime(base, ns=(entry.mtime, entry.mtime), dir_fd=folder, follow_symlinks=False)

    def _whiteout(self, folder: int, base: bytes) -> None:
        """Hide a name of the layers below; what this layer itself holds under the name stays (layer.md)."""
        self._stream.keep_content()
        if base == OPAQUE:
            os.setxattr(folder, OPAQUE_XATTR, b"y")
            return
        hidden = base[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise Damaged("reaches outside of the layer")
        try:
            found = os.stat(hidden, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=folder)
            return
        if stat.S_ISDIR(found.st_mode):
            _set_opaque(folder, hidden)

    def _enter(self, parent: bytes, *, create: bool = True, follow: bool = True) -> tuple[int, bytes]:
        """Open a directory by its components, made where missing; links are resolved as chroot(2) would."""
        known, rest = parent, []
        while known and known not in self._open:
            known, _, part = known.rpartition(b"/")
            rest.append(part)
        start, path = self._open[known] if known else (self._root, b"")
        place = [os.dup(start)]
        try:
            path = self._walk(place, path, rest, parent, create=create, follow=follow)
        except BaseException:
            os.close(place[0])
            raise
        self._open[parent] = place[0], path
        return place[0], path

    def _walk(
        self, place: list[int], path: bytes, rest: list[bytes], parent: bytes, *, create: bool, follow: bool
    ) -> bytes:
        """Step from the directory in place, and to it again, through what rest has, last one first; say the path."""
        links = detour = 0
        while rest:
            name = rest.pop()
            if name == b"..":
                if path:
                    _step(b"..", place)
                    path = path[: path.rfind(b"/", 0, -1) + 1]
                continue
            try:
                _step(name, place)
            except (FileNotFoundError, NotADirectoryError) as error:
                target = _readlink(place[0], name) if isinstance(error, NotADirectoryError) and follow else None
                if target is not None:
                    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
                    links, detour = links + 1, detour + len(parts)
                    if links > MAX_LINKS or detour > MAX_DETOUR:
                        raise Damaged(f"{shown(parent)}: too many symbolic links") from None
                    if target.startswith(b"/"):
                        os.dup2(self._root, place[0], inheritable=False)
                        path = b""
                    rest += reversed(parts)
                    continue
                if not create:
                    raise
                self._make_parent(place[0], name, path + name)
                _step(name, place)
            path += name + b"/"
        return path

    def _make_parent(self, folder: int, name: bytes, path: bytes) -> None:
        """Make a directory that no entry speaks of; what a whiteout hides stays hidden."""
        hidden = False
        try:
            hidden = is_whiteout(os.stat(name, dir_fd=folder, follow_symlinks=False))
            if not hidden:
                raise Damaged(f"{shown(path[-255:])}: is a parent of another entry, but no directory")
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        self._count()
        os.mkdir(name, 0o755, dir_fd=folder)
        if not self._plain:
            os.chown(name, self._uid, self._gid, dir_fd=folder, follow_symlinks=False)
            os.chmod(name, 0o755, dir_fd=folder)
        if hidden:
            _set_opaque(folder, name)

    def _forget(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._stale = False

    def _clear_way(self, folder: int, base: bytes, path: bytes) -> None:
        """Remove what stands at base, after its content has gone into the recipe."""
        try:
            found = os.stat(base, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        self._stale = self._ever_stale = True
        if stat.S_ISDIR(found.st_mode):
            self._remove_tree(folder, base, path)
        else:
            self._remove(folder, base, path, found)

    def _remove(self, folder: int, base: bytes, path: bytes, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode) and found.st_size:
            descriptor = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            self._recipe.replaced(path, descriptor)
            os.close(descriptor)
        os.unlink(base, dir_fd=folder)

    def _remove_tree(self, folder: int, base: bytes, path: bytes) -> None:
        """Delete a tree as `files.remove_tree` does: inner directories are moved up and deleted in turn."""
        top = os.open(base, FOLDER, dir_fd=folder)
        left = [(b"", path)]  # name in top, and the path that it had
        mark, number = os.urandom(8).hex().encode(), 0
        while left:
            name, path = left.pop()
            inner = os.open(name, FOLDER, dir_fd=top) if name else os.dup(top)
            for each in map(os.fsencode, os.listdir(inner)):  # noqa: PTH208 (of a descriptor)
                found = os.stat(each, dir_fd=inner, follow_symlinks=False)
                if not stat.S_ISDIR(found.st_mode):
                    self._remove(inner, each, path + b"/" + each, found)
                elif name:
                    moved, number = b"%b%d" % (mark, number), number + 1
                    os.rename(each, moved, src_dir_fd=inner, dst_dir_fd=top)
                    left.append((moved, path + b"/" + each))
                else:
                    left.append((each, path + b"/" + each))
            os.close(inner)
            if name:
                os.rmdir(name, dir_fd=top)
        os.close(top)
        os.rmdir(base, dir_fd=folder)


class _DirectoryLog:
    """What is to be done to directories at the end; packed, for a layer may have millions."""

    def __init__(self) -> None:
        self._packer = zlib.compressobj(1)
        self._parts: list[bytes] = []

    def append(self, path: bytes, moment: int, acl: bytes | None) -> None:
        head = _late.pack(len(path), moment, -1 if acl is None else len(acl))
        if part := self._packer.compress(head + path + (acl or b"")):
            self._parts.append(part)

    def __iter__(self) -> Iterator[tuple[bytes, int, bytes | None]]:
        unpacker = zlib.decompressobj()
        buffer = b""
        for part in [*self._parts, self._packer.flush()]:
            buffer += unpacker.decompress(part)
            at = 0
            while len(buffer) - at >= _late.size:
                length, moment, more = _late.unpack_from(buffer, at)
                end = at + _late.size + length
                if len(buffer) < end + max(more, 0):
                    break
                yield buffer[end - length : end], moment, buffer[end : end + more] if more >= 0 else None
                at = end + max(more, 0)
            buffer = buffer[at:]


def is_whiteout(entry: os.stat_result) -> bool:
    return stat.S_ISCHR(entry.st_mode) and entry.st_rdev == 0


def _parts(name: bytes) -> list[bytes]:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if len(name) > MAX_NAME:
        raise Damaged(f"{shown(name)}: a name of {len(name)} bytes (at most {MAX_NAME})")
    if b".." in parts or b"\0" in name:
        raise Damaged(f"{shown(name)}: reaches outside of the layer")
    return parts


def _is_bookkeeping(name: bytes) -> bool:
    """Check whether the entry is aufs's own, as `.wh..wh.plnk/…`."""
    *parents, base = name.split(b"/")
    return any(part.startswith(AUFS) for part in parents) or (base.startswith(AUFS) and base != OPAQUE)


def _owner(number: int) -> int:
    if not 0 <= number < NOBODY:
        raise Damaged(f"owner {number} (at most {NOBODY - 1})")
    return number


def _set_opaque(folder: int, name: bytes) -> None:
    """Hide what the layers below have in a directory."""
    descriptor = os.open(name, FOLDER, dir_fd=folder)
    os.setxattr(descriptor, OPAQUE_XATTR, b"y")
    os.close(descriptor)


def _step(name: bytes, place: list[int]) -> None:
    """Go on from the directory in place to one inside it."""
    inner = os.open(name, FOLDER, dir_fd=place[0])
    os.close(place[0])
    place[0] = inner


def _readlink(folder: int, name: bytes) -> bytes | None:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


def _set_times(descriptor: int, moment: int) -> None:
    os.utime(descriptor, ns=(moment, moment))


def _set_xattrs(target: int | bytes, xattrs: dict[bytes, bytes]) -> None:
    for name, value in xattrs.items():
        if not name.startswith(KEPT) or name.startswith(STEERING):
            continue
        try:
            os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
        except PermissionError:
            if isinstance(target, int) or not name.startswith(b"user."):  # links and devices have none: xattr(7)
                raise
        except OSError as error:
            raise type(error)(error.errno, f"attribute {shown(name)}: {error.strerror}") from error
