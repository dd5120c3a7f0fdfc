"""A state directory is replaced in one step: what reads it sees the old tree or the new one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ground import wait_for
from holdfast import mounts
from holdfast.errors import Conflict, TryAgain, UnfitHost
from holdfast.mounts import mount_points
from holdfast.source import replace
from holdfast.source.directory import DirectorySource
from holdfast.source.replace import check_replaceable, holds, replace_tree

OLD = {"shop.toml": b"[app]\n", "conf/a.txt": b"a"}
NEW = {"web.toml": b"[app]\n# new\n", "conf/b/c.txt": b"c"}
NONE: frozenset[str] = frozenset()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "etc/state"
    replace_tree(folder, OLD, NONE)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return dict(DirectorySource(folder).current().files)


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_directory_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "deep/er/state"
    assert replace_tree(folder, NEW, frozenset({"web.toml"})) is None
    assert files(folder) == NEW
    assert (folder / "web.toml").stat().st_mode & 0o777 == 0o755
    assert (folder / "conf/b/c.txt").stat().st_mode & 0o777 == 0o644
    assert names(folder.parent) == ["state"]


def test_what_was_there_is_kept_beside_it_and_only_the_last_of_it(state: Path) -> None:
    previous = replace_tree(state, NEW, NONE)
    assert previous == state.with_name("state.previous")
    assert (files(state), files(previous)) == (NEW, OLD)
    replace_tree(state, {"third.toml": b""}, NONE)
    assert (files(state), files(previous)) == ({"third.toml": b""}, NEW)
    assert names(state.parent) == ["state", "state.previous"]


def test_mode_of_the_directory_and_the_link_to_it_stay(state: Path, tmp_path: Path) -> None:
    state.chmod(0o2750)
    link = tmp_path / "link"
    link.symlink_to("etc/state")
    replace_tree(link, NEW, NONE)
    assert link.is_symlink() and files(link) == NEW
    assert state.stat().st_mode & 0o7777 == 0o2750


def test_a_tree_is_held_only_where_nothing_is_missing_other_or_more(state: Path) -> None:
    assert holds(state, OLD, NONE)
    assert not holds(state, {**OLD, "more.toml": b""}, NONE)
    assert not holds(state, {**OLD, "shop.toml": b"x"}, NONE)
    (state / "more.toml").touch()
    assert not holds(state, OLD, NONE)
    assert not holds(state / "missing", OLD, NONE)


def test_a_git_work_tree_and_a_file_are_left_alone(state: Path) -> None:
    (state / ".git").mkdir()
    with pytest.raises(Conflict, match="git work tree"):
        replace_tree(state, NEW, NONE)
    with pytest.raises(Conflict, match="no directory"):
        check_replaceable(state / "shop.toml")
    assert files(state) == OLD


def test_a_directory_with_a_mount_inside_is_left_alone(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = enumerate(("/", "/proc", state, state / "conf"))
    lines = (f"{number} 1 0:{number} / {point} rw - tmpfs none rw\n" for number, point in points)
    (tmp_path / "mountinfo").write_text("".join(lines))
    monkeypatch.setattr(mounts, "OURS", mounts.MountTable(tmp_path / "mountinfo"))
    with pytest.raises(Conflict, match=r"mounted inside of it, at '.*/conf'"):
        replace_tree(state, NEW, NONE)
    assert files(state) == OLD


def test_the_mount_points_of_this_host_are_known() -> None:
    assert {"/", "/proc"} <= {each.point for each in mount_points()}


def test_a_file_system_that_can_not_exchange_gets_two_renames(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replace, "RENAME_EXCHANGE", 1 << 30)  # EINVAL from the real kernel
    previous = replace_tree(state, NEW, NONE)
    assert previous is not None
    assert (files(state), files(previous)) == (NEW, OLD)
    assert names(state.parent) == ["state", "state.previous"]


def test_a_file_that_can_not_be_written_changes_nothing(state: Path) -> None:
    with pytest.raises(UnfitHost, match="file name too long"):
        replace_tree(state, {"x" * 256: b""}, NONE)
    assert files(state) == OLD
    assert names(state.parent) == ["state"]


def test_a_reader_sees_one_tree_or_the_other_while_they_alternate(state: Path) -> None:
    one = {f"{number % 5}/{number}.toml": b"one" for number in range(20)}
    two = {f"{number % 5}/{number}.toml": b"two" for number in range(20)}
    replace_tree(state, one, NONE)
    source, seen, end = DirectorySource(state), set(), threading.Event()

    def read() -> None:
        while not end.is_set():
            try:
                revision = source.current()
            except TryAgain:
                continue
            seen.add((len(revision.files), *set(revision.files.values())))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        replace_tree(state, two, NONE)
        replace_tree(state, one, NONE)
    wait_for(lambda: seen, "somebody has read")
    end.set()
    reader.join()
    assert seen <= {(20, b"one"), (20, b"two")}


def mounted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have a folder stand for a mount point: what is done inside of one needs no real one."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)


def test_a_mount_point_is_changed_inside_and_keeps_what_was_there(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, state)
    (state / "lost+found").mkdir()
    place = state.stat().st_ino
    previous = replace_tree(state, NEW, NONE)
    assert state.stat().st_ino == place
    assert previous is not None
    assert (files(state), files(previous)) == (NEW, OLD)
    assert names(state) == ["..previous", "conf", "lost+found", "web.toml"]


@pytest.mark.parametrize("step", range(1, 6))
def test_a_mount_point_that_was_left_half_replaced_is_finished_by_the_next_load(
    state: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    mounted(monkeypatch, state)
    renames = 0
    rename = Path.rename

    class Crash(BaseException):
        pass

    def crashing(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == step:
            raise Crash
        return rename(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "rename", crashing)
        if step <= 4:  # two entries go, two come
            with pytest.raises(Crash):
                replace_tree(state, NEW, NONE)
            with pytest.raises(TryAgain, match="being replaced"):
                files(state)
        else:
            replace_tree(state, NEW, NONE)
    previous = replace_tree(state, NEW, NONE)
    assert previous is not None
    assert files(state) == NEW
    assert files(previous) == (OLD if step <= 4 else NEW)
