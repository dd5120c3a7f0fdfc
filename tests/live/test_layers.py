"""What only root can unpack, and what the kernel's overlay makes of it."""

from __future__ import annotations

import base64
import gzip
import os
import random
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ground import wait_for
from holdfast.drivers import Host, RootfsWant
from holdfast.errors import UnfitHost
from holdfast.images.kept.lookup import find
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.unpack import Expected, unpack_stream
from holdfast_plugins.storage import OverlayRootfs
from live.processes import children
from tars import END, LIMITS, entry, header, layer, padded, pax, raw, tar_of, unpack

pytestmark = pytest.mark.live

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep, version 2


def xattr(name: str, value: bytes) -> dict[str, Any]:
    return {"pax_headers": {f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")}}


def test_owners_devices_and_capabilities_are_kept(site: Host) -> None:
    root = site.root / "layer"
    layer(
        root,
        entry("program", b"x", uid=12, gid=34, mode=0o6755, **xattr("security.capability", CAPABILITY)),
        entry("link", kind="link", linkname="program", uid=56, gid=78),
        entry("null", kind="char", devmajor=1, devminor=3, mode=0o666),
        entry("folder", kind="dir", uid=5, **xattr("user.note", b"\x01\xff")),
    )
    program, null = (root / "program").stat(), (root / "null").stat()
    assert (program.st_uid, program.st_gid, stat.S_IMODE(program.st_mode)) == (12, 34, 0o6755)
    assert os.getxattr(root / "program", "security.capability") == CAPABILITY
    assert ((root / "link").lstat().st_uid, (root / "link").lstat().st_gid) == (56, 78)
    assert (null.st_rdev, stat.S_IMODE(null.st_mode)) == (os.makedev(1, 3), 0o666)
    assert (root / "folder").stat().st_uid == 5
    assert os.getxattr(root / "folder", "user.note") == b"\x01\xff"


def test_an_archive_can_not_steer_overlayfs(site: Host) -> None:
    root = site.root / "layer"
    layer(root, entry("d", kind="dir", **xattr("trusted.overlay.redirect", b"/elsewhere")))
    assert os.listxattr(root / "d") == []


def test_the_kernel_stacks_what_whiteouts_and_opaque_directories_say(site: Host) -> None:
    names = ("low", "middle", "high")
    layers = tuple(site.root / name for name in names)
    layer(layers[0], *(entry(f"{folder}/low", b"low") for folder in "abcdef"), entry("g", b"low"))
    layer(
        layers[1],
        entry("a/.wh.low"),
        entry("b/.wh..wh..opq"),
        entry("b/middle", b"middle"),
        entry(".wh.c"),
        entry(".wh.d"),
        entry("d/middle", b"middle"),
        entry("e/middle", b"middle"),
        entry(".wh.e"),
        entry(".wh.g"),
    )
    layer(layers[2], entry("c/high", b"high"), entry("g/high", b"high"), entry("f/.wh.low"))
    expected = {"b/middle", "c/high", "d/middle", "e/middle", "g/high"}
    driver = OverlayRootfs(site)
    receipt = driver.ensure(RootfsWant(instance="stack", layers=layers))
    try:
        root = Path(receipt.data["path"])
        assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == expected
    finally:
        driver.remove(receipt)
    paths = [f"{folder}/{name}" for folder in "abcdefg" for name in names]
    assert {path for path in paths if find(layers, path)} == expected


MAP = ((8192, 1), (20_000, 2))
HOLES = {
    "old GNU": header(
        b"s",
        b"S",
        3,
        magic=b"ustar  \0",
        more=bytes(41)
        + b"".join(b"%011o\0%011o\0" % piece for piece in MAP).ljust(96, b"\0")
        + b"\0"
        + b"%011o\0" % 1_000_000,
    )
    + padded(b"abc"),
    "pax 0.0": pax(
        (b"GNU.sparse.size", b"1000000"),
        (b"GNU.sparse.numblocks", b"2"),
        *(
            (key, b"%d" % number)
            for piece in MAP
            for key, number in zip((b"GNU.sparse.offset", b"GNU.sparse.numbytes"), piece, strict=True)
        ),
    )
    + raw(b"s", b"abc"),
    "pax 0.1": pax(
        (b"GNU.sparse.size", b"1000000"), (b"GNU.sparse.map", b"8192,1,20000,2"), (b"GNU.sparse.name", b"s")
    )
    + raw(b"./GNUSparseFile.0/s", b"abc"),
    "pax 1.0": pax(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"1000000"),
        (b"GNU.sparse.name", b"s"),
    )
    + raw(b"./GNUSparseFile.0/s", padded(b"2\n8192\n1\n20000\n2\n") + b"abc"),
}


@pytest.mark.parametrize("form", HOLES)
def test_sparse_files_stay_sparse(site: Host, form: str) -> None:
    unpack(HOLES[form] + END, site.root / "layer")
    content = bytearray(1_000_000)
    content[8192:8193], content[20_000:20_002] = b"a", b"bc"
    found = (site.root / "layer/s").stat()
    assert (site.root / "layer/s").read_bytes() == content
    assert found.st_blocks * 512 < 100_000


def acl(*entries: tuple[int, int, int]) -> bytes:
    """As acl(5) lies in an extended attribute: version 2, then tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


ACL = acl((1, 6, 0xFFFFFFFF), (2, 4, 12), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))


def test_what_a_folder_hands_down_is_not_what_the_archive_says(site: Host) -> None:
    root = site.root / "layer"
    unpack(
        pax((b"SCHILY.xattr.system.posix_acl_default", ACL))
        + raw(b"d", kind=b"5", mode=0o2775, owner=(0, 50))
        + raw(b"d/file", b"1", mode=0o640, owner=(0, 0), mtime=b"%011o\0" % 7)
        + raw(b"d/folder", kind=b"5", mode=0o700, owner=(0, 0))
        + raw(b"d/folder/file", kind=b"5", mode=0o4711, owner=(0, 0))
        + raw(b"d/link", kind=b"2", link=b"x", owner=(0, 0))
        + END,
        root,
    )
    assert os.getxattr(root / "d", "system.posix_acl_default") == ACL
    for name, mode in {"d/file": 0o640, "d/folder": 0o700, "d/folder/file": 0o4711, "d/link": 0o777}.items():
        found = (root / name).lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, 0), name
        assert os.listxattr(root / name, follow_symlinks=False) == []


def test_attributes_come_in_either_spelling_and_for_every_kind(site: Host) -> None:
    root = site.root / "layer"
    both = pax((b"SCHILY.xattr.user.a", b"1"), (b"LIBARCHIVE.xattr.user.a", base64.b64encode(b"2")))
    trusted = pax((b"LIBARCHIVE.xattr.trusted%2eb", base64.b64encode(b"\0\n").rstrip(b"=")))
    access = pax((b"SCHILY.xattr.system.posix_acl_access", ACL))
    times = pax((b"mtime", b"-1.000000001"))
    unpack(
        both + raw(b"a", b"1")
        + trusted + raw(b"link", kind=b"2", link=b"/nowhere")
        + trusted + raw(b"pipe", kind=b"6")
        + access + raw(b"acl", b"1", mode=0o640)
        + times + raw(b"time", b"1")
        + END,
        root,
    )  # fmt: skip
    assert os.getxattr(root / "a", "user.a") == b"1"
    assert os.getxattr(root / "link", "trusted.b", follow_symlinks=False) == b"\0\n"
    assert os.getxattr(root / "pipe", "trusted.b") == b"\0\n"
    assert os.getxattr(root / "acl", "system.posix_acl_access") == ACL
    assert (root / "time").stat().st_mtime_ns == -1_000_000_001


def test_a_full_disk_is_no_fault_of_the_layer(site: Host) -> None:
    small = site.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        with pytest.raises(UnfitHost, match="'a': No space left on device"):
            layer(small / "layer", entry("a", bytes(3_000_000)))
    finally:
        subprocess.run(["umount", small], check=True)


def root_of(pid: int) -> Path | None:
    """The root directory of a process, None when it has just ended."""
    try:
        return Path(f"/proc/{pid}/root").readlink()
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_the_worker_is_locked_into_the_layers_folder(site: Host) -> None:
    folder = site.root / "layer"
    folder.mkdir()
    reader, writer = os.pipe()
    try:
        thread = threading.Thread(
            target=unpack_stream, args=(reader, folder, site.root / "recipe"), kwargs={"limits": LIMITS}
        )
        thread.start()
        os.write(writer, raw(b"a", b"1"))
        wait_for((folder / "a").exists, "it unpacks")
        workers = [pid for pid in children(os.getpid()) if root_of(pid) == folder]
        assert len(workers) == 1
        facts = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{workers[0]}/status").read_text().splitlines()
            if ":\t" in line
        )
        kept = sum(1 << number for number in (0, 1, 3, 4, 21, 27, 31))  # capabilities(7)
        assert (int(facts["CapEff"], 16), int(facts["CapPrm"], 16)) == (kept, kept)
        assert facts["NoNewPrivs"] == "1"
        opened = {str(path.readlink()) for path in Path(f"/proc/{workers[0]}/fd").iterdir()}
        strange = {name for name in opened if not name.startswith(("socket:", "pipe:", "/dev/null", str(site.root)))}
        assert not strange
        assert sum(name.startswith("pipe:") for name in opened) == 1
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)


UNPACK = """
import sys
from pathlib import Path
from holdfast.images.unpacking.unpack import Expected
from holdfast.images.kept.store import ImageStore
store = ImageStore(Path(sys.argv[1]))
print("ready", flush=True)
store.layers.add(0, Expected(diff_id=sys.argv[2] or None))
print("done", flush=True)
"""


def test_the_worker_ends_with_the_agent(site: Host) -> None:
    reader, writer = os.pipe()
    agent = subprocess.Popen(
        [sys.executable, "-c", UNPACK, site.root / "images", ""], stdin=reader, stdout=subprocess.DEVNULL
    )
    os.close(reader)
    os.write(writer, raw(b"a", b"1"))
    wait_for(lambda: children(agent.pid), "there is a worker")
    agent.kill()
    agent.wait()
    poll = select.poll()
    poll.register(writer, 0)  # POLLERR comes when nobody has the other end any more
    assert poll.poll(20_000)
    os.close(writer)
    clean_store(site)


def clean_store(site: Host) -> ImageStore:
    """The store once nothing is half unpacked; a child that was just being made may hold its lock for a moment."""

    def clean() -> ImageStore | None:
        store = ImageStore(site.root / "images")
        return None if any(path.is_dir() for path in (site.root / "images/partial").iterdir()) else store

    store = wait_for(clean, "nothing is half unpacked")
    assert store is not None
    return store


@pytest.mark.parametrize("victim", ["agent", "worker"])
def test_a_kill_at_any_moment_leaves_no_half_layer(site: Host, victim: str) -> None:
    """The kills are spread over the bytes of the stream, and over what comes after the last one."""
    dice = random.Random(4)
    archive = tar_of(*(entry(f"folder{n % 7}/file{n}", dice.randbytes(5000)) for n in range(400)))
    stream = gzip.compress(archive, 1)
    whole = unpack(stream, site.root / "whole")
    for part in (0, 1, len(stream) // 3, len(stream) - 9, len(stream) - 1, len(stream)):
        reader, writer = os.pipe()
        agent = subprocess.Popen(
            [sys.executable, "-c", UNPACK, site.root / "images", whole.diff_id],
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        os.close(reader)
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"ready\n"
        sender = threading.Thread(target=send, args=(writer, stream[:part]))
        sender.start()
        if victim == "worker":
            wait_for(lambda agent=agent: children(agent.pid), "there is a worker")  # type: ignore[misc]
        if part > 1:
            sender.join()
        for pid in children(agent.pid) if victim == "worker" else [agent.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sender.join()
        os.close(writer)
        agent.wait()
        agent.stdout.close()
        store = clean_store(site)
        if store.layers.has(whole.diff_id):
            assert part == len(stream)
            assert store.layers.add(0, Expected(diff_id=whole.diff_id)).files == whole.files


def send(writer: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(writer, data) :]
    except BrokenPipeError:
        pass
