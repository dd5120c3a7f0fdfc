"""Write images of the store as OCI layouts and archives that skopeo, Podman and Docker read, and send them away.

A layer's archive is made again from its recipe while it is written, and compared with its diff id. Layers are
compressed anew: the manifest that lists them differs from the registry's, as with `docker save`; the configuration,
which Docker calls the image's id, and the diff ids stay. An image whose manifest lists plain archives (imported,
committed) keeps that in an archive. Source: Docker Image Specification v1.2.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from holdfast.errors import WrongCall, WrongState
from holdfast.images.formats import layout as oci
from holdfast.images.formats.references import parse
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.registry.skopeo import Skopeo
from holdfast.images.unpacking.recipe import rebuild
from holdfast.questions import Json, Sink

Format = Literal["oci-archive", "docker-archive"]
FORMATS: tuple[Format, ...] = ("oci-archive", "docker-archive")
LEVEL = 6  # of zlib
FAST_LEVEL = 2  # of ISA-L, which knows 0 to 3

Chosen = Sequence[tuple[Image, list[str]]]  # images, and the names they get in the archive


def write_layer(store: ImageStore, diff_id: str, out: Sink, *, compress: bool = False) -> Json:
    """Write the archive of a layer, plain or gzipped, and return its descriptor; the same layer makes the same bytes.

    Raises WrongState when the layer is no longer what its diff id says, or its recipe is not here; what was written
    is useless then.
    """
    recipe = store.layers.recipe(diff_id)
    if not recipe.exists():
        raise WrongState(
            f"write layer {diff_id!r}: it was stored without what its archive is made of (remove its images and pull "
            "or load them again)"
        )
    counted = oci.Counted(out)
    gzip = _Gzip(counted) if compress else None
    plain = oci.Counted(gzip) if gzip else counted
    rebuild(store.layers.folder(diff_id), recipe, cast(BinaryIO, plain))
    if gzip is not None:
        gzip.finish()
    if plain.digest != diff_id:
        raise WrongState(f"write layer {diff_id!r}: it has become {plain.digest} (damaged in the store)")
    kind = f"{oci.LAYER}+gzip" if compress else oci.LAYER
    return {"mediaType": kind, "digest": counted.digest, "size": counted.size}


def write_layout(store: ImageStore, image: Image, folder: Path, tag: str = "latest") -> str:
    """Write one image as an OCI layout, named tag, into a new or empty directory; returns the manifest's digest.

    Layers are gzipped. Hold `store.keep` while the image must not go.
    """
    out = oci.LayoutWriter(oci.FolderWriter(folder))
    manifest = _add_image(store, image, out, folder, {})
    out.finish([{**manifest, "annotations": {oci.REF_NAME: tag}}])
    return str(manifest["digest"])


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
        write = _save_docker if format == "docker-archive" else _save_oci
        write(store, list(chosen.values()), oci.ArchiveWriter(out))
    return [image for image, _ in chosen.values()]


def _save_docker(store: ImageStore, chosen: Chosen, archive: oci.ArchiveWriter) -> None:
    entries, written = [], set[str]()

    def member(digest: str, suffix: str) -> str:
        name = digest.removeprefix("sha256:") + suffix
        if name not in written:
            written.add(name)
            if suffix == ".tar":
                size = store.layers.facts(digest).size
                archive.put(name, size, lambda out: write_layer(store, digest, out))
            else:
                data = store.read_blob(digest)
                archive.put(name, len(data), lambda out: out.write(data))
        return name

    for image, names in chosen:
        layers = [member(diff_id, ".tar") for diff_id in image.diff_ids]
        entries.append({"Config": member(image.config_digest, ".json"), "RepoTags": names, "Layers": layers})
    manifest = oci.dump(entries)
    archive.put("manifest.json", len(manifest), lambda out: out.write(manifest))
    archive.finish()


def _save_oci(store: ImageStore, chosen: Chosen, archive: oci.ArchiveWriter) -> None:
    out = oci.LayoutWriter(archive)
    written: dict[str, Json] = {}
    entries: list[Json] = []
    with store.layers.scratch() as scratch:
        for image, names in chosen:
            entry = _add_plain(store, image, out) or _add_image(store, image, out, scratch, written)
            entry = {**entry, "platform": {"os": "linux", "architecture": image.architecture}}
            entries += [{**entry, "annotations": {oci.NAME: name, oci.REF_NAME: name}} for name in names] or [entry]
    out.finish(entries)


def _add_plain(store: ImageStore, image: Image, out: oci.LayoutWriter) -> Json | None:
    """Write an image whose manifest lists plain archives, as it is; None for any other."""
    if [each.get("digest") for each in image.manifest["layers"]] != list(image.diff_ids):
        return None
    for diff_id in image.diff_ids:
        size = store.layers.facts(diff_id).size
        out.put(diff_id, size, lambda sink, diff_id=diff_id: write_layer(store, diff_id, sink))  # type: ignore[misc]
    out.add(store.read_blob(image.config_digest))
    return out.add(store.read_blob(image.digest), oci.MANIFEST)


def _add_image(
    store: ImageStore, image: Image, out: oci.LayoutWriter, scratch: Path, written: dict[str, Json]
) -> Json:
    """Write an image with its layers compressed; returns the descriptor of its manifest.

    A layer's digest and size precede it in an archive, so it is made in scratch first. written: by diff id.
    """
    for diff_id in image.diff_ids:
        if diff_id not in written:
            place = scratch / "layer"
            with place.open("wb") as file:
                written[diff_id] = write_layer(store, diff_id, file, compress=True)
            out.take(written[diff_id]["digest"], place)
    config = out.add(store.read_blob(image.config_digest), oci.CONFIG)
    annotations = image.manifest.get("annotations")
    more = {"annotations": annotations} if annotations else {}
    return out.add(oci.manifest_of(config, [written[diff_id] for diff_id in image.diff_ids], **more), oci.MANIFEST)


def push(store: ImageStore, skopeo: Skopeo, image: Image, ref: str, told: Callable[..., None]) -> str:
    """Send an image to a registry; blobs that are there are not sent again. Returns the manifest's digest there.

    told: called with the event, as `store.event`.
    """
    reference = skopeo.reference(ref, "push")
    if reference.digest:
        raise WrongCall(f"push {ref!r}: the digest of a push can't be chosen (expected [HOST/]NAME[:TAG])")
    with store.keep(), store.layers.scratch() as folder:
        digest = write_layout(store, image, folder)
        skopeo.send(folder, "latest", reference, ref)
    told("pushed", ref, f"{image.digest} is there as {digest}", digest=digest)
    return digest


def push_index(skopeo: Skopeo, layout: Path, ref: str) -> None:
    """Send the index of a layout (tag `latest`) to a registry, with all images in it."""
    skopeo.send(layout, "latest", skopeo.reference(ref, "push"), ref, every=True)


def _names(store: ImageStore, reference: str, image: Image) -> list[str]:
    """Choose what an image is called in an archive: as it was asked for, if that is one of its names."""
    every = sorted(name for name, each in store.names().items() if each.digest == image.digest)
    with suppress(WrongCall):
        parsed = parse(reference)
        if parsed.name in every and not parsed.digest:
            return [parsed.name]
    return [each for each in every if parse(each).transport == "docker"]


class _Gzip:
    """Compress what passes, without a time in the header (RFC 1952): the same content makes the same bytes."""

    def __init__(self, out: Sink) -> None:
        self.out = out
        try:
            from isal import isal_zlib
        except ModuleNotFoundError:
            self._deflate: Any = zlib.compressobj(LEVEL, wbits=31)
        else:
            self._deflate = isal_zlib.compressobj(FAST_LEVEL, wbits=31)

    def write(self, data: bytes) -> None:
        if packed := self._deflate.compress(data):
            self.out.write(packed)

    def finish(self) -> None:
        self.out.write(self._deflate.flush())
