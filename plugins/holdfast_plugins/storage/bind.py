"""Bind mounts of the host's own directories and files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from holdfast.drivers import Host, MountWant, Receipt
from holdfast.errors import UnfitHost, WrongState


def bind_receipt(driver: str, want: MountWant, source: Path, *, read_only: bool) -> Receipt:
    """The receipt of a bind mount: recursive, private, and read-only all the way down (`rro`, Linux 5.12).

    Nothing is mounted below a file, and crun before 1.14.4 takes what `rro` is asked of for a directory.
    """
    options = ["rbind", "rprivate", "ro" if read_only else "rw", *(["rro"] if read_only and source.is_dir() else [])]
    data = {"type": "bind", "source": str(source), "options": options}
    return Receipt("volume", driver, f"{want.instance}:{want.mount.target}", want.instance, data)


class BindMount:
    """The mount driver `bind`. It leaves nothing on the host that would have to be observed or removed."""

    name = "bind"

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: MountWant) -> None:
        """Raise UnfitHost when the source is missing and may not be created."""
        source = Path(want.mount.source)
        if not source.is_absolute():
            raise WrongState(f"mount {want.mount.source!r}: not an absolute path of the host")
        if not want.mount.create_host_path and not source.exists():
            raise UnfitHost(
                f"mount {want.mount.source!r} at {want.mount.target!r}: no such file or directory on this host "
                "(create it, or set create_host_path = true)"
            )

    def ensure(self, want: MountWant) -> Receipt:
        """Create the source if that is asked for; what is created stays: it is the host's."""
        self.check(want)
        source = Path(want.mount.source)
        if want.mount.create_host_path and not source.exists():
            source.mkdir(parents=True, exist_ok=True)
        return bind_receipt(self.name, want, source, read_only=want.mount.read_only)

    def observe(self) -> Iterable[Receipt]:
        """Nothing: the mount lives and dies with the container's mount namespace."""
        return ()

    def remove(self, receipt: Receipt) -> None:
        """Nothing: the source belongs to the host."""
