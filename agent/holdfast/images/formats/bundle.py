"""Read and write bundles: one file that holds a state and all its images. `cli` does both, `node` loads the images.

A bundle is a tar archive of an OCI image layout, so `skopeo copy oci-archive:FILE:NAME …` takes its images, too.
index.json lists first the state, then each image name; its annotations hold version and platform.

The state is an artifact (manifest.md, "Guidelines for Artifact Usage"): one tar of the files, sorted, without times
and owners, programs with mode 0755. An image's descriptor says in annotations which digest a registry gave for its
name, and that top manifest travels as a blob, byte for byte, even where it is the index of more platforms than this
bundle is for.
"""

from __future__ import annotations

import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from holdfast.errors import NotFound, UnfitHost, WrongCall, WrongState
from holdfast.files import sync_folder
from holdfast.images.formats import layout as oci
from holdfast.images.formats.manifests import Layer, read_diff_ids, read_manifest
from holdfast.images.formats.references import parse
from holdfast.questions import Json, Sink

VERSION = 1
STATE = "application/vnd.holdfast.state.v1"
EMPTY = "application/vnd.oci.empty.v1+json"
ANNOTATION = "vnd.holdfast.bundle."
CREATED, REVISION, AUTHORS = (f"org.opencontainers.image.{key}" for key in ("created", "revision", "authors"))

