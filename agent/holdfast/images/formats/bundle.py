"""One file that holds a state tree and all its images ↔ what is in it. `cli` writes and reads it, `node` loads it.

It is a tar archive of an OCI image layout (image-layout.md 1.1), so that `skopeo copy oci-archive:FILE:NAME …` takes
its images, too:

    index.json         first the state, then a descriptor for each image name; annotations: version and platform
    blobs/sha256/HEX   each once: the state's manifest and tar, indexes, manifests, configurations, then layers

The state is an artifact (manifest.md, "Guidelines for Artifact Usage"): one tar of the files, sorted, without times
and owners, programs with mode 0755. An image's descriptor says in annotations which digest a registry gave for its
name, and that top manifest travels as a blob, byte for byte, even where it is the index of more platforms than this
bundle is for.

Nobody's word is taken: blobs are what their digests say, or nothing is made of the whole file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from holdfast.errors import HoldfastError, NotFound, UnfitHost, WrongCall, WrongState
from holdfast.images.disk import sync_folder
from holdfast.images.formats.archives import open_regular
from holdfast.images.formats.references import parse, to_digest
from holdfast.observed import Json

VERSION = 1
STATE = "application/vnd.holdfast.state.v1"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
ANNOTATION = "vnd.holdfast.bundle."
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED, REVISION, AUTHORS = (f"org.opencontainers.image.{key}" for key in ("created", "revision", "authors"))

LARGEST_INDEX = 64 << 20
LARGEST_DOCUMENT = 8 << 20  # a manifest or configuration
LARGEST_STATE = 64 << 20  # as much as an agent reads of any source
MOST_FILES = 100_000
MOST_MEMBERS = 1_000_000
DEEPEST = 100
LONGEST_HEADER = 1 << 20
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Gathered:
    """An image to be put into a bundle. reference: as the state files have it. name: what the store calls it.

    top: what the registry gave for the name, an index or the manifest itself. layers: (digest, size) of the blobs
    that the manifest names, lowest first.
    """

    reference: str
    name: str
    top: bytes
    manifest: bytes
    config: bytes
    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """The files of a state tree, which of them are programs, and where they come from. created: epoch seconds."""

    files: Mapping[str, bytes]
    executable: frozenset[str] = frozenset()
    revision: str = ""
    author: str = ""
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class Packed:
    """An image in a bundle, its documents verified. digest: of its manifest; top_digest: what the name stands for."""

    reference: str
    name: str
    digest: str
    top_digest: str
    top: bytes
    manifest: bytes
    config: bytes
    layers: tuple[Blob, ...]

    @property
    def size(self) -> int:
        """Bytes of its layers in the bundle."""
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer as it lies in the bundle: digest and size (bytes) of its compressed form, and of what it unpacks to."""

    digest: str
    size: int
    diff_id: str


# -- writing -------------------------------------------------------------------------------------------------


