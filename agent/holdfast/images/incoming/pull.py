"""Pull images from registries into the store.

`node.stage` pulls what a generation needs, `node.images` what a person asks for. A pull fetches the manifest (`skopeo
inspect`), the configuration and the layers (`proxy`), checks policy.json if there is anything in it to check, and
enters the image into the store last. What is here already is not fetched.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, NotFound, Throttled, TryAgain, UnfitHost, WrongCall, WrongState
from holdfast.grammar.images import DIGEST, Reference
from holdfast.grammar.quantities import about
from holdfast.images.formats import manifests
from holdfast.images.formats.archives import path_of
from holdfast.images.formats.layout import digest_of
from holdfast.images.formats.references import parse
from holdfast.images.incoming.fetch import Downloads, Fetch, missing
from holdfast.images.incoming.load import list_archive, load_archive, load_reference
from holdfast.images.incoming.transfers import Transfer, Transfers
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.registry.faults import REFUSED, UNFIT, failure
from holdfast.images.registry.skopeo import Skopeo, is_loopback

if TYPE_CHECKING:
    from holdfast.images.registry.head import Place, RateLimits

Told = Callable[..., None]  # (kind, subject, message, **more), as `store.event`

DEFAULTS = ImageSettings()
NEWS_EVERY = 5.0  # seconds between two events of one pull


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
    again: TryAgain for a registry that is down, slow or overloaded, NotFound for what it does not have, WrongState
    for content that is damaged or not for this host, UnfitHost where skopeo, a login or space is missing.
    """

    def __init__(
        self,
        store: ImageStore,
        settings: ImageSettings = DEFAULTS,
        transfers: Transfers | None = None,
        told: Told = lambda *_args, **_more: None,
    ) -> None:
        self.store = store
        self.transfers = transfers or Transfers()
        self.told = told
        self.skopeo = Skopeo(settings)
        self._downloads = Downloads()
        self._limits: RateLimits | None = None

    def size(self, ref: str, deadline: float) -> int:
        """Add up the bytes of layers that a pull of a reference would fetch. Raises as `resolve`."""
        here: set[str] = set()
        for name in self.store.names().values():
            with suppress(NotFound, manifests.Unfit):
                stored = manifests.read_manifest(self.store.read_blob(name.digest))
                here.update(layer.digest for layer in stored.layers)
        layers = manifests.read_manifest(self.resolve(ref, deadline).manifest).layers
        return sum({layer.digest: layer.size for layer in layers if layer.digest not in here}.values())

    def resolve(self, ref: str, deadline: float | None = None) -> Remote:
        """Ask the registry what it has for this host under a reference. Fetches no layer.

        deadline: until when (monotonic), if that is sooner than stall_timeout says.
        """
        reference = self._reference(ref)
        try:
            top = self.skopeo.manifest(reference, reference.remote, ref, deadline)
        except NotFound as error:
            if reference.digest or ref.endswith(f":{reference.tag}"):
                raise
            more = f"as ':{reference.tag}', for no tag is written (expected {ref}:TAG)"
            raise failure(NotFound, f"{error} {more}", error.wait) from error
        with _unfit(ref):
            if reference.digest:
                manifests.check_digest(top, reference.digest)
            manifest = manifests.find_manifest(
                top, lambda chosen: self._document(reference, chosen, ref, deadline), manifests.architecture()
            )
            manifests.read_manifest(manifest)
        return Remote(reference, top, digest_of(top), manifest, digest_of(manifest))

    def pull(
        self,
        ref: str,
        remote: Remote | None = None,
        *,
        watch: Callable[[Transfer], object] = lambda _: None,
        needed: bool = True,
    ) -> Image:
        """Have the image here, under its name unless the reference is a digest; fetch only what is missing.

        remote: what `resolve` has said just now. watch: gets the transfer, which others of this reference may be
        beside. needed: False where something is here that will do. A layer under way for another image or caller is
        waited for.
        """
        reference = self._reference(ref)
        with self.transfers.transfer(ref) as transfer, self.store.keep():
            watch(transfer)
            news = _News(self.told, ref, transfer)
            fetch = Fetch(self.store, self.skopeo, self._downloads, reference, ref, transfer, news.moved)
            try:
                if not self._here(ref):
                    fetch.warm_up()
                if remote is None:
                    with self.transfers.asked(ref) if needed else nullcontext():
                        remote = self.resolve(ref)
                transfer.state = "pulling"
                fetch.source = reference.at(remote.digest)
                return self._pull(ref, remote, fetch, transfer, news)
            except Throttled as error:
                error.wait = self._time_to_wait(ref) or error.wait
                raise
            except OSError as error:
                words = (error.strerror or str(error)).lower()
                raise failure(UnfitHost, f"pull {ref!r}: {words}: {str(self.store.root)!r}", REFUSED) from error
            finally:
                fetch.close()

    def head(self, ref: str) -> str:
        """Ask a registry for the digest under a tag, without a cost there; "" where only `resolve` can tell.

        Raises TryAgain, with the time to wait, for a registry that asks to wait.
        """
        from holdfast.images.registry import head  # its modules are needed once in a while

        reference = self._reference(ref)
        self._limits = self._limits or head.RateLimits()
        return head.ask(reference, self._places(reference), self.skopeo.settings.authfile, self._limits)

    def _time_to_wait(self, ref: str) -> float:
        """Ask a registry how long to wait, which skopeo does not tell; 0.0 if it does not say."""
        with suppress(TryAgain):  # which says so, too
            self.head(ref)
        limits, now = self._limits, time.time()
        where = self._places(parse(ref))
        return float(max((ceil(limits.left(each.host, now)) for each in where), default=0)) if limits else 0.0

    def _places(self, reference: Reference) -> list[Place]:
        from holdfast.images.registry import head

        return head.places(reference, self.skopeo.registries(), loopback=is_loopback(reference.host))

    def load(self, ref: str, opened: int | None = None) -> Image:
        """Load the image that `oci:/path[:REF]`, `oci-archive:` or `docker-archive:` means, if policy.json allows it.

        opened: a descriptor of what is at the path, which is read instead. What skopeo has checked is what is
        loaded: a copy of it, which nobody else can change meanwhile.
        """
        reference = parse(ref)
        place = reference.path if opened is None else path_of(opened)
        try:
            if self.skopeo.policy_is_open():
                return load_reference(self.store, ref, opened)
            if not os.path.exists(place):  # noqa: PTH110
                raise NotFound(f"load {reference.path!r}: no such file or directory")
            with self.store.keep(), self.store.layers.scratch() as folder:
                layout = folder / "admitted"
                self.skopeo.admit(replace(reference, path=place), ref, layout)
                return load_reference(self.store, f"oci:{layout}")
        except HoldfastError as error:
            error.args = (str(error).replace(place, reference.path),)
            raise

    def load_all(self, path: Path) -> list[Image]:
        """Load every image of an archive, under the names that it has there, if policy.json allows all of them."""
        if self.skopeo.policy_is_open():
            return load_archive(self.store, path)
        with self.store.keep(), self.store.layers.scratch() as folder:
            admitted: list[tuple[Path, tuple[str, ...]]] = []
            for reference, names in list_archive(self.store, path):
                layout = folder / str(len(admitted))
                self.skopeo.admit(reference, reference.name, layout)
                admitted.append((layout, names))
            for layout, names in admitted:
                for name in names:
                    load_archive(self.store, layout, name)
            return [self.store.resolve(names[0]) for _, names in admitted]

    def fetch_for(self, ref: str, platform: str, layout: Path) -> None:
        """Fetch an image for another platform (`linux/arm64`) into a new OCI layout, under the tag `image`."""
        self.skopeo.fetch_for(self._reference(ref), platform, ref, layout)

    def tags(self, ref: str) -> list[str]:
        """List every tag of the reference's repository. Raises as `resolve`."""
        return self.skopeo.tags(self._reference(ref, "list tags of"), ref)

    def close(self) -> None:
        """End what is under way, quickly: it raises Stopping. Nothing can be asked for afterwards."""
        self._downloads.closed.set()
        self.skopeo.close()

    def _reference(self, ref: str, operation: str = "pull") -> Reference:
        if DIGEST.fullmatch(ref) and self._here(ref):
            raise WrongCall(f"{operation} {ref!r}: a digest alone names no registry, and the image is here already")
        return self.skopeo.reference(ref, operation)

    def _here(self, ref: str) -> bool:
        with suppress(NotFound):
            return bool(self.store.resolve(ref))
        return False

    def _document(self, reference: Reference, blob: manifests.Descriptor, ref: str, deadline: float | None) -> bytes:
        """Read a manifest, or an index in an index: from the store if it is there."""
        with suppress(NotFound):
            return self.store.read_blob(blob.digest)
        return self.skopeo.manifest(reference, reference.at(blob.digest), ref, deadline)

    def _pull(self, ref: str, remote: Remote, fetch: Fetch, transfer: Transfer, news: _News) -> Image:
        with _unfit(ref):
            manifest = manifests.read_manifest(remote.manifest)
            config = self._config(manifest, fetch)
            diff_ids = manifests.read_diff_ids(config, len(manifest.layers), manifests.architecture())
        jobs = missing(self.store, transfer, map(manifests.Layer, diff_ids, manifest.layers), f"pull {ref!r}")
        began = time.monotonic()
        if not self.skopeo.policy_is_open():
            self._check_policy(ref, remote, manifest)
        if jobs:
            news.begin(len(jobs))
            fetch.layers(jobs)
        names = [] if remote.reference.digest else [remote.reference.name]
        top = None if remote.top_digest == remote.digest else remote.top
        try:
            image = self.store.add_image(remote.manifest, config, names, source="registry", top=top)
        except (WrongState, NotFound) as error:
            raise failure(type(error), f"pull {ref!r}: {error}", UNFIT) from error
        if jobs:
            news.end(image.digest, time.monotonic() - began)
        return image

    def _config(self, manifest: manifests.Manifest, fetch: Fetch) -> bytes:
        with suppress(NotFound):
            return self.store.read_blob(manifest.config.digest)
        data = fetch.small(manifest.config)
        manifests.check_digest(data, manifest.config.digest)
        return data

    def _check_policy(self, ref: str, remote: Remote, manifest: manifests.Manifest) -> None:
        layers = [layer.digest for layer in manifest.layers]
        with self.store.layers.scratch() as scratch:
            checked = self.skopeo.check_policy(remote.reference, layers, ref, scratch)
        if digest_of(checked) != remote.digest:
            raise TryAgain(f"pull {ref!r}: the tag has moved to {digest_of(checked)} meanwhile")


