"""Scratch folders: an empty directory on disk for each mount of an instance, which goes with it.

root/scratch/INSTANCE/TARGET, the target quoted as in a URL
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, unquote

from pydantic import Field

from holdfast.drivers import Driver, Host, MountWant
from holdfast.errors import WrongCall, WrongState
from holdfast.files import remove_tree
from holdfast.hookspecs import hookimpl
from holdfast.keys import Table
from holdfast.observed import Receipt
from holdfast.tables import read_options

api_version = 2

LONGEST = 255  # bytes of a file's name


class Options(Table):
    mode: Annotated[str, Field(pattern="^[0-7]{3,4}$", description="its mode, in octal")] = "1777"


@hookimpl
def register_mount_drivers(register: Callable[[Driver[MountWant]], None], host: Host) -> None:
    register(ScratchMount(host))


class ScratchMount:
    """The mount kind `scratch`; driver_opts: mode."""

    name = "scratch"
    options = Options

    def __init__(self, host: Host) -> None:
        self.root = host.root / "scratch"

    def check(self, want: MountWant) -> None:
        """Raise WrongState for wrong options, and for a target that is too long to name a directory after."""
        read_options(Options, want.mount.driver_opts)
        if len(quote(want.mount.target, safe="")) > LONGEST:
            raise WrongState(f"mount 'scratch' at {want.mount.target!r}: the target is too long")

    def ensure(self, want: MountWant) -> Receipt:
        """Make the directory with its mode; what the container has written to it stays."""
        self.check(want)
        place = self._place(want.instance, want.mount.target)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        mode = int(read_options(Options, want.mount.driver_opts).mode, 8)
        if place.stat().st_mode & 0o7777 != mode:
            place.chmod(mode)
        access = "ro" if want.mount.read_only else "rw"
        data = {"type": "bind", "source": str(place), "options": ["rbind", "rprivate", "nosuid", "nodev", access]}
        return Receipt("volume", self.name, f"{want.instance}:{want.mount.target}", want.instance, data)

    def observe(self) -> Iterable[Receipt]:
        """List the directories. How they are mounted can't be read back."""
        for place in sorted(self.root.glob("*/%2F*")):
            instance = place.parent.name
            yield Receipt("volume", self.name, f"{instance}:{unquote(place.name)}", instance)

    def remove(self, receipt: Receipt) -> None:
        """Delete the directory with its content."""
        instance, _, target = receipt.id.partition(":")
        place = self._place(instance, target)
        with suppress(FileNotFoundError):
            remove_tree(place)
        with suppress(OSError):  # gone, or the instance has others
            place.parent.rmdir()

    def _place(self, instance: str, target: str) -> Path:
        if not instance or "/" in instance or instance.startswith(".") or not target.startswith("/"):
            raise WrongCall(f"mount {instance}:{target}: not a mount of an instance (expected INSTANCE:TARGET)")
        return self.root / instance / quote(target, safe="")
