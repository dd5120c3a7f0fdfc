"""References → images in the store, out of registries; and images of the store into registries.

`node.stage` pulls what a generation needs; `api` what a person asks for; `images.build` pushes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast.config import ImageSettings
from holdfast.images.references import Reference
from holdfast.images.store import Image, ImageStore
from holdfast.images.transfers import Transfers

Told = Callable[..., None]  # (kind, subject, message, **more), as `store.event`


@dataclass(frozen=True, slots=True)
class Remote:
    """What a registry has for a reference, for this host.

    top: the document that the reference leads to, an index or a manifest, and top_digest its digest. manifest: of
    the image for this host's platform, and digest its digest; the same where top is no index.
    """

    reference: Reference
    top: bytes
    top_digest: str
    manifest: bytes
    digest: str


class Puller:
    """Fetches images into a store and sends them out of it. Safe for several threads at once.

    All verbs block. Errors have one line with the reference in it; `retry` and `wait` say when the same may be tried
    again: TryAgain for a registry that is down, slow or overloaded, NotFound for what it does not have, WrongState for
    content that is damaged or not for this host, UnfitHost where skopeo is missing or the disk is full.
    """

    def __init__(
        self,
        store: ImageStore,
        settings: ImageSettings = ImageSettings(),
        transfers: Transfers | None = None,
        told: Told = lambda *_args, **_more: None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.transfers = transfers or Transfers()
        self.told = told

    def resolve(self, ref: str) -> Remote:
        """Ask the registry what it has for this host under a reference. Fetches no layer."""
        raise NotImplementedError

    def pull(self, ref: str, remote: Remote | None = None) -> Image:
        """Have the image here, under its name unless the reference is a digest; fetch only what is missing.

        remote: what `resolve` has said just now. The same image under way in another thread is waited for.
        """
        raise NotImplementedError

    def push(self, image: Image, ref: str) -> str:
        """Send an image to a registry; blobs that are there are not sent again. The manifest's digest there."""
        raise NotImplementedError

    def tags(self, ref: str) -> list[str]:
        """Every tag of the reference's repository. Raises as `resolve`."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is under way, quickly: it raises TryAgain. Nothing can be asked for afterwards."""
        raise NotImplementedError