class _News:
    """The events of a pull: at its beginning, every few seconds, and at its end."""

    def __init__(self, told: Told, ref: str, transfer: Transfer) -> None:
        self._told, self._ref, self._transfer = told, ref, transfer
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def begin(self, layers: int) -> None:
        total = self._transfer.total
        here = len(self._transfer.layers) - layers
        known = f" ({here} more are here)" if here else ""
        self._last = time.monotonic()
        plural = "layer" if layers == 1 else "layers"
        self._told("pulling", self._ref, f"{layers} {plural}, {about(total)}{known}", bytes=0, total=total)

    def moved(self) -> None:
        """Note that some bytes have come."""
        now = time.monotonic()
        with self._lock:
            if now - self._last < NEWS_EVERY:
                return
            self._last = now
        done, total = self._transfer.done, self._transfer.total
        self._told("pulling", self._ref, f"{about(done)} of {about(total)}", bytes=done, total=total)

    def end(self, digest: str, took: float) -> None:
        total = self._transfer.total
        message = f"{about(total)} in {took:.1f} s: {digest}"
        self._told("pulled", self._ref, message, bytes=total, took=round(took, 3), digest=digest)


@contextmanager
def _unfit(ref: str) -> Iterator[None]:
    """Make what can't be taken an error of the pull: another push helps, or another reference."""
    try:
        yield
    except manifests.Unfit as error:
        raise failure(WrongState, f"pull {ref!r}: {error}", UNFIT) from error
