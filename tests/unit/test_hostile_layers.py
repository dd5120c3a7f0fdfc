"""Layers made byte by byte to do harm: each is one clear error, or does nothing but what is safe."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import TryAgain, WrongState
from holdfast.files import remove_tree
from holdfast.images.unpacking.tarstream import Damaged
from holdfast.images.unpacking.unpack import Expected, Limits, unpack_stream
from holdfast.testing import host_fingerprint
from tars import END, LIMITS, entry, header, padded, pax, raw, tar_of, unpack, unpack_here

FILE = raw(b"a", b"content" * 1000)
NOISE = raw(b"a", random.Random(1).randbytes(200_000)) + END
GNU = b"ustar  \0"


def sparse(size: int, *pieces: tuple[int, int], content: bytes = b"", more: bool = False) -> bytes:
    """GNU's own sparse header."""
    numbers = b"".join(b"%011o\0%011o\0" % piece for piece in pieces)
    fields = bytes(41) + numbers.ljust(96, b"\0") + bytes([more]) + b"\x80" + size.to_bytes(11, "big")
    return header(b"s", b"S", len(content), magic=GNU, more=fields) + padded(content)


def sparse_pax(map: bytes, *records: tuple[bytes, bytes]) -> bytes:
    """Version 1.0: the map is the beginning of the content."""
    return pax(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"s"),
        (b"GNU.sparse.realsize", b"10000"),
        *records,
    ) + raw(b"x", map)


