"""Keep images by name and digest, with their layers unpacked and ready to be stacked.

    images/blobs/sha256/HEX       manifests, indexes and configurations, as the OCI image spec has them; a manifest's
                                  mtime is when its image was last used
    images/layers/sha256/HEX/     one unpacked directory per layer, by diff id; beside it
                 HEX.json         its figures ({"size", "files", …}; an older store has HEX.size instead)
                 HEX.recipe       what its archive is made from again
    images/index.json             name → {"digest", "top", "source", "at"}; in older stores name → manifest digest
    images/partial/               what is being unpacked; counts for nothing

`pull`, `load`, `build` and `node.bundle` put images in; `node` resolves names while it stages, and stacks the layers.
A layer counts once its directory has its name, which it gets when all of it is on disk. An image counts once its
manifest is there, which is written after its layers. Its names are written last. Deletion goes the other way.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from holdfast.config import ImageSettings
from holdfast.errors import Conflict, NotFound, TryAgain, WrongCall, WrongState
from holdfast.grammar.images import DIGEST, familiar
from holdfast.images.disk import Locks, spread, write_whole
from holdfast.images.formats.layout import digest_of, reading
from holdfast.images.formats.manifests import architecture, read_diff_ids, read_manifest
from holdfast.images.formats.references import parse, to_digest
from holdfast.images.kept.image import Freed, Image, InUse, Name, Source, listing, moment, read_name
from holdfast.images.kept.layers import HEX, LayerStore

PATIENCE = 5.0  # seconds
SHORT = re.compile("(?:sha256:)?([0-9a-f]{6,64})")  # of a digest, as people copy it from a list


class ImageStore:
    """The images of one agent. Safe for several threads and processes at once."""

    def __init__(self, root: Path, settings: ImageSettings = ImageSettings()) -> None:
        self.root = root
        self.settings = settings  # may be set at any time
        self.partial = root / "partial"
        self._blobs = root / "blobs/sha256"
        self._known: dict[str, Image] = {}
        self._listings: dict[str, tuple[str, ...] | None] = {}
        for folder in (self._blobs, self.partial):
            folder.mkdir(parents=True, exist_ok=True)
        spread(self.partial)
        root.chmod(0o700)  # layers hold set-user-ID programs, for containers only
        self.locks = Locks(self.partial, frozenset({"store", "index"}))
        self.layers = LayerStore(root / "layers/sha256", self.partial, self.locks, lambda: self.settings)
        self.layers.sweep()

    # -- finding --

    def resolve(self, reference: str) -> Image:
        """Find the image of a name, with or without a digest, or of a digest or its beginning. Raises NotFound.

        A digest is a manifest's, a configuration's (Docker's image id), or that of an index which is here.
        """
        return self.get(self.digest_of(reference))

    def digest_of(self, reference: str) -> str:
        """Find the manifest digest that a reference means here; the image may be damaged. Raises NotFound."""
        if DIGEST.fullmatch(reference):
            return self._digest_by(reference) or self._unknown(reference)
        try:
            parsed = parse(reference)
        except WrongCall:  # a digest without its algorithm is no name
            found = self._digest_by_start(reference)
            if found is None:
                raise
            return found
        if parsed.digest:
            return self._digest_by(parsed.digest) or self._unknown(reference)
        known = self.names().get(parsed.name)
        return known.digest if known else self._digest_by_start(reference) or self._unknown(reference)

    def get(self, digest: str) -> Image:
        """Read the image of a manifest digest. Raises NotFound if it, or a layer of it, is not here."""
        self.base(digest)
        return self._image(digest)

    def base(self, digest: str) -> tuple[tuple[Path, ...], Mapping[str, Any]]:
        """Read the layers of an image, lowest first, and its configuration, but not its names. Raises as `get`."""
        image = self._nameless(digest)
        for layer in image.layers:
            if not layer.is_dir():
                raise NotFound(f"find image {digest!r}: its layer {layer.name!r} is gone (pull or load it again)")
        return image.layers, image.config

    def has(self, image: Image) -> bool:
        """Check whether all of an image is still here."""
        return self._blob(image.digest).exists() and all(layer.is_dir() for layer in image.layers)

    def names(self) -> dict[str, Name]:
        """Read every full name (`docker.io/library/app:latest`) and what it leads to."""
        try:
            written = json.loads((self.root / "index.json").read_bytes())
        except FileNotFoundError:
            return {}
        return {name: read_name(name, value) for name, value in written.items()}

    def digests(self) -> list[str]:
        """List the manifest digest of every image that is here, with or without a name."""
        return [f"sha256:{blob}" for blob in self._blob_names() if self._mentions(blob) == ()]

    def read_blob(self, digest: str) -> bytes:
        """Read a manifest, an index or a configuration, byte for byte. Raises NotFound."""
        try:
            return self._blob(digest).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"find blob {digest!r}: it is not here (pull or load its image again)") from error

    def used_at(self, digest: str) -> float:
        """Find when an image was last used, or came: seconds since the epoch; 0.0 for one that is not here."""
        try:
            return self._blob(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def touch(self, digests: Collection[str]) -> None:
        """Note that images are used now; those that are not here are ignored."""
        for digest in digests:
            if DIGEST.fullmatch(digest):
                with suppress(FileNotFoundError):
                    os.utime(self._blob(digest))

    # -- putting images in --

    def add_image(
        self, manifest: bytes, config: bytes, names: Sequence[str], *, source: Source, top: bytes | None = None
    ) -> Image:
        """Store a manifest and its configuration, and have names lead to it. All its layers must be here.

        top: what the registry gave for the tag, if that is an index. Raises WrongState when the configuration is not
        the manifest's, or is not for this host; NotFound for a layer that is not here.
        """
        full = [each.name for each in map(parse, names) if not each.digest]  # a digest leads here without a name
        digest = digest_of(manifest)
        what = full[0] if full else digest
        with reading(f"store image {what!r}"):
            parsed = read_manifest(manifest)
            if parsed.config.digest != digest_of(config):
                found = digest_of(config)
                raise WrongState(f"its configuration is {found} (its manifest says {parsed.config.digest})")
            diff_ids = read_diff_ids(config, len(parsed.layers), architecture())
        with self.keep():
            missing = [each for each in diff_ids if not self.layers.has(each)]
            if missing:
                raise NotFound(f"store image {what!r}: its layer {missing[0]} is not here")
            self._add_blob(config)
            above = digest if top is None else self._add_blob(top)
            self._add_blob(manifest)  # the last: from now on it is an image
            self._set_names(full, digest, above, source)
            return self.get(digest)

    def tag(self, reference: str, name: str) -> Image:
        """Give an image one more name. Raises NotFound."""
        full = parse(name)
        if full.digest or full.transport != "docker":
            raise WrongCall(f"tag image {name!r}: not a name to give (expected [HOST/]NAME[:TAG])")
        with self.keep():
            image = self.resolve(reference)
            tops = [each.top for each in self.names().values() if each.digest == image.digest]
            self._set_names([full.name], image.digest, tops[0] if tops else image.digest, "tag")
            return self.get(image.digest)

    # -- taking images out --

    def keep(self) -> AbstractContextManager[bool]:
        """Keep everything that is here while the block runs: what it has put in or found, and no image needs yet."""
        return self.locks.hold("store", shared=True)

    def remove(self, reference: str, in_use: InUse = dict) -> Freed:
        """Remove a name, or (by digest) all names; an image that no name leads to any more is deleted.

        in_use: what must stay. Raises Conflict for such an image when its last name would go, NotFound when there is
        no such image. While something is being put in, the image's content stays, without a name, for the next
        `prune` or collection.
        """
        with self.locks.hold("index"):
            digest = self.digest_of(reference)
            index = self.names()
            name = _plain_name(reference)
            doomed = {name} if name in index else {key for key, each in index.items() if each.digest == digest}
            rest = {key: each for key, each in index.items() if key not in doomed}
            named = digest in {each.digest for each in rest.values()}
            used = in_use()
            if digest in used and not named:
                raise Conflict(
                    f"remove image {reference!r}: in use by {', '.join(sorted(used[digest])) or 'a container'} "
                    "(remove that first)"
                )
            self._write_index(rest)
        if named:
            return Freed()
        with self.alone() as alone:
            again = digest in {each.digest for each in self.names().values()}  # somebody has named it meanwhile
            return self.delete([digest], in_use()) if alone and not again else Freed()

    def prune(self, in_use: InUse = dict, *, all: bool = False, patience: float = PATIENCE) -> Freed:
        """Delete the images without a name that nobody uses, and layers that no image needs; with all, the unused
        images with names, too.

        Raises TryAgain where something is still being put in after so many seconds (patience).
        """
        with self.alone(patience) as alone:
            if not alone:
                raise TryAgain(
                    "prune images: an image is being pulled, built or loaded (try again when that is done)"
                )
            used = in_use()
            named = {each.digest for each in self.names().values()}
            doomed = [each for each in self.digests() if all or each not in named]
            return self.delete(doomed, used) + self.delete_orphans(math.inf)

    @contextmanager
    def alone(self, wait: float = 0) -> Iterator[bool]:
        """Hold off whoever puts something in (`keep`); yields whether that is so: somebody may be at it already, and
        still be after `wait` seconds.

        What was deleted meanwhile is off the disk when this returns: nobody is held off for that.
        """
        with self.locks.hold("store", wait=wait) as held:
            yield held
        if held:
            self.layers.sweep()

    def delete(self, digests: Collection[str], in_use: Collection[str] = ()) -> Freed:
        """Delete images, their names, and what no other image needs, but for what is in use. Only when `alone`."""
        doomed = set(digests) - set(in_use)
        with self.locks.hold("index"):
            index = self.names()
            rest = {name: each for name, each in index.items() if each.digest not in doomed}
            if rest != index:
                self._write_index(rest)
        gone, candidates = [], set[str]()
        for digest in sorted(doomed):
            if not self._blob(digest).exists():
                continue
            with suppress(NotFound):  # its configuration is lost
                parts = self._nameless(digest)
                candidates.update((parts.config_digest, *parts.diff_ids))
            self._blob(digest).unlink()
            self._known.pop(digest, None)
            gone.append(digest)
        needed = self._needed()
        layers = [each for each in candidates - needed if self.layers.has(each)]
        freed = Freed(tuple(gone), tuple(sorted(layers)), sum(self.layers.facts(each).size for each in layers))
        for each in candidates - needed:
            self.layers.drop(each)
            self._blob(each).unlink(missing_ok=True)
        for blob in self._blob_names():
            mentions = self._mentions(blob)
            if mentions and not needed & {f"sha256:{blob}"} and set(mentions) & set(gone):
                (self._blobs / blob).unlink(missing_ok=True)
        return freed

    def delete_orphans(self, before: float) -> Freed:
        """Delete layers and blobs that no image needs and that came before that moment (seconds since the epoch).

        Such are what pulls that broke off have left; a new try takes them up. Only for who is `alone`.
        """
        needed = self._needed()
        layers = [each for each in self.layers.all() if each not in needed and self.layers.came(each) < before]
        freed = Freed((), tuple(sorted(layers)), sum(self.layers.facts(each).size for each in layers))
        for each in layers:
            self.layers.drop(each)
        for path in self._blobs.iterdir():
            if f"sha256:{path.name}" not in needed and path.lstat().st_mtime < before:
                path.unlink(missing_ok=True)
        self.layers.drop_strays(before)
        with self.locks.hold("index"):  # nobody writes it now: such a file was left by a crash
            for path in self.root.glob("index.json.*.new"):
                path.unlink()
        return freed

    # -- inside --

    def _image(self, digest: str) -> Image:
        names = tuple(familiar(name) for name, each in sorted(self.names().items()) if each.digest == digest)
        return replace(self._nameless(digest), names=names)

    def _unknown(self, reference: str) -> NoReturn:
        near = _nearest(reference, list(self.names()))
        hint = f"; did you mean {familiar(near)!r}?" if near else ""
        raise NotFound(
            f"find image {reference!r}: no such image here{hint} (see `holdfast image list`; `holdfast image pull` "
            "gets one)"
        )

    def _digest_by(self, digest: str) -> str | None:
        """Find the manifest that any digest leads to: its own, an index's, a configuration's."""
        mentions = self._mentions(digest.removeprefix("sha256:"))
        if mentions == ():
            return digest
        here = self.digests()
        if mentions:
            named = (each.digest for each in self.names().values() if each.top == digest)  # by an index in the index
            return next((each for each in (*mentions, *named) if each in here), None)
        return next((each for each in here if self._config_digest(each) == digest), None)

    def _digest_by_start(self, text: str) -> str | None:
        match = SHORT.fullmatch(text)
        if match is None:
            return None
        start = f"sha256:{match[1]}"
        here = self.digests()
        found = {each for each in here if each.startswith(start) or self._config_digest(each).startswith(start)}
        if len(found) > 1:
            raise WrongCall(f"find image {text!r}: {len(found)} images begin so (write more of the digest)")
        return found.pop() if found else None

    def _config_digest(self, digest: str) -> str:
        try:
            return self._nameless(digest).config_digest
        except NotFound:
            return ""

    def _needed(self) -> set[str]:
        """List all blobs and layers of all images, and the indexes that lead to one of them or have a name."""
        here = self.digests()
        needed = {*here, *(each.top for each in self.names().values())}
        for digest in here:
            with suppress(NotFound):
                parts = self._nameless(digest)
                needed.update((parts.config_digest, *parts.diff_ids))
        needed.update(f"sha256:{blob}" for blob in self._blob_names() if set(self._mentions(blob) or ()) & set(here))
        return needed

    def _add_blob(self, data: bytes) -> str:
        digest = digest_of(data)
        write_whole(self._blob(digest), data)
        return digest

    def _blob(self, digest: str) -> Path:
        return self._blobs / to_digest(digest).removeprefix("sha256:")

    def _blob_names(self) -> list[str]:
        return [name for name in os.listdir(self._blobs) if HEX.fullmatch(name)]  # noqa: PTH208

    def _mentions(self, blob: str) -> tuple[str, ...] | None:
        """Read which manifests an index lists; () for a manifest, None for anything else or what is not here."""
        path = self._blobs / blob
        if not path.exists():
            return None
        if blob not in self._listings:
            with suppress(FileNotFoundError):
                self._listings[blob] = listing(path.read_bytes())
        return self._listings.get(blob)

    def _nameless(self, digest: str) -> Image:
        """Read an image, names aside; kept in memory, since its two documents never change."""
        if (known := self._known.get(digest)) and self._blob(digest).exists():
            return known
        try:
            manifest = json.loads(self._blob(digest).read_bytes())
            config_digest = manifest["config"]["digest"]
            document = json.loads(self._blob(config_digest).read_bytes())
        except (FileNotFoundError, KeyError) as error:
            raise NotFound(f"find image {digest!r}: no such image (pull or load it again)") from error
        diff_ids = tuple(document["rootfs"]["diff_ids"])
        self._known[digest] = Image(
            digest=digest,
            names=(),
            config=document.get("config") or {},
            layers=tuple(map(self.layers.folder, diff_ids)),
            size=sum(self.layers.facts(diff_id).size for diff_id in diff_ids),
            created=moment(document.get("created")),
            architecture=document.get("architecture", ""),
            config_digest=config_digest,
            diff_ids=diff_ids,
            manifest=manifest,
            document=document,
        )
        return self._known[digest]

    def _write_index(self, names: Mapping[str, Name]) -> None:
        index = {
            key: {"digest": each.digest, "top": each.top, "source": each.source, "at": each.at}
            for key, each in names.items()
        }
        write_whole(self.root / "index.json", json.dumps(index, indent=1, sort_keys=True).encode())

    def _set_names(self, names: Sequence[str], digest: str, top: str, source: Source) -> None:
        if names:
            with self.locks.hold("index"):
                fresh = {name: Name(name, digest, top, source, time.time()) for name in names}
                self._write_index({**self.names(), **fresh})

    def list(self, *, dangling: bool = False) -> list[Image]:
        """List every image that has a name, ordered by its first name; dangling: those without as well."""
        digests = {each.digest for each in self.names().values()}
        if dangling:
            digests.update(self.digests())
        images = []
        for digest in digests:
            with suppress(NotFound):
                images.append(self._image(digest))
        return sorted(images, key=lambda image: (not image.names, image.names, image.digest))


def _plain_name(reference: str) -> str:
    """Read the full name that a reference means; "" for a digest."""
    try:
        parsed = parse(reference)
    except WrongCall:
        return ""
    return "" if parsed.digest or DIGEST.fullmatch(reference) else parsed.name


def _nearest(reference: str, names: Sequence[str]) -> str:
    """Guess which full name was meant: of the same repository, or with a similar end; "" for none."""
    try:
        wanted = parse(reference)
    except WrongCall:
        return ""
    near = [name for name in names if parse(name).repository == wanted.repository]
    if not near:
        lasts = {name: parse(name).path.rpartition("/")[2] for name in names}
        closest = get_close_matches(wanted.path.rpartition("/")[2], set(lasts.values()), n=1, cutoff=0.65)
        near = [name for name, last in lasts.items() if last in closest]
    return next(iter(get_close_matches(wanted.name, near, n=1, cutoff=0.0)), "")