LARGEST_STATE = 64 << 20  # bytes: as much as an agent reads of any source
MOST_FILES = 100_000
DEEPEST = 100


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
class StateTree:
    """The files of a state, which of them are programs, and where they come from. created: epoch seconds."""

    files: Mapping[str, bytes]
    executable: frozenset[str] = frozenset()
    revision: str = ""
    author: str = ""
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class BundledImage:
    """An image in a bundle, its documents verified. digest: of its manifest; top_digest: what the name stands for."""

    reference: str
    name: str
    digest: str
    top_digest: str
    top: bytes
    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Bytes of its layers in the bundle."""
        return sum(layer.blob.size for layer in self.layers)

    def json(self) -> Json:
        """Describe it, as `Bundle.json`."""
        known = {"ref": self.reference, "name": self.name, "digest": self.digest, "top": self.top_digest}
        return {**known, "size": self.size, "layers": [layer.blob.digest for layer in self.layers]}


# -- writing -------------------------------------------------------------------------------------------------


def write_bundle(target: Path, tree: StateTree, images: Iterable[Gathered], blobs: Path, platform: str) -> str:
    """Write a bundle in one step: whole, synced, under its name, or not at all. Returns the file's sha256 (hex).

    blobs: the folder that holds the layers, by hex digest. The same content makes the same bytes. Raises WrongState
    for a layer that is not what its digest says, UnfitHost where there is no room.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    in_order = sorted(images, key=lambda each: (each.reference, each.name))
    try:
        with temporary.open("xb") as file:
            hashed = oci.Counted(file)
            out = oci.LayoutWriter(oci.ArchiveWriter(hashed))
            entries = [_add_state(out, tree), *(_add_image(out, image, platform) for image in in_order)]
            for image in in_order:
                for digest, size in image.layers:
                    out.put(digest, size, partial(_copy_layer, blobs / digest.removeprefix("sha256:"), digest))
            annotations = {f"{ANNOTATION}platform": platform, f"{ANNOTATION}version": str(VERSION)}
            out.finish(entries, annotations=annotations)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UnfitHost(f"write '{target}': {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return hashed.digest.removeprefix("sha256:")


def _copy_layer(path: Path, digest: str, out: Sink) -> None:
    counted = oci.Counted(out)
    with path.open("rb") as file:
        while data := file.read(oci.CHUNK):
            counted.write(data)
    if counted.digest != digest:
        raise WrongState(f"bundle layer '{digest}': what came is not what its digest says")


def _add_state(out: oci.LayoutWriter, tree: StateTree) -> Json:
    created = datetime.fromtimestamp(int(tree.created), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {AUTHORS: tree.author, CREATED: created, REVISION: tree.revision}
    notes = {"artifactType": STATE, "annotations": {key: value for key, value in told.items() if value}}
    manifest = oci.manifest_of(out.add(b"{}", EMPTY), [out.add(pack_files(tree), oci.LAYER)], **notes)
    return out.add(manifest, oci.MANIFEST, **notes)


def _add_image(out: oci.LayoutWriter, image: Gathered, platform: str) -> Json:
    """Write the documents of an image; returns what index.json says of it.

    skopeo looks names up among OCI manifests and indexes only: any other kind gets an index of one around it.
    """
    out.add(image.top)
    out.add(image.config)
    manifest = out.add(image.manifest, oci.media_type_of(image.manifest))
    annotations = {
        oci.NAME: image.name,
        oci.REF_NAME: image.reference,
        f"{ANNOTATION}manifest": manifest["digest"],
        f"{ANNOTATION}top": oci.digest_of(image.top),
    }
    if manifest["mediaType"] == oci.MANIFEST:
        system, architecture, *_ = platform.split("/")
        return {**manifest, "platform": {"os": system, "architecture": architecture}, "annotations": annotations}
    around = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": [manifest]}
    return out.add(json.dumps(around).encode(), oci.INDEX, annotations=annotations)


def pack_files(tree: StateTree) -> bytes:
    """Pack the files of a state into a tar: the same bytes for the same files."""
    buffer = io.BytesIO()
    tar = oci.ArchiveWriter(buffer)
    for path, content in sorted(tree.files.items()):
        mode = 0o755 if path in tree.executable else 0o644
        tar.put(path, len(content), lambda out, content=content: out.write(content), mode)  # type: ignore[misc]
    tar.finish()
    return buffer.getvalue()


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that is open: its documents are in memory, its layers are read from the file when asked for."""

    path: Path
    size: int
    platform: str
    tree: StateTree
    images: tuple[BundledImage, ...]
    _files: oci.Archive = field(repr=False)

    def layers(self) -> list[Layer]:
        """List the layers of all images, each diff id once, in the order in which they lie in the file."""
        found = {layer.diff_id: layer for image in reversed(self.images) for layer in reversed(image.layers)}
        return sorted(found.values(), key=lambda layer: self._files.place(oci.member_of(layer.blob.digest)))

    def open_layer(self, digest: str) -> BinaryIO:
        """Open the blob of that digest as a stream that ends with it; whoever reads it verifies it."""
        return self._files.open(oci.member_of(digest))

    def json(self) -> Json:
        """{"path", "size", "platform", "revision", "author", "created", "images": [{"ref", "name", "digest", "top",
        "size", "layers"}, …], "files": [{"path", "size"}, …]}; sizes in bytes, created in seconds since the epoch"""
        tree = self.tree
        files = [
            {"path": os.fsencode(path).decode(errors="replace"), "size": len(content)}
            for path, content in sorted(tree.files.items())
        ]
        known = {"path": str(self.path), "size": self.size, "platform": self.platform, "revision": tree.revision}
        images = [each.json() for each in self.images]
        return {**known, "author": tree.author, "created": tree.created, "images": images, "files": files}


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle and verify all of it but the layers, which are verified while they are read.

    Raises NotFound for a missing file, and WrongState for what is no bundle, damaged, hostile or of a newer version
    of this program.
    """
    if path.is_dir():
        raise WrongCall(f"read bundle '{path}': a directory (expected a file of 'holdfast bundle create')")
    try:
        file = oci.open_regular(path)
    except FileNotFoundError as error:
        raise NotFound(f"read bundle '{path}': no such file") from error
    except OSError as error:
        raise UnfitHost(f"read bundle '{path}': {(error.strerror or str(error)).lower()}") from error
    with file:
        with oci.reading(f"read bundle '{path}'"):
            bundle = _read_bundle(path, oci.Archive(file, strict=True))
        yield bundle


def _read_bundle(path: Path, layout: oci.Archive) -> Bundle:
    index = layout.index()
    annotations = index.get("annotations") or {}
    version = annotations.get(f"{ANNOTATION}version")
    if version is None:
        raise WrongState("it holds images only, no state (holdfast image load takes such a file)")
    if int(version) > VERSION:
        raise WrongState(f"it is of version {int(version)} (this holdfast knows {VERSION}: update it)")
    platform = str(annotations[f"{ANNOTATION}platform"])
    if not re.fullmatch(r"linux/\w{1,20}(/\w{1,20})?", platform, re.ASCII):
        raise WrongState(f"it is for {platform[:100]!r} (expected as linux/amd64)")
    states = [entry for entry in index["manifests"] if entry.get("artifactType") == STATE]
    if len(states) != 1:
        raise WrongState(f"it holds {len(states)} states (expected one)")
    tree = _read_tree(layout, states[0])
    images = tuple(_read_image(layout, each, platform) for each in index["manifests"] if each is not states[0])
    return Bundle(path, layout.size, platform, tree, images, layout)


def _read_tree(layout: oci.Layout, entry: Json) -> StateTree:
    manifest = json.loads(layout.blob(entry["digest"]))
    if manifest.get("artifactType") != STATE or len(manifest["layers"]) != 1:
        raise WrongState("its state is no state")
    annotations = manifest.get("annotations") or {}
    files, executable = unpack_files(layout.blob(manifest["layers"][0]["digest"], LARGEST_STATE * 2))
    created = datetime.fromisoformat(annotations[CREATED]).timestamp() if CREATED in annotations else 0.0
    revision, author = (_plain(str(annotations.get(key, ""))) for key in (REVISION, AUTHORS))
    return StateTree(files, executable, revision, author, created)


def _plain(text: str) -> str:
    """Replace control characters: whoever wrote a bundle must not steer the terminal of whoever reads it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)[:200]


def unpack_files(tar: bytes) -> tuple[dict[str, bytes], frozenset[str]]:
    """Read the files in the tar of a state, and which are programs. Raises WrongState for what is no plain file."""
    files: dict[str, bytes] = {}
    executable = set()
    total = 0
    for member in oci.scan_tar(io.BytesIO(tar)):
        path = _inner_path(member.name)
        total += member.size
        if not oci.is_plain(member):
            raise WrongState(f"state file {path!r}: neither a file nor a folder")
        if path in files or len(files) >= MOST_FILES or total > LARGEST_STATE:
            raise WrongState(f"state file {path!r}: comes twice, or there is too much in the state")
        files[path] = tar[member.offset_data : member.offset_data + member.size]
        if len(files[path]) != member.size:
            raise WrongState(f"state file {path!r}: cut short")
        if member.mode & 0o111:
            executable.add(path)
    for path in files:
        for folder in list(PurePosixPath(path).parents)[:-1]:
            if str(folder) in files:
                raise WrongState(f"state file {path!r}: lies in {str(folder)!r}, which is a file")
    return files, frozenset(executable)


def _inner_path(name: str) -> str:
    """Check that a path stays inside, and that no other program takes it for its own."""
    steps = name.split("/")
    if any(step in ("", ".", "..", ".git") or len(os.fsencode(step)) > 255 for step in steps) or len(steps) > DEEPEST:
        raise WrongState(f"state file {name[:255]!r}: a path that leads out, or that can't be")
    if "\0" in name:
        raise WrongState(f"state file {name[:255]!r}: holds the character NUL")
    return name


def _read_image(layout: oci.Archive, entry: Json, platform: str) -> BundledImage:
    annotations = entry["annotations"]
    layout.blob(entry["digest"])  # what other programs go by
    reference, name = (_image_name(annotations[key]) for key in (oci.REF_NAME, oci.NAME))
    digest, top_digest = annotations[f"{ANNOTATION}manifest"], annotations[f"{ANNOTATION}top"]
    with oci.reading(f"image {reference!r}"):
        manifest, top = layout.blob(digest), layout.blob(top_digest)
        if top != manifest and digest not in [each["digest"] for each in json.loads(top)["manifests"]]:
            raise WrongState(f"{top_digest} does not lead to its manifest")
        parsed = read_manifest(manifest)
        config = layout.blob(parsed.config.digest)
        diff_ids = read_diff_ids(config, len(parsed.layers), platform.split("/")[1])
        for blob in parsed.layers:
            size = layout.place(oci.member_of(blob.digest))[1]
            if size != blob.size:
                raise WrongState(f"layer {blob.digest} has {size} bytes (its manifest says {blob.size})")
        layers = tuple(map(Layer, diff_ids, parsed.layers))
    return BundledImage(reference, name, digest, top_digest, top, manifest, config, layers)


def _image_name(text: object) -> str:
    """Check a name that the store is to have; it is shown as well."""
    try:
        parse(str(text))
    except WrongCall as error:
        raise WrongState(str(error)) from error
    return str(text)
