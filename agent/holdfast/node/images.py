"""Answer the questions about images, and delete unused ones when the disk is full.

What takes long is an iterator that yields its progress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, WrongCall
from holdfast.grammar.images import familiar
from holdfast.grammar.quantities import about
from holdfast.images.formats.references import parse
from holdfast.images.incoming.load import import_rootfs
from holdfast.images.incoming.transfers import Transfer
from holdfast.images.kept.collect import collect
from holdfast.images.kept.image import Freed, Image, Name, moment
from holdfast.images.outgoing.write import FORMATS, push, save
from holdfast.node.bundle import load_bundle
from holdfast.node.capture import commit_container, export_container, export_image
from holdfast.node.context import Context
from holdfast.node.newer import outdated
from holdfast.questions import ImageQuestions, Json, Sink, Steps
from holdfast.workers import in_background

BEAT = 0.1  # seconds between looks at a transfer


class ImageAnswers(ImageQuestions):
    """The answers about images."""

    def __init__(self, context: Context) -> None:
        self.context = context

    # -- looking --

    def images(self) -> Sequence[Json]:
        """Return every image, once for each of its names; one without a name has the ref ""."""
        users = image_users(self.context)
        names = self.context.images.names()
        return [
            {**image_json(image, names.get(full)), "ref": short, "used_by": sorted(users.get(image.digest, ()))}
            for image in self.context.images.list(dangling=True)
            for short, full in ([(name, parse(name).name) for name in image.names] or [("", "")])
        ]

    def image(self, ref: str) -> Json:
        """Return one image in the shape of `docker image inspect`."""
        store = self.context.images
        image = store.resolve(ref)
        names = [each for each in store.names().values() if each.digest == image.digest]
        tops = [(parse(each.name), each.top) for each in names if each.source == "registry"]
        document = image.document
        return {
            "Id": image.config_digest,
            "Digest": image.digest,
            "RepoTags": [familiar(each.name) for each in names],
            "RepoDigests": sorted({familiar(name.at(top)) for name, top in tops if name.transport == "docker"}),
            "Comment": str((image.history or [{}])[-1].get("comment", "")),
            "Created": str(document.get("created") or ""),
            "Author": str(document.get("author") or ""),
            "Architecture": image.architecture,
            "Variant": str(document.get("variant") or ""),
            "Os": str(document.get("os") or "linux"),
            "Size": image.size,
            "Config": dict(image.config),
            "RootFS": {"Type": "layers", "Layers": list(image.diff_ids)},
            "History": [dict(step) for step in image.history],
            "ManifestType": str(image.manifest.get("mediaType") or ""),
            "Annotations": dict(image.manifest.get("annotations") or {}),
            "Names": [{"name": each.name, "top": each.top, "source": each.source, "at": each.at} for each in names],
            "UsedBy": sorted(image_users(self.context).get(image.digest, ())),
            "LastUsed": store.used_at(image.digest),
        }

    def image_history(self, ref: str) -> Sequence[Json]:
        """How an image was made, the newest step first: {"layer", "created", "created_by", "size", "comment"}."""
        image = self.context.images.resolve(ref)
        return history_of(image, lambda diff_id: self.context.images.layers.facts(diff_id).size)

    def outdated(self) -> Sequence[Json]:
        """Ask the registries what they have now."""
        return outdated(self.context)

    # -- taking in --

    def pull_image(self, ref: str) -> Steps:
        """Fetch an image: {"transfers": […]} now and then, {"image": …} at the end."""
        if ref.startswith("images.") and "/" not in ref:
            raise WrongCall(
                f"pull {ref!r}: such an image is built, not pulled (its app does it: holdfast apply, or sync)"
            )
        local = parse(ref).transport != "docker"
        mine: list[Transfer] = []

        def pull() -> Json:
            image = self.context.puller.load(ref) if local else self.context.puller.pull(ref, watch=mine.append)
            return {"image": self._taken_in(image, ref)}

        return self._watched(ref, pull, mine)

    def push_image(self, ref: str, to: str = "") -> Steps:
        """Send an image to a registry, under its own name or another: {"pushed": {"ref", "digest"}} at the end."""

        def send() -> Json:
            context = self.context
            image = context.images.resolve(ref)
            digest = push(context.images, context.puller.skopeo, image, to or ref, context.store.event)
            return {"pushed": {"ref": to or ref, "digest": digest}}

        return self._watched(to or ref, send, ())

    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        """Make an image of a root file system's tar archive."""
        return self._taken_in(import_rootfs(self.context.images, Path(path), ref, changes), ref)

    def load_image(self, path: str) -> Sequence[Json]:
        """Load the images of an archive or layout."""
        images = self.context.puller.load_all(Path(path))
        return [self._taken_in(image, image.names[0] if image.names else image.digest) for image in images]

    def load_bundle(self, path: str) -> Steps:
        """Load the images of a bundle."""
        file, mine = Path(path), list[Transfer]()
        return self._watched(file.name, lambda: {"images": load_bundle(self.context, file, watch=mine.append)}, mine)

    def tag_image(self, ref: str, name: str) -> Json:
        """Give an image one more name."""
        return self._taken_in(self.context.images.tag(ref, name), name)

    def commit(
        self,
        target: str,
        name: str,
        changes: Sequence[str] = (),
        message: str = "",
        author: str = "",
        pause: bool = True,
    ) -> Json:
        """Make an image of a container's file system."""
        image = commit_container(self.context, target, name, changes, message=message, author=author, pause=pause)
        self.context.store.event("committed", target, f"to image {name}", digest=image.digest)
        return self._taken_in(image, name)

    # -- handing out --

    def save_images(self, ref: Sequence[str], format: str, out: Sink) -> Json:
        """Write images as one archive."""
        if format not in FORMATS:
            raise WrongCall(f"save images: format {format!r} is not known (expected {' or '.join(FORMATS)})")
        chosen = next(each for each in FORMATS if each == format)
        return {"images": [image_json(image) for image in save(self.context.images, ref, out, chosen)]}

    def export_image(self, ref: str, out: Sink) -> Json:
        """Write the root file system of an image as a tar archive."""
        return image_json(export_image(self.context, ref, out))

    def export(self, target: str, out: Sink, pause: bool = True) -> Json:
        """Write the root file system of a container as a tar archive."""
        export_container(self.context, target, out, pause=pause)
        return {"target": target}

    # -- taking away --

    def remove_image(self, ref: str) -> Json:
        """Forget a name; Conflict if a container or a kept generation needs it."""
        return {"ref": ref, **freed_json(self.context.images.remove(ref, lambda: image_users(self.context)))}

    def prune_images(self, all: bool = False) -> Json:
        """Delete unused images without a name (all: also named ones), and layers of interrupted pulls."""
        freed = self.context.images.prune(lambda: image_users(self.context), all=all)
        if freed.images or freed.layers:
            self.context.store.event("removed", "images", f"{_what(freed)}, by hand", freed=freed.size)
        return freed_json(freed)

    def _watched(self, ref: str, work: Callable[[], Json], mine: Sequence[Transfer]) -> Steps:
        """Do the work in a thread, and yield the progress of its transfers: mine, to which the work may add.

        The work continues if the caller goes. A failure is an event, too.
        """

        def run() -> Json:
            try:
                return work()
            except HoldfastError as error:
                if type(error) is not WrongCall:
                    self.context.store.event("failed", ref, str(error))
                raise

        done = in_background(run, "transfer")
        while wait([done], BEAT).not_done:
            yield {"transfers": [each.json() for each in list(mine) if each.state in ("resolving", "pulling")]}
        yield done.result()

    def _taken_in(self, image: Image, ref: str) -> Json:
        """Describe an image that is new here; what could not be staged without it is tried again at once."""
        self.context.store.retry_now()
        return {**image_json(image), "ref": ref}


