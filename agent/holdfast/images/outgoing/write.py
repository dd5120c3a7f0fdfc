"""Images of the store → OCI layouts and archives that skopeo, Podman and Docker read.

`pull` pushes what `write_layout` has written; `api` and `cli` stream archives to whoever asks.

A layer's archive is made again from its recipe while it is written, and held against its diff id; nothing but a
compressed layer of an OCI archive is ever put on disk for that. Layers are compressed anew: the manifest that lists
them is another than the registry had, as with `docker save`; the configuration, which Docker calls the image's id,
and the diff ids stay. An image whose manifest lists plain archives (imported, committed) keeps that in an archive.
Sources: OCI image spec 1.1 (image-layout.md, annotations.md), Docker Image Specification v1.2.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from holdfast.errors import WrongCall, WrongState
from holdfast.images.formats.references import parse
from holdfast.images.kept.image import CONFIG, LAYER, MANIFEST, Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.recipe import rebuild

Format = Literal["oci-archive", "docker-archive"]
FORMATS: tuple[Format, ...] = ("oci-archive", "docker-archive")
INDEX = "application/vnd.oci.image.index.v1+json"
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'
BLOCK = 512  # of a tar archive
LEVEL = 6  # of zlib
FAST_LEVEL = 2  # of ISA-L, which knows 0 to 3


class Sink(Protocol):
    """What can be written to; not more is asked of the places where archives go."""

    def write(self, data: bytes, /) -> object:
        """Take all of data."""
        ...


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer as it was written: digest and size in bytes."""

    digest: str
    size: int


def write_layer(store: ImageStore, diff_id: str, out: Sink, *, compress: bool) -> Blob:
    """Write the archive of a layer, plain or gzipped; the same layer makes the same bytes.

    Raises WrongState when the layer is no longer what its diff id says, or its recipe is not here; what was written
    is then good for nothing.
    """
    recipe = store.layers.recipe(diff_id)
    if not recipe.exists():
        raise WrongState(
            f"write layer {diff_id!r}: it was stored without what its archive is made of (remove its images and pull "
            "or load them again)"
        )
    counted = _Counted(out)
    gzip = _Gzip(counted) if compress else None
    plain = _Counted(gzip or counted)
    rebuild(store.layers.folder(diff_id), recipe, cast(BinaryIO, plain))
    if gzip is not None:
        gzip.finish()
    if plain.digest != diff_id:
        raise WrongState(f"write layer {diff_id!r}: it has become {plain.digest} (damaged in the store)")
    return Blob(counted.digest, counted.size)


def write_layout(store: ImageStore, image: Image, folder: Path, tag: str = "latest") -> str:
    """Write one image as an OCI layout, named tag, into a new or empty directory; returns the manifest's digest.

    Layers are gzipped. Hold `store.keep` while the image must not go.
    """
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    written: dict[str, Blob] = {}
    for number, diff_id in enumerate(image.diff_ids):
        if diff_id not in written:
            place = blobs / f"layer{number}"
            with place.open("wb") as out:
                written[diff_id] = write_layer(store, diff_id, out, compress=True)
            place.rename(blobs / written[diff_id].digest.removeprefix("sha256:"))
    config = store.read_blob(image.config_digest)
    manifest = _manifest(image, config, written)
    for data in (config, manifest):
        (blobs / sha256(data).hexdigest()).write_bytes(data)
    entry = {**_descriptor(MANIFEST, manifest), "annotations": {REF_NAME: tag}}
    (folder / "index.json").write_bytes(_dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}))
    (folder / "oci-layout").write_bytes(LAYOUT)
    return str(entry["digest"])


def save(store: ImageStore, references: Sequence[str], out: Sink, format: Format = "oci-archive") -> list[Image]:
    """Write the images of these references as one archive, each layer once; returns them.

    A reference that is a name brings that name; a digest brings all names of its image. Raises NotFound for what is
    not here, and what `write_layer` does.
    """
    with store.keep():
        images = [store.resolve(each) for each in references]
        chosen: dict[str, tuple[Image, list[str]]] = {}
        for reference, image in zip(references, images, strict=True):
            names = chosen.setdefault(image.digest, (image, []))[1]
            names.extend(each for each in _names(store, reference, image) if each not in names)
        archive = Archive(out)
        if format == "docker-archive":
            _save_docker(store, list(chosen.values()), archive)
        else:
            _save_oci(store, list(chosen.values()), archive)
        archive.finish()
    return [image for image, _ in chosen.values()]


