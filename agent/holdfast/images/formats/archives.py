"""Files that hold images (OCI layout as directory or tar, docker-archive) → what images are in them.

`images.ImageStore.load` reads them; nothing is unpacked here. Sources: OCI image spec 1.1
(image-layout.md, manifest.md, image-index.md), Docker Image Specification v1.2 (manifest.json).
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import importlib
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from holdfast.errors import HoldfastError, NotFound, UnfitHost, WrongState
from holdfast.grammar.images import Transport
from holdfast.images.formats.references import to_digest

GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
BUNDLE = "vnd.holdfast.bundle.version"
LARGEST_DOCUMENT = 64 << 20
MAX_HEADER = 8 << 20  # bytes: tarfile holds names and attributes that precede an entry in memory
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass(frozen=True, slots=True)
class Found:
    """An image in an archive.

    manifest: None for a docker-archive, which has none. layers: members, lowest first. part: what
    containers-transports(5) writes behind the archive's path for it, "" for the only one.
    """

    names: tuple[str, ...]
    config: bytes
    manifest: bytes | None
    layers: tuple[str, ...]
    part: str = ""


class Entry(tarfile.TarInfo):
    """An entry of a tar archive whose headers fit into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Called by tarfile with the plain header, before it reads what that announces."""
        if self.type in HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"header of {self.size} bytes is too long (at most {MAX_HEADER})")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


class Files(Protocol):
    """The members of an archive, in any order."""

    path: Path

    def open(self, member: str) -> BinaryIO:
        """Raises NotFound."""
        ...


class Archive:
    """An opened archive of either kind."""

    def __init__(self, files: Files, architecture: str) -> None:
        self.files = files
        self.architecture = architecture

    def open(self, member: str) -> BinaryIO:
        return self.files.open(member)

    @property
    def transport(self) -> Transport:
        """What containers-transports(5) calls such an archive."""
        if not self._has("oci-layout"):
            return "docker-archive"
        return "oci" if isinstance(self.files, _Folder) else "oci-archive"

    def images(self) -> list[Found]:
        """Every image for this architecture. Raises WrongState when there is none, or the archive is neither kind."""
        try:
            return self._oci_images() if self._has("oci-layout") else self._docker_images()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WrongState(f"load {str(self.files.path)!r}: damaged archive: {error!r}") from error

    def _has(self, member: str) -> bool:
        try:
            self.open(member).close()
        except NotFound:
            return False
        return True

    def _oci_images(self) -> list[Found]:
        index = json.loads(self._read("index.json"))
        if BUNDLE in (index.get("annotations") or {}):
            raise WrongState(
                f"load {str(self.files.path)!r}: is a bundle (holdfast bundle load; its images alone: --images-only)"
            )
        found = [self._oci_image(entry) for entry in self._manifests(index)]
        if not found:
            there = ", ".join(sorted({_platform(entry) for entry in index["manifests"]})) or "none at all"
            raise WrongState(
                f"load {str(self.files.path)!r}: no image for linux/{self.architecture} in it (it has: {there})"
            )
        return found

    def _manifests(
        self, index: Mapping[str, Any], names: tuple[str, ...] = (), part: str = ""
    ) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Manifest digests with names and part; of an index inside the index, the one for this architecture."""
        for entry in index["manifests"]:
            annotations = entry.get("annotations") or {}
            own, mine = self._names(annotations) or names, part or annotations.get(REF_NAME, "")
            if entry.get("mediaType") in INDEXES:
                yield from self._manifests(json.loads(self._read_blob(entry["digest"])), own, mine)
            elif "platform" not in entry or _platform(entry) == f"linux/{self.architecture}":
                yield entry["digest"], own, mine

    def _oci_image(self, entry: tuple[str, tuple[str, ...], str]) -> Found:
        digest, names, part = entry
        manifest = self._read_blob(digest)
        document = json.loads(manifest)
        config = self._read_blob(document["config"]["digest"])
        return Found(names, config, manifest, tuple(_blob(layer["digest"]) for layer in document["layers"]), part)

    def _names(self, annotations: Mapping[str, str]) -> tuple[str, ...]:
        """A bare tag (skopeo writes that) belongs to an image that is called like the file."""
        name = annotations.get(NAME) or annotations.get(REF_NAME)
        if name and NAME not in annotations and not re.search("[/:]", name):
            stem = self.files.path.name.split(".")[0]
            name = f"{stem.lower()}:{name}"
        return (name,) if name else ()

    def _docker_images(self) -> list[Found]:
        try:
            entries = json.loads(self._read("manifest.json"))
        except NotFound as error:
            raise WrongState(
                f"load {str(self.files.path)!r}: neither an OCI layout nor a docker-archive "
                "(a root file system is taken by `holdfast image import`)"
            ) from error
        return [
            Found(
                tuple(entry.get("RepoTags") or ()),
                self._read(entry["Config"]),
                None,
                tuple(entry["Layers"]),
                f"@{number}" if len(entries) > 1 else "",
            )
            for number, entry in enumerate(entries)
        ]

    def _read(self, member: str) -> bytes:
        with self.open(member) as file:
            data = file.read(LARGEST_DOCUMENT + 1)
        if len(data) > LARGEST_DOCUMENT:
            raise WrongState(f"load {str(self.files.path)!r}: {member!r} is larger than {LARGEST_DOCUMENT} bytes")
        return data

    def _read_blob(self, digest: str) -> bytes:
        data = self._read(_blob(digest))
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise WrongState(f"load {str(self.files.path)!r}: blob {digest!r} is damaged")
        return data


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, member: str) -> BinaryIO:
        if member.startswith("/") or ".." in member.split("/"):  # what a manifest calls its parts is the maker's word
            raise WrongState(f"load {str(self.path)!r}: {member!r} leads out of it")
        try:
            return open_regular(self.path / member)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise _missing(self.path, member) from error


