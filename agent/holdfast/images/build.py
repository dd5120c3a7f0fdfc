"""`[images.*]` of a state tree → images in the store, by buildah.

The context is laid out, built with a storage of buildah's own (its layers are the cache of later builds), and what
comes of it is taken into the image store under a name that holds the build's key: where that is known, nothing is built.
Called by `node` while it stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.config import ImageSettings
from holdfast.images.store import Image, ImageStore
from holdfast.spec.model import Build


class Builder:
    """Builds images, one at a time for one key. Safe for several threads."""

    def __init__(
        self,
        store: ImageStore,
        settings: ImageSettings,
        root: Path,
        run_root: Path,
        told: Callable[..., None],
        *,
        runtime: str = "",
        push: Callable[[Image, str], str] | None = None,
    ) -> None:
        """root, run_root: the agent's own. told: called as told(kind, subject, message). runtime: crun's or runc's
        path, for RUN steps. push: `Puller.push`."""
        self.store, self.settings, self.root, self.run_root = store, settings, root, run_root
        self.told, self.runtime, self.push = told, runtime, push

    def build(self, name: str, images: Mapping[str, Build], blobs: Mapping[str, bytes]) -> Image:
        """The image of a qualified name of App.images, built if it is not here, and before it what it is built from.

        blobs: Spec.blobs. Raises WrongState (the build failed), UnfitHost (no buildah), TryAgain.
        """
        raise NotImplementedError