class Archive:
    """A tar archive that is written as a stream (POSIX pax)."""

    def __init__(self, out: Sink) -> None:
        self.out = out

    def add(self, entry: tarfile.TarInfo, fill: Callable[[Sink], object] | None = None) -> None:
        """Write an entry. fill writes its content: exactly entry.size bytes, or WrongState is raised."""
        self.out.write(entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        if fill is not None:
            counted = _Sized(self.out)
            fill(counted)
            if counted.size != entry.size:
                raise WrongState(f"write {entry.name!r}: {counted.size} bytes came (expected {entry.size})")
            self.out.write(bytes(-entry.size % BLOCK))

    def file(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self.add(_entry(name, len(data)), lambda out: out.write(data))

    def finish(self) -> None:
        """Write the end-of-archive mark."""
        self.out.write(bytes(2 * BLOCK))


def _save_docker(store: ImageStore, chosen: Sequence[tuple[Image, list[str]]], archive: Archive) -> None:
    entries, there = [], set()
    for image, names in chosen:
        members = []
        for diff_id in image.diff_ids:
            member = f"{_hex(diff_id)}.tar"
            members.append(member)
            if member not in there:
                there.add(member)
                _put_plain(store, archive, member, diff_id)
        config = f"{_hex(image.config_digest)}.json"
        if config not in there:
            there.add(config)
            archive.file(config, store.read_blob(image.config_digest))
        entries.append({"Config": config, "RepoTags": names, "Layers": members})
    archive.file("manifest.json", _dump(entries))


def _save_oci(store: ImageStore, chosen: Sequence[tuple[Image, list[str]]], archive: Archive) -> None:
    archive.file("oci-layout", LAYOUT)
    written: dict[tuple[str, bool], Blob] = {}
    entries: list[Mapping[str, Any]] = []
    there = set()
    for image, names in chosen:
        keeps = [each.get("digest") for each in image.manifest["layers"]] == list(image.diff_ids)
        for diff_id in image.diff_ids:
            if (diff_id, keeps) not in written:
                put = _put_plain_blob if keeps else _put_compressed_blob
                written[diff_id, keeps] = put(store, archive, diff_id)
        config = store.read_blob(image.config_digest)
        ours = {diff_id: written[diff_id, keeps] for diff_id in image.diff_ids}
        manifest = store.read_blob(image.digest) if keeps else _manifest(image, config, ours)
        for data in (config, manifest):
            digest = sha256(data).hexdigest()
            if digest not in there:
                there.add(digest)
                archive.file(f"blobs/sha256/{digest}", data)
        entry = {**_descriptor(MANIFEST, manifest), "platform": {"os": "linux", "architecture": image.architecture}}
        entries.extend({**entry, "annotations": {NAME: name, REF_NAME: name}} for name in names)
        if not names:
            entries.append(entry)
    archive.file("index.json", _dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}))


def _put_plain(store: ImageStore, archive: Archive, member: str, diff_id: str) -> None:
    size = store.layers.facts(diff_id).size
    archive.add(_entry(member, size), lambda out: write_layer(store, diff_id, out, compress=False))


def _put_plain_blob(store: ImageStore, archive: Archive, diff_id: str) -> Blob:
    _put_plain(store, archive, f"blobs/sha256/{_hex(diff_id)}", diff_id)
    return Blob(diff_id, store.layers.facts(diff_id).size)


def _put_compressed_blob(store: ImageStore, archive: Archive, diff_id: str) -> Blob:
    """Its size and digest precede it in the archive, so that it has to be made on disk first."""
    with store.scratch() as scratch:
        place = scratch / "layer"
        with place.open("wb") as out:
            blob = write_layer(store, diff_id, out, compress=True)
        archive.add(_entry(f"blobs/sha256/{_hex(blob.digest)}", blob.size), lambda out: _copy(place, out))
    return blob


def _copy(path: Path, out: Sink) -> None:
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            out.write(data)


def _names(store: ImageStore, reference: str, image: Image) -> list[str]:
    """What an image is called in an archive: as it was asked for, if that is one of its names."""
    every = sorted(name for name, each in store.names().items() if each.digest == image.digest)
    with suppress(WrongCall):
        parsed = parse(reference)
        if parsed.name in every and not parsed.digest:
            return [parsed.name]
    return [each for each in every if parse(each).transport == "docker"]


def _manifest(image: Image, config: bytes, layers: Mapping[str, Blob]) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(CONFIG, config),
        "layers": [
            {"mediaType": f"{LAYER}+gzip", "digest": layers[each].digest, "size": layers[each].size}
            for each in image.diff_ids
        ],
    }
    if annotations := image.manifest.get("annotations"):
        document["annotations"] = annotations
    return _dump(document)


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256(data).hexdigest()}", "size": len(data)}


def _dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


class _Sized:
    def __init__(self, out: Sink) -> None:
        self.out = out
        self.size = 0

    def write(self, data: bytes) -> int:
        self.out.write(data)
        self.size += len(data)
        return len(data)


class _Counted(_Sized):
    """Hashes and counts what passes."""

    def __init__(self, out: Sink) -> None:
        super().__init__(out)
        self._hash = sha256()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return super().write(data)

    def flush(self) -> None:
        """There is nothing that waits."""


class _Gzip:
    """Compresses what passes, without a time in its header (RFC 1952): the same content makes the same bytes."""

    def __init__(self, out: Sink) -> None:
        self.out = out
        try:
            from isal import isal_zlib
        except ModuleNotFoundError:
            self._deflate: Any = zlib.compressobj(LEVEL, wbits=31)
        else:
            self._deflate = isal_zlib.compressobj(FAST_LEVEL, wbits=31)

    def write(self, data: bytes) -> int:
        if packed := self._deflate.compress(data):
            self.out.write(packed)
        return len(data)

    def finish(self) -> None:
        self.out.write(self._deflate.flush())
