"""Make the archive of a layer again from its folder and its recipe, byte by byte.

The recipe is written while the layer is unpacked (`Writer`, in the worker), and holds every byte of the archive that
no file in the folder holds. `rebuild` is for what needs the archive again: save, push, bundles.

    MAGIC, one byte that nobody reads, then a zlib stream of frames; numbers are little-endian:

    L  u32 length, bytes                        bytes of the archive, as they are
    F  u64 size, u32 length, path               the content of that file of the folder
    S  u32 pieces, u32 length, path, pieces × (u64 offset, u64 size)    the same, of a sparse file
    K  u64 size, u32 length, path, (u64 offset, u32 size, bytes) …, (u64 0, u32 0)   what the file at path held up
                                                to here, holes left out: a later entry of the archive replaced it
    R  u32 length, path, u32 number             likewise, for another name of the file in that K frame (from 0)
    .  u64 size                                 the end; how many bytes the archive has

Paths are relative to the folder, without links among their parents. An F or S frame means the file that was at
its path then: the first K or R frame of that path that follows it, else what the folder has there now.
"""

from __future__ import annotations

import io
import os
import zlib
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any, BinaryIO

try:
    from isal import isal_zlib

    _compressor: Callable[[int], Any] = isal_zlib.compressobj
except ImportError:  # a machine that isal is not made for
    _compressor = zlib.compressobj

MAGIC = b"holdfast recipe1"
LEVEL = 1
CHUNK = 1 << 20
FLUSH = 1 << 17  # bytes of frames that are compressed at once
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_u32, _u64 = Struct("<I"), Struct("<Q")
_literal = Struct("<cI").pack
_file = Struct("<cQI").pack
_sparse = Struct("<cII").pack
_piece = Struct("<QQ")
_kept = Struct("<QI")


class Writer:
    """Writes a recipe to a descriptor. Bytes only: it lives in the worker."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._packer = _compressor(LEVEL)
        self._frames: list[bytes | memoryview] = []
        self._room = 0
        self._kept = 0
        self._linked: dict[int, int] = {}  # inode → its K frame, while other names of it remain
        os.write(descriptor, MAGIC + b"\0")

    def literal(self, data: bytes | memoryview) -> None:
        self._frames += (_literal(b"L", len(data)), bytes(data))
        self._room += len(data) + 5
        if self._room > FLUSH:
            self._flush()

    def file(self, path: bytes, size: int) -> None:
        self._frames += (_file(b"F", size, len(path)), path)

    def sparse(self, path: bytes, pieces: list[tuple[int, int]]) -> None:
        self._frames += (_sparse(b"S", len(pieces), len(path)), path, *(_piece.pack(*piece) for piece in pieces))
        self._flush()

    def replaced(self, path: bytes, descriptor: int) -> None:
        """Keep what the file at path holds, before it goes; of a file with several names, once."""
        found = os.fstat(descriptor)
        if found.st_ino in self._linked:
            self._frames += (_literal(b"R", len(path)), path, _u32.pack(self._linked[found.st_ino]))
        else:
            self._frames += (_file(b"K", found.st_size, len(path)), path)
            for offset, size in _extents(descriptor, found.st_size):
                self._frames += (_kept.pack(offset, size), _read(descriptor, offset, size))
                self._flush()
            self._frames.append(_kept.pack(0, 0))
            self._linked[found.st_ino] = self._kept
            self._kept += 1
        if found.st_nlink == 1:
            del self._linked[found.st_ino]  # the number may be another file's, next

    def finish(self, size: int) -> None:
        """size: bytes of the archive."""
        self._frames.append(b"." + _u64.pack(size))
        self._flush()
        _write(self._descriptor, self._packer.flush())

    def _flush(self) -> None:
        data = self._packer.compress(b"".join(self._frames))
        self._frames.clear()
        self._room = 0
        if data:
            _write(self._descriptor, data)


def rebuild(folder: Path, recipe: Path, out: BinaryIO) -> None:
    """Write the plain archive again that folder was unpacked from; the caller holds its digest against the diff id.

    Raises WrongState where the recipe is damaged, or a file is gone, has another size, or is no file any more. That a
    file's content was changed is seen by the digest alone.
    """
    import tempfile

    from holdfast.errors import WrongState

    try:
        with (
            recipe.open("rb") as file,
            tempfile.TemporaryFile(dir=recipe.parent) as scratch,
            _Opener(folder) as files,
        ):
            kept = _collect(_Frames(file), scratch.fileno())
            _write_archive(_Frames(file), files, kept, scratch.fileno(), out)
    except (_Broken, zlib.error) as error:
        raise WrongState(f"rebuild layer {recipe.stem!r}: {error} (the layer on disk is damaged)") from error


class _Broken(Exception):
    """Recipe and folder do not make the archive."""


class _Plain(io.RawIOBase):
    """What the zlib stream of a recipe holds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._unpacker = file, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data and not self._unpacker.eof:
            if not (raw := self._unpacker.unconsumed_tail or self._file.read(CHUNK)):
                break
            data = self._unpacker.decompress(raw, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Frames:
    """The frames of a recipe, read from its beginning."""

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        if file.read(len(MAGIC) + 1)[:-1] != MAGIC:
            raise _Broken("no recipe")
        self._plain = io.BufferedReader(_Plain(file), CHUNK)

    def read(self, size: int) -> bytes:
        data = self._plain.read(size)
        if len(data) < size:
            raise _Broken("the recipe ends too early")
        return data

    def copy(self, size: int, write: Callable[[bytes], object]) -> None:
        while size:
            data = self.read(min(size, CHUNK))
            write(data)
            size -= len(data)

    def number(self) -> int:
        return int(_u32.unpack(self.read(4))[0])

    def long(self) -> int:
        return int(_u64.unpack(self.read(8))[0])

    def path(self) -> bytes:
        return self.read(self.number())

    def __iter__(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Read the kind, number and path of each frame; what follows in L, S and K frames has to be read, too.

        The number: L, its length; F and K, the size of the file; S, how many pieces; R, the number of a K frame; the
        end, the size of the archive.
        """
        while (kind := self.read(1)) != b".":
            if kind == b"L":
                yield kind, self.number(), b""
            elif kind in (b"F", b"K"):
                yield kind, self.long(), self.path()
            elif kind == b"S":
                yield kind, self.number(), self.path()
            elif kind == b"R":
                path = self.path()
                yield kind, self.number(), path
            else:
                raise _Broken(f"the recipe has a frame {kind!r}")
        yield kind, self.long(), b""

    def kept(self) -> Iterator[tuple[int, int]]:
        """Read offset and size of each extent of a K frame; the caller reads the bytes."""
        while True:
            offset, size = _kept.unpack(self.read(_kept.size))
            if not size:
                return
            yield offset, size

    def pieces(self, count: int) -> Iterator[tuple[int, int]]:
        for _ in range(count):
            yield _piece.unpack(self.read(_piece.size))


def _collect(frames: _Frames, scratch: int) -> dict[bytes, list[tuple[int, int]]]:
    """Write what replaced files held into scratch: path → how many F and S frames came before, and where it lies."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    bases: list[int] = []
    content = end = 0
    for kind, number, path in frames:
        if kind == b"L":
            frames.copy(number, _nothing)
        elif kind == b"S":
            frames.copy(number * _piece.size, _nothing)
        elif kind == b"K":
            bases.append(end)
            for offset, size in frames.kept():
                _write(scratch, frames.read(size), end + offset)
            found.setdefault(path, []).append((content, end))
            end += number
        elif kind == b"R":
            if number >= len(bases):
                raise _Broken("the recipe is damaged")
            found.setdefault(path, []).append((content, bases[number]))
        content += kind in (b"F", b"S")
    return found


class _Opener:
    """The regular files of a folder, opened without following a link; the parent of the last one stays open."""

    def __init__(self, folder: Path) -> None:
        self._root = os.open(folder, FOLDER)
        self._parent: tuple[bytes, int] = (b"", os.dup(self._root))

    def __enter__(self) -> _Opener:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)
        os.close(self._parent[1])

    def open(self, path: bytes) -> int:
        parent, _, name = path.rpartition(b"/")
        try:
            if parent != self._parent[0]:
                self._enter(parent)
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._parent[1])
        except OSError as error:
            raise _Broken(f"{path!r}: {error.strerror}") from error

    def _enter(self, parent: bytes) -> None:
        folder = os.dup(self._root)
        for part in parent.split(b"/") if parent else ():
            if part in (b"", b".", b".."):
                raise _Broken(f"{parent!r} leads out of the layer")
            try:
                inner = os.open(part, FOLDER, dir_fd=folder)
            finally:
                os.close(folder)
            folder = inner
        os.close(self._parent[1])
        self._parent = parent, folder


