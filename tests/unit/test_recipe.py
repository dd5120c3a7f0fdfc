"""From what was unpacked, and the recipe, the same archive comes out again, byte by byte."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import WrongState
from holdfast.files import remove_tree
from holdfast.images.unpacking.recipe import rebuild
from holdfast.images.unpacking.tarstream import Damaged
from tars import END, entry, header, layer, padded, pax, raw, tar_of, unpack, unpack_here


@pytest.fixture(autouse=True, scope="module")
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def rebuilt(folder: Path) -> bytes:
    out = io.BytesIO()
    rebuild(folder, folder.with_name(f"{folder.name}.recipe"), out)
    return out.getvalue()


MAP = b"".join(b"%011o\0%011o\0" % piece for piece in ((4096, 4), (99_998, 2)))
SPARSE = header(
    b"hole", b"S", 6, magic=b"ustar  \0", more=bytes(41) + MAP + bytes(49) + b"%011o\0" % 100_000
) + padded(b"abcdef")
ODD = {
    "nothing but the end": END,
    "no end": raw(b"a", b"1"),
    "something after the end": raw(b"a", b"1") + END + random.Random(1).randbytes(5000),
    "an entry that is replaced": raw(b"a", b"first") + raw(b"a", b"second") + END,
    "a folder that is replaced": raw(b"a/b/c", b"first") + raw(b"a/d", b"2") + raw(b"a", b"a file") + END,
    "an entry behind a link that is replaced": raw(b"to", kind=b"2", link=b"a/b")
    + raw(b"a/b/x", b"1")
    + raw(b"to/x", b"2")
    + raw(b"to/x", b"3")
    + raw(b"a", kind=b"2", link=b"elsewhere")
    + END,
    "all names of a file are replaced": raw(b"a", b"1" * 1000)
    + raw(b"b", kind=b"1", link=b"a")
    + raw(b"a", b"2")
    + raw(b"b", b"3")
    + raw(b"a", b"4")
    + END,
    "whiteouts with content": raw(b".wh.a", b"why")
    + raw(b"b/.wh..wh..opq", b"so")
    + raw(b".wh..wh.plnk/1.2", b"x")
    + END,
    "an old sparse file": SPARSE + END,
    "a sparse file that is replaced": SPARSE + raw(b"hole", b"x") + END,
    "a global header": raw(b"g", b"18 comment=whatever", kind=b"g") + raw(b"a", b"1") + END,
    "sizes where there is no content": header(b"d", b"5", 700)
    + header(b"l", b"2", 5, link=b"d")
    + raw(b"a", b"1")
    + END,
    "attributes": pax((b"SCHILY.xattr.user.a", b"1\n\0\xff")) + raw(b"a", b"1") + END,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_archives_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    found = unpack(ODD[name], tmp_path / "l")
    assert found.diff_id == f"sha256:{hashlib.sha256(ODD[name]).hexdigest()}"
    assert rebuilt(tmp_path / "l") == ODD[name]


names = st.sampled_from([b"a", b"b", b"c", b"d/a", b"d/b", b"e/d/a", b"./d/c/a/b", b"/a", b"d//b", b"\xe9\n"])
contents = st.one_of(
    st.binary(max_size=20), st.integers(0, 5000).map(bytes), st.integers(1, 300).map(lambda number: b"xyz" * number)
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Entries of all kinds, many of the same name; a hard link is to a file that came before."""
    parts: list[bytes] = []
    files: list[bytes] = []
    for kind in draw(st.lists(st.sampled_from("FFFFDLHHPSXWO"), max_size=12)):
        name = draw(names)
        parent, _, base = name.rpartition(b"/")
        match kind:
            case "F":
                files.append(name)
                parts.append(raw(name, draw(contents)))
            case "D":
                parts.append(raw(parent or name, kind=b"5"))
            case "L":
                parts.append(raw(name, kind=b"2", link=draw(names)))
            case "H" if files:
                parts.append(raw(name, kind=b"1", link=draw(st.sampled_from(files))))
            case "P":
                parts.append(raw(name, kind=b"6"))
            case "S":
                parts.append(SPARSE)
            case "X":
                parts.append(pax((b"path", name + b"/long" * 30)) + raw(b"x", draw(contents)))
            case "W":
                parts.append(raw(parent + b"/.wh." + base, draw(contents)))
            case "O":
                parts.append(raw(parent + b"/.wh..wh..opq", draw(contents)))
    return b"".join(parts) + draw(st.sampled_from([b"", END, END + bytes(9000), END + b"more"]))


@settings(max_examples=100, deadline=None)
@given(archive=archives(), chunk=st.sampled_from([511, 512, 1000, 1 << 16]))
def test_any_archive_that_can_be_unpacked_comes_out_as_it_went_in(archive: bytes, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "l")
        with suppress(Damaged, OSError):  # a file as a parent, a link to nothing, a loop
            unpack_here(archive, root, Path(folder, "l.recipe"), chunk)
            assert rebuilt(root) == archive
        remove_tree(root)


def test_a_file_of_many_names_is_kept_once(tmp_path: Path) -> None:
    names = [b"name%d" % number for number in range(50)]
    archive = (
        raw(b"file", random.Random(3).randbytes(100_000))
        + b"".join(raw(name, kind=b"1", link=b"file") for name in names)
        + b"".join(raw(name, b"another") for name in [*names, b"file"])
        + END
    )
    unpack(archive, tmp_path / "l")
    assert (tmp_path / "l.recipe").stat().st_size < 120_000
    assert rebuilt(tmp_path / "l") == archive


def test_a_recipe_is_small(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(20_000)
    archive = tar_of(*(entry(f"usr/lib/{n % 10}/file{n}", data) for n in range(500)))
    unpack(archive, tmp_path / "l")
    assert (tmp_path / "l.recipe").stat().st_size < len(archive) / 50
    assert rebuilt(tmp_path / "l") == archive


def test_what_has_changed_on_disk_is_told_or_changes_the_digest(tmp_path: Path) -> None:
    found = layer(tmp_path / "l", entry("a/file", b"content"), entry("b", b"1"))

    (tmp_path / "l/a/file").write_bytes(b"changed")
    assert f"sha256:{hashlib.sha256(rebuilt(tmp_path / 'l')).hexdigest()}" != found.diff_id
    (tmp_path / "l/a/file").write_bytes(b"less")
    with pytest.raises(WrongState, match=r"rebuild layer 'l': b'a/file' is shorter"):
        rebuilt(tmp_path / "l")
    (tmp_path / "l/a/file").unlink()
    (tmp_path / "l/a/file").symlink_to("/etc/hostname")
    with pytest.raises(WrongState, match="rebuild layer 'l': b'a/file'"):
        rebuilt(tmp_path / "l")


@pytest.mark.parametrize("damage", [b"", b"something else", None])
def test_a_damaged_recipe_is_told(tmp_path: Path, damage: bytes | None) -> None:
    layer(tmp_path / "l", entry("a", b"content"))
    recipe = tmp_path / "l.recipe"
    recipe.write_bytes(recipe.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(WrongState, match="rebuild layer 'l'"):
        rebuilt(tmp_path / "l")
