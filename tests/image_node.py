"""A node with a real image store, for tests of what it decides about images. It starts no container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from holdfast.config import ImageSettings
from holdfast.drivers import Host
from holdfast.images.builds.build import Builder
from holdfast.images.builds.outside import Outside
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfers
from holdfast.images.kept.store import ImageStore
from holdfast.node.context import Context
from holdfast.plugins import Plugins
from holdfast.runtime.binaries import RuntimeBinary
from holdfast.runtime.conmon import Runtime
from holdfast.runtime.content import ContentStore
from holdfast.store import Store


@contextmanager
def image_node(folder: Path, settings: ImageSettings | None = None) -> Iterator[Context]:
    """A node whose root is folder/root; registries are asked by skopeo, as ever."""
    settings = settings or ImageSettings()
    host = Host("test", folder / "root", folder / "run")
    host.root.mkdir(parents=True)
    store, transfers = Store(host.root / "state.db"), Transfers()
    images = ImageStore(host.root / "images", settings)
    puller = Puller(images, settings, transfers, partial(store.event, app="", container=""))
    try:
        yield Context(
            host=host,
            store=store,
            plugins=Plugins(host),
            images=images,
            puller=puller,
            builder=Builder(images, host, store.event, Outside(images, puller)),
            content=ContentStore(host.root / "content"),
            runtime=Runtime(host, RuntimeBinary("none", Path("/nonexistent")), Path("/nonexistent")),
            transfers=transfers,
        )
    finally:
        puller.close()
        store.close()