def _write_archive(
    frames: _Frames, files: _Opener, kept: dict[bytes, list[tuple[int, int]]], scratch: int, out: BinaryIO
) -> None:
    written = content = 0
    for kind, number, path in frames:
        if kind == b"L":
            frames.copy(number, out.write)
            written += number
        elif kind in (b"F", b"S"):
            pieces = frames.pieces(number) if kind == b"S" else iter([(0, number)])
            bases = (base for before, base in kept.get(path, ()) if before > content)  # if it was replaced
            written += _write_file(path, pieces, next(((scratch, base) for base in bases), None), files, out)
            content += 1
        elif kind == b"K":
            for _, size in frames.kept():
                frames.copy(size, _nothing)
        elif kind == b"." and number != written:
            raise _Broken("the recipe does not add up")


def _write_file(
    path: bytes, pieces: Iterator[tuple[int, int]], kept: tuple[int, int] | None, files: _Opener, out: BinaryIO
) -> int:
    descriptor, base = kept or (files.open(path), 0)
    total = 0
    try:
        for offset, size in pieces:
            total += size
            while size:
                data = os.pread(descriptor, min(size, CHUNK), base + offset)
                if not data and kept:
                    data = bytes(min(size, CHUNK))  # a hole at its end
                if not data:
                    raise _Broken(f"{path!r} is shorter than it was")
                out.write(data)
                offset += len(data)
                size -= len(data)
    except OSError as error:
        raise _Broken(f"{path!r}: {error.strerror}") from error
    finally:
        if not kept:
            os.close(descriptor)
    return total


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Find where a file has data, in parts of at most CHUNK bytes."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(descriptor, offset, os.SEEK_HOLE)
        while offset < end:
            part = min(CHUNK, end - offset)
            yield offset, part
            offset += part


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise OSError(5, "a file is shorter than it says")
    return data


def _write(descriptor: int, data: bytes, offset: int | None = None) -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset = None if offset is None else offset + written


def _nothing(_: bytes) -> None:
    pass
