"""Builds layer archives entry by entry, and unpacks them."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from holdfast.images.unpacking.recipe import Writer
from holdfast.images.unpacking.tarstream import TarStream
from holdfast.images.unpacking.tree import Tree
from holdfast.images.unpacking.unpack import Expected, Limits, Unpacked, unpack_stream

END = bytes(1024)
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


def header(
    name: bytes = b"a",
    kind: bytes = b"0",
    size: int | bytes = 0,
    *,
    mode: int = 0o644,
    owner: tuple[int, int] | None = None,
    mtime: int | bytes = 1_000_000_000,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    device: tuple[int, int] = (0, 0),
    prefix: bytes = b"",
    more: bytes = b"",
    off: int = 0,
) -> bytes:
    """A header, field by field. A number given as bytes is taken as it is; more: from offset 345 on; off: what the
    checksum is wrong by."""
    uid, gid = owner or (os.getuid(), os.getgid())
    block = b"".join(
        (
            name.ljust(100, b"\0"),
            *(b"%07o\0" % number for number in (mode, uid, gid)),
            size if isinstance(size, bytes) else b"%011o\0" % size,
            mtime if isinstance(mtime, bytes) else b"%011o\0" % mtime,
            b" " * 8,
            kind,
            link.ljust(100, b"\0"),
            magic.ljust(8, b"\0"),
            bytes(64),
            *(b"%07o\0" % number for number in device),
            more or prefix.ljust(155, b"\0"),
        )
    ).ljust(512, b"\0")
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % (sum(block) + off) + block[156:]


def padded(content: bytes) -> bytes:
    """What follows a header."""
    return content + bytes(-len(content) % 512)


def raw(name: bytes, content: bytes = b"", **fields: Any) -> bytes:
    """A header and its content."""
    return header(name, size=len(content), **fields) + padded(content)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """An extended header for what follows."""
    data = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(b"%d" % length) + len(key) + len(value) + 3 != length:
            length += 1
        data += b"%d %b=%b\n" % (length, key, value)
    return raw(b"pax", data, kind=b"x")


def unpack(stream: bytes, root: Path, *, limits: Limits = LIMITS, expected: Expected = Expected()) -> Unpacked:
    """Unpack a stream into root, which is made; the recipe is written beside it (root.recipe)."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        return unpack_stream(
            file.fileno(), root, root.with_name(f"{root.name}.recipe"), limits=limits, expected=expected
        )


def unpack_here(stream: bytes, root: Path, recipe: Path, chunk: int = 1 << 16) -> Tree:
    """Unpack a plain archive in this process, whose umask has to be 0; raises Damaged and OSError."""
    root.mkdir()
    chunks = iter([*(stream[at : at + chunk] for at in range(0, len(stream), chunk))])
    descriptor, target = os.open(root, os.O_RDONLY), os.open(recipe, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        writer = Writer(target)
        archive = TarStream(lambda: next(chunks, b""), writer.literal)
        tree = Tree(descriptor, archive, writer, LIMITS.files)
        try:
            while (found := archive.next()) is not None:
                tree.add(found)
            tree.finish()
        finally:
            tree.close()
        writer.finish(len(stream))
    finally:
        os.close(descriptor)
        os.close(target)
    return tree


def layer(root: Path, *entries: Entry) -> Unpacked:
    """Unpack the entries into root, which is made."""
    return unpack(tar_of(*entries), root)


ROOTFS = tar_of(
    entry("bin/sh", b"shell", mode=0o755), entry("bin/ash", kind="link", linkname="sh"), entry("etc/passwd", b"root")
)  # a root file system as small as can be
