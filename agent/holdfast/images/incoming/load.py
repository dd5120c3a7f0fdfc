"""Load images from files of this host into the store: OCI layouts, docker-archives and tars of root file systems."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from holdfast.errors import NotFound, WrongCall
from holdfast.grammar.images import Reference
from holdfast.images.formats.archives import ArchivedImage, open_archive, path_of
from holdfast.images.formats.layout import CONFIG, LAYER, Layout, descriptor, dump, manifest_of, open_regular, reading
from holdfast.images.formats.manifests import architecture, read_diff_ids
from holdfast.images.formats.references import parse, parse_changes
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.unpack import Expected, Unpacked


def import_rootfs(store: ImageStore, tar: Path | int, name: str, changes: Sequence[str] = ()) -> Image:
    """Make an image of one layer from the tar of a root file system (plain, gzip, xz, bzip2 or zstd).

    tar: a file, or a descriptor to read it from. changes: as `docker import --change` has them: CMD, ENTRYPOINT, ENV,
    WORKDIR, USER, EXPOSE, LABEL, VOLUME, STOPSIGNAL. The same archive and changes make the same digest, so nothing
    restarts for it.
    """
    parsed = parse(name)
    config = parse_changes(changes)
    with store.keep():
        if isinstance(tar, int):
            layer = store.layers.add(tar)
        else:
            try:
                stream = open_regular(tar)
            except FileNotFoundError as error:
                raise NotFound(f"open {str(tar)!r}: no such file") from error
            with stream:
                layer = store.layers.add(stream)
        created = datetime.fromtimestamp(layer.newest, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        document = {
            "architecture": architecture(),
            "config": config,
            "created": created,
            "history": [{"created": created, "created_by": "holdfast image import"}],
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        }
        data = dump(document)
        return store.add_image(_plain_manifest(data, [layer]), data, [parsed.name], source="import")


def load_archive(store: ImageStore, path: Path, name: str | None = None) -> list[Image]:
    """Load the images of an OCI layout (directory or archive) or of a docker-archive.

    name: use it instead of the name in the archive. Raises WrongState for what is damaged, or made for another
    architecture than this host's.
    """
    with store.keep(), open_archive(path, store.partial, architecture()) as (layout, found):
        if name is not None and len(found) != 1:
            raise WrongCall(f"load {str(path)!r}: holds {len(found)} images (one name can't be given to all)")
        if not name:
            _check_named(found, path)
        return [_add(store, layout, image, path, [name] if name else image.names) for image in found]


def list_archive(store: ImageStore, path: Path) -> list[tuple[Reference, tuple[str, ...]]]:
    """List the reference and the names of each image that `load_archive` would take. Raises the same."""
    with store.keep(), open_archive(path, store.partial, architecture()) as (_, found):
        _check_named(found, path)
    return [(Reference(each.transport, "", str(path), each.part, ""), each.names) for each in found]


def load_reference(store: ImageStore, reference: str, opened: int | None = None) -> Image:
    """Load the image that `oci:/path[:REF]`, `oci-archive:` or `docker-archive:` means; it gets no name.

    opened: a descriptor of what is at the path, read instead of the path. If the image is in the store already, this
    only reads its manifest. Raises NotFound, and WrongState as `load_archive`.
    """
    wanted = parse(reference)
    path = Path(wanted.path if opened is None else path_of(opened))
    with store.keep(), open_archive(path, store.partial, architecture()) as (layout, there):
        found = [each for each in there if not wanted.tag or any(_means(wanted.tag, name) for name in each.names)]
        if len(found) != 1:
            names = ", ".join(name for each in there for name in each.names) or "no names"
            raise NotFound(f"load {reference!r}: leads to {len(found)} images, not to one (it holds {names})")
        return _add(store, layout, found[0], path, ())


def _add(store: ImageStore, layout: Layout, found: ArchivedImage, path: Path, names: Sequence[str]) -> Image:
    with reading(f"load {str(path)!r}"):
        diff_ids = read_diff_ids(found.config, len(found.layers), architecture())
    layers = []
    for diff_id, member in zip(diff_ids, found.layers, strict=True):
        if store.layers.has(diff_id):
            layers.append(store.layers.facts(diff_id))
        else:
            with reading(f"load {str(path)!r}"), layout.open(member) as stream:
                layers.append(store.layers.add(stream, Expected(diff_id)))
    manifest = found.manifest or _plain_manifest(found.config, layers)
    return store.add_image(manifest, found.config, names, source="load")


def _means(ref: str, name: str) -> bool:
    """Check whether REF means the image that an archive calls name: by its whole name, or by its tag."""
    return name == ref or name.rpartition(":")[2] == ref


def _check_named(found: Sequence[ArchivedImage], path: Path) -> None:
    if not all(image.names for image in found):
        raise WrongCall(f"load {str(path)!r}: the image in it has no name (give one)")


def _plain_manifest(config: bytes, layers: Sequence[Unpacked]) -> bytes:
    """Write the manifest of an image that comes without one: its layers are plain archives."""
    plain = [{"mediaType": LAYER, "digest": each.diff_id, "size": each.size} for each in layers]
    return manifest_of(descriptor(config, CONFIG), plain)
