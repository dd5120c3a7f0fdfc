"""Give a build what it needs from outside its fence: images to start from, a cgroup and a network.

`node.builds` does so for an agent. What is here is enough for builds without an agent, on a host of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.errors import NotFound, TryAgain
from holdfast.images.formats.references import parse
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore

Pull = Literal["missing", "newer", "always", "never"]
RESOLV_CONF = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Cage:
    """The cgroup of one build. folders: one for each hierarchy. exceeded: which limit it ran into, "" for none."""

    folders: Sequence[Path] = ()
    exceeded: Callable[[], str] = lambda: ""


class Outside:
    """The services of one agent, or of none. Safe for several threads."""

    #: What `network = "default"` is here: a network of its own that `network` joins, or the host's.
    own_network = False

    def __init__(self, store: ImageStore, puller: Puller, *, host_network: bool = True) -> None:
        """host_network: whether builds may use the host's network where they have none of their own."""
        self.store, self.puller, self.host_network = store, puller, host_network

    def image(self, reference: str, pull: Pull) -> Image:
        """Have an image to start from in our store. Raises as `Puller.pull`."""
        if parse(reference).transport != "docker":
            return self.puller.load(reference)
        try:
            here = self.store.resolve(reference)
        except NotFound:
            if pull == "never" or self.store.settings.offline:
                raise TryAgain(f"image '{reference}': is not here, and none is to be pulled") from None
            return self.puller.pull(reference)
        if pull in ("missing", "never") or self.store.settings.offline:
            return here
        try:
            return self.puller.pull(reference)
        except (TryAgain, NotFound):
            if pull == "always":
                raise
            return here

    @contextmanager
    def cgroup(self, id: str) -> Iterator[Cage]:
        """Make a cgroup for a build, and delete it at the end."""
        yield Cage()

    @contextmanager
    def network(self, id: str, pid: int) -> Iterator[None]:
        """Join the network namespace of a process to the network of builds while the block runs."""
        yield

    def resolv_conf(self) -> str:
        """Read how names are looked up in a build (resolv.conf(5))."""
        try:
            return RESOLV_CONF.read_text(errors="replace")
        except OSError:
            return ""

    def sweep(self) -> None:
        """Delete what builds of a killed agent have left on the host."""