#: What is sent, or what makes it where that takes a while, and what is said of it.
HOSTILE: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    # names
    "a parent reference": (raw(b"../outside"), "outside of the layer"),
    "a parent reference in the middle": (raw(b"a/../../outside"), "outside of the layer"),
    "a parent reference in a long name": (pax((b"path", b"../outside")) + raw(b"a"), "outside of the layer"),
    "a parent reference in a GNU name": (raw(b"l", b"../outside\0", kind=b"L") + raw(b"a"), "outside of the layer"),
    "a parent reference in a prefix": (raw(b"outside", prefix=b".."), "outside of the layer"),
    "a name with a NUL": (pax((b"path", b"a\0b")) + raw(b"a"), "outside of the layer"),
    "a name without end": (pax((b"path", b"a/" * 20_000)) + raw(b"a"), "a name of 40000 bytes"),
    "a part of a name too long": (pax((b"path", b"a" * 300)) + raw(b"a"), "File name too long"),
    "no name": (raw(b"./."), "without a name"),
    "a whiteout of the folder itself": (raw(b"a/.wh."), "outside of the layer"),
    "a whiteout of this folder": (raw(b"a/.wh.."), "outside of the layer"),
    "a whiteout of the parent": (raw(b".wh..."), "outside of the layer"),
    "a whiteout with a path": (raw(b".wh./../outside"), "outside of the layer"),
    # links
    "a hard link to above": (raw(b"k", kind=b"1", link=b"../precious/key"), "outside of the layer"),
    "a hard link to what is not there": (raw(b"k", kind=b"1", link=b"/etc/passwd"), "not in this layer"),
    "a hard link through a link": (
        raw(b"door", kind=b"2", link=b"/etc") + raw(b"k", kind=b"1", link=b"door/passwd"),
        "not in this layer",
    ),
    "a hard link to itself": (raw(b"a", b"1") + raw(b"a", kind=b"1", link=b"a"), "not in this layer"),
    "a hard link to a folder": (raw(b"d", kind=b"5") + raw(b"k", kind=b"1", link=b"d"), "not in this layer"),
    "a hard link to the layer": (raw(b"k", kind=b"1", link=b"."), "not in this layer"),
    "a hard link to a whiteout": (raw(b".wh.gone") + raw(b"k", kind=b"1", link=b"gone"), "not in this layer"),
    "a link to nothing": (raw(b"a", kind=b"2"), "No such file"),
    "a loop of links": (
        raw(b"a", kind=b"2", link=b"b") + raw(b"b", kind=b"2", link=b"a") + raw(b"a/x", b"1"),
        "too many symbolic links",
    ),
    "links that multiply": (
        b"".join(
            pax((b"linkpath", b"/".join([b"l%d" % (n + 1)] * 500))) + raw(b"l%d" % n, kind=b"2") for n in range(20)
        )
        + raw(b"l0/x"),
        "too many symbolic links",
    ),
    "a file as a parent": (raw(b"a", b"1") + raw(b"a/b", b"2"), "is a parent of another entry, but no directory"),
    # numbers
    "a size beyond the stream": (header(size=1 << 20) + bytes(512), "ends in the middle of a file"),
    "a size beyond all": (header(size=b"\x80" + b"\xff" * 11), "has the number"),
    "a negative size": (header(size=b"\xff" * 12), "has the number -1"),
    "a negative size in octal": (header(size=b"-0000000001\0"), "has the number -1"),
    "a size that is none": (header(size=b"zzz\0".ljust(12)), "for a number"),
    "a size beyond the limits": (header(size=b"\x80" + (1 << 40).to_bytes(11, "big")), "comes to more than"),
    "a negative long size": (pax((b"size", b"-1")) + raw(b"a"), "for a number"),
    "an endless number": (pax((b"size", b"1" * 5000)) + raw(b"a"), "for a number"),
    "a time that is none": (pax((b"mtime", b"inf")) + raw(b"a"), "for a number"),
    "a time beyond all": (pax((b"mtime", b"9" * 18)) + raw(b"d", kind=b"5"), "a time of 9+ seconds"),
    "an owner beyond all": (pax((b"uid", b"%d" % (1 << 40))) + raw(b"a"), "owner 1099511627776"),
    "an owner that means nobody in particular": (pax((b"gid", b"%d" % 0xFFFFFFFF)) + raw(b"a"), "owner 4294967295"),
    "a device that is none": (raw(b"a", kind=b"3", device=(0o777777, 0o777777)), "device 262143/262143"),
    # headers
    "a wrong checksum": (header(off=1), "checksum is wrong"),
    "an unknown type": (raw(b"a", kind=b"V"), "unknown type"),
    "a header of 8 GiB": (header(kind=b"x", size=(8 << 30) - 1), "headers of 8589934591 bytes"),
    "a name of 8 GiB": (header(kind=b"L", size=(8 << 30) - 1), "headers of 8589934591 bytes"),
    "headers that add up": (raw(b"l", bytes(3 << 20), kind=b"L") * 3 + raw(b"a"), "headers of 9437184 bytes"),
    "headers without end": (header(kind=b"x") * 3000, "headers of 0 bytes"),
    "a header of nothing": (pax((b"path", b"a")) + END, "belongs to nothing"),
    "a record that is longer than its header": (raw(b"p", b"99 path=a\n", kind=b"x") + raw(b"a"), "pax header"),
    "a record without length": (raw(b"p", b"0 path=a\n", kind=b"x") + raw(b"a"), "pax header"),
    "a record after which nothing follows": (raw(b"p", b"9 path=a\nno", kind=b"x") + raw(b"a"), "pax header"),
    "a record without end": (raw(b"p", b"9 path=ab", kind=b"x") + raw(b"a"), "pax header"),
    "a record without value": (raw(b"p", b"7 path\n", kind=b"x") + raw(b"a"), "pax header"),
    "a lone block of zeros": (FILE + bytes(512) + FILE, "block of zeros"),
    # sparse files
    "more zeros than a disk": (sparse(1 << 60), "comes to more than"),
    "many files of many zeros": (sparse(1 << 27) * 3, "comes to more than"),
    "a piece beyond the end": (sparse(100, (98, 4), content=b"abcd"), "does not fit"),
    "pieces that overlap": (sparse(100, (10, 4), (12, 4), content=b"abcdefgh"), "overlap"),
    "fewer pieces than content": (sparse(100, (0, 2), content=b"abcd"), "does not fit"),
    "more pieces than content": (sparse(100, (0, 8), content=b"abcd"), "does not fit"),
    "an odd map": (
        pax((b"GNU.sparse.map", b"0,1,2"), (b"GNU.sparse.size", b"9")) + raw(b"x", b"1"),
        "odd sparse map",
    ),
    "a map that is none": (pax((b"GNU.sparse.map", b"-1,1"), (b"GNU.sparse.size", b"9")) + raw(b"x", b"1"), "number"),
    "a map without end": (sparse_pax(b"1000000\n" + b"0\n" * 300), "does not end"),
    "a map without lines": (sparse_pax(b"1" * 600), "does not end"),
    "a map as long as memory": (sparse(1, more=True) + (b"00000000000\0" * 42 + b"\1" * 8) * 20_000, "of sparse map"),
    # streams
    "a page of a web server": (b"<!DOCTYPE html>\n<html>Not Found</html>\n" * 50, "expected a tar archive"),
    "a short page": (b'{"errors": [{"code": "DENIED"}]}', "expected a tar archive"),
    "nothing at all": (b"", "expected a tar archive"),
    "half an archive": (NOISE[:100_000], "ends in the middle of a file"),
    "half a header": (FILE + FILE[:100], "ends in the middle of a header"),
    "half of gzip": (gzip.compress(NOISE)[:100_000], "decompress: the stream ends too early"),
    "half of zstd": (zstandard.compress(NOISE)[:100_000], "ends in the middle|ends too early"),
    "half of xz": (lambda: lzma.compress(NOISE)[:100_000], "decompress: the stream ends too early"),
    "half of bzip2": (lambda: bz2.compress(NOISE)[:100_000], "decompress: the stream ends too early"),
    "something after gzip": (gzip.compress(FILE + END) + b"garbage after it", "decompress"),
    "something after zstd": (zstandard.compress(FILE + END) + b"garbage after it", "decompress"),
    "a checksum of gzip that is wrong": (gzip.compress(FILE + END)[:-8] + bytes(8), "decompress"),
    "gzip that is none": (b"\x1f\x8b" + b"x" * 1000, "decompress"),
    "zstd that is none": (b"\x28\xb5\x2f\xfd" + b"x" * 1000, "decompress"),
    "a bomb of zeros": (lambda: gzip.compress(header(size=1 << 29) + bytes(1 << 26)) * 6, "comes to more than"),
    "a bomb of zeros after the end": (lambda: zstandard.compress(END + bytes(1 << 26)) * 6, "comes to more than"),
    "more memory than there is": (
        lambda: zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=30, compression_level=1)
        ).compress(bytes(200 << 20)),
        "requires too much memory",
    ),
}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "key").write_text("secret")
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_is_one_line_and_changes_nothing_outside(tmp_path: Path, precious: Path, name: str) -> None:
    made, why = HOSTILE[name]
    stream = made() if callable(made) else made
    before = host_fingerprint("nobody", precious)
    with pytest.raises(WrongState, match=why) as caught:
        unpack(stream, tmp_path / "l", limits=Limits(size=300 << 20, files=1000))
    assert re.fullmatch(r"unpack layer: [ -~]{10,1100}", str(caught.value))
    assert host_fingerprint("nobody", precious) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l", "l.recipe", "precious"]
    remove_tree(tmp_path / "l")


