"""Read and write OCI image layouts, in a directory or in a tar archive. No other module knows their structure.

    oci-layout         the version of the format
    index.json         a descriptor of each image, with its name in annotations
    blobs/sha256/HEX   manifests, configurations and layers, each once

Each document is compared with its digest when it is read. Sources: OCI image spec 1.1 (image-layout.md,
descriptor.md, manifest.md, annotations.md).
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from holdfast.errors import HoldfastError, NotFound, UnfitHost, WrongState
from holdfast.images.formats.references import to_digest
from holdfast.questions import Json, Sink

OCI = "application/vnd.oci.image"
MANIFEST, INDEX, CONFIG = f"{OCI}.manifest.v1+json", f"{OCI}.index.v1+json", f"{OCI}.config.v1+json"
LAYER = f"{OCI}.layer.v1.tar"
INDEXES = (INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'

LARGEST_DOCUMENT = 64 << 20  # bytes
LARGEST_HEADER = 8 << 20  # bytes: tarfile holds names and attributes that precede an entry in memory
MOST_MEMBERS = 1_000_000
BLOCK = 512  # bytes, of a tar archive
CHUNK = 1 << 20


# -- documents -----------------------------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def dump(value: object) -> bytes:
    """Write a document: the same bytes for the same content, in every version, since digests are made of them."""
    return json.dumps(value, sort_keys=True).encode()


def descriptor(data: bytes, media_type: str, **more: Any) -> Json:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def manifest_of(config: Json, layers: Sequence[Json], **more: Any) -> bytes:
    """Write the manifest of an image of these descriptors, layers lowest first."""
    return dump({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": list(layers), **more})


def media_type_of(manifest: bytes) -> str:
    """Read what a manifest or index says that it is; OCI's where it says nothing (manifest.md: mediaType)."""
    document = json.loads(manifest)
    told = document.get("mediaType")
    return told if isinstance(told, str) else INDEX if "manifests" in document else MANIFEST


def member_of(digest: object) -> str:
    """Name the member that holds a blob. Raises WrongState for what is no digest."""
    return "blobs/" + to_digest(digest).replace(":", "/")


# -- reading -------------------------------------------------------------------------------------------------


class Missing(WrongState):
    """A file that has to be in a layout is not there."""


class Layout:
    """An OCI layout that is read. Raises Missing for what is not in it, WrongState for what is damaged."""

    def open(self, member: str) -> BinaryIO:
        """Open a file for reading, any at any time. Raises Missing."""
        raise NotImplementedError

    def has(self, member: str) -> bool:
        try:
            self.open(member).close()
        except Missing:
            return False
        return True

    def read(self, member: str, most: int = LARGEST_DOCUMENT) -> bytes:
        """Read a small file."""
        with self.open(member) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise WrongState(f"{member!r} is larger than {most} bytes")
        return data

    def blob(self, digest: str, most: int = LARGEST_DOCUMENT) -> bytes:
        """Read a document, and check its digest."""
        data = self.read(member_of(digest), most)
        if digest_of(data) != digest:
            raise WrongState(f"blob {digest!r} is damaged")
        return data

    def index(self) -> Json:
        return dict(json.loads(self.read("index.json")))

    def image(self, digest: str) -> tuple[bytes, bytes, list[Json]]:
        """Read the manifest and the configuration of an image, and the descriptors of its layers, lowest first."""
        manifest = self.blob(digest)
        document = json.loads(manifest)
        return manifest, self.blob(document["config"]["digest"]), document["layers"]


