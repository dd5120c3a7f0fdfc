"""Writable layers and stacks → archives: what overlayfs keeps comes back as it was when the archive is unpacked."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import WrongState
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.pack import pack_changes, pack_merged

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and attributes of overlayfs need root")
OPAQUE = "trusted.overlay.opaque"
STRANGE = b"new\nline\xff" + "ä".encode() * 60


def look(root: Path) -> dict[str, Any]:
    """Everything that a layer says of its files."""
    found = {}
    for path in sorted(root.rglob("*")):
        entry = path.lstat()
        names = [name for name in os.listxattr(path, follow_symlinks=False) if name != "trusted.overlay.origin"]
        found[str(path.relative_to(root))] = (
            entry.st_mode,
            entry.st_uid,
            entry.st_rdev,
            entry.st_mtime_ns if not (stat.S_ISCHR(entry.st_mode) and entry.st_rdev == 0) else 0,
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b"",
            {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
            entry.st_nlink if path.is_file() else 0,
        )
    return found


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """A writable layer with one of everything."""
    root = tmp_path / "upper"
    (root / "etc").mkdir(parents=True)
    os.mknod(root / "etc/gone", stat.S_IFCHR, 0)
    (root / "srv").mkdir(mode=0o751)
    os.setxattr(root / "srv", OPAQUE, b"y")
    (root / "srv/page").write_bytes(b"page")
    os.chown(root / "srv/page", 3_000_000, 5)
    (root / "srv/page").chmod(0o4755)
    os.setxattr(root / "srv/page", "user.raw", b"\x00\xff=\n")
    os.link(root / "srv/page", root / "srv/same")
    (root / "long").symlink_to("x" * 150)
    (root / os.fsdecode(STRANGE)).write_bytes(b"strange")
    os.utime(root / os.fsdecode(STRANGE), ns=(1, 1_600_000_000_123_456_789))
    os.mkfifo(root / "pipe", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "empty").touch()
    return root


def packed(root: Path, **more: Any) -> bytes:
    out = io.BytesIO()
    pack_changes(root, out, **more)
    return out.getvalue()


def unpacked(tmp_path: Path, archive: bytes) -> Path:
    (tmp_path / "layer.tar").write_bytes(archive)
    store = ImageStore(tmp_path / "images")
    with (tmp_path / "layer.tar").open("rb") as stream:
        return store.layers.folder(store.layers.add(stream).diff_id)


def test_a_writable_layer_survives_the_archive(upper: Path, tmp_path: Path) -> None:
    assert look(unpacked(tmp_path, packed(upper))) == look(upper)


def test_the_same_layer_makes_the_same_archive(upper: Path) -> None:
    assert packed(upper) == packed(upper)


def test_whiteouts_are_written_as_images_have_them(upper: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed(upper)), errors="surrogateescape") as tar:
        names = tar.getnames()
    assert {"etc/.wh.gone", "srv/.wh..wh..opq", os.fsdecode(STRANGE)} <= set(names)
    assert names[0] == "."


def test_sockets_and_empty_mount_points_are_left_out(upper: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(upper / "talk"))
    (upper / "mnt").mkdir()
    (upper / "full").write_bytes(b"1")
    there = look(unpacked(tmp_path, packed(upper, leave_out=["/mnt", "/empty", "/full", "/srv"])))
    assert "talk" not in there and "mnt" not in there and "empty" not in there
    assert {"full", "srv", "srv/page"} <= set(there)


def test_holes_stay_holes(tmp_path: Path) -> None:
    root = tmp_path / "upper"
    root.mkdir()
    with (root / "disk").open("wb") as file:
        file.write(b"start")
        file.seek(64 << 20)
        file.write(b"middle")
        file.truncate(256 << 20)
    archive = packed(root)
    assert len(archive) < 1 << 20
    copy = unpacked(tmp_path, archive) / "disk"
    assert copy.stat().st_size == 256 << 20
    assert copy.stat().st_blocks * 512 < 1 << 20
    with copy.open("rb") as file:
        assert file.read(5) == b"start"
        file.seek(64 << 20)
        assert file.read(7) == b"middle\0"


def test_a_directory_that_overlayfs_redirected_is_refused(upper: Path) -> None:
    os.setxattr(upper / "etc", "trusted.overlay.redirect", b"/old")
    with pytest.raises(WrongState, match="redirect_dir"):
        packed(upper)


def test_whoever_reads_no_more_is_not_taken_for_a_damaged_tree(upper: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with pytest.raises(BrokenPipeError), os.fdopen(theirs, "wb", 0) as pipe:
        pack_changes(upper, pipe)


def test_a_merged_stack_is_what_overlayfs_shows(upper: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    for folder in ("etc", "srv", "opt/deep"):
        (lower / folder).mkdir(parents=True)
    for name in ("etc/gone", "etc/kept", "srv/hidden", "opt/deep/file", "empty"):
        (lower / name).write_bytes(name.encode())
    out = io.BytesIO()
    pack_merged([lower, upper], out)
    out.seek(0)
    with tarfile.open(fileobj=out, errors="surrogateescape") as tar:
        names = set(tar.getnames())
        kept = tar.extractfile("etc/kept")
        assert kept is not None and kept.read() == b"etc/kept"
        assert tar.getmember("empty").size == 0
        assert tar.getmember("srv/same").linkname == "srv/page"
    expected = {"etc", "etc/kept", "srv", "srv/page", "srv/same", "opt", "opt/deep", "opt/deep/file", "empty", "pipe"}
    assert names == expected | {".", "long", "null", os.fsdecode(STRANGE)}


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "upper"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    with tarfile.open(fileobj=io.BytesIO(packed(root))) as tar:
        assert tar.getnames() == [".", "out"]


def test_very_deep_trees_are_packed(tmp_path: Path) -> None:
    root = tmp_path / "upper"
    root.mkdir()
    place = os.open(root, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("directory", dir_fd=place)
        inner = os.open("directory", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    with tarfile.open(fileobj=io.BytesIO(packed(root))) as tar:
        assert len(tar.getnames()) == 301