SAFE: dict[str, tuple[bytes, Callable[[Path], bool]]] = {
    "an absolute name": (raw(b"{outside}/key", b"x"), lambda root: True),
    "writing through a link": (
        raw(b"door", kind=b"2", link=b"{outside}") + raw(b"door/key", b"x") + raw(b"door/.wh.gone"),
        lambda root: (root / "door").is_symlink(),
    ),
    "writing over a link": (
        raw(b"key", kind=b"2", link=b"{outside}/key") + raw(b"key", b"x"),
        lambda root: (root / "key").read_bytes() == b"x",
    ),
    "attributes of a link": (
        pax((b"SCHILY.xattr.user.a", b"1")) + raw(b"key", kind=b"2", link=b"{outside}/key", owner=(0, 0)),
        lambda root: (root / "key").is_symlink(),
    ),
    "a name with a line break and an escape": (
        raw(b"a\n\x1b[31mb", b"1"),
        lambda root: [path.name for path in root.iterdir()] == ["a\n\x1b[31mb"],
    ),
    "a name that is no UTF-8": (
        raw(b"caf\xe9/\xff", b"1") + pax((b"path", b"\xfe" * 200)) + raw(b"x"),
        lambda root: {os.fsencode(path.name) for path in root.iterdir()} == {b"caf\xe9", b"\xfe" * 200},
    ),
    "attributes that no Linux has": (
        pax((b"LIBARCHIVE.xattr.com.apple.provenance", b"AQ=="), (b"SCHILY.xattr.foo.bar", b"x")) + raw(b"a"),
        lambda root: os.listxattr(root / "a") == [],
    ),
    "attributes that steer overlayfs": (
        pax((b"SCHILY.xattr.user.overlay.opaque", b"y"), (b"LIBARCHIVE.xattr.trusted%2eoverlay.redirect", b"Lw=="))
        + raw(b"a", kind=b"5"),
        lambda root: os.listxattr(root / "a") == [],
    ),
    "a global header with a path": (
        raw(b"g", b"19 path=../outside\n", kind=b"g") + raw(b"a", b"1"),
        lambda root: (root / "a").read_bytes() == b"1",
    ),
    "a link that claims content": (
        header(b"l", b"2", 1 << 20, link=b"x") + raw(b"a", b"1"),
        lambda root: (root / "a").read_bytes() == b"1",
    ),
    "a bookkeeping entry of aufs": (
        raw(b".wh..wh.plnk/12.34", b"1") + raw(b"a/.wh..wh.aufs", b"1") + raw(b"b", b"1"),
        lambda root: [path.name for path in root.iterdir()] == ["b"],
    ),
}


