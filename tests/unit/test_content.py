"""Content of files and trees, stored once by digest."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.errors import NotFound, WrongState
from holdfast.runtime.content import ContentStore


def files_below(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def test_content_is_stored_once_immutable_and_pruned(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "content")
    file = store.store_file(b"text")
    assert file == hashlib.sha256(b"text").hexdigest()
    tree = store.store_tree({"a/b": file, "c": file})
    assert store.store_tree({"c": file, "a/b": file}) == tree
    assert (store.path(tree) / "a/b").read_bytes() == b"text"
    assert stat.S_IMODE(store.path(file).stat().st_mode) == 0o444
    store.prune({tree})
    assert (store.path(tree) / "c").read_bytes() == b"text"
    with pytest.raises(NotFound):
        store.path(file)
    store.prune(set())
    assert files_below(store.root) == []
    for name in ("/a", "../a", "a//b", ""):
        with pytest.raises(WrongState, match="not a path below"):
            store.store_tree({name: file})


def test_content_is_stored_by_many_at_once(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "content")
    files = {f"d/{number}": store.store_file(b"%d" % number) for number in range(50)}
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: store.store_tree(files), range(16)))) == 1
    assert list((store.root / "partial").iterdir()) == []
