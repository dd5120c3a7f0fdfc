"""Builds layer archives entry by entry, hostile ones included."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

from holdfast.images.unpack import Unpacked, unpack

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


def layer(root: Path, *entries: Entry) -> Unpacked:
    """Unpack the entries into root, which is made."""
    root.mkdir(parents=True)
    return unpack(io.BytesIO(tar_of(*entries)), root)