@pytest.mark.parametrize("name", SAFE)
def test_what_can_be_made_safe_is(tmp_path: Path, precious: Path, name: str) -> None:
    stream, holds = SAFE[name]
    before = host_fingerprint("nobody", precious)
    aim = stream if b"{outside}" not in stream else _aimed(stream, precious)
    unpack(aim, tmp_path / "l")
    assert holds(tmp_path / "l")
    assert host_fingerprint("nobody", precious) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l", "l.recipe", "precious"]


def _aimed(stream: bytes, outside: Path) -> bytes:
    """The stream with {outside} in its names and links replaced, and its checksums right again."""
    blocks = []
    for at in range(0, len(stream), 512):
        block = stream[at : at + 512]
        if b"{outside}" in block:
            name, link = (
                field.rstrip(b"\0").replace(b"{outside}", os.fsencode(outside)).ljust(100, b"\0")
                for field in (block[:100], block[157:257])
            )
            block = name + block[100:148] + b" " * 8 + block[156:157] + link + block[257:]
            block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
        assert len(block) == 512, "the folder's path is too long for a plain header"
        blocks.append(block)
    return b"".join(blocks)


def test_thousands_of_folders_in_each_other_are_made_and_can_be_deleted(tmp_path: Path) -> None:
    depth = 2500
    names = [b"d/" * level for level in range(50, depth, 50)]
    unpack(b"".join(pax((b"path", name)) + raw(b"x", kind=b"5") for name in names) + END, tmp_path / "l")
    folder, found = os.open(tmp_path / "l", os.O_RDONLY), 0
    while "d" in os.listdir(folder):  # noqa: PTH208
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder, found = inner, found + 1
    os.close(folder)
    assert found == depth - 50
    remove_tree(tmp_path / "l")
    assert not (tmp_path / "l").exists()


def test_a_deep_folder_can_be_replaced(tmp_path: Path) -> None:
    deep = pax((b"path", b"d/" * 2200 + b"f")) + raw(b"x", b"1")
    unpack(deep + raw(b"d", b"a file") + END, tmp_path / "l")
    assert (tmp_path / "l/d").read_bytes() == b"a file"


SEEDS = [stream for stream, _ in HOSTILE.values() if isinstance(stream, bytes) and len(stream) < 5000] + [
    pax((b"path", b"x/y"), (b"SCHILY.xattr.user.a", b"1"), (b"mtime", b"1.5")) + raw(b"b", b"x" * 700) + END,
    sparse(5000, (512, 3), (4000, 4), content=b"abcdefg") + FILE + END,
    sparse_pax(padded(b"1\n9000\n3\n") + b"abc") + FILE + END,
]


