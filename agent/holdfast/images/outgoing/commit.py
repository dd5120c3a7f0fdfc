"""Make a new image of a container's writable layer and the image below it. `node` finds the layer, and pauses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from holdfast.images.formats.layout import CONFIG, LAYER, descriptor, manifest_of
from holdfast.images.kept.image import Image, whole_history
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.unpack import Unpacked, piped
from holdfast.questions import Sink

APPENDED = ("Env", "Labels", "ExposedPorts", "Volumes")  # of a configuration: what is added to, not replaced


@dataclass(frozen=True, slots=True)
class Note:
    """What a new image says of its making. at: seconds since the epoch."""

    by: str
    message: str
    author: str
    at: float


def commit_image(
    store: ImageStore, base: Image, write: Callable[[Sink], None], name: str, config: Mapping[str, Any], note: Note
) -> Image:
    """Make an image of base and one more layer, whose archive write writes, and give it a name.

    The layer goes straight into the store: there is no other copy of it. config: the whole `config` object of the new
    image. Raises what write raises, and what `LayerStore.add` does.
    """
    with store.keep():
        with piped(write) as stream:
            layer = store.layers.add(stream)
        made = datetime.fromtimestamp(note.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        step = {"created": made, "created_by": note.by, "comment": note.message, "author": note.author}
        below = whole_history(base.history, len(base.diff_ids))
        document = {
            **base.document,
            "created": made,
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [*base.diff_ids, layer.diff_id]},
            "history": [*below, {key: value for key, value in step.items() if value}],
        }
        if note.author:
            document["author"] = note.author
        for leftover in ("container", "container_config", "id", "parent"):  # of Docker's, about another container
            document.pop(leftover, None)
        data = json.dumps(document, sort_keys=True).encode()
        return store.add_image(_manifest(base, data, layer), data, [name], source="commit")


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the changes of `parse_changes` to a configuration: variables, labels, ports and volumes are added."""
    result = {**config, **{key: value for key, value in changes.items() if key not in APPENDED}}
    for key in APPENDED:
        if key not in changes:
            continue
        if key == "Env":
            pairs = dict(entry.partition("=")[::2] for entry in (*(config.get("Env") or ()), *changes["Env"]))
            result["Env"] = [f"{name}={value}" for name, value in pairs.items()]
        else:
            result[key] = {**(config.get(key) or {}), **changes[key]}
    return result


def _manifest(base: Image, config: bytes, layer: Unpacked) -> bytes:
    """Write the manifest: layers of the base keep their descriptors, so a registry is not sent them again."""
    below = [{**each, "mediaType": _oci_type(str(each.get("mediaType", "")))} for each in base.manifest["layers"]]
    layers = [*below, {"mediaType": LAYER, "digest": layer.diff_id, "size": layer.size}]
    return manifest_of(descriptor(config, CONFIG), layers)


def _oci_type(media_type: str) -> str:
    """Name a layer's media type as OCI does, where Docker's schema 2 has another name."""
    if not media_type.startswith("application/vnd.docker."):
        return media_type or LAYER
    return f"{LAYER}+gzip" if media_type.endswith("gzip") else LAYER
