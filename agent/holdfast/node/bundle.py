"""A bundle → the images in it in the store of this node: all of them, or no name changes.

The API calls it for `holdfast bundle load`. The state in the bundle is none of its business: whoever runs the command
writes the files, with rights of his own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from holdfast.errors import HoldfastError, NotFound, WrongState
from holdfast.images.formats.bundle import Bundle, BundledImage, open_bundle
from holdfast.images.formats.manifests import Layer
from holdfast.images.incoming.fetch import do_all, missing
from holdfast.images.incoming.transfers import Transfer
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.unpack import Expected
from holdfast.node.context import Context
from holdfast.observed import Json

SIDE_BY_SIDE = 4  # layers: each has a process that unpacks it


def load_bundle(context: Context, path: Path, watch: Callable[[Transfer], object] = lambda _: None) -> Sequence[Json]:
    """Take in the images of a bundle; a damaged one changes no name. Blocks; doing it again costs next to nothing.

    Returns {"ref", "digest", "new": whether it was not here just so} of each. Raises WrongState for what is damaged
    or for another architecture, UnfitHost where the disk is full.
    """
    with open_bundle(path) as bundle, context.transfers.transfer(path.name) as transfer, context.images.keep():
        watch(transfer)
        here = {image.reference: _is_here(context.images, image) for image in bundle.images}
        _add_layers(context.images, bundle, transfer)
        for image in bundle.images:
            if not here[image.reference]:
                _add_image(context.images, image)
        context.images.touch(
            [image.digest for image in bundle.images]
        )  # nobody uses them yet, and somebody will soon
    new = [each for each in bundle.images if not here[each.reference]]
    if new:
        told = f"loaded from '{path}': {', '.join(each.reference for each in new)}"
        context.store.event("images", "node", told)
    context.store.retry_now()
    return [{"ref": each.reference, "digest": each.digest, "new": each in new} for each in bundle.images]


def _is_here(store: ImageStore, image: BundledImage) -> bool:
    """Check whether loading the image would change nothing."""
    try:
        store.get(image.digest)
        store.read_blob(image.top_digest)
    except (NotFound, WrongState):
        return False
    name = store.names().get(image.name)
    return _pinned(image) or (
        name is not None and (name.digest, name.top, name.source) == (image.digest, image.top_digest, "bundle")
    )


def _pinned(image: BundledImage) -> bool:
    """Check whether an image is known by its digest only: as after a pull, it gets no name."""
    return "@" in image.name


def _add_layers(store: ImageStore, bundle: Bundle, transfer: Transfer) -> None:
    """Unpack what is missing, several at once. After a failure nothing new is begun."""
    jobs = missing(store, transfer, bundle.layers(), f"load bundle '{bundle.path}'")
    transfer.state = "pulling"
    do_all(partial(_add_layer, store, bundle, transfer), jobs, min(SIDE_BY_SIDE, os.cpu_count() or 1))


def _add_layer(store: ImageStore, bundle: Bundle, transfer: Transfer, layer: Layer) -> None:
    blob = layer.blob
    transfer.begin(blob.digest)
    try:
        with bundle.open_layer(blob.digest) as stream:
            expected = Expected(layer.diff_id, blob.digest, blob.size)
            store.layers.add(stream, expected, lambda done: transfer.advance(blob.digest, done))
    except HoldfastError as error:
        raise type(error)(f"load bundle '{bundle.path}': {error}") from error
    transfer.finish(blob.digest)


def _add_image(store: ImageStore, image: BundledImage) -> None:
    top = None if image.top_digest == image.digest else image.top
    store.add_image(image.manifest, image.config, [] if _pinned(image) else [image.name], source="bundle", top=top)