CHANGES = [b"\0", b"/", b"0", b"7", b"9", b" ", b"=", b"x", b"\x80", b"\xff"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_changes_in_an_archive_is_refused_or_unpacked_and_nothing_else(data: st.DataObject) -> None:
    """Bytes of headers change, and the checksums with them: what is thrown must be among what the worker expects."""
    archive = bytearray(data.draw(st.sampled_from(SEEDS)) + data.draw(st.sampled_from(SEEDS)))
    blocks = st.integers(0, max(0, len(archive) // 512 - 1))
    places = st.sampled_from([0, 3, 100, 110, 124, 135, 136, 156, 157, 257, 345, 386, 400, 482, 483, 500])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(blocks) * 512 + data.draw(places)
        archive[at : at + 1] = data.draw(st.sampled_from(CHANGES))
    for at in range(0, len(archive) - 511, 512):
        archive[at + 148 : at + 156] = b" " * 8
        archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
    before = os.umask(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with suppress(Damaged, OSError, ValueError, OverflowError):
                unpack_here(bytes(archive), Path(folder, "l"), Path(folder, "l.recipe"))
        finally:
            os.umask(before)
            remove_tree(Path(folder, "l"))
            assert set(os.listdir(folder)) <= {"l.recipe"}  # noqa: PTH208


def test_folders_that_nobody_mentions_count_too(tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="holds more than 100 entries"):
        unpack(pax((b"path", b"d/" * 200)) + raw(b"x", kind=b"5"), tmp_path / "l", limits=Limits(1 << 20, 100))


def test_a_million_names_take_no_memory(tmp_path: Path) -> None:
    script = """
import os, resource, sys
from pathlib import Path
from holdfast.images.unpacking.unpack import Limits, unpack_stream
unpack_stream(0, Path(sys.argv[1]), Path(sys.argv[1] + ".recipe"), limits=Limits())
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    peaks = []
    for count in (100, 5_000):
        parts = []
        for number in range(count):
            name = b"folder%d/" % (number // 10) if number % 10 == 0 else b"folder%d/%d" % (number // 10, number)
            parts.append(raw(name, kind=b"5") if number % 10 == 0 else raw(name))
        folder = tmp_path / str(count)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", script, folder],
            input=gzip.compress(b"".join(parts)),
            stdout=subprocess.PIPE,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 6_000, "KiB"


@pytest.mark.parametrize(
    ("expected", "error", "why"),
    [
        (Expected(size=10), WrongState, "more than 10 bytes come"),
        (Expected(size=1 << 20), TryAgain, "the stream ended after 10240 of 1048576 bytes"),
        (Expected(digest="sha256:" + "0" * 64), WrongState, r"its digest is sha256:\w+ \(expected sha256:0000"),
        (Expected(diff_id="sha256:" + "0" * 64), WrongState, r"its diff id is sha256:\w+ \(expected sha256:0000"),
    ],
)
def test_a_manifest_that_lies_is_told_with_both_values(
    tmp_path: Path, expected: Expected, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        unpack(tar_of(entry("a", b"1")), tmp_path / "l", expected=expected)


def test_a_manifest_that_lies_about_the_size_alone_is_wrong(tmp_path: Path) -> None:
    digest = unpack(tar_of(entry("a", b"1")), tmp_path / "l").digest
    with pytest.raises(WrongState, match=r"its size is 10240 \(expected 20000\)"):
        unpack(tar_of(entry("a", b"1")), tmp_path / "k", expected=Expected(digest=digest, size=20_000))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, lzma.compress, bz2.compress, bytes])
def test_every_compression_is_told_by_its_first_bytes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    archive = NOISE[: -len(END)] + raw(b"b", b"abc" * 100_000) + END
    half = len(archive) // 2
    stream = pack(archive) if pack is bytes else pack(archive[:half]) + pack(archive[half:])
    found = unpack(stream, tmp_path / "l")
    assert (found.size, found.compressed) == (len(archive), len(stream))
    assert (tmp_path / "l/b").read_bytes() == b"abc" * 100_000


def test_frames_that_zstd_skips_are_skipped(tmp_path: Path) -> None:
    skipped = b"\x5e\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"abcde"
    unpack(skipped + zstandard.compress(FILE + END) + skipped, tmp_path / "l")
    assert (tmp_path / "l/a").exists()


class Slow:
    """A stream of which a part has come; it is being unpacked in a thread."""

    def __init__(self, folder: Path, part: bytes, **options: Any) -> None:
        folder.mkdir()
        reader, self.writer = os.pipe()
        self.error: BaseException | None = None
        os.write(self.writer, part)

        def run() -> None:
            try:
                unpack_stream(reader, folder, folder.with_name("r"), limits=LIMITS, **options)
            except BaseException as error:
                self.error = error
            os.close(reader)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def finish(self) -> BaseException | None:
        self.thread.join()
        os.close(self.writer)
        return self.error


def workers() -> list[int]:
    """The processes that this one has started to unpack."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path("/proc", child, "cmdline").read_text()
            found += [int(child)] if "holdfast.images.unpacking.worker" in command else []
    return found


def test_a_stream_that_says_nothing_any_more_is_given_up(tmp_path: Path) -> None:
    slow = Slow(tmp_path / "l", FILE, stall=0.2)
    error = slow.finish()
    assert isinstance(error, TryAgain)
    assert "not a byte came for 0.2 s" in str(error)


def test_a_worker_that_is_killed_is_one_line_with_the_layer_in_it(tmp_path: Path) -> None:
    slow = Slow(tmp_path / "l", FILE, expected=Expected(digest="sha256:abc"))
    while not workers():
        assert slow.thread.is_alive()
    os.kill(workers()[0], signal.SIGKILL)
    error = slow.finish()
    assert isinstance(error, TryAgain)
    assert str(error) == "unpack layer 'sha256:abc': its worker was ended by SIGKILL (is there enough memory?)"
