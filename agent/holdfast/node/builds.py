"""Give builds what they need from an agent: images by its rules, a cgroup with limits, and a network.

`images.build` calls it. The network is an ordinary one, called `build`: the planner makes it while an app has images
to build with it, and takes it away afterwards. The namespace of a build has no name: it ends, and its link with it,
when the agent is killed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast import kinds
from holdfast.drivers import EndpointWant, Host
from holdfast.errors import HoldfastError, TryAgain
from holdfast.images.builds.outside import Cage, Outside, Pull
from holdfast.images.kept.image import Image
from holdfast.node.context import Context
from holdfast.node.stage import resolve_image
from holdfast.runtime import cgroup, delegation, device_access, names
from holdfast.runtime.conmon import kill_each, wait_end
from holdfast.runtime.device_access import Rule
from holdfast.spec.model import BUILD_NETWORK, Container

ENDING = 10.0  # seconds that the processes of a build are given to be gone
CONTROLLERS = {1: ("memory", "pids", "freezer", "devices"), 2: ("memory", "pids")}
#: c and b for mknod of overlayfs alone; then /dev/null, zero, full, random, urandom, tty, ptmx and terminals.
DEVICES = (
    Rule("c", None, None, "m"),
    Rule("b", None, None, "m"),
    *(Rule("c", 1, minor, "rw") for minor in (3, 5, 7, 8, 9)),
    *(Rule("c", 5, minor, "rw") for minor in (0, 2)),
    Rule("c", 136, None, "rw"),
)
TABLE = "[builds] of agent.toml"
SHARE = 0.75  # of the host's memory, where agent.toml names no limit


class BuildServices(Outside):
    """Of one agent."""

    own_network = True

    def __init__(self, context: Context) -> None:
        super().__init__(context.images, context.puller)
        self.context = context

    def image(self, reference: str, pull: Pull) -> Image:
        """Get an image as for a container: policy.json, bind_roots, offline and `pull` mean the same."""
        return self.context.images.get(resolve_image(self.context, Container(image=reference, pull=pull)))

    @contextmanager
    def cgroup(self, id: str) -> Iterator[Cage]:
        path = f"{self._parent}/{id}"
        self._clear(path)
        limit = self.context.builder.builds.memory or int(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE
        )
        folders = _make(self.context.host, path)
        try:
            memory = {"limit": limit, "swap": limit}  # no swap: what a build fills of it, others miss
            cgroup.apply(path, {"memory": memory, "pids": {"limit": self.context.builder.builds.pids}})
            device_access.allow_only(path, DEVICES)
            yield Cage(folders, lambda: self._exceeded(path, limit))
        finally:
            self._clear(path)
            cgroup.remove_if_empty(self._parent)

    def _exceeded(self, path: str, limit: int) -> str:
        if cgroup.oom_kills(path):
            return f"it needs more than the {limit >> 20} MiB of memory that a build may use (memory in {TABLE})"
        if cgroup.pids_refused(path):
            return f"it needs more than the {self.context.builder.builds.pids} processes of a build (pids in {TABLE})"
        return ""

    @contextmanager
    def network(self, id: str, pid: int) -> Iterator[None]:
        context = self.context
        network = context.store.receipt("network", BUILD_NETWORK)
        if network is None:
            raise TryAgain(f"network '{BUILD_NETWORK}' does not stand yet")
        driver = context.plugins.driver(kinds.ENDPOINT, network.driver)
        space = Path(f"/proc/{pid}/ns/net")
        want = EndpointWant(instance=id, network=network, netns=space, interface="eth0", default_route=True)
        context.builds.add(id)
        try:
            endpoint = driver.ensure(want)
            try:
                yield
            finally:
                driver.remove(endpoint)
        finally:
            context.builds.discard(id)

    def resolv_conf(self) -> str:
        return names.read_resolv_conf()

    def sweep(self) -> None:
        for folder in cgroup.folders(self._parent):
            for name in cgroup.children(folder):
                with suppress(HoldfastError):
                    self._clear(f"{self._parent}/{name}")
        cgroup.remove_if_empty(self._parent)

    @property
    def _parent(self) -> str:
        return f"{self.context.host.cgroup}-build"

    def _clear(self, path: str) -> None:
        """End all that is in a cgroup, and remove it."""
        if not cgroup.folders(path):
            return
        with suppress(HoldfastError):
            cgroup.thaw(path)
        deadline = time.monotonic() + ENDING
        while (left := cgroup.pids(path)) and time.monotonic() < deadline:
            kill_each(left, signal.SIGKILL)
            for pid in left:
                wait_end(pid, deadline)
        cgroup.remove(path)


def _make(host: Host, path: str) -> list[Path]:
    """Make a cgroup in every hierarchy that limits a build."""
    version = cgroup.version()
    if version == 2:
        _enable(host, path)
    folders = {cgroup.folder(each, path) for each in CONTROLLERS[version] if cgroup.folder(each, "/").is_dir()}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return sorted(folders)


def _enable(host: Host, path: str) -> None:
    """Hand the controllers down from the agent's place (cgroup-v2.rst, "Enabling and disabling")."""
    delegation.ensure(host)
    above = cgroup.folder("", host.cgroup_root)
    for name in path.removeprefix(host.cgroup_root).strip("/").split("/"):
        for controller in CONTROLLERS[2]:
            with suppress(OSError):  # a kernel without it: `apply` leaves out what is not there
                (above / "cgroup.subtree_control").write_text(f"+{controller}")
        above = above / name
        above.mkdir(exist_ok=True)
