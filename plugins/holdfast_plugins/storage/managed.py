"""Volumes that are kept under the agent's root: root/volumes/APP/NAME/_data.

Deletion starts with a rename, so that no half-deleted volume is ever taken for a whole one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from holdfast.drivers import COMPLETE_CONTENT, Host, Receipt, VolumeWant
from holdfast.errors import WrongCall, explained
from holdfast.files import remove_tree
from holdfast.keys import Size, Table, within
from holdfast.tables import read_options
from holdfast_plugins.storage import quota

ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}/[a-z0-9][a-z0-9_.-]{0,62}")


class ManagedOptions(Table):
    """The `driver_opts` of the driver `managed`."""

    size: Annotated[Annotated[Size, within(1)] | None, Field(description="how much it holds; absent: no limit")] = (
        None
    )


class ManagedVolume:
    """The volume driver `managed`."""

    name = "managed"
    options = ManagedOptions

    def __init__(self, host: Host) -> None:
        self.host = host

    def check(self, want: VolumeWant) -> None:
        """Raise WrongState for what is not a size, UnfitHost where the file system can't limit one."""
        folder = self._folder(want.id)
        if read_options(ManagedOptions, want.driver_opts).size is not None:
            quota.check(folder, f"volume {want.id!r}: driver_opts.size")

    def ensure(self, want: VolumeWant) -> Receipt:
        """Create it, empty; limit it to the size that is asked for by now."""
        size = read_options(ManagedOptions, want.driver_opts).size
        folder = self._folder(want.id)
        data = folder / "_data"
        folder.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)  # set-user-ID programs may lie below
        data.mkdir(parents=True, exist_ok=True)
        key = f"{self.host.name} volume {want.id}"
        with explained(f"limit volume {want.id!r}"):
            try:
                quota.limit(folder, size, key) if size is not None else quota.unlimit(folder, key)
            except OSError:
                quota.check(folder, f"volume {want.id!r}: driver_opts.size")
                raise
        _adopt(folder)
        return self._receipt(want.id)

    def observe(self) -> Iterable[Receipt]:
        """Every volume on disk, used or not."""
        root = self.host.root / "volumes"
        for data in sorted(root.glob("[!.]*/[!.]*/_data")):
            yield self._receipt(str(data.parent.relative_to(root)))

    def remove(self, receipt: Receipt) -> None:
        """Delete it with its data."""
        folder = self._folder(receipt.id)
        doomed = folder.with_name(f".removed-{folder.name}")
        _delete(doomed)
        with suppress(FileNotFoundError), quota.freed(folder, f"{self.host.name} volume {receipt.id}"):
            folder.rename(doomed)
            _delete(doomed)
        with suppress(OSError):  # gone, or there are other volumes of the app
            folder.parent.rmdir()

    def _folder(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise WrongCall(f"volume {id!r}: not a volume's name (expected APP/NAME)")
        return self.host.root / "volumes" / id

    def _receipt(self, id: str) -> Receipt:
        return Receipt("volume", self.name, id, data={"path": str(self._folder(id) / "_data")})


def _delete(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(folder)


def _adopt(folder: Path) -> None:
    """Hand over to the core what an earlier version had begun to fill when it was killed."""
    if (folder / ".seed").exists():
        _delete(folder / ".seed")
    if (folder / ".seeded").exists():
        (folder / ".seeded").rename(folder / "_data" / COMPLETE_CONTENT)
