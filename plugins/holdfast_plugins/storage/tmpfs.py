"""Mounts of memory, which disappear with the container."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.drivers import MountWant, Receipt
from holdfast.errors import WrongState

MODE = 0o1777  # as docker run --tmpfs


class TmpfsMount:
    """The mount driver `tmpfs`. The runtime mounts it inside the container; nothing of it is on the host."""

    name = "tmpfs"

    def check(self, want: MountWant) -> None:
        """Raise WrongState for a size of nothing."""
        if want.mount.size is not None and want.mount.size <= 0:
            raise WrongState(
                f"mount tmpfs at {want.mount.target!r}: size {want.mount.size} (expected 1 byte or more)"
            )

    def ensure(self, want: MountWant) -> Receipt:
        """Describe the mount for the runtime (tmpfs(5)); without a size, it is half of the memory at most."""
        mount = want.mount
        options = ["nosuid", "nodev", "noexec", f"mode={MODE if mount.mode is None else mount.mode:o}"]
        options += [
            f"{key}={value}"
            for key, value in (("size", mount.size), ("uid", mount.uid), ("gid", mount.gid))
            if value is not None
        ]
        options += ["ro"] if mount.read_only else []
        data = {"type": "tmpfs", "source": "tmpfs", "options": options}
        return Receipt("volume", self.name, f"{want.instance}:{mount.target}", want.instance, data)

    def observe(self) -> Iterable[Receipt]:
        """Nothing: the mount exists only in the container's mount namespace."""
        return ()

    def remove(self, receipt: Receipt) -> None:
        """Nothing: it is gone with the container."""