def write_bundle(target: Path, tree: Tree, images: Iterable[Gathered], blobs: Path, platform: str) -> str:
    """Write a bundle in one step: whole, synced, under its name, or not at all; returns the file's sha256 (hex).

    blobs: the folder that holds the layers, by hex digest. The same content makes the same bytes. Raises WrongState
    for a layer that is not what its digest says, UnfitHost where there is no room.
    """
    parts = _Parts(blobs)
    entries = [_state_entry(parts, tree)]
    in_order = sorted(images, key=lambda each: (each.reference, each.name))
    entries += [_image_entry(parts, image, platform) for image in in_order]
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": entries,
        "annotations": {f"{ANNOTATION}platform": platform, f"{ANNOTATION}version": str(VERSION)},
    }
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with temporary.open("xb") as file:
            hashed = _Hashing(file)
            with tarfile.open(fileobj=cast(BinaryIO, hashed), mode="w|", format=tarfile.PAX_FORMAT) as tar:
                _put(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
                _put(tar, "index.json", _dump(index))
                parts.put(tar)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UnfitHost(f"write '{target}': {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return hashed.digest.hexdigest()


class _Parts:
    """The blobs of a bundle in the order in which they are written: documents, then layers; each once."""

    def __init__(self, blobs: Path) -> None:
        self.blobs = blobs
        self.documents: dict[str, bytes] = {}
        self.layers: dict[str, int] = {}

    def add(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Have a document written; its descriptor."""
        digest = digest_of(data)
        self.documents[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def put(self, tar: tarfile.TarFile) -> None:
        for digest, data in self.documents.items():
            _put(tar, _member(digest), data)
        for digest, size in self.layers.items():
            if digest in self.documents:
                continue
            with (self.blobs / digest.removeprefix("sha256:")).open("rb") as file:
                hashed = _Hashing(file)
                there = os.fstat(file.fileno()).st_size
                if there == size:
                    tar.addfile(_entry(_member(digest), size), cast(BinaryIO, hashed))
                if there != size or f"sha256:{hashed.digest.hexdigest()}" != digest:
                    raise WrongState(f"bundle layer '{digest}': what came is not what its digest and size say")


def _state_entry(parts: _Parts, tree: Tree) -> Json:
    layer = parts.add(pack_files(tree), TAR)
    created = datetime.fromtimestamp(int(tree.created), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {AUTHORS: tree.author, CREATED: created, REVISION: tree.revision}
    annotations = {key: value for key, value in told.items() if value}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": STATE,
        "config": parts.add(b"{}", EMPTY),
        "layers": [layer],
        "annotations": annotations,
    }
    return parts.add(_dump(manifest), MANIFEST, artifactType=STATE, annotations=annotations)


def _image_entry(parts: _Parts, image: Gathered, platform: str) -> Json:
    """What index.json says of an image.

    skopeo looks names up among OCI manifests and indexes only: any other kind gets an index of one around it.
    """
    parts.add(image.top, "")
    system, _, architecture = platform.partition("/")
    manifest = parts.add(image.manifest, media_type_of(image.manifest))
    parts.add(image.config, "")
    for digest, size in image.layers:
        parts.layers.setdefault(digest, size)
    annotations = {
        NAME: image.name,
        REF_NAME: image.reference,
        f"{ANNOTATION}manifest": manifest["digest"],
        f"{ANNOTATION}top": digest_of(image.top),
    }
    if manifest["mediaType"] == MANIFEST:
        return {
            **manifest,
            "platform": {"os": system, "architecture": architecture.partition("/")[0]},
            "annotations": annotations,
        }
    around = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]}
    return parts.add(_dump(around), INDEX, annotations=annotations)


def pack_files(tree: Tree) -> bytes:
    """The tar of a state tree: the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for path in sorted(tree.files):
            _put(tar, path, tree.files[path], 0o755 if path in tree.executable else 0o644)
    return buffer.getvalue()


def _put(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    tar.addfile(_entry(name, len(data), mode), io.BytesIO(data))


def _entry(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, mode
    return entry


class _Hashing:
    """A file that is hashed and counted while it is read or written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        return self._seen(self.file.read(size))

    def write(self, data: bytes) -> int:
        return self.file.write(self._seen(data))

    def _seen(self, data: bytes) -> bytes:
        self.digest.update(data)
        self.size += len(data)
        return data


# -- reading -------------------------------------------------------------------------------------------------


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle and verify all of it but the layers, which are verified while they are read.

    Raises NotFound where there is no such file, WrongState for what is no bundle, damaged, hostile or of a newer
    version of this program.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise NotFound(f"read bundle '{path}': no such file") from error
    except IsADirectoryError as error:
        raise WrongCall(f"read bundle '{path}': a directory (expected a file of 'holdfast bundle create')") from error
    except OSError as error:
        raise UnfitHost(f"read bundle '{path}': {(error.strerror or str(error)).lower()}") from error
    with file:
        yield _read_bundle(path, file)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that is open: its documents are in memory, its layers are read from the file when asked for."""

    path: Path
    size: int
    platform: str
    tree: Tree
    images: tuple[Packed, ...]
    _members: _Members = field(repr=False)

    def layers(self) -> list[Blob]:
        """The layers of all images, each diff id once, in the order in which they lie in the file."""
        found = {blob.diff_id: blob for image in reversed(self.images) for blob in reversed(image.layers)}
        return sorted(found.values(), key=lambda blob: self._members.offset(_member(blob.digest)))

    def open_layer(self, digest: str) -> BinaryIO:
        """The blob of that digest as a stream that ends with it; whoever reads it verifies it."""
        return cast(BinaryIO, io.BufferedReader(self._members.open(_member(digest)), CHUNK))

    def json(self) -> Json:
        """{"path", "size", "platform", "revision", "author", "created", "images": [{"ref", "name", "digest", "top",
        "size", "layers"}, …], "files": [{"path", "size"}, …]}; sizes in bytes, created in seconds since the epoch"""
        return {
            "path": str(self.path),
            "size": self.size,
            "platform": self.platform,
            "revision": self.tree.revision,
            "author": self.tree.author,
            "created": self.tree.created,
            "images": [
                {
                    "ref": each.reference,
                    "name": each.name,
                    "digest": each.digest,
                    "top": each.top_digest,
                    "size": each.size,
                    "layers": [layer.digest for layer in each.layers],
                }
                for each in self.images
            ],
            "files": [
                {"path": os.fsencode(path).decode(errors="replace"), "size": len(content)}
                for path, content in sorted(self.tree.files.items())
            ],
        }


class _Members:
    """The regular files in an uncompressed tar archive, by name."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file.fileno()
        self.size = os.fstat(self._file).st_size
        self._places: dict[str, tuple[int, int]] = {}
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                self._add(member)

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        if not member.isreg() or member.sparse is not None:
            raise ValueError(f"{member.name[:255]!r} is no plain file (expected a file of 'holdfast bundle create')")
        if member.name in self._places or len(self._places) >= MOST_MEMBERS:
            raise ValueError(f"{member.name[:255]!r} is in it twice, or it has too many members")
        if member.offset_data + member.size > self.size:
            raise ValueError(f"it is cut short: {self.size} bytes are here (copy it again)")
        self._places[member.name] = (member.offset_data, member.size)

    def offset(self, name: str) -> int:
        return self._place(name)[0]

    def length(self, name: str) -> int:
        return self._place(name)[1]

    def open(self, name: str) -> io.RawIOBase:
        return _Section(self._file, *self._place(name))

    def read(self, name: str, most: int) -> bytes:
        offset, size = self._place(name)
        if size > most:
            raise ValueError(f"{name!r} has {size} bytes (at most {most})")
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise ValueError(f"{name!r} is cut short")
        return data

    def blob(self, digest: str, most: int = LARGEST_DOCUMENT) -> bytes:
        """A blob that is what its digest says."""
        data = self.read(_member(digest), most)
        if digest_of(data) != digest:
            raise ValueError(f"blob {digest} is damaged")
        return data

    def _place(self, name: str) -> tuple[int, int]:
        try:
            return self._places[name]
        except KeyError:
            raise ValueError(f"{name!r} is not in it") from None


class _Header(tarfile.TarInfo):
    """An entry of a tar archive; those that announce a name of megabytes are refused before they are read."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        plain = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
        if self.type not in plain and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes (at most {LONGEST_HEADER})")
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


def _read_bundle(path: Path, file: BinaryIO) -> Bundle:
    try:
        members = _Members(file)
        index = json.loads(members.read("index.json", LARGEST_INDEX))
        annotations = index.get("annotations") or {}
        version = annotations.get(f"{ANNOTATION}version")
        if version is None:
            raise ValueError("it holds images only, no state (holdfast image load takes such a file)")
        if int(version) > VERSION:
            raise ValueError(f"it is of version {int(version)} (this holdfast knows {VERSION}: update it)")
        platform = str(annotations[f"{ANNOTATION}platform"])
        if not re.fullmatch(r"linux/\w{1,20}(/\w{1,20})?", platform, re.ASCII):
            raise ValueError(f"it is for {platform[:100]!r} (expected as linux/amd64)")
        entries = index["manifests"]
        states = [entry for entry in entries if entry.get("artifactType") == STATE]
        if len(states) != 1:
            raise ValueError(f"it holds {len(states)} states (expected one)")
        tree = _read_tree(members, states[0])
        images = tuple(_read_image(members, entry, platform) for entry in entries if entry is not states[0])
    except HoldfastError as error:
        raise type(error)(f"read bundle '{path}': {error}") from error
    except tarfile.TarError as error:
        raise WrongState(
            f"read bundle '{path}': {error} (damaged, or no file of 'holdfast bundle create')"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        told = str(error) if type(error) is ValueError else f"damaged: {error!r}"
        raise WrongState(f"read bundle '{path}': {told}") from error
    return Bundle(path, members.size, platform, tree, images, members)


def _read_tree(members: _Members, entry: Json) -> Tree:
    manifest = json.loads(members.blob(entry["digest"]))
    if manifest.get("artifactType") != STATE or len(manifest["layers"]) != 1:
        raise ValueError("its state is no state")
    annotations = manifest.get("annotations") or {}
    files, executable = unpack_files(members.blob(manifest["layers"][0]["digest"], LARGEST_STATE * 2))
    created = datetime.fromisoformat(annotations[CREATED]).timestamp() if CREATED in annotations else 0.0
    revision, author = (_plain(str(annotations.get(key, ""))) for key in (REVISION, AUTHORS))
    return Tree(files, executable, revision, author, created)


def _plain(text: str) -> str:
    """Text without control characters: whoever wrote a bundle must not steer the terminal of whoever reads."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)[:200]


def unpack_files(tar: bytes) -> tuple[dict[str, bytes], frozenset[str]]:
    """The files in the tar of a state tree, and which are programs. Raises ValueError for what is no plain file."""
    files: dict[str, bytes] = {}
    executable = set()
    total = 0
    with tarfile.open(
        fileobj=io.BytesIO(tar), mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if member.isdir():
                continue
            path = _inner_path(member.name)
            content = archive.extractfile(member) if member.isreg() and member.sparse is None else None
            if content is None:
                raise ValueError(f"state file {path!r}: neither a file nor a folder")
            total += member.size
            if path in files or len(files) >= MOST_FILES or total > LARGEST_STATE:
                raise ValueError(f"state file {path!r}: comes twice, or there is too much in the state")
            files[path] = content.read()
            if len(files[path]) != member.size:
                raise ValueError(f"state file {path!r}: cut short")
            if member.mode & 0o111:
                executable.add(path)
    _check_folders(files)
    return files, frozenset(executable)


def _inner_path(name: str) -> str:
    """A path that stays inside, and that no program but the agent takes for its own."""
    steps = name.split("/")
    if any(step in ("", ".", "..", ".git") or len(os.fsencode(step)) > 255 for step in steps) or len(steps) > DEEPEST:
        raise ValueError(f"state file {name[:255]!r}: a path that leads out, or that can't be")
    if "\0" in name:
        raise ValueError(f"state file {name[:255]!r}: holds the character NUL")
    return name


def _check_folders(files: Mapping[str, bytes]) -> None:
    """No file may be the folder of another."""
    for path in files:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            if (folder := "/".join(parts[:depth])) in files:
                raise ValueError(f"state file {path!r}: lies in {folder!r}, which is a file")


def _read_image(members: _Members, entry: Json, platform: str) -> Packed:
    annotations = entry["annotations"]
    members.blob(to_digest(entry["digest"]))  # what other programs go by
    reference, name = (_image_name(annotations[key]) for key in (REF_NAME, NAME))
    digest, top_digest = to_digest(annotations[f"{ANNOTATION}manifest"]), to_digest(annotations[f"{ANNOTATION}top"])
    manifest, top = members.blob(digest), members.blob(top_digest)
    if top != manifest and digest not in [each["digest"] for each in json.loads(top)["manifests"]]:
        raise ValueError(f"image {reference!r}: {top_digest} does not lead to its manifest")
    document = json.loads(manifest)
    config = members.blob(to_digest(document["config"]["digest"]))
    told = json.loads(config)
    if (found := f"{told.get('os', 'linux')}/{told['architecture']}") != "/".join(platform.split("/")[:2]):
        raise ValueError(f"image {reference!r}: is for {found} (the bundle says {platform})")
    layers, diff_ids = document["layers"], told["rootfs"]["diff_ids"]
    if len(layers) != len(diff_ids):
        raise ValueError(f"image {reference!r}: {len(layers)} layers with {len(diff_ids)} diff ids")
    blobs = []
    for layer, diff_id in zip(layers, diff_ids, strict=True):
        size = members.length(_member(layer["digest"]))
        if size != layer["size"]:
            raise ValueError(f"layer {layer['digest']} has {size} bytes (its manifest says {layer['size']})")
        blobs.append(Blob(layer["digest"], size, to_digest(diff_id)))
    return Packed(reference, name, digest, top_digest, top, manifest, config, tuple(blobs))


def _image_name(text: object) -> str:
    """A name that the store can have; it is shown as well."""
    try:
        parse(str(text))
    except WrongCall as error:
        raise ValueError(str(error)) from error
    return str(text)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def media_type_of(manifest: bytes) -> str:
    """What a manifest says that it is; one that says nothing is OCI's (manifest.md: mediaType is optional)."""
    document = json.loads(manifest)
    told = document.get("mediaType")
    if isinstance(told, str):
        return told
    return INDEX if "manifests" in document else MANIFEST


def _member(digest: object) -> str:
    return "blobs/" + to_digest(digest).replace(":", "/")


def _dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