class Collector:
    """Deletes unused images when the disk is full. An event says so once, however long it stays full."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._full = False

    def collect(self) -> None:
        """Delete unused images if the disk is full. A failure is reported, and tried again the next time."""
        try:
            done = collect(self.context.images, lambda: image_users(self.context))
        except (HoldfastError, OSError) as error:
            if not self._full:
                self.context.store.event("failed", "images", f"collect unused images: {error}")
            self._full = True
            return
        if done.freed.images or done.freed.layers:
            self._tell(done.freed)
        if done.full and not self._full:
            limit = self.context.images.settings.high_watermark
            self.context.store.event(
                "full",
                "images",
                f"the disk is {done.percent:.0f}% full, above {limit:g}%, and every image is in use or new "
                "(see 'holdfast system df')",
            )
        self._full = done.full

    def _tell(self, freed: Freed) -> None:
        limit = self.context.images.settings.high_watermark
        why = f" (the disk was above {limit:g}%)" if freed.images else ""
        told = f"{_what(freed)} deleted, {about(freed.size)} freed{why}"
        self.context.store.event("removed", "images", told, digests=list(freed.images), freed=freed.size)


def image_users(context: Context) -> Mapping[str, set[str]]:
    """digest → APP/NAME of what needs it: instances, also ended ones, and all kept generations."""
    found: dict[str, set[str]] = {}
    for user, digest in context.store.images():
        found.setdefault(digest, set()).add(user)
    return found


def image_json(image: Image, name: Name | None = None) -> dict[str, Any]:
    """{"digest", "id", "size", "created", "layers", "architecture"}, and of a name {"top", "source", "at"}"""
    found: dict[str, Any] = {
        "digest": image.digest,
        "id": image.config_digest,
        "size": image.size,
        "created": image.created,
        "layers": len(image.layers),
        "architecture": image.architecture,
    }
    return found | ({"top": name.top, "source": name.source, "at": name.at} if name else {})


def freed_json(freed: Freed) -> dict[str, Any]:
    """{"images": digests, "layers": diff ids, "freed": bytes}"""
    return {"images": list(freed.images), "layers": list(freed.layers), "freed": freed.size}


def history_of(image: Image, size: Callable[[str], int]) -> list[Json]:
    """The steps of an image, newest first, each with its layer, if it made one.

    config.md says which steps made none (`empty_layer`); images whose steps do not add up are shown layer by layer.
    """
    steps: list[Mapping[str, Any]] = image.history
    if sum(not step.get("empty_layer") for step in steps) != len(image.diff_ids):
        steps = [{} for _ in image.diff_ids]
    left, rows = iter(image.diff_ids), list[Json]()
    for step in steps:
        layer = "" if step.get("empty_layer") else next(left)
        told = {key: str(step.get(key) or "") for key in ("created_by", "comment")}
        made = moment(step.get("created")) or None
        rows.append({"layer": layer, "created": made, "size": size(layer) if layer else 0, **told})
    return rows[::-1]


def _what(freed: Freed) -> str:
    """What was deleted, in words: images with their layers, or layers alone."""
    if count := len(freed.images):
        return f"{count} unused {'image' if count == 1 else 'images'}"
    count = len(freed.layers)
    return f"{count} {'layer' if count == 1 else 'layers'} of interrupted pulls"
