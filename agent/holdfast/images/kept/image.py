"""Describe images as values: names, digests, documents. No I/O except for looking into their layers."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from holdfast.images.kept.lookup import find, read_small

Source = Literal["registry", "load", "import", "build", "commit", "bundle", "tag"]
#: Tells which images are in use: digest → who uses it. It is asked when nothing can change any more.
InUse = Callable[[], Mapping[str, Collection[str]]]


@dataclass(frozen=True, slots=True)
class Name:
    """A name and what it leads to.

    digest: of the manifest for this platform; top: what the registry gave for the tag, an index or that manifest.
    at: when it came to lead there, seconds since the epoch.
    """

    name: str
    digest: str
    top: str
    source: Source
    at: float


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is wholly here.

    digest: of its manifest (`sha256:…`); config_digest: what Docker calls the image's id. config: the `config` object
    of its OCI configuration (Entrypoint, Cmd, Env, User, WorkingDir, StopSignal, …), document: all of that.
    layers: unpacked, lowest first, and their diff_ids. size: bytes, of its layers' plain archives.
    created: seconds since the epoch, 0.0 if the image does not say.
    """

    digest: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    layers: tuple[Path, ...]
    size: int
    created: float
    architecture: str
    config_digest: str = ""
    diff_ids: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[Mapping[str, Any]]:
        """How it was made, oldest step first (OCI image spec, config.md: `history`); may be empty."""
        return [step for step in self.document.get("history") or () if isinstance(step, dict)]

    def lookup(self, path: str) -> int | None:
        """Find the st_mode of what path leads to inside the image, links followed; None if nothing is there."""
        found = find(self.layers, path)
        return None if found is None else found.lstat().st_mode

    def read_file(self, path: str) -> bytes | None:
        """Read the regular file that path leads to inside the image; None if there is none."""
        found = find(self.layers, path)
        if found is None or not stat.S_ISREG(found.lstat().st_mode):
            return None
        return read_small(found)


@dataclass(frozen=True, slots=True)
class Freed:
    """What went: images (digests) and layers (diff ids), and their size in bytes."""

    images: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    size: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.images + other.images, self.layers + other.layers, self.size + other.size)


def whole_history(history: Sequence[Mapping[str, Any]], layers: int) -> list[Mapping[str, Any]]:
    """Complete the steps of an image of so many layers with an unknown one for each layer without a step.

    Steps that tell of more layers than there are can't be right: all of them are unknown then.
    """
    missing = layers - sum(not step.get("empty_layer") for step in history)
    known, unknown = (list(history), missing) if missing >= 0 else ([], layers)
    return [*known, *({"created_by": "unknown"} for _ in range(unknown))]


def listing(blob: bytes) -> tuple[str, ...] | None:
    """Read which manifests an index lists; () for a manifest, None for anything else."""
    try:
        document = json.loads(blob)
        if isinstance(document.get("manifests"), list):
            return tuple(str(each["digest"]) for each in document["manifests"]) or None
        return () if "digest" in document["config"] and "layers" in document else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_name(name: str, value: Any) -> Name:
    """Read an entry of index.json."""
    if isinstance(value, str):  # as stores of old have it
        return Name(name, value, value, "load", 0.0)
    return Name(name, value["digest"], value.get("top") or value["digest"], value["source"], float(value["at"]))


def moment(text: str | None) -> float:
    """Turn an RFC 3339 time into seconds since the epoch; 0.0 for none."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except (ValueError, TypeError):
        return 0.0
