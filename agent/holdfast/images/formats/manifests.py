"""Read the documents of a registry (index, manifest, configuration), and choose what is for this host. Pure.

Sources: OCI image spec 1.1 (image-index.md, manifest.md, config.md), Docker Image Manifest V2, Schema 2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import WrongState
from holdfast.grammar.images import DIGEST
from holdfast.images.formats.layout import CONFIG, INDEXES, digest_of

CONFIGS = (CONFIG, "application/vnd.docker.container.image.v1+json")
SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+"
LARGEST_CONFIG = 16 << 20  # bytes
LARGEST_BLOB = 1 << 46  # a manifest that claims more lies
DEEPEST_INDEX = 4
LISTED = 12  # platforms that an error names

#: What uname(2) calls a machine → what images call its architecture (GOARCH), where the two differ.
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "loongarch64": "loong64",
}
#: Variants of an architecture, best first; "": none is given. A machine of one variant runs those behind it, too.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "arm": ("v7", "v6", "v5", ""),
    "arm64": ("v8", ""),
    "amd64": ("", "v1"),
}


class Unfit(WrongState):
    """Why an image can't be taken, in words that follow `pull 'app': `."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of one of its parts. size: bytes."""

    digest: str
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image consists of; layers lowest first, one may come more than once."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of an image: the digest of what it unpacks to, and how it is packed."""

    diff_id: str
    blob: Descriptor


def architecture() -> str:
    """Name this host's architecture as images do (GOARCH)."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def check_digest(data: bytes, digest: str) -> None:
    """Raise Unfit for content that is not what was asked for."""
    if (found := digest_of(data)) != digest:
        raise Unfit(f"the registry sent {found} for {digest}")


def read_document(data: bytes) -> Mapping[str, Any]:
    """Read an index or manifest. Raises Unfit."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        what = "a web page" if data.lstrip()[:1] == b"<" else "nothing that is JSON"
        raise Unfit(f"the registry sent {what} (expected a manifest)") from None
    if not isinstance(document, dict):
        raise Unfit("the registry sent JSON that is no manifest")
    return document


def is_index(document: Mapping[str, Any]) -> bool:
    """Check whether a document lists manifests, and is none."""
    return document.get("mediaType") in INDEXES or ("manifests" in document and "layers" not in document)


def choose(index: Mapping[str, Any], architecture: str, variant: str | None = None) -> Descriptor:
    """Choose the manifest (or inner index) for an architecture. variant: None means this host's. Raises Unfit."""
    entries = index.get("manifests")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Unfit("its index is damaged")
    if not entries:
        raise Unfit("its index is empty: there is no image in it for any platform")
    if variant is None:
        variant = "v6" if os.uname().machine == "armv6l" else ""
    variants = VARIANTS.get(architecture, ("",))
    variants = variants[variants.index(variant) if variant and variant in variants else 0 :]
    fitting = [
        (variants.index(_platform(entry)[2]), number, entry)
        for number, entry in enumerate(entries)
        if _platform(entry)[:2] == ("linux", architecture) and _platform(entry)[2] in variants
    ]
    if fitting:
        return _descriptor(min(fitting)[2])
    for entry in entries:  # its own configuration, or the index inside, says more
        if "platform" not in entry:
            return _descriptor(entry)
    there = sorted({"/".join(filter(None, _platform(entry))) for entry in entries} - {"unknown/unknown"})
    more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
    raise Unfit(
        f"there is no image for linux/{architecture} (it has {', '.join(there[:LISTED]) or 'none at all'}{more})"
    )


def find_manifest(
    top: bytes, fetch: Callable[[Descriptor], bytes], architecture: str, variant: str | None = None
) -> bytes:
    """Follow an index, and the indexes in it, to the manifest for an architecture. Raises Unfit.

    fetch: called for what an index lists. variant: as in `choose`.
    """
    manifest = top
    for _ in range(DEEPEST_INDEX + 1):
        document = read_document(manifest)
        if not is_index(document):
            return manifest
        chosen = choose(document, architecture, variant)
        manifest = fetch(chosen)
        check_digest(manifest, chosen.digest)
    raise Unfit(f"its indexes are nested deeper than {DEEPEST_INDEX}")


def read_manifest(data: bytes) -> Manifest:
    """Read the manifest of one image. Raises Unfit for what is none, or an artifact of another kind."""
    document = read_document(data)
    kind = str(document.get("mediaType") or "")
    if kind.startswith(SCHEMA1) or document.get("schemaVersion") == 1:
        raise Unfit("its manifest is of schema 1, which nobody writes any more (push the image again)")
    config = document.get("config")
    if "artifact.manifest" in kind or not isinstance(config, dict):
        raise Unfit(f"it is no image but {document.get('artifactType') or kind or 'something else'!r}")
    if (made := str(config.get("mediaType") or CONFIGS[0])) not in CONFIGS:
        raise Unfit(f"it is no image but an artifact ({str(document.get('artifactType') or made)[:100]})")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise Unfit("its manifest is damaged: it has no layers")
    blobs = tuple(_descriptor(layer) for layer in layers)
    for blob in blobs:
        if "+encrypted" in blob.media_type:
            raise Unfit("its layers are encrypted, which is not supported")
    parsed = Manifest(_descriptor(config), blobs)
    if parsed.config.size > LARGEST_CONFIG:
        raise Unfit(f"its configuration has {parsed.config.size} bytes (at most {LARGEST_CONFIG})")
    return parsed


def read_diff_ids(config: bytes, layers: int, architecture: str) -> Sequence[str]:
    """Read the digest of each layer's plain archive, lowest first. Raises Unfit, for another platform, too."""
    try:
        document = json.loads(config)
        system, machine = str(document.get("os") or "linux"), str(document.get("architecture") or architecture)
        diff_ids = document["rootfs"]["diff_ids"]
        sound = all(isinstance(each, str) and DIGEST.fullmatch(each) for each in diff_ids)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Unfit("its configuration is damaged") from None
    if (system, machine) != ("linux", architecture):
        raise Unfit(f"the image is for {system[:20]}/{machine[:20]} (expected linux/{architecture})")
    if not sound or len(diff_ids) != layers:
        raise Unfit(f"it has {layers} layers, and {len(diff_ids)} diff ids for them")
    return list(diff_ids)


def _platform(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    platform = entry.get("platform")
    if not isinstance(platform, dict):
        return ("unknown", "unknown", "")
    return tuple(str(platform.get(key) or "") for key in ("os", "architecture", "variant"))  # type: ignore[return-value]


def _descriptor(descriptor: Any) -> Descriptor:
    try:
        digest, size = descriptor["digest"], descriptor["size"]
        media_type = str(descriptor.get("mediaType") or "")
    except (KeyError, TypeError, AttributeError):
        raise Unfit("its manifest is damaged: a part has no digest or no size") from None
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise Unfit(f"its manifest names {str(digest)[:80]!r} (expected sha256: and 64 hexadecimal digits)")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST_BLOB:
        raise Unfit(f"its manifest is damaged: {str(size)[:40]!r} is no size")
    return Descriptor(digest, size, media_type)
