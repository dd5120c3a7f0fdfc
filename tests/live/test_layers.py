"""What only root can unpack, and what the kernel's overlay makes of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from holdfast.drivers import Host, RootfsWant
from holdfast.images.lookup import find
from holdfast_plugins.storage import OverlayRootfs
from tars import entry, layer

pytestmark = pytest.mark.live

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep, version 2


def xattr(name: str, value: bytes) -> dict[str, dict[str, str]]:
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
