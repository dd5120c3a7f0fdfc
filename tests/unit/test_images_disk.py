"""What the image store asks of its file system."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.errors import UnfitHost
from holdfast.images.disk import check_room, lock
from holdfast.images.kept.store import ImageStore


def _attributes(folder: Path) -> str:
    done = subprocess.run(["lsattr", "-d", folder], capture_output=True, text=True, check=False)
    return done.stdout.split(" ")[0] if done.returncode == 0 else ""


def test_layers_are_made_away_from_each_other_on_a_disk_that_knows_how(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    probe = subprocess.run(["chattr", "+T", tmp_path / "other"], capture_output=True, check=False)
    if os.geteuid() != 0 or probe.returncode != 0 or "T" not in _attributes(tmp_path / "other"):
        pytest.skip("this file system has no such attribute")
    for _ in range(2):  # an old store, as well as one made just now
        store = ImageStore(tmp_path / "images")
        assert "T" in _attributes(store.partial)
    assert "T" not in _attributes(store.root)


def test_a_layer_folder_that_never_got_its_name_is_swept_away(tmp_path: Path) -> None:
    key = "a" * 64
    left = ImageStore(tmp_path).partial / f"{key}.{'b' * 32}"
    left.mkdir()
    (left.parent / f"{key}.recipe").touch()
    assert list(ImageStore(tmp_path).partial.glob("a*")) == []


def test_a_lock_that_was_not_had_in_time_is_not_taken_later(tmp_path: Path) -> None:
    with ExitStack() as stack:

        def opened() -> int:
            descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, descriptor)
            return descriptor

        first, last = opened(), opened()
        assert lock(first, 0)
        for wait in (0, 0.05):
            late = os.open(tmp_path / "lock", os.O_RDWR)
            assert not lock(late, wait)
            os.close(late)
        assert lock(first, shared=True)
        assert lock(last, 0, shared=True)
        assert not lock(last, 0.01)
    with (tmp_path / "lock").open() as file:
        assert lock(file.fileno(), 5)


def test_where_too_little_is_free_nothing_is_begun(tmp_path: Path) -> None:
    check_room(tmp_path, 1, 1, "pull 'app'")
    for needed, least in ((1 << 62, 0), (0, 1 << 62)):
        with pytest.raises(UnfitHost, match=r"^pull 'app': not enough space in '.* free, .*system prune") as caught:
            check_room(tmp_path, needed, least, "pull 'app'")
        assert (caught.value.retry, caught.value.wait) == (True, 60)
