"""Find the images in files of this host: OCI layouts, as directories or archives, and docker-archives.

Nothing is unpacked here; `incoming.load` does that. Source: Docker Image Specification v1.2 (manifest.json).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import WrongState
from holdfast.grammar.images import Transport
from holdfast.images.formats.layout import INDEXES, NAME, REF_NAME, Layout, Missing, member_of, open_layout, reading
from holdfast.questions import Json

BUNDLE = "vnd.holdfast.bundle.version"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """An image in an archive.

    manifest: None for a docker-archive, which has none. layers: members, lowest first. transport: what
    containers-transports(5) calls such an archive; part: what it writes behind its path for this image.
    """

    names: tuple[str, ...]
    config: bytes
    manifest: bytes | None
    layers: tuple[str, ...]
    transport: Transport
    part: str


@contextmanager
def open_archive(path: Path, scratch: Path, architecture: str) -> Iterator[tuple[Layout, list[ArchivedImage]]]:
    """Open an archive of either kind, and list every image for the architecture in it.

    A compressed one is unpacked into scratch while the block runs. Raises WrongState for an archive without such an
    image, or of neither kind.
    """
    with ExitStack() as stack:
        with reading(f"load {str(path)!r}"):
            layout = stack.enter_context(open_layout(path, scratch))
            is_oci = layout.has("oci-layout")
            images = _oci_images(layout, path, architecture) if is_oci else _docker_images(layout)
        yield layout, images


def _oci_images(layout: Layout, path: Path, architecture: str) -> list[ArchivedImage]:
    index = layout.index()
    if BUNDLE in (index.get("annotations") or {}):
        raise WrongState("is a bundle (holdfast bundle load; its images alone: --images-only)")
    found = []
    transport: Transport = "oci" if path.is_dir() else "oci-archive"
    for digest, names, part in _manifests(layout, index, path, architecture):
        manifest, config, layers = layout.image(digest)
        members = tuple(member_of(each["digest"]) for each in layers)
        found.append(ArchivedImage(names, config, manifest, members, transport, part))
    if not found:
        there = ", ".join(sorted({_platform(entry) for entry in index["manifests"]})) or "none at all"
        raise WrongState(f"no image for linux/{architecture} in it (it has: {there})")
    return found


def _manifests(
    layout: Layout, index: Json, path: Path, architecture: str, names: tuple[str, ...] = (), part: str = ""
) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Find manifest digests with names and part; of an index inside the index, the one for the architecture."""
    for entry in index["manifests"]:
        annotations = entry.get("annotations") or {}
        own, mine = _names(annotations, path) or names, part or annotations.get(REF_NAME, "")
        if entry.get("mediaType") in INDEXES:
            inner = json.loads(layout.blob(entry["digest"]))
            yield from _manifests(layout, inner, path, architecture, own, mine)
        elif "platform" not in entry or _platform(entry) == f"linux/{architecture}":
            yield entry["digest"], own, mine


def _names(annotations: Mapping[str, str], path: Path) -> tuple[str, ...]:
    """Name an image as its descriptor says; a bare tag, as skopeo writes it, gets the file's name."""
    name = annotations.get(NAME) or annotations.get(REF_NAME)
    if name and NAME not in annotations and not re.search("[/:]", name):
        name = f"{path.name.split('.')[0].lower()}:{name}"
    return (name,) if name else ()


def _docker_images(layout: Layout) -> list[ArchivedImage]:
    try:
        entries = json.loads(layout.read("manifest.json"))
    except Missing as error:
        raise WrongState(
            "neither an OCI layout nor a docker-archive (a root file system is taken by `holdfast image import`)"
        ) from error
    found = []
    for number, entry in enumerate(entries):
        names, part = tuple(entry.get("RepoTags") or ()), f"@{number}" if len(entries) > 1 else ""
        config, layers = layout.read(entry["Config"]), tuple(entry["Layers"])
        found.append(ArchivedImage(names, config, None, layers, "docker-archive", part))
    return found


def path_of(opened: int) -> str:
    """Name a path to what a descriptor of this process has open, for whoever runs as the same user."""
    return f"/proc/{os.getpid()}/fd/{opened}"


def _platform(entry: Mapping[str, Any]) -> str:
    platform = entry.get("platform") or {}
    return f"{platform.get('os', 'unknown')}/{platform.get('architecture', 'unknown')}"
