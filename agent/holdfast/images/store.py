"""Archives on this host → images by name and digest, unpacked and ready to be stacked.

    images/blobs/sha256/HEX      manifests and configurations, as the OCI image spec has them
    images/layers/sha256/HEX/    one unpacked directory per layer, by diff id; HEX.size next to it
    images/index.json            name → manifest digest
    images/partial/              what is being unpacked; counts for nothing

The command line imports, loads and lists; `node` resolves names while it stages, and stacks the layers.
An index entry is written last, when all that it names is on disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.drivers import remove_tree
from holdfast.errors import Conflict, NotFound, WrongCall, WrongState
from holdfast.images.archives import Archive, Found, open_archive, open_regular, plain
from holdfast.images.lookup import find, read_small
from holdfast.images.references import DIGEST, REFERENCE, familiar, normalize, parse_changes, to_digest
from holdfast.images.unpack import unpack

ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "loongarch64": "loong64",
}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is wholly here.

    digest: of its manifest (`sha256:…`). config: the `config` object of its OCI configuration (Entrypoint, Cmd, Env,
    User, WorkingDir, StopSignal, …). layers: unpacked, lowest first. size: bytes, of its layers' plain archives.
    created: seconds since the epoch, 0.0 if the image does not say.
    """

    digest: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    layers: tuple[Path, ...]
    size: int
    created: float
    architecture: str

    def lookup(self, path: str) -> int | None:
        """The mode (as st_mode) of what path leads to inside the image, links followed; None: nothing is there."""
        found = find(self.layers, path)
        return None if found is None else found.lstat().st_mode

    def read_file(self, path: str) -> bytes | None:
        """The content of the regular file that path leads to inside the image; None when there is none."""
        found = find(self.layers, path)
        if found is None or not stat.S_ISREG(found.lstat().st_mode):
            return None
        return read_small(found)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a manifest and its configuration say, names aside; never changes for a digest."""

    config: Mapping[str, Any]
    diff_ids: tuple[str, ...]
    size: int
    created: float
    architecture: str
    blobs: tuple[str, ...] = field(default=())


class ImageStore:
    """The images of one agent. Safe for several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs/sha256"
        self._layers = root / "layers/sha256"
        self._partial = root / "partial"
        self._known: dict[str, _Parts] = {}
        for folder in (self._blobs, self._layers, self._partial):
            folder.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)  # layers hold set-user-ID programs, for containers only
        self._sweep()

    def import_rootfs(self, tar: Path, name: str, changes: Sequence[str] = ()) -> Image:
        """Make an image of one layer from the tar of a root file system (plain, gzip, xz, bzip2 or zstd).

        changes: as `docker import --change` has them: CMD, ENTRYPOINT, ENV, WORKDIR, USER, EXPOSE, LABEL, VOLUME,
        STOPSIGNAL. The same archive and changes make the same digest, so that nothing restarts for it.
        """
        name = normalize(name)
        config = parse_changes(changes)
        with self._lock("store", shared=True):
            with _open(tar) as stream, plain(stream) as archive:
                diff_id, size, newest = self._add_layer(archive, None)
            created = datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            document = {
                "architecture": architecture(),
                "config": config,
                "created": created,
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            }
            digest = self._add_image(json.dumps(document, sort_keys=True).encode(), [(diff_id, size)])
            self._set_names(digest, [name])
        return self.get(digest)

    def load(self, path: Path, name: str | None = None) -> list[Image]:
        """Load the images of an OCI layout (directory or archive) or of a docker-archive.

        name: instead of what the archive calls its image. Raises WrongState for what is damaged, or made for
        another architecture than this host's.
        """
        with self._lock("store", shared=True), open_archive(path, self._partial, architecture()) as archive:
            found = archive.images()
            if name is not None and len(found) != 1:
                raise WrongCall(f"load {str(path)!r}: holds {len(found)} images (one name can't be given to all)")
            return [self._load(archive, image, path, name) for image in found]

    def resolve(self, reference: str) -> Image:
        """The image of a name (`app`, `app:1`, `host/app:1@sha256:…`) or digest. Raises NotFound."""
        if DIGEST.fullmatch(reference):
            return self.get(reference)
        match = REFERENCE.fullmatch(reference)
        if match is not None and match["digest"]:
            return self.get(match["digest"])
        name = normalize(reference)
        index = self._read_index()
        if name not in index:
            near = get_close_matches(name, index, n=1)
            hint = f"; did you mean {familiar(near[0])!r}?" if near else ""
            raise NotFound(
                f"find image {reference!r}: no such image{hint} (images can only be imported or loaded for now, "
                "with `holdfast image import` or `holdfast image load`: registries come later)"
            )
        return self.get(index[name])

    def get(self, digest: str) -> Image:
        """The image of a manifest digest. Raises NotFound when it, or a layer of it, is not here."""
        image = self._image(digest)
        for layer in image.layers:
            if not layer.is_dir():
                raise NotFound(f"find image {digest!r}: its layer {layer.name!r} is gone (import or load it again)")
        return image

    def list(self) -> list[Image]:
        """Every image that has a name, ordered by its first name."""
        images = [self._image(digest) for digest in set(self._read_index().values())]
        return sorted(images, key=lambda image: image.names)

    def remove(self, reference: str, in_use: Collection[str] | Mapping[str, Collection[str]] = ()) -> None:
        """Take a name away, or (by digest) all names; what no name leads to any more is deleted.

        in_use: digests that must stay; as a mapping, digest → who uses it. Raises Conflict for one of them when its
        last name would go, NotFound when there is no such image.
        """
        with self._lock("store", shared=False):
            digest = self.resolve(reference).digest
            index = self._read_index()
            by_name = not DIGEST.fullmatch(reference) and "@" not in reference
            doomed = {normalize(reference)} if by_name else {key for key, value in index.items() if value == digest}
            rest = {key: value for key, value in index.items() if key not in doomed}
            if digest in in_use and digest not in rest.values():
                users = ", ".join(sorted(in_use[digest])) if isinstance(in_use, Mapping) else ""
                raise Conflict(f"remove image {reference!r}: in use by {users or 'a container'} (remove that first)")
            self._write_index(rest)
            self._drop_unneeded({*rest.values(), *in_use})

    def _image(self, digest: str) -> Image:
        parts = self._parts(digest)
        layers = tuple(self._layer(diff_id) for diff_id in parts.diff_ids)
        names = tuple(familiar(name) for name, value in sorted(self._read_index().items()) if value == digest)
        return Image(digest, names, parts.config, layers, parts.size, parts.created, parts.architecture)

    def _load(self, archive: Archive, found: Found, path: Path, name: str | None) -> Image:
        diff_ids = _diff_ids(found.config, path)
        if len(diff_ids) != len(found.layers):
            raise WrongState(f"load {str(path)!r}: {len(found.layers)} layers with {len(diff_ids)} diff ids")
        names = [normalize(each) for each in ([name] if name else found.names)]
        if not names:
            raise WrongCall(f"load {str(path)!r}: the image in it has no name (give one)")
        layers = [
            (diff_id, self._load_layer(archive, diff_id, layer))
            for diff_id, layer in zip(diff_ids, found.layers, strict=True)
        ]
        digest = self._add_image(found.config, layers, found.manifest)
        self._set_names(digest, names)
        return self.get(digest)

    def _load_layer(self, archive: Archive, diff_id: str, member: str) -> int:
        if self._layer(diff_id).is_dir():
            return self._size(diff_id)
        with archive.open(member) as stream, plain(stream) as layer:
            return self._add_layer(layer, diff_id)[1]

    def _add_layer(self, archive: BinaryIO, expected: str | None) -> tuple[str, int, int]:
        """Unpack into partial/, verify, and only then call it a layer. One at a time for one diff id."""
        key = expected.removeprefix("sha256:") if expected else uuid.uuid4().hex
        with self._lock(key, shared=False):
            if expected and self._layer(expected).is_dir():
                return expected, self._size(expected), 0
            folder = self._partial / key
            with suppress(FileNotFoundError):
                remove_tree(folder)
            folder.mkdir()
            folder.chmod(0o755)
            try:
                unpacked = unpack(archive, folder)
                if expected not in (None, unpacked.diff_id):
                    raise WrongState(
                        f"unpack layer {expected!r}: its content is {unpacked.diff_id} (damaged archive)"
                    )
                self._finish_layer(folder, unpacked.diff_id, unpacked.size)
            finally:
                with suppress(FileNotFoundError):
                    remove_tree(folder)
        return unpacked.diff_id, unpacked.size, unpacked.newest

    def _finish_layer(self, folder: Path, diff_id: str, size: int) -> None:
        target = self._layer(diff_id)
        _write_whole(target.with_suffix(".size"), str(size).encode())
        with suppress(OSError):  # ENOTEMPTY: an import of the same archive was faster
            folder.rename(target)
        _sync(target.parent)
        if not target.is_dir():
            raise WrongState(f"unpack layer {diff_id!r}: could not be moved to {str(target)!r}")

    def _add_image(self, config: bytes, layers: Sequence[tuple[str, int]], manifest: bytes | None = None) -> str:
        """Store the configuration and the manifest; one is made for an image that comes without."""
        config_digest = self._add_blob(config)
        if manifest is None:
            document = {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "digest": config_digest, "size": len(config)},
                "layers": [{"mediaType": LAYER, "digest": diff_id, "size": size} for diff_id, size in layers],
            }
            manifest = json.dumps(document, sort_keys=True).encode()
        return self._add_blob(manifest)

    def _add_blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        _write_whole(self._blobs / digest, data)
        return f"sha256:{digest}"

    def _parts(self, digest: str) -> _Parts:
        """What is read from the two blobs; kept, for they never change."""
        if (known := self._known.get(digest)) and (self._blobs / digest.removeprefix("sha256:")).exists():
            return known
        try:
            manifest = json.loads(self._read_blob(digest))
            config_digest = manifest["config"]["digest"]
            config = json.loads(self._read_blob(config_digest))
        except FileNotFoundError as error:
            raise NotFound(f"find image {digest!r}: no such image (import or load it again)") from error
        diff_ids = tuple(config["rootfs"]["diff_ids"])
        parts = _Parts(
            config=config.get("config") or {},
            diff_ids=diff_ids,
            size=sum(self._size(diff_id) for diff_id in diff_ids),
            created=_moment(config.get("created")),
            architecture=config.get("architecture", ""),
            blobs=(digest, config_digest),
        )
        self._known[digest] = parts
        return parts

    def _read_blob(self, digest: str) -> bytes:
        return (self._blobs / to_digest(digest).removeprefix("sha256:")).read_bytes()

    def _layer(self, diff_id: str) -> Path:
        return self._layers / diff_id.removeprefix("sha256:")

    def _size(self, diff_id: str) -> int:
        try:
            return int(self._layer(diff_id).with_suffix(".size").read_text())
        except FileNotFoundError:
            return 0

    def _read_index(self) -> dict[str, str]:
        try:
            index: dict[str, str] = json.loads((self.root / "index.json").read_bytes())
        except FileNotFoundError:
            return {}
        return index

    def _write_index(self, index: Mapping[str, str]) -> None:
        _write_whole(self.root / "index.json", json.dumps(index, indent=1, sort_keys=True).encode())

    def _set_names(self, digest: str, names: Sequence[str]) -> None:
        with self._lock("index", shared=False):
            self._write_index({**self._read_index(), **dict.fromkeys(names, digest)})

    def _drop_unneeded(self, digests: Collection[str]) -> None:
        """Delete all blobs and layers that these images don't need: those of an interrupted load as well."""
        needed: set[str] = set()
        for digest in digests:
            with suppress(NotFound):
                parts = self._parts(digest)
                needed.update(parts.blobs, parts.diff_ids)
        keep = {each.removeprefix("sha256:") for each in needed}
        for blob in self._blobs.iterdir():
            if blob.name not in keep:
                blob.unlink()
        for layer in self._layers.iterdir():
            if layer.stem not in keep:
                self._delete_layer(layer)

    def _delete_layer(self, layer: Path) -> None:
        if layer.suffix:
            layer.unlink()
            return
        doomed = self._partial / uuid.uuid4().hex  # half a layer must not be found under a layer's name
        layer.rename(doomed)
        remove_tree(doomed)

    def _sweep(self) -> None:
        """Delete what a killed process left half unpacked; what a living one unpacks is locked."""
        for key in {path.name.removesuffix(".lock") for path in self._partial.iterdir()} - {"store", "index"}:
            with self._lock(key, shared=False, wait=False) as locked:
                if locked:
                    with suppress(OSError):
                        remove_tree(self._partial / key)

    @contextmanager
    def _lock(self, key: str, *, shared: bool, wait: bool = True) -> Iterator[bool]:
        """Hold a flock(2) of that name against threads and processes; yields whether it is held."""
        path = self._partial / f"{key}.lock"
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                os.close(descriptor)
                yield False
                return
            if _still(path, descriptor):
                break
            os.close(descriptor)
        try:
            yield True
        finally:
            if key not in ("store", "index"):
                path.unlink(missing_ok=True)
            os.close(descriptor)


def architecture() -> str:
    """This host's architecture as images name it (GOARCH)."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def _diff_ids(config: bytes, path: Path) -> list[str]:
    """The layers that a configuration names, lowest first. Raises WrongState if they are not for this host."""
    try:
        document = json.loads(config)
        machine, system = document["architecture"], document.get("os", "linux")
        diff_ids = [to_digest(diff_id) for diff_id in document["rootfs"]["diff_ids"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WrongState(f"load {str(path)!r}: damaged image configuration: {error!r}") from error
    if (system, machine) != ("linux", architecture()):
        raise WrongState(
            f"load {str(path)!r}: the image is for {system}/{machine} (this host is linux/{architecture()})"
        )
    return diff_ids


def _moment(text: str | None) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise NotFound(f"open {str(path)!r}: no such file") from error


def _still(path: Path, descriptor: int) -> bool:
    """Whether the lock file at path is the one that is locked: a former holder may have deleted it meanwhile."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power failure."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