class _Tar:
    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path = path
        self.tar = tar
        self.members = {member.name.removeprefix("./"): member for member in tar}

    def open(self, member: str) -> BinaryIO:
        entry = self.members.get(member)
        file = None if entry is None else self.tar.extractfile(entry)
        if file is None:
            raise _missing(self.path, member)
        return cast(BinaryIO, file)


@contextmanager
def open_archive(path: Path, scratch: Path, architecture: str) -> Iterator[Archive]:
    """Open an archive for reading members in any order; a compressed one is unpacked into scratch for that while."""
    if path.is_dir():
        yield Archive(_Folder(path), architecture)
        return
    try:
        with _seekable(path, scratch) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=Entry) as tar:
            yield Archive(_Tar(path, tar), architecture)
    except (tarfile.TarError, RecursionError) as error:
        raise WrongState(f"load {str(path)!r}: {error} (expected a directory or a tar archive)") from error


def path_of(opened: int) -> str:
    """A path that leads to what a descriptor of this process has open, for whoever runs as the same user."""
    return f"/proc/{os.getpid()}/fd/{opened}"


def open_regular(path: Path) -> BinaryIO:
    """Open a file that ends: a fifo or a terminal would hold its reader for ever, a device as /dev/zero never ends.

    Raises OSError, and WrongState for what is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise WrongState(f"open {str(path)!r}: no regular file (expected a file or a directory)")


@contextmanager
def plain(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream without its compression, told by its first bytes. Raises WrongState where it is damaged."""
    stream = _Peeked(stream)  # type: ignore[assignment]
    head = cast(_Peeked, stream).head
    try:
        if head.startswith(GZIP):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=stream))
        elif head.startswith(BZIP2):
            yield cast(BinaryIO, bz2.BZ2File(stream))
        elif head.startswith(XZ):
            yield cast(BinaryIO, lzma.LZMAFile(stream))  # noqa: SIM115 (the caller closes the stream)
        elif head.startswith(ZSTD):
            yield _zstd(stream)
        else:
            yield stream
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise WrongState(f"decompress: {error} (damaged archive)") from error


class _Peeked:
    """A stream whose first bytes are looked at before they are read; members of a tar can't always seek."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.head = stream.read(8)
        self._rest = self.head

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            return self.stream.read(size)
        if size < 0:
            head, self._rest = self._rest, b""
            return head + self.stream.read()
        head, self._rest = self._rest[:size], self._rest[size:]
        return head

    def close(self) -> None:
        self.stream.close()


@contextmanager
def _seekable(path: Path, scratch: Path) -> Iterator[BinaryIO]:
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise NotFound(f"load {str(path)!r}: no such file or directory") from error
    with file:
        compressed = file.read(8).startswith((GZIP, BZIP2, XZ, ZSTD))
        file.seek(0)
        if not compressed:
            yield file
            return
        with tempfile.TemporaryFile(dir=scratch) as copy:
            with plain(file) as stream:
                shutil.copyfileobj(stream, copy, 1 << 20)
            copy.seek(0)
            yield cast(BinaryIO, copy)


def _zstd(stream: BinaryIO) -> BinaryIO:
    """Python has zstd from 3.14 on; before, the package of Debian (python3-zstandard) or PyPI (zstandard) does."""
    for module, opener in (("compression.zstd", "ZstdFile"), ("zstandard", "open")):
        try:
            return cast(BinaryIO, getattr(importlib.import_module(module), opener)(stream, "rb"))
        except ModuleNotFoundError:
            continue
    raise UnfitHost("decompress zstd: this Python has no module for it (install the package zstandard)")


def _blob(digest: str) -> str:
    return "blobs/" + to_digest(digest).replace(":", "/")


def _platform(entry: Mapping[str, Any]) -> str:
    platform = entry.get("platform") or {}
    return f"{platform.get('os', 'unknown')}/{platform.get('architecture', 'unknown')}"


def _missing(path: Path, member: str) -> HoldfastError:
    return NotFound(f"load {str(path)!r}: {member!r} is not in it")
