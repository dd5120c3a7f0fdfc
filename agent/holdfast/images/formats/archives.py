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
from holdfast.images.formats.layout import (
    INDEXES,
    NAME,
    REF_NAME,
    Folder,
    Layout,
    Missing,
    member_of,
    open_files,
    reading,
)

BUNDLE = "vnd.holdfast.bundle.version"


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """An image in an archive.

    manifest: None for a docker-archive, which has none. layers: members, lowest first. part: what
    containers-transports(5) writes behind the archive's path for it, "" for the only one.
    """

    names: tuple[str, ...]
    config: bytes
    manifest: bytes | None
    layers: tuple[str, ...]
    part: str = ""


class ImageArchive:
    """An opened archive of either kind. architecture: whose images are taken."""

    def __init__(self, path: Path, layout: Layout, architecture: str) -> None:
        self.path, self.layout, self.architecture = path, layout, architecture
        self._is_oci = layout.has("oci-layout")

    @property
    def transport(self) -> Transport:
        """What containers-transports(5) calls such an archive."""
        if not self._is_oci:
            return "docker-archive"
        return "oci" if isinstance(self.layout.files, Folder) else "oci-archive"

    def images(self) -> list[ArchivedImage]:
        """List every image for the architecture. Raises WrongState for an archive without one, or of neither kind."""
        with reading(f"load {str(self.path)!r}"):
            return self._oci_images() if self._is_oci else self._docker_images()

    def _oci_images(self) -> list[ArchivedImage]:
        index = self.layout.index()
        if BUNDLE in (index.get("annotations") or {}):
            raise WrongState("is a bundle (holdfast bundle load; its images alone: --images-only)")
        found = [self._oci_image(*each) for each in self._manifests(index)]
        if not found:
            there = ", ".join(sorted({_platform(entry) for entry in index["manifests"]})) or "none at all"
            raise WrongState(f"no image for linux/{self.architecture} in it (it has: {there})")
        return found

    def _manifests(
        self, index: Mapping[str, Any], names: tuple[str, ...] = (), part: str = ""
    ) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Find manifest digests with names and part; of an index inside the index, the one for the architecture."""
        for entry in index["manifests"]:
            annotations = entry.get("annotations") or {}
            own, mine = self._names(annotations) or names, part or annotations.get(REF_NAME, "")
            if entry.get("mediaType") in INDEXES:
                yield from self._manifests(json.loads(self.layout.blob(entry["digest"])), own, mine)
            elif "platform" not in entry or _platform(entry) == f"linux/{self.architecture}":
                yield entry["digest"], own, mine

    def _oci_image(self, digest: str, names: tuple[str, ...], part: str) -> ArchivedImage:
        manifest, config, layers = self.layout.image(digest)
        return ArchivedImage(names, config, manifest, tuple(member_of(each["digest"]) for each in layers), part)

    def _names(self, annotations: Mapping[str, str]) -> tuple[str, ...]:
        """Name an image as its descriptor says; a bare tag, as skopeo writes it, gets the file's name."""
        name = annotations.get(NAME) or annotations.get(REF_NAME)
        if name and NAME not in annotations and not re.search("[/:]", name):
            name = f"{self.path.name.split('.')[0].lower()}:{name}"
        return (name,) if name else ()

    def _docker_images(self) -> list[ArchivedImage]:
        try:
            entries = json.loads(self.layout.read("manifest.json"))
        except Missing as error:
            raise WrongState(
                "neither an OCI layout nor a docker-archive (a root file system is taken by `holdfast image import`)"
            ) from error
        return [
            ArchivedImage(
                tuple(entry.get("RepoTags") or ()),
                self.layout.read(entry["Config"]),
                None,
                tuple(entry["Layers"]),
                f"@{number}" if len(entries) > 1 else "",
            )
            for number, entry in enumerate(entries)
        ]


@contextmanager
def open_archive(path: Path, scratch: Path, architecture: str) -> Iterator[ImageArchive]:
    """Open an archive for reading; a compressed one is unpacked into scratch while the block runs."""
    with ExitStack() as stack:
        with reading(f"load {str(path)!r}"):
            files = stack.enter_context(open_files(path, scratch))
        yield ImageArchive(path, Layout(files), architecture)


def path_of(opened: int) -> str:
    """Name a path to what a descriptor of this process has open, for whoever runs as the same user."""
    return f"/proc/{os.getpid()}/fd/{opened}"


def _platform(entry: Mapping[str, Any]) -> str:
    platform = entry.get("platform") or {}
    return f"{platform.get('os', 'unknown')}/{platform.get('architecture', 'unknown')}"
