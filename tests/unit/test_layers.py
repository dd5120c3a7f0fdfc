"""What archives become on disk, and that hostile ones change nothing outside."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import stat
from pathlib import Path

import pytest

from holdfast.errors import WrongState
from holdfast.images.kept.lookup import find
from holdfast.testing import host_fingerprint
from tars import Entry, entry, layer, tar_of, unpack


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def test_content_mode_times_and_links_are_as_in_the_archive(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    layer(
        tmp_path / "l",
        entry("./", kind="dir", mode=0o711),
        entry("./bin/", kind="dir", mode=0o1770, mtime=5),
        entry("./bin/program", data, mode=0o4755, mtime=1_234_567_890.5),
        entry("./bin/again", kind="hard", linkname="bin/program"),
        entry("./bin/link", kind="link", linkname="../etc/passwd", mtime=7),
        entry("deep/without/parents", b"x"),
        entry("pipe", kind="fifo", mode=0o600),
    )
    root = tmp_path / "l"
    program = (root / "bin/program").stat()
    assert (root / "bin/program").read_bytes() == data
    assert (stat.S_IMODE(program.st_mode), program.st_mtime_ns) == (0o4755, 1_234_567_890_500_000_000)
    assert (root / "bin/again").stat().st_ino == program.st_ino
    assert os.readlink(root / "bin/link") == "../etc/passwd"  # noqa: PTH115 (a Path would be normalised)
    assert ((root / "bin").stat().st_mtime, stat.S_IMODE((root / "bin").stat().st_mode)) == (5, 0o1770)
    assert stat.S_IMODE(root.stat().st_mode) == 0o711
    assert stat.S_IMODE((root / "deep/without").stat().st_mode) == 0o755
    assert (root / "pipe").is_fifo()


def test_the_digest_is_that_of_all_bytes_padding_included(tmp_path: Path) -> None:
    data = tar_of(entry("a", b"1")) + bytes(100_000)
    (tmp_path / "l").mkdir()
    unpacked = unpack(data, tmp_path / "l")
    assert unpacked.diff_id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (unpacked.size, unpacked.newest) == (len(data), 1_000_000_000)


def test_names_that_are_no_utf8_are_kept_byte_by_byte(tmp_path: Path) -> None:
    layer(tmp_path / "l", entry(os.fsdecode(b"caf\xe9"), b"1"), entry("日本", b"2"))
    assert sorted(os.fsencode(path.name) for path in (tmp_path / "l").iterdir()) == [b"caf\xe9", "日本".encode()]


def test_a_file_whose_short_name_ends_at_a_slash_is_no_directory(tmp_path: Path) -> None:
    """A header has room for 100 bytes of a name; the whole of it is in the extended header before."""
    folder = "d" * 99
    layer(tmp_path / "l", entry(f"{folder}/file", b"content"), entry("after", b"1"))
    assert (tmp_path / "l" / folder / "file").read_bytes() == b"content"
    assert (tmp_path / "l/after").read_bytes() == b"1"


def test_whiteouts_become_what_overlayfs_reads(tmp_path: Path) -> None:
    layer(tmp_path / "l", entry("etc/.wh.gone", b""), entry("etc/.wh..wh.plnk", b""), entry("etc/kept", b"1"))
    assert is_whiteout(tmp_path / "l/etc/gone")
    assert sorted(path.name for path in (tmp_path / "l/etc").iterdir()) == ["gone", "kept"]


@pytest.mark.parametrize("late", [False, True])
def test_a_file_of_the_same_layer_outlives_its_whiteout(tmp_path: Path, late: bool) -> None:
    entries = [entry("a", b"new"), entry(".wh.a", b"")]
    layer(tmp_path / "l", *(reversed(entries) if late else entries))
    assert (tmp_path / "l/a").read_bytes() == b"new"


def test_a_later_entry_replaces_an_earlier_one(tmp_path: Path) -> None:
    layer(
        tmp_path / "l",
        entry("a/inner", b"1"),
        entry("a", b"a file now"),
        entry("b", kind="link", linkname="/etc"),
        entry("b", kind="dir"),
        entry("c", b"1"),
        entry("c", b"2"),
    )
    assert (tmp_path / "l/a").read_bytes() == b"a file now"
    assert (tmp_path / "l/b").is_dir()
    assert not (tmp_path / "l/b").is_symlink()
    assert (tmp_path / "l/c").read_bytes() == b"2"


def test_what_follows_a_replaced_folder_goes_where_its_name_leads_then(tmp_path: Path) -> None:
    layer(
        tmp_path / "l",
        entry("a", kind="dir", mtime=5),
        entry("a/x", b"1"),
        entry("b", kind="dir"),
        entry("a", kind="link", linkname="b"),
        entry("a/y", b"2"),
        entry("c", kind="dir", mtime=5),
        entry("c", b"3", mtime=7),
    )
    assert sorted(path.name for path in (tmp_path / "l").iterdir()) == ["a", "b", "c"]
    assert [path.name for path in (tmp_path / "l/b").iterdir()] == ["y"]
    assert (tmp_path / "l/c").stat().st_mtime == 7


def test_a_folder_of_many_folders_can_be_replaced(tmp_path: Path) -> None:
    folders = [entry(f"a/{number // 40}/{number}", kind="dir") for number in range(1200)]
    layer(tmp_path / "l", *folders, entry("a", b"1"))
    assert (tmp_path / "l/a").read_bytes() == b"1"


def test_links_among_parents_are_followed_inside_the_layer(tmp_path: Path) -> None:
    layer(
        tmp_path / "l",
        entry("usr/lib", kind="dir"),
        entry("lib", kind="link", linkname="/usr/lib"),
        entry("lib/a", b"1"),
        entry("up", kind="link", linkname="../../../../usr"),
        entry("up/lib/b", b"2"),
    )
    assert sorted(path.name for path in (tmp_path / "l/usr/lib").iterdir()) == ["a", "b"]


HOSTILE = {
    "a parent reference": [entry("../outside", b"x")],
    "a parent reference in the middle": [entry("a/../../outside", b"x")],
    "a whiteout of the parent": [entry(".wh...", b"")],
    "a whiteout above": [entry("../.wh.precious", b"")],
    "a hard link to above": [entry("key", kind="hard", linkname="../precious/key")],
    "a hard link to an absolute path": [entry("key", kind="hard", linkname="{outside}/key")],
    "a hard link through a link": [
        entry("door", kind="link", linkname="{outside}"),
        entry("key", kind="hard", linkname="door/key"),
    ],
    "a loop of links": [
        entry("a", kind="link", linkname="b"),
        entry("b", kind="link", linkname="a"),
        entry("a/x", b"1"),
    ],
    "a file as a parent": [entry("a", b"1"), entry("a/b", b"2")],
}

HARMLESS = {
    "an absolute name": [entry("{outside}/key", b"x")],
    "writing through a link to a directory": [
        entry("door", kind="link", linkname="{outside}"),
        entry("door/key", b"x"),
    ],
    "writing through a relative link": [
        entry("door", kind="link", linkname="../precious"),
        entry("door/key", b"x"),
    ],
    "writing over a link to a file": [
        entry("key", kind="link", linkname="{outside}/key"),
        entry("key", b"x", mode=0o777),
    ],
    "a hard link to a link": [
        entry("key", kind="link", linkname="{outside}/key"),
        entry("again", kind="hard", linkname="key"),
        entry("again", b"x"),
    ],
    "a directory over a link": [
        entry("door", kind="link", linkname="{outside}"),
        entry("door", kind="dir", mode=0o777, mtime=1),
    ],
    "a whiteout behind a link": [
        entry("door", kind="link", linkname="{outside}"),
        entry("door/.wh.key", b""),
    ],
    "a directory that becomes a link": [
        entry("door", kind="dir", mtime=1),
        entry("door", kind="link", linkname="{outside}"),
    ],
}


def _aimed(entries: list[Entry], outside: Path) -> list[Entry]:
    aimed = copy.deepcopy(entries)
    for member, _ in aimed:
        member.name = member.name.replace("{outside}", str(outside))
        member.linkname = member.linkname.replace("{outside}", str(outside))
    return aimed


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "key").write_text("secret")
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_is_refused_and_changes_nothing_outside(tmp_path: Path, precious: Path, name: str) -> None:
    before = host_fingerprint("nobody", precious)
    with pytest.raises(WrongState, match="unpack layer"):
        layer(tmp_path / "l", *_aimed(HOSTILE[name], precious))
    assert host_fingerprint("nobody", precious) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l", "l.recipe", "precious"]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_points_outside_stays_inside(tmp_path: Path, precious: Path, name: str) -> None:
    before = host_fingerprint("nobody", precious)
    layer(tmp_path / "l", *_aimed(HARMLESS[name], precious))
    assert host_fingerprint("nobody", precious) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l", "l.recipe", "precious"]


@pytest.mark.parametrize("data", [b"no archive at all" * 100, tar_of(entry("a", bytes(100_000)))[:60_000]])
def test_a_damaged_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "l").mkdir()
    with pytest.raises(WrongState, match="unpack layer"):
        unpack(data, tmp_path / "l")


@pytest.fixture
def stack(tmp_path: Path) -> tuple[Path, ...]:
    layer(
        tmp_path / "low",
        entry("bin/sh", b"shell", mode=0o755),
        entry("etc/passwd", b"low"),
        entry("etc/gone", b"low"),
        entry("dir/below", b"low"),
        entry("file", b"low"),
    )
    layer(
        tmp_path / "high",
        entry("etc/passwd", b"high"),
        entry("etc/.wh.gone", b""),
        entry("dir", b"a file hides the directory"),
        entry("usr", kind="link", linkname="/"),
        entry("abs", kind="link", linkname="/../../bin/sh"),
        entry("rel", kind="link", linkname="usr/bin/../bin/sh"),
        entry("loop", kind="link", linkname="loop"),
        entry("out", kind="link", linkname="../../../../../../../../etc/hostname"),
        entry("file/new", b"high"),
    )
    return tmp_path / "low", tmp_path / "high"


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/bin/sh", b"shell"),
        ("etc/passwd", b"high"),
        ("/etc/gone", None),
        ("/dir/below", None),
        ("/dir", b"a file hides the directory"),
        ("/usr/usr/bin/sh", b"shell"),
        ("/abs", b"shell"),
        ("/rel", b"shell"),
        ("/loop", None),
        ("/out", None),
        ("/file/new", b"high"),
        ("/bin/sh/x", None),
        ("/../../bin/./sh", b"shell"),
        ("/nowhere", None),
    ],
)
def test_paths_are_found_as_the_container_will_find_them(
    stack: tuple[Path, ...], path: str, content: bytes | None
) -> None:
    found = find(stack, path)
    assert (None if found is None else found.read_bytes()) == content


def test_directories_are_found_where_they_are_highest(stack: tuple[Path, ...]) -> None:
    assert find(stack, "/etc") == stack[1] / "etc"
    assert find(stack, "/") == stack[1]
