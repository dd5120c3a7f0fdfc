"""Builds layer archives entry by entry, and unpacks them."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from holdfast.images.unpack import Expected, Limits, Unpacked, unpack_stream

LIMITS = Limits(size=1 << 30, files=20_000)
KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "char": tarfile.CHRTYPE,
}


Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", *, kind: str = "file", **fields: Any) -> Entry:
    """One entry; owner is whoever runs the tests, unless fields say otherwise."""
    member = tarfile.TarInfo(name)
    member.type = KINDS[kind]
    member.size = len(content)
    member.mode = 0o755 if kind == "dir" else 0o644
    member.uid, member.gid, member.mtime = os.getuid(), os.getgid(), 1_000_000_000
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


def tar_of(*entries: Entry) -> bytes:
    """An archive of the entries, in that order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpack(stream: bytes, root: Path, *, limits: Limits = LIMITS, expected: Expected = Expected()) -> Unpacked:
    """Unpack a stream into root, which is made; the recipe is written beside it (root.recipe)."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        return unpack_stream(
            file.fileno(), root, root.with_name(f"{root.name}.recipe"), limits=limits, expected=expected
        )


def layer(root: Path, *entries: Entry) -> Unpacked:
    """Unpack the entries into root, which is made."""
    return unpack(tar_of(*entries), root)
