"""Pack directories as overlayfs keeps them into tar archives: a writable layer as an OCI layer, or a merged stack.

This is the reverse of unpacking: overlayfs's whiteouts (character device 0/0) and opaque directories
(`trusted.overlay.opaque`) become `.wh.NAME` and `.wh..wh..opq` (OCI image spec, layer.md). Names are bytes. What does
not fit into a ustar header is written to a pax header before it (pax(1)); holes of sparse files are left out (GNU
tar's manual, "PAX 1"), and so are sockets.

Containers may change these files meanwhile: every directory is opened below its parent, no link is ever followed,
and a file that shrinks is filled with zeros, because its size has been written already.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import UnfitHost, WrongState
from holdfast.images.formats.layout import BLOCK
from holdfast.images.unpacking.tree import OPAQUE_XATTR, is_whiteout
from holdfast.questions import Sink

WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
CHUNK = 1 << 20
HOLE = 1 << 16  # bytes: holes in smaller files are not looked for
REDIRECTS = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CONTENT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def pack_changes(upper: Path, out: Sink, leave_out: Collection[str] = ()) -> None:
    """Write a writable layer as an OCI layer.

    leave_out: absolute paths inside of it, of empty files and directories that are there only to be mounted on.
    Raises WrongState for what can't be written without the layers below (directories that overlayfs has redirected),
    UnfitHost for what can't be read.
    """
    _Packer(out, changes=True, leave_out=leave_out).pack([upper])


def pack_merged(layers: Sequence[Path], out: Sink, leave_out: Collection[str] = ()) -> None:
    """Write what overlayfs shows of a stack, lowest first, as the archive of one root file system."""
    _Packer(out, changes=False, leave_out=leave_out).pack(list(reversed(layers)))


@dataclass(slots=True)
class _Walked:
    """A directory that is being walked: its name below the root, and where it lies, highest first."""

    path: bytes
    places: list[int]
    names: Iterator[bytes]


class _Packer:
    def __init__(self, out: Sink, *, changes: bool, leave_out: Collection[str]) -> None:
        self.out = out
        self.changes = changes
        self.leave_out = {os.fsencode(path.strip("/")) for path in leave_out}
        self.links: dict[tuple[int, int], bytes] = {}

    def pack(self, roots: Sequence[Path]) -> None:
        stack: list[_Walked] = []
        try:
            stack.append(_opened(b"", [os.open(root, FOLDER) for root in roots]))
            self._entry(b"./", roots[0].lstat(), str(roots[0]))
            while stack:
                name = next(stack[-1].names, None)
                if name is None:
                    _close(stack.pop())
                elif (inner := self._add(stack[-1], name)) is not None:
                    stack.append(inner)
            self.out.write(bytes(2 * BLOCK))
        except (ConnectionError, TimeoutError):
            raise  # nobody takes what is written: out's business
        except OSError as error:
            where = stack[-1].path if stack else b""
            raise UnfitHost(f"pack {os.fsdecode(where)!r}: {(error.strerror or str(error)).lower()}") from error
        finally:
            for folder in stack:
                _close(folder)

    def _add(self, folder: _Walked, name: bytes) -> _Walked | None:
        """Write one entry; of a directory, what is to be walked next."""
        path = folder.path + name
        found = [(place, entry) for place in folder.places if (entry := _stat(place, name)) is not None]
        if not found:
            return None  # gone meanwhile
        place, entry = found[0]
        if is_whiteout(entry):
            if self.changes:
                self._whiteout(folder.path, WHITEOUT + name, entry)
            return None
        if stat.S_ISSOCK(entry.st_mode) or self._is_mount_point(path, place, name, entry):
            return None
        here = _at(place, name)
        if not stat.S_ISDIR(entry.st_mode):
            self._file(path, place, name, entry)
            return None
        self._entry(path + b"/", entry, here)
        return self._descend(path + b"/", name, found)

    def _descend(self, path: bytes, name: bytes, found: list[tuple[int, os.stat_result]]) -> _Walked:
        places = []
        for place, entry in found:
            if not stat.S_ISDIR(entry.st_mode):
                break
            places.append(os.open(name, FOLDER, dir_fd=place))
            marks = _xattrs(_at(place, name), own=True)
            if self.changes and any(mark in marks for mark in REDIRECTS):
                raise WrongState(
                    f"pack {os.fsdecode(path)!r}: was renamed by overlayfs's redirect_dir (not supported)"
                )
            if marks.get(OPAQUE_XATTR) == b"y":
                if self.changes:
                    self._whiteout(path, OPAQUE, entry)
                break
        return _opened(path, places)

    def _is_mount_point(self, path: bytes, place: int, name: bytes, entry: os.stat_result) -> bool:
        """Check whether something is here only to be mounted over."""
        if path not in self.leave_out:
            return False
        if stat.S_ISREG(entry.st_mode):
            return entry.st_size == 0
        if not stat.S_ISDIR(entry.st_mode):
            return False
        with suppress(OSError):
            inner = os.open(name, FOLDER, dir_fd=place)
            try:
                return not os.listdir(inner)  # noqa: PTH208 (a descriptor)
            finally:
                os.close(inner)
        return False

    def _whiteout(self, parent: bytes, name: bytes, entry: os.stat_result) -> None:
        info = tarfile.TarInfo()
        info.mode, info.mtime = 0o600, int(entry.st_mtime)
        self._header(info, {b"path": parent + name})

    def _entry(self, path: bytes, entry: os.stat_result, where: str) -> None:
        """Write a directory, a link, a device or a fifo."""
        records = {b"path": path, **_pax_xattrs(where)}
        info = _info(entry)
        if stat.S_ISLNK(entry.st_mode):
            records[b"linkpath"] = os.fsencode(os.readlink(where))  # noqa: PTH115 (as it is, not as a Path has it)
        self._header(info, records, entry)

    def _file(self, path: bytes, place: int, name: bytes, entry: os.stat_result) -> None:
        key = (entry.st_dev, entry.st_ino)
        if entry.st_nlink > 1:
            if key in self.links:
                info = _info(entry)
                info.type = tarfile.LNKTYPE
                self._header(info, {b"path": path, b"linkpath": self.links[key]}, entry)
                return
            self.links[key] = path
        if not stat.S_ISREG(entry.st_mode):
            self._entry(path, entry, _at(place, name))
            return
        try:
            descriptor = os.open(name, CONTENT, dir_fd=place)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return  # gone or replaced meanwhile
            raise
        try:
            entry = os.fstat(descriptor)
            if stat.S_ISREG(entry.st_mode):
                self._content(path, descriptor, entry, _at(place, name))
        finally:
            os.close(descriptor)

    def _content(self, path: bytes, descriptor: int, entry: os.stat_result, where: str) -> None:
        records = {b"path": path, **_pax_xattrs(where)}
        info, table = _info(entry), b""
        pieces = _pieces(descriptor, entry)
        if pieces is None:
            pieces = [(0, entry.st_size)]
        else:
            numbers = [len(pieces), *(number for piece in pieces for number in piece)]
            table = b"".join(b"%d\n" % number for number in numbers)
            table += bytes(-len(table) % BLOCK)
            folder, _, base = path.rpartition(b"/")
            records |= {
                b"path": b"/".join(part for part in (folder, b"GNUSparseFile.0", base) if part),
                b"GNU.sparse.major": b"1",
                b"GNU.sparse.minor": b"0",
                b"GNU.sparse.name": path,
                b"GNU.sparse.realsize": str(entry.st_size).encode(),
            }
        info.size = len(table) + sum(length for _, length in pieces)
        self._header(info, records, entry)
        self.out.write(table)
        for offset, length in pieces:
            while length:
                data = os.pread(descriptor, min(CHUNK, length), offset) or bytes(min(CHUNK, length))
                self.out.write(data)
                offset, length = offset + len(data), length - len(data)
        self.out.write(bytes(-info.size % BLOCK))

    def _header(
        self, info: tarfile.TarInfo, records: dict[bytes, bytes], entry: os.stat_result | None = None
    ) -> None:
        """Write a header, and before it a pax header with all that is too long, too large or too fine for it."""
        kept = {key: value for key, value in records.items() if not _fits(info, key, value)}
        if entry is not None and entry.st_mtime_ns % 1_000_000_000:
            seconds, rest = divmod(entry.st_mtime_ns, 1_000_000_000)
            if seconds >= 0:
                kept[b"mtime"] = b"%d.%09d" % (seconds, rest)
        for field, limit in (("uid", 8**7), ("gid", 8**7), ("size", 8**11), ("mtime", 8**11)):
            value = getattr(info, field)
            if not 0 <= value < limit:
                kept.setdefault(field.encode(), str(int(value)).encode())
                setattr(info, field, 0)
        if kept:
            data = b"".join(_record(key, value) for key, value in sorted(kept.items()))
            before = tarfile.TarInfo("PaxHeader")
            before.type, before.size = tarfile.XHDTYPE, len(data)
            self.out.write(before.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
        self.out.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))


def _opened(path: bytes, places: list[int]) -> _Walked:
    names: set[bytes] = set()
    for place in places:
        names.update(os.fsencode(name) for name in os.listdir(place))  # noqa: PTH208 (a descriptor)
    return _Walked(path, places, iter(sorted(names)))


def _close(folder: _Walked) -> None:
    for place in folder.places:
        os.close(place)


def _stat(place: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _at(place: int, name: bytes) -> str:
    """Make a path to a name in an open directory, for calls that take no descriptor."""
    return f"/proc/self/fd/{place}/{os.fsdecode(name)}"


def _info(entry: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = KINDS[stat.S_IFMT(entry.st_mode)]
    info.mode = stat.S_IMODE(entry.st_mode)
    info.uid, info.gid, info.mtime = entry.st_uid, entry.st_gid, entry.st_mtime_ns // 1_000_000_000
    if stat.S_ISCHR(entry.st_mode) or stat.S_ISBLK(entry.st_mode):
        info.devmajor, info.devminor = os.major(entry.st_rdev), os.minor(entry.st_rdev)
    return info


def _fits(info: tarfile.TarInfo, key: bytes, value: bytes) -> bool:
    """Put a name into the header itself where it fits, its beginning otherwise."""
    if key not in (b"path", b"linkpath"):
        return False
    fits = len(value) <= 100 and value.isascii()
    text = value if fits else value[:90].rstrip(b"/") or b"name"
    setattr(info, "name" if key == b"path" else "linkname", text.decode("ascii", "replace" if fits else "ignore"))
    return fits


def _record(key: bytes, value: bytes) -> bytes:
    """Write one record of a pax header: its length, which counts its own digits, key and value."""
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _xattrs(where: str, *, own: bool = False) -> dict[str, bytes]:
    """Read the extended attributes of what is at a path: those of overlayfs only, or all others."""
    found = {}
    try:
        for name in os.listxattr(where, follow_symlinks=False):
            if name.startswith(OVERLAY_XATTRS) == own:
                with suppress(OSError):
                    found[name] = os.getxattr(where, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTSUP):
            raise
    return found


def _pax_xattrs(where: str) -> dict[bytes, bytes]:
    return {b"SCHILY.xattr." + os.fsencode(name): value for name, value in _xattrs(where).items()}


def _pieces(descriptor: int, entry: os.stat_result) -> list[tuple[int, int]] | None:
    """Find offset and length of the data in a file with holes; None for a file that needs no map."""
    size = entry.st_size
    if size < HOLE or entry.st_blocks * 512 > size - HOLE // 2:
        return None
    pieces, at = [], 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            return None  # a file system that does not tell
        at = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        if start < at:
            pieces.append((start, at - start))
        elif at <= start:
            break
    if not pieces or sum(pieces[-1]) < size:
        pieces.append((size, 0))
    return pieces
