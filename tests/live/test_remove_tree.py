"""Deleting a directory never reaches what is mounted in it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from holdfast.files import discard_tree, remove_tree
from live.mounts import Mounts

pytestmark = pytest.mark.live


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of somebody else's, with a file in it."""
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "folder/file").write_text("kept")
    return source


@pytest.mark.parametrize("place", ["tree", "tree/inner", "tree/inner/deep"])
def test_what_is_mounted_in_a_tree_keeps_its_content(
    tmp_path: Path, source: Path, mounts: Mounts, place: str
) -> None:
    (tmp_path / "tree/inner/deep").mkdir(parents=True)
    mounts.bind(source, tmp_path / place)

    with pytest.raises(OSError) as refused:
        remove_tree(tmp_path / "tree")
    discard_tree(tmp_path / "tree")

    assert refused.value.errno in (errno.EXDEV, errno.EBUSY)
    assert (source / "folder/file").read_text() == "kept"


def test_a_file_that_is_mounted_in_a_tree_is_kept(tmp_path: Path, source: Path, mounts: Mounts) -> None:
    place = tmp_path / "tree/file"
    place.parent.mkdir()
    place.touch()
    mounts.bind(source / "folder/file", place)

    with pytest.raises(OSError):
        remove_tree(tmp_path / "tree")

    assert place.read_text() == "kept"
