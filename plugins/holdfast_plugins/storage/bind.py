"""Bind mounts of directories and files of the host.

A source is opened once. The open file is checked and mounted at a place of our own (run_root/binds/), and the runtime
gets that path: who can write to the folders above the source can't have something else mounted. When the container
has its own mount, ours is removed (`release`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from holdfast.drivers import Host, MountWant, Receipt
from holdfast.errors import UnfitHost, WrongState, reason
from holdfast.files import held, open_source, roots_above
from holdfast.syscalls import unmount
from holdfast_plugins.storage.mounts import bind_descriptor

LONGEST_TARGET = 200  # bytes of a quoted target in a file's name


def bind_receipt(
    driver: str, want: MountWant, source: Path, *, read_only: bool, directory: bool | None = None
) -> Receipt:
    """The receipt of a bind mount: recursive, private, and read-only with all mounts below (`rro`, Linux 5.12).

    Not for files: nothing is mounted below them, and crun before 1.14.4 takes an `rro` source for a directory.
    """
    deep = read_only and (source.is_dir() if directory is None else directory)
    options = ["rbind", "rprivate", "ro" if read_only else "rw", *(["rro"] if deep else [])]
    data = {"type": "bind", "source": str(source), "options": options}
    return Receipt("volume", driver, f"{want.instance}:{want.mount.target}", want.instance, data)


class BindMount:
    """The mount driver `bind`."""

    name = "bind"

    def __init__(self, host: Host) -> None:
        self.folder = host.run_root / "binds"

    def check(self, want: MountWant) -> None:
        """Raise UnfitHost if the source is missing and may not be created, WrongState if it is not allowed."""
        source = want.mount.source
        if not source.startswith("/"):
            raise WrongState(f"mount {source!r}: not an absolute path of the host")
        with _told(want):
            try:
                os.close(open_source(source, want.roots))
            except FileNotFoundError:
                if not want.mount.create_host_path:
                    raise
                _check_creatable(source, want.roots)

    def ensure(self, want: MountWant) -> Receipt:
        """Open the source and mount it. It is created if that is asked for, and belongs to the host then."""
        self.check(want)
        place = self._place(want.instance, want.mount.target)
        create = want.mount.create_host_path
        with _told(want), held(open_source(want.mount.source, want.roots, create=create)) as source:
            found = os.fstat(source)
            directory = stat.S_ISDIR(found.st_mode)
            if not (place.exists() and os.path.samestat(place.stat(), found)):
                self._take_away(place)
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                place.mkdir() if directory else place.touch()
                bind_descriptor(source, place)
        return bind_receipt(self.name, want, place, read_only=want.mount.read_only, directory=directory)

    def release(self, receipt: Receipt) -> None:
        """Remove our own mount; the container's is not touched."""
        self.remove(receipt)

    def observe(self) -> Iterable[Receipt]:
        """List our own mounts, which exist only during a start."""
        for place in sorted(self.folder.glob("*:*")):
            instance, _, target = place.name.partition(":")
            yield Receipt("volume", self.name, f"{instance}:{unquote(target)}", instance)

    def remove(self, receipt: Receipt) -> None:
        """Remove our own mount. The source belongs to the host."""
        instance, _, target = receipt.id.partition(":")
        self._take_away(self._place(instance, target))

    def _place(self, instance: str, target: str) -> Path:
        name = quote(target, safe="#")
        if len(name) > LONGEST_TARGET:
            name = f"#{hashlib.sha256(target.encode()).hexdigest()[:32]}"
        return self.folder / f"{quote(instance, safe='')}:{name}"

    def _take_away(self, place: Path) -> None:
        with suppress(FileNotFoundError):
            unmount(place)
            place.rmdir() if place.is_dir() else place.unlink()


def _check_creatable(source: str, roots: Sequence[str] | None) -> None:
    """Raise unless the source can be created in the nearest folder above it that exists."""
    folder, roots = str(Path(source).parent), roots_above(source, roots)
    try:
        handle = open_source(folder, roots)
    except FileNotFoundError:
        _check_creatable(folder, roots)
        return
    with held(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
        if os.statvfs(f"/proc/self/fd/{handle}").f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)


@contextmanager
def _told(want: MountWant) -> Iterator[None]:
    """Name the mount in errors of the kernel."""
    try:
        yield
    except OSError as error:
        hint = " (create it, or set create_host_path = true)" if isinstance(error, FileNotFoundError) else ""
        cause = f"{reason(error)} on this host"
        raise UnfitHost(f"mount {want.mount.source!r} at {want.mount.target!r}: {cause}{hint}") from error
