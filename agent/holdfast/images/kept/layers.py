"""Unpack streams of archives into layers by diff id, each once. `ImageStore.layers` is one of these.

layers/sha256/HEX/         the directory; once it has this name, all of it is on disk
layers/sha256/HEX.json     its figures ({"size", "files", …}; older stores have HEX.size instead)
layers/sha256/HEX.recipe   what its archive is made from again
partial/                   what is being unpacked or deleted; counts for nothing
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from holdfast.config import ImageSettings
from holdfast.files import sync_folder
from holdfast.images.disk import Locks, check_room, write_whole
from holdfast.images.formats.references import to_digest
from holdfast.images.unpacking.unpack import Expected, Limits, Progress, Unpacked, discard, piped, unpack_stream

HEX = re.compile("[0-9a-f]{64}")
CHUNK = 1 << 20


class LayerStore:
    """The layers of one agent. Safe for several threads and processes at once."""

    def __init__(self, root: Path, partial: Path, locks: Locks, settings: Callable[[], ImageSettings]) -> None:
        self.root = root
        self.partial = partial
        self._settings = settings
        self._locks = locks
        root.mkdir(parents=True, exist_ok=True)

    def has(self, diff_id: str) -> bool:
        """Check whether a layer is here, and whole."""
        return self.folder(diff_id).is_dir()

    def folder(self, diff_id: str) -> Path:
        """Name the directory of a layer, which may not be here."""
        return self.root / to_digest(diff_id).removeprefix("sha256:")

    def recipe(self, diff_id: str) -> Path:
        """Name the recipe of a layer's archive; a layer stored by an early version has none."""
        return self.folder(diff_id).with_suffix(".recipe")

    def all(self) -> list[str]:
        """List the diff id of every layer that is here, whether an image needs it or not."""
        return [f"sha256:{name}" for name in os.listdir(self.root) if HEX.fullmatch(name)]  # noqa: PTH208

    def facts(self, diff_id: str) -> Unpacked:
        """Read the figures of a layer; zeros if there are none."""
        base = self.folder(diff_id)
        with suppress(FileNotFoundError, ValueError, TypeError):
            return Unpacked(diff_id=diff_id, **json.loads(base.with_suffix(".json").read_bytes()))
        with suppress(FileNotFoundError, ValueError):
            return Unpacked(diff_id, int(base.with_suffix(".size").read_text()))
        return Unpacked(diff_id, 0)

    def add(
        self,
        stream: int | BinaryIO,
        expected: Expected = Expected(),
        progress: Progress | None = None,
        *,
        stall: float = 0,
    ) -> Unpacked:
        """Unpack a layer's archive, compressed or not, and verify it while it is read; returns its figures.

        A layer that is here already is not read at all. Of several threads or processes that bring the same diff id,
        one unpacks it; the others wait and get the result. Hold `ImageStore.keep` until `add_image` has been called.
        progress, stall and errors: as for `unpack_stream`. After an error nothing of the layer is left.
        """
        key = expected.diff_id.removeprefix("sha256:") if expected.diff_id else uuid.uuid4().hex
        with self._locks.hold(key):
            if expected.diff_id and self.has(expected.diff_id):
                return self.facts(expected.diff_id)
            settings = self._settings()
            check_room(self.root, expected.size or 0, settings.min_free, "unpack layer")
            folder = self.partial / key
            self._clear(key)
            born = self.partial / f"{key}.{uuid.uuid4().hex}"  # ext4 picks the place by the name: see disk.spread
            born.mkdir()
            born.rename(folder)
            folder.chmod(0o755)
            limits = Limits(settings.max_layer_size, settings.max_layer_files)
            try:
                with _descriptor(stream) as descriptor:
                    found = unpack_stream(
                        descriptor,
                        folder,
                        folder.with_suffix(".recipe"),
                        limits=limits,
                        expected=expected,
                        progress=progress,
                        stall=stall,
                    )
                self._finish(folder, found)
            finally:
                self._clear(key)
        return found

    def drop(self, diff_id: str) -> None:
        """Remove a layer, if it is here: its directory loses its name at once, so nobody finds half a layer.

        The next `sweep` deletes its files, which takes longer.
        """
        folder = self.folder(diff_id)
        with suppress(FileNotFoundError):
            folder.rename(self.partial / uuid.uuid4().hex)
        for kind in (".json", ".size", ".recipe"):
            folder.with_suffix(kind).unlink(missing_ok=True)

    def came(self, diff_id: str) -> float:
        """Find when a layer was stored, in seconds since the epoch; its own times are its archive's."""
        for path in (self.folder(diff_id).with_suffix(".json"), self.folder(diff_id)):
            with suppress(FileNotFoundError):
                return path.lstat().st_ctime
        return 0.0

    def drop_strays(self, before: float) -> None:
        """Delete figures and recipes, older than that, of layers that are not here."""
        for path in self.root.glob("*.*"):
            if not path.with_suffix("").exists() and path.lstat().st_mtime < before:
                path.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make a folder on the store's disk for the block; it goes afterwards, or with the `sweep` after a crash."""
        key = uuid.uuid4().hex
        with self._locks.hold(key):
            (self.partial / key).mkdir(mode=0o700)
            try:
                yield self.partial / key
            finally:
                self._clear(key)

    def sweep(self) -> None:
        """Delete what was dropped, or left half unpacked by a killed process; what a living one unpacks is locked."""
        for key in {path.name.partition(".")[0] for path in self.partial.iterdir()} - self._locks.lasting:
            with self._locks.hold(key, wait=0) as held:
                if held:
                    with suppress(OSError):
                        self._clear(key)

    def _finish(self, folder: Path, found: Unpacked) -> None:
        """Give the layer its name, after its figures and its recipe: a directory under its diff id is whole."""
        figures = {key: value for key, value in asdict(found).items() if key != "diff_id"}
        target = self.folder(found.diff_id)
        write_whole(target.with_suffix(".json"), json.dumps(figures).encode())  # the rest is on disk already
        folder.with_suffix(".recipe").replace(target.with_suffix(".recipe"))
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # an import of the same archive was faster
                raise
        sync_folder(target.parent)

    def _clear(self, key: str) -> None:
        with suppress(FileNotFoundError):
            discard(self.partial / key)
        for path in self.partial.glob(f"{key}.*"):
            if path.is_dir():
                path.rmdir()
            elif path.suffix != ".lock":
                path.unlink(missing_ok=True)


@contextmanager
def _descriptor(stream: int | BinaryIO) -> Iterator[int]:
    """Get a descriptor to read the stream from; a stream without one, as a member of a tar, goes through a pipe."""
    if isinstance(stream, int):
        yield stream
        return
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO) and _unread(stream):
        yield stream.fileno()
        return
    with piped(lambda out: shutil.copyfileobj(stream, out, CHUNK)) as ours:
        yield ours


def _unread(stream: io.BufferedReader) -> bool:
    """Check that nothing of the file is in the reader's buffer."""
    return stream.seekable() and stream.tell() == os.lseek(stream.fileno(), 0, os.SEEK_CUR)