class Folder(Layout):
    """A layout in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, member: str) -> BinaryIO:
        if member.startswith("/") or ".." in member.split("/"):  # a manifest says what its parts are called
            raise WrongState(f"{member!r} leads out of it")
        try:
            return open_regular(self.path / member)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise Missing(f"{member!r} is not in it") from error


class Archive(Layout):
    """A layout in a plain tar archive.

    strict: refuse links, and names that come twice; otherwise a link leads to the member that it names, and the last
    of several members counts. Raises WrongState.
    """

    def __init__(self, file: BinaryIO, *, strict: bool = False) -> None:
        self._file = file.fileno()
        self.size = os.fstat(self._file).st_size
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        for member in scan_tar(file):
            self._add(member, strict=strict)

    def _add(self, member: tarfile.TarInfo, *, strict: bool) -> None:
        name = member.name.removeprefix("./")
        if not strict and (member.issym() or member.islnk()):
            above = posixpath.dirname(name) if member.issym() else ""
            self._links[name] = posixpath.normpath(posixpath.join(above, member.linkname))
            return
        if not is_plain(member):
            raise WrongState(f"{name[:255]!r} is no plain file")
        if (strict and name in self._places) or len(self._places) >= MOST_MEMBERS:
            raise WrongState(f"{name[:255]!r} is in it twice, or it has too many members")
        if member.offset_data + member.size > self.size:
            raise WrongState(f"it is cut short: {self.size} bytes are here (copy it again)")
        self._places[name] = (member.offset_data, member.size)

    def place(self, member: str) -> tuple[int, int]:
        """Find offset and size of a member in the archive. Raises Missing."""
        try:
            return self._places[self._links.get(member, member)]
        except KeyError:
            raise Missing(f"{member!r} is not in it") from None

    def open(self, member: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Section(self._file, *self.place(member)), CHUNK))


def scan_tar(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Read the headers of a plain tar archive but for those of directories. Raises WrongState."""
    try:
        with tarfile.open(
            fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if not member.isdir():
                    yield member
    except (tarfile.TarError, RecursionError) as error:
        raise WrongState(f"no tar archive, or a damaged one: {error}") from error


def is_plain(member: tarfile.TarInfo) -> bool:
    """Check whether a member's content lies in the archive as it is."""
    return member.isreg() and member.sparse is None


class _Header(tarfile.TarInfo):
    """A header of a tar archive. One that announces names of megabytes is refused before those are read."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if self.type not in plain and self.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes (at most {LARGEST_HEADER})")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


class _Section(io.RawIOBase):
    """A part of a file, read from its start to its end, whoever else reads the file."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._descriptor, self._at, self._end = file, offset, offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def open_layout(path: Path, scratch: Path) -> Iterator[Layout]:
    """Open a directory or a tar archive; a compressed one is unpacked into scratch while the block runs.

    Raises NotFound, and WrongState for what is neither.
    """
    if path.is_dir():
        yield Folder(path)
        return
    try:
        opened = open_regular(path)
    except FileNotFoundError as error:
        raise NotFound("no such file or directory") from error
    with opened as file:
        opener = next((each for start, each in OPENERS.items() if file.peek(8).startswith(start)), None)  # type: ignore[attr-defined]
        if opener is None:
            yield Archive(file)
            return
        with tempfile.TemporaryFile(dir=scratch) as copy:
            try:
                shutil.copyfileobj(opener(file), copy, CHUNK)
            except (gzip.BadGzipFile, lzma.LZMAError, EOFError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise WrongState(f"decompress: {error} (damaged archive)") from error
            copy.seek(0)
            yield Archive(cast(BinaryIO, copy))


def open_regular(path: Path) -> BinaryIO:
    """Open a file that ends: a fifo or a terminal would block its reader for ever, /dev/zero never ends.

    Raises OSError, and WrongState for what is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    try:
        os.listdir(descriptor)  # noqa: PTH208 (a descriptor)
        raise IsADirectoryError(f"{str(path)!r} is a directory")
    except NotADirectoryError:
        raise WrongState(f"open {str(path)!r}: no regular file (expected a file or a directory)") from None
    finally:
        os.close(descriptor)


def _zstd(file: BinaryIO) -> BinaryIO:
    """Decompress zstd: by Python from 3.14 on, before by Debian's python3-zstandard or PyPI's zstandard."""
    for module, opener in (("compression.zstd", "ZstdFile"), ("zstandard", "open")):
        try:
            return cast(BinaryIO, getattr(importlib.import_module(module), opener)(file, "rb"))
        except ModuleNotFoundError:
            continue
    raise UnfitHost("decompress zstd: this Python has no module for it (install the package zstandard)")


OPENERS: Mapping[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Put what is read before each error of the block, and take whatever a damaged document causes for damage."""
    try:
        yield
    except HoldfastError as error:
        raise type(error)(f"{what}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise WrongState(f"{what}: damaged: {error!r}") from error


# -- writing -------------------------------------------------------------------------------------------------


class Counted:
    """Count and hash what is written through it to out."""

    def __init__(self, out: Sink) -> None:
        self.out = out
        self.size = 0
        self._hash = sha256()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.out.write(data)
        self.size += len(data)
        return len(data)


class FolderWriter:
    """Write files into a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, name: str, size: int, fill: Callable[[Sink], object]) -> None:
        """Write a file; fill writes its content, exactly size bytes."""
        with self._place(name).open("wb") as file:
            fill(file)

    def take(self, name: str, file: Path) -> None:
        """Move a file into the directory."""
        shutil.move(file, self._place(name))

    def finish(self) -> None:
        """Do nothing: all files are written."""

    def _place(self, name: str) -> Path:
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


class ArchiveWriter:
    """Write a tar archive (POSIX pax) to a stream."""

    def __init__(self, out: Sink) -> None:
        self.out = out
        self._written = 0

    def put(self, name: str, size: int, fill: Callable[[Sink], object], mode: int = 0o644) -> None:
        """Write a member; fill writes its content. Raises WrongState where that is not size bytes."""
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = size, mode
        self.out.write(entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        self._written = 0
        fill(self)
        if self._written != size:
            raise WrongState(f"write {name!r}: {self._written} bytes came (expected {size})")
        self.out.write(bytes(-size % BLOCK))

    def write(self, data: bytes) -> None:
        """Write a part of a member's content."""
        self._written += len(data)
        self.out.write(data)

    def take(self, name: str, file: Path) -> None:
        """Write a member whose content is in a file."""
        with file.open("rb") as source:
            self.put(name, file.stat().st_size, lambda out: shutil.copyfileobj(source, cast(BinaryIO, out), CHUNK))

    def finish(self) -> None:
        """Write the end-of-archive mark."""
        self.out.write(bytes(2 * BLOCK))


class LayoutWriter:
    """Write an OCI layout: each blob once, index.json last."""

    def __init__(self, files: FolderWriter | ArchiveWriter) -> None:
        self.files = files
        self._written: set[str] = set()
        self._add("oci-layout", LAYOUT)

    def add(self, data: bytes, media_type: str = "", **more: Any) -> Json:
        """Write a document, and return its descriptor."""
        found = descriptor(data, media_type, **more)
        if member := self._fresh(found["digest"]):
            self._add(member, data)
        return found

    def put(self, digest: str, size: int, fill: Callable[[Sink], object]) -> None:
        """Write a blob; fill writes its content."""
        if member := self._fresh(digest):
            self.files.put(member, size, fill)

    def take(self, digest: str, file: Path) -> None:
        """Write a blob that is in a file, which may be moved."""
        if member := self._fresh(digest):
            self.files.take(member, file)

    def finish(self, manifests: Sequence[Json], **more: Any) -> None:
        """Write the index, of these descriptors."""
        self._add("index.json", dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests), **more}))
        self.files.finish()

    def _add(self, name: str, data: bytes) -> None:
        self.files.put(name, len(data), lambda out: out.write(data))

    def _fresh(self, digest: str) -> str:
        """Name the member for a blob that is not written yet; "" for another one."""
        fresh = digest not in self._written
        self._written.add(digest)
        return member_of(digest) if fresh else ""
