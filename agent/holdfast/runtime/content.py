"""Store the revision's mounted files by their digest, as copies that never change and that containers can mount.

`node` stores files while it stages a generation, and prunes those that no generation names. The mount driver `file`
mounts them.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from holdfast.errors import NotFound, WrongState
from holdfast.files import remove_tree, sync_folder
from holdfast.spec.model import digest_of_file

FILE_MODE = 0o444
PROGRAM_MODE = 0o555
FOLDER_MODE = 0o755


class ContentStore:
    """Files and trees by their sha256 (hex). Safe for several threads and processes at once.

    An entry is complete when it appears, and never changes. Storing it again costs one stat(2).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partial = root / "partial"
        self._partial.mkdir(parents=True, exist_ok=True)

    def store_file(self, data: bytes, *, executable: bool = False) -> str:
        """Store one file; the digest covers its bytes and whether it is executable."""
        digest = digest_of_file(data, executable=executable)
        self._store(digest, lambda path: _write(path, data, PROGRAM_MODE if executable else FILE_MODE))
        return digest

    def store_tree(self, files: Mapping[str, str]) -> str:
        """Store a directory of stored files, {relative path: digest}; the digest covers this mapping."""
        for name in files:
            if name.startswith("/") or not name or {"", ".", ".."} & set(name.split("/")):
                raise WrongState(f"store tree: {name!r}: is not a path below the tree")
        canonical = json.dumps(dict(sorted(files.items())), separators=(",", ":")).encode()
        digest = hashlib.sha256(b"tree\0" + canonical).hexdigest()
        self._store(digest, lambda path: self._build(path, files))
        return digest

    def path(self, digest: str) -> Path:
        """The path of a file or directory. Raises NotFound if it was never stored, or is pruned."""
        path = self._entry(digest)
        if not path.exists():
            raise NotFound(f"find content {digest!r}: it is not stored")
        return path

    def prune(self, keep: Collection[str]) -> None:
        """Delete every entry that keep does not name.

        A kept tree has hard links to its files, so these need not be named as well.
        """
        for folder in self.root.glob("[0-9a-f][0-9a-f]"):
            for path in folder.iterdir():
                if path.name not in keep:
                    self._delete(path)

    def _entry(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _store(self, digest: str, make: Callable[[Path], None]) -> None:
        path = self._entry(digest)
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        temporary = self._partial / f"{digest}.{uuid.uuid4().hex}"
        make(temporary)
        try:
            temporary.rename(path)
        except OSError:  # another thread stored the same tree: a directory is not replaced
            if not path.is_dir():
                raise
            remove_tree(temporary)
        sync_folder(path.parent)

    def _build(self, root: Path, files: Mapping[str, str]) -> None:
        root.mkdir()
        for name, digest in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(self.path(digest))
        for folder, _, _ in os.walk(root):
            Path(folder).chmod(FOLDER_MODE)
            sync_folder(Path(folder))

    def _delete(self, path: Path) -> None:
        """Rename it first: a reader sees a complete entry or none."""
        doomed = self._partial / f"{path.name}.{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            path.rename(doomed)
            if doomed.is_dir():
                remove_tree(doomed)
            else:
                doomed.unlink()


def _write(path: Path, data: bytes, mode: int) -> None:
    with path.open("xb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
