"""Find every image that the state files of a tree name, and fetch them into one folder, for a bundle.

skopeo fetches, with the same credentials, mirrors and signature policy as for a pull, but for any platform, without
an image store and without root. Manifests and configurations are kept byte for byte, because state files pin their
digests. Layers go into one folder; those that several images share are fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, NotFound, TryAgain, WrongState
from holdfast.files import discard_tree
from holdfast.grammar.images import Reference, built
from holdfast.grammar.quantities import about
from holdfast.images.builds.build import Builder, built_name
from holdfast.images.formats.bundle import Gathered
from holdfast.images.formats.layout import MANIFEST, Folder, digest_of, media_type_of, member_of
from holdfast.images.formats.manifests import (
    Unfit,
    architecture,
    check_digest,
    find_manifest,
    read_diff_ids,
    read_manifest,
)
from holdfast.images.formats.references import parse
from holdfast.images.kept.image import Image, listing
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import write_layout
from holdfast.images.registry.skopeo import Skopeo
from holdfast.spec import Cache, NodeFacts, Problem, Spec, load


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image that state files name, or have built and pushed (`images.app/name`). places: as `shop.toml:3`."""

    reference: str
    places: tuple[str, ...]


class Unread(Exception):
    """State files that don't load; problems says why."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


def wanted_images(
    files: Mapping[str, bytes],
    facts: NodeFacts,
    *,
    executable: frozenset[str],
    everywhere: bool,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Wanted], Spec]:
    """Find every image of a state, each once, built ones first, and load the state. Raises Unread.

    everywhere: also of apps that `when` gives to other nodes than the one of facts; their images are built there.
    """
    cache = Cache()
    spec = load(files, facts, executable=executable, left_out=left_out, cache=cache)
    if spec.problems:
        raise Unread(spec.problems)
    here = {app.path for app in spec.apps.values()}
    found: dict[str, list[str]] = {}
    for path, reading in cache.readings.items():
        if reading.draft is None or not (everywhere or path in here):
            continue
        for name, container in reading.draft.app.containers.items():
            if container.image is not None:
                line = reading.draft.document.line(("containers", name, "image"))
                found.setdefault(container.image, []).append(f"{path}:{line}")
    for app in spec.apps.values():
        for image, build in app.images.items():
            if build.push and image.startswith(f"{app.name}/"):
                found.setdefault(f"images.{image}", []).append(app.path)
    in_order = sorted(found.items(), key=lambda each: built(each[0]) is None)
    return [Wanted(reference, tuple(places)) for reference, places in in_order], spec


class Gatherer:
    """Fetches images of one platform (`linux/amd64`, `linux/arm/v7`) into folder, which is the caller's to delete.

    folder: without a colon in its path, which skopeo would take for the end of it. store: of this host, for what was
    imported, loaded or built here, which no registry has. told: called with each image before its layers come, and
    with where it comes from, in words. builder: makes what the state files have built; None: this user can't.
    """

    def __init__(
        self,
        folder: Path,
        platform: str,
        settings: ImageSettings,
        store: ImageStore | None = None,
        told: Callable[[str, str], None] = lambda reference, source: None,
        builder: Callable[[], Builder] | None = None,
    ) -> None:
        self.folder, self.platform, self.store, self.told, self.builder = folder, platform, store, told, builder
        self.blobs = folder / "sha256"
        self.blobs.mkdir(parents=True, exist_ok=True)
        _, self._architecture, self._variant = f"{platform}/".split("/")[:3]
        self._skopeo = Skopeo(settings)

    def close(self) -> None:
        """End what is under way."""
        self._skopeo.close()

    def gather(self, wanted: list[Wanted], spec: Spec) -> list[Gathered]:
        """Fetch all of them; spec says how those are built that are.

        Raises an ExceptionGroup with every one that could not be had, and where it is named.
        """
        found: list[Gathered] = []
        failures: list[HoldfastError] = []
        for each in wanted:
            try:
                name = built(each.reference)
                if name is None:
                    found.append(self._gather(each))
                else:
                    self.told(each.reference, "built from its files")
                    found.append(self._build(name, each.reference, spec))
            except Unfit as error:
                failures.append(WrongState(f"{', '.join(each.places)}: bundle {each.reference!r}: {error}"))
            except HoldfastError as error:
                failures.append(type(error)(f"{', '.join(each.places)}: {error}"))
        if failures:
            raise ExceptionGroup("gather images", failures)
        return found

    def _build(self, name: str, written: str, spec: Spec) -> Gathered:
        """Build what a node would build, under the name by which the node finds it."""
        images = next((app.images for app in spec.apps.values() if name in app.images), None)
        if images is None:
            raise Unfit("is built on other nodes than this (--node-name and --label say for which node a bundle is)")
        if self._architecture != architecture():
            raise Unfit(f"is built here, for linux/{architecture()} alone (expected that platform)")
        if self.builder is None:
            raise Unfit("is built from files of the state, which only root can do (run it as root)")
        builder = self.builder()
        self.store = self.store or builder.store  # where its tags lead to it, whatever registries have
        unpushed = {each: build.model_copy(update={"push": False}) for each, build in images.items()}
        image = builder.build(name, unpushed, spec.blobs)
        return self._from_store(builder.store, image, built_name(name, images[name]), written)

    def _gather(self, wanted: Wanted) -> Gathered:
        reference = parse(wanted.reference)
        if reference.transport != "docker":
            raise Unfit(
                "is read from a path of its node, where no bundle puts anything (expected the name of an image)"
            )
        store = self.store
        name = None if reference.digest or store is None else store.names().get(reference.name)
        image = None if store is None or name is None else store.get(name.digest)
        if store is None or name is None or image is None or name.source == "registry":
            return self._from_registry(reference, wanted.reference)
        if image.architecture != self._architecture:
            return self._from_registry(reference, wanted.reference)
        if name.source == "bundle":  # a registry had it once, with its own digest
            with suppress(TryAgain, NotFound, Unfit):
                return self._from_registry(reference, wanted.reference)
        self.told(wanted.reference, "from the store of this host")
        return self._from_store(store, image, name.name, wanted.reference)

    def _from_store(self, store: ImageStore, image: Image, name: str, written: str) -> Gathered:
        """What this host has and no registry, or none that answers. Layers are compressed anew: its digest changes,
        which is why nothing that is pinned comes from here."""
        path = self.folder / "stored"
        try:
            with store.keep():
                digest = write_layout(store, image, path)
            layout = Folder(path)
            manifest, config, described = layout.image(digest)
            for layer in described:
                with suppress(FileNotFoundError):  # one layer may come more than once
                    (path / member_of(layer["digest"])).replace(self._blob(layer["digest"]))
        finally:
            discard_tree(path)
        layers = tuple((layer["digest"], layer["size"]) for layer in described)
        return Gathered(written, name, manifest, manifest, config, layers)

    def _from_registry(self, reference: Reference, written: str) -> Gathered:
        top = self._skopeo.manifest(reference, reference.remote, written)
        if reference.digest:
            check_digest(top, reference.digest)
        manifest = find_manifest(
            top,
            lambda chosen: self._skopeo.manifest(reference, reference.at(chosen.digest), written),
            self._architecture,
            self._variant,
        )
        if listing(top) and digest_of(manifest) not in (listing(top) or ()):
            raise Unfit(f"is an index in an index, which no bundle holds (expected as {reference.repository}@DIGEST)")
        parts = read_manifest(manifest)
        name = reference.at(digest_of(manifest))
        config = self._skopeo.configuration(reference, name, written)
        check_digest(config, parts.config.digest)
        read_diff_ids(config, len(parts.layers), self._architecture)
        layers = {layer.digest: layer.size for layer in parts.layers}
        fresh = [digest for digest in layers if not self._blob(digest).exists()]
        known = f", {len(layers) - len(fresh)} of them fetched already" if len(fresh) < len(layers) else ""
        plural = "layer" if len(layers) == 1 else "layers"
        self.told(written, f"{about(sum(layers.values()))} in {len(layers)} {plural}{known}")
        layout, exact = self.folder / "layout", media_type_of(manifest) == MANIFEST
        try:
            if fresh:
                self._skopeo.fetch_layers(reference, name, written, layout, self.folder, exact=exact)
        finally:
            discard_tree(layout)
        for digest in fresh:
            if not self._blob(digest).exists():
                raise Unfit(f"skopeo has not brought its layer {digest}")
        ordered = tuple((layer.digest, layer.size) for layer in parts.layers)
        return Gathered(written, reference.remote, top, manifest, config, ordered)

    def _blob(self, digest: str) -> Path:
        return self.blobs / digest.removeprefix("sha256:")
