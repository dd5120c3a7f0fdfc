"""Send images of the store, and indexes of OCI layouts, to a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from holdfast.errors import WrongCall
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import write_layout
from holdfast.images.registry.skopeo import Skopeo


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
