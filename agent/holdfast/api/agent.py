"""What the API asks of an agent, as protocols: `daemon` is one, and so is the node itself when no agent runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from holdfast.images.outgoing.write import Sink
from holdfast.observed import Json
from holdfast.runtime.execs import ExecWant


class ImageAgent(Protocol):
    """What it asks about images. Plain methods, which may block and are called from threads.

    ref: a name, or a digest or its beginning; NotFound for what is not here.
    """

    def images(self) -> Sequence[Json]:
        """{"ref", "digest", "id", "size", "created", "used_by": […], …} of every image, by each of its names.

        An image without a name has the ref "". source: registry, load, import, build, commit, bundle or tag.
        """
        ...

    def image(self, ref: str) -> Json:
        """One image in the shape of `docker image inspect`, with UsedBy, Names and History besides."""
        ...

    def image_history(self, ref: str) -> Sequence[Json]:
        """{"layer", "created", "created_by", "size", "comment"} of each step, newest first."""
        ...

    def outdated(self) -> Sequence[Json]:
        """What registries have by now for the images that were staged (`node.newer.outdated`)."""
        ...

    def pull_image(self, ref: str) -> Iterator[Json]:
        """Fetch an image: {"transfers": [`Transfer.json`]} now and then, {"image": …} at the end."""
        ...

    def push_image(self, ref: str, to: str = "") -> Iterator[Json]:
        """Send an image to a registry: {"transfers": …} now and then, {"pushed": {"ref", "digest"}} at the end."""
        ...

    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        """Make an image of one layer out of a root file system's tar archive; changes as CMD, ENV, USER …"""
        ...

    def load_image(self, path: str) -> Sequence[Json]:
        """Take in the images of an OCI layout (directory or archive) or a docker-archive."""
        ...

    def load_bundle(self, path: str) -> Sequence[Json]:
        """Take in the images of a bundle: {"ref", "digest", "new"} of each; its state is the caller's business."""
        ...

    def tag_image(self, ref: str, name: str) -> Json:
        """Give an image one more name."""
        ...

    def remove_image(self, ref: str) -> Json:
        """Forget a reference, and what only it needs."""
        ...

    def prune_images(self, all: bool = False) -> Json:
        """Delete unused images without a name, with all also named ones: {"images", "layers", "freed" (bytes)}."""
        ...

    def save_images(self, refs: Sequence[str], format: str, out: Sink) -> Json:
        """Write images as one archive."""
        ...

    def export_image(self, ref: str, out: Sink) -> Json:
        """Write the root file system of an image as a tar archive."""
        ...

    def commit(
        self,
        target: str,
        name: str,
        *,
        changes: Sequence[str] = (),
        message: str = "",
        author: str = "",
        pause: bool = True,
    ) -> Json:
        """Make an image of what a container has become; its processes stand still meanwhile, with pause."""
        ...

    def export(self, target: str, out: Sink, pause: bool = True) -> Json:
        """Write the root file system of a container as a tar archive."""
        ...

    def usage(self) -> Json:
        """What takes up the disk, and what of it could go (`node.usage.usage`)."""
        ...

    def prune(self, all: bool = False, volumes: bool = False) -> Json:
        """Delete what nobody needs: {"images", "volumes", "freed" (bytes), "kinds"}."""
        ...


class Agent(ImageAgent, Protocol):
    """What the API asks of the agent. Plain methods may block and are called from threads.

    A target is `app/container`, and names something that is there, or NotFound is raised.
    """

    def status(self) -> Json:
        """`Status.json()` of the last pass."""
        ...

    def plan(self) -> Json:
        """`plan_json` of a preview made now; touches nothing."""
        ...

    async def sync(self, accept_rewrite: bool) -> Json:
        """Ask the source, make a pass, and return the status after it."""
        ...

    def events(self, after: int, limit: int) -> Sequence[Json]:
        """The events with a seq above `after`, oldest first; the newest `limit` of them.

        An event is {"seq", "at" (epoch seconds), "kind", "subject", "message", …}.
        """
        ...

    async def wait_events(self, after: int) -> None:
        """Return when there is an event with a seq above `after`; safe to cancel."""

    def hold(self, target: str, kind: Literal["stopped", "started", "restarted"], by: str) -> None:
        """Record what a person asks for, and wake the loop."""

    def release(self, target: str) -> None:
        """End a hold, and wake the loop."""

    def inspect(self, target: str) -> Json:
        """Everything known of a container: want, instances, receipts, paths."""
        ...

    def logs_of(self, target: str) -> Json:
        """{"paths": the log of each instance that has one, oldest first} (see `runtime.logs`)."""
        ...

    def exec_of(self, target: str, want: ExecWant) -> Sequence[str]:
        """The argument list that runs a command inside the container's newest running instance."""
        ...

    def stats(self) -> Sequence[Json]:
        """{"target", "instance", "memory", "memory_limit", "limits" (`status.actual.LimitsStatus`), "cpu" (seconds),
        "pids"} of every running instance."""
        ...

    def volumes(self) -> Sequence[Json]:
        """{"id", "driver", "path", "used_by": […], "orphan": bool} of every volume."""
        ...

    def volume(self, id: str) -> Json:
        """One volume, in full."""
        ...

    def remove_volume(self, id: str, force: bool = False) -> None:
        """Delete a volume and its data; Conflict when a container has it mounted, or (without force) declares it."""

    def prune_volumes(self) -> Sequence[str]:
        """Delete every volume that no app declares; return their ids."""
        ...

    def networks(self) -> Sequence[Json]:
        """{"id", "driver", "subnet", "gateway", "interface", "internal", "endpoints": […]} of every network."""
        ...

    def network(self, id: str) -> Json:
        """One network, in full."""
        ...

    def plugins(self) -> Sequence[Json]:
        """`plugins.PluginState` of every plugin, and of each driver that is missing."""
        ...

    def forget_plugin(self, name: str) -> None:
        """Start containers without a plugin that adjusted them and is gone."""
