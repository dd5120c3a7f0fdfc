"""Events in a directory → wakes, with the habits of real editors and deployers."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ground import wait_for
from holdfast.errors import TryAgain
from holdfast.source.directory import DirectorySource
from holdfast.source.revision import Watch


class Wakes:
    """Counts wakes, and remembers when the last one came."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.times: list[float] = []
        self._came = threading.Condition()

    def __call__(self, reason: str) -> None:
        with self._came:
            self.reasons.append(reason)
            self.times.append(time.perf_counter())
            self._came.notify_all()

    def wait_for(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.reasons) >= count, 20), f"no wake {count}: {self.reasons}"

    def wait_quiet(self, seconds: float = 0.06) -> int:
        """Wait until no wake came for that long; the number of wakes so far."""
        with self._came:
            while self._came.wait(seconds):
                pass
            return len(self.reasons)


class Watched:
    """A state directory, a source that watches it, and the wakes."""

    def __init__(self, path: Path, debounce: float = 0.02) -> None:
        self.source = DirectorySource(path, debounce)
        self.wakes = Wakes()
        self.watch: Watch = self.source.watch(self.wakes)

    def expect(self, change: Callable[[], object], files: dict[str, bytes]) -> None:
        """After change, without any pass of the clock's, a wake comes after which the files are these."""
        change()
        deadline = time.monotonic() + 20
        while True:
            count = len(self.wakes.reasons)
            with self.wakes._came:
                if count == 0 or dict(self.source.current(light=True).files) != files:
                    left = deadline - time.monotonic()
                    assert left > 0 and self.wakes._came.wait(left), f"no wake: {self.wakes.reasons}"
                    continue
            break
        self.wakes.wait_quiet()
        assert dict(self.source.current(light=True).files) == files


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "shop.toml").write_text("1")
    return folder


@pytest.fixture
def watched(state: Path) -> Iterator[Watched]:
    watched = Watched(state)
    watched.source.current()
    yield watched
    watched.watch.close()


@pytest.fixture
def patient(state: Path) -> Iterator[Watched]:
    """Waits long enough for a busy machine not to cut a save in two."""
    watched = Watched(state, debounce=0.5)
    watched.source.current()
    yield watched
    watched.watch.close()


def replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content)
    temporary.rename(path)


def test_a_file_renamed_into_place_wakes_without_waiting_for_quiet(state: Path) -> None:
    watched = Watched(state, debounce=1000.0)
    watched.source.current()
    try:
        replace(state.parent / "next", "2")
        (state.parent / "next").rename(state / "shop.toml")
        watched.wakes.wait_for(1)
    finally:
        watched.watch.close()


def test_a_plain_write_waits_for_quiet(state: Path, watched: Watched) -> None:
    begin = time.perf_counter()
    watched.expect(lambda: (state / "shop.toml").write_text("2"), {"shop.toml": b"2"})
    assert watched.wakes.times[0] - begin >= 0.02


def test_a_thousand_writes_make_few_wakes(state: Path, patient: Watched) -> None:
    for number in range(1000):
        (state / f"app{number % 10}.toml").write_text(str(number))
    patient.wakes.wait_for(1)
    assert patient.wakes.wait_quiet() <= 50
    assert patient.source.current().files["app9.toml"] == b"999"


def test_a_hundred_renames_make_few_wakes(state: Path, patient: Watched) -> None:
    for number in range(100):
        replace(state / f"app{number}.toml", "x")
    patient.wakes.wait_for(1)
    assert patient.wakes.wait_quiet() <= 50
    assert len(patient.source.current().files) == 101


def test_a_save_by_vim_is_one_change(state: Path, patient: Watched) -> None:
    def save() -> None:
        (state / ".shop.toml.swp").write_bytes(b"b0VIM")
        (state / "4913").touch()
        (state / "4913").unlink()
        (state / "shop.toml").rename(state / "shop.toml~")
        (state / "shop.toml").write_text("2")
        (state / "shop.toml~").unlink()
        (state / ".shop.toml.swp").unlink()

    patient.expect(save, {"shop.toml": b"2"})
    assert len(patient.wakes.reasons) == 1


def test_a_save_by_emacs_is_one_change(state: Path, patient: Watched) -> None:
    def save() -> None:
        (state / ".#shop.toml").symlink_to("me@host.1:1")
        (state / "#shop.toml#").write_text("2")
        (state / "shop.toml").rename(state / "shop.toml~")
        (state / "shop.toml").write_text("2")
        (state / "#shop.toml#").unlink()
        (state / ".#shop.toml").unlink()

    patient.expect(save, {"shop.toml": b"2"})
    assert len(patient.wakes.reasons) == 1


def test_what_editors_keep_beside_the_file_wakes_nobody(state: Path, watched: Watched) -> None:
    for name in ("4913", ".shop.toml.swp", ".#shop.toml", "#shop.toml#", "shop.toml~"):
        (state / name).write_text("x")
        (state / name).unlink()
    assert watched.wakes.wait_quiet(0.1) == 0


def test_truncate_and_write_is_seen_whole(state: Path, watched: Watched) -> None:
    def save() -> None:
        with (state / "shop.toml").open("w") as file:
            for part in range(50):
                file.write(f"{part}\n")
                file.flush()

    watched.expect(save, {"shop.toml": "".join(f"{part}\n" for part in range(50)).encode()})


def test_a_removed_file_wakes(state: Path, watched: Watched) -> None:
    watched.expect((state / "shop.toml").unlink, {})


def test_new_folders_are_watched_at_once(state: Path, watched: Watched) -> None:
    def make() -> None:
        (state / "a/b/c").mkdir(parents=True)
        (state / "a/b/c/x.toml").write_text("1")

    watched.expect(make, {"a/b/c/x.toml": b"1", "shop.toml": b"1"})
    count = len(watched.wakes.reasons)
    watched.expect(lambda: replace(state / "a/b/c/x.toml", "2"), {"a/b/c/x.toml": b"2", "shop.toml": b"1"})
    watched.wakes.wait_for(count + 1)  # the change may be read before the wake for it comes


def test_a_folder_moved_in_is_watched(state: Path, watched: Watched) -> None:
    (state.parent / "deep/er").mkdir(parents=True)
    (state.parent / "deep/er/x.toml").write_text("1")
    watched.expect(
        lambda: (state.parent / "deep").rename(state / "deep"), {"deep/er/x.toml": b"1", "shop.toml": b"1"}
    )
    watched.expect(lambda: (state / "deep/er/x.toml").write_text("2"), {"deep/er/x.toml": b"2", "shop.toml": b"1"})


def test_a_directory_removed_and_moved_back_is_watched_again(state: Path, watched: Watched) -> None:
    for number in (b"2", b"3"):
        successor = state.with_name("successor")
        successor.mkdir()
        (successor / "shop.toml").write_bytes(number)
        shutil.rmtree(state)
        watched.wakes.wait_quiet()
        watched.expect(lambda successor=successor: successor.rename(state), {"shop.toml": number})  # type: ignore[misc]
    watched.expect(lambda: replace(state / "shop.toml", "4"), {"shop.toml": b"4"})


def test_a_parent_that_is_renamed_and_made_anew_is_watched_again(tmp_path: Path) -> None:
    state = tmp_path / "etc/holdfast/state"
    state.mkdir(parents=True)
    (state / "shop.toml").write_text("1")
    watched = Watched(state)
    watched.source.current()
    try:
        (tmp_path / "etc").rename(tmp_path / "old")
        watched.wakes.wait_for(1)

        def again() -> None:
            state.mkdir(parents=True)
            (state / "shop.toml").write_text("2")

        again()
        wait_for(lambda: str(state) in watched.watch._watched.values(), "it is watched")  # type: ignore[attr-defined]
        watched.expect(lambda: replace(state / "shop.toml", "3"), {"shop.toml": b"3"})
    finally:
        watched.watch.close()


def test_a_flipped_state_link_wakes_and_is_followed(state: Path, tmp_path: Path) -> None:
    link, second = tmp_path / "current", tmp_path / "second"
    second.mkdir()
    (second / "shop.toml").write_text("second")
    link.symlink_to("state")
    watched = Watched(link)
    watched.source.current()
    try:
        (tmp_path / "new").symlink_to("second")
        watched.expect(lambda: (tmp_path / "new").rename(link), {"shop.toml": b"second"})
        watched.expect(lambda: (second / "shop.toml").write_text("2"), {"shop.toml": b"2"})
        count = watched.wakes.wait_quiet(0.3)
        (state / "shop.toml").write_text("nobody looks here any more")
        assert watched.wakes.wait_quiet() == count
    finally:
        watched.watch.close()


def test_a_flipped_data_link_inside_wakes(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted ConfigMap: `..data` flips from one hidden folder to another."""
    state = tmp_path / "state"
    for version in ("1", "2"):
        (state / f"..v{version}").mkdir(parents=True)
        (state / f"..v{version}/shop.toml").write_text(version)
    (state / "..data").symlink_to("..v1")
    (state / "shop.toml").symlink_to("..data/shop.toml")
    watched = Watched(state)
    assert watched.source.current().files == {"shop.toml": b"1"}
    try:
        (state / "..data_tmp").symlink_to("..v2")
        watched.expect(lambda: (state / "..data_tmp").rename(state / "..data"), {"shop.toml": b"2"})
        watched.expect(lambda: (state / "..v2/shop.toml").write_text("3"), {"shop.toml": b"3"})
    finally:
        watched.watch.close()


def test_an_open_file_that_is_written_all_the_time_does_not_put_the_wake_off_for_ever(
    state: Path, watched: Watched
) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            (state / "busy.log").write_text("x")
            stop.wait(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        watched.wakes.wait_for(2)
    finally:
        stop.set()
        writer.join()


def test_a_poke_wakes(watched: Watched) -> None:
    watched.watch.poke()
    watched.wakes.wait_for(1)
    assert watched.wakes.reasons == ["asked to look"]


@pytest.mark.parametrize("count", [10, 2000])
def test_an_edit_reads_one_file_of_many(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(count):
        (tmp_path / f"app{number}.toml").write_text("[app]")
    watched = Watched(tmp_path)
    whole = watched.source.current()
    listed, opened = counting(monkeypatch, "scandir"), counting(monkeypatch, "open")
    try:
        assert watched.source.current(light=True) is whole
        replace(tmp_path / "app3.toml", "[app] # another")
        watched.wakes.wait_for(1)
        edited = watched.source.current(light=True)
        assert (len(listed), opened) == (0, [str(tmp_path / "app3.toml")])
        assert edited.files["app3.toml"] == b"[app] # another"
        assert edited.id != whole.id
        assert watched.source.current() is edited  # the next listing finds the same
        assert DirectorySource(tmp_path).current().id == edited.id
    finally:
        watched.watch.close()


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """What a function of os is called with from now on."""
    calls: list[object] = []
    real = getattr(os, name)

    def noting(first: object, *more: Any, **named: Any) -> Any:
        calls.append(first)
        return real(first, *more, **named)

    monkeypatch.setattr(os, name, noting)
    return calls


def test_a_tree_that_is_being_replaced_is_not_read_file_by_file(state: Path, watched: Watched) -> None:
    before = watched.source.current()
    (state / "..replacing").write_bytes(b"out\n")
    replace(state / "shop.toml", "[app] # of another tree")
    watched.wakes.wait_for(1)
    with pytest.raises(TryAgain, match="being replaced"):
        watched.source.current(light=True)
    (state / "..replacing").unlink()
    assert watched.source.current(light=True).files["shop.toml"] != before.files["shop.toml"]


def test_a_closed_watch_is_silent_and_leaves_nothing(state: Path) -> None:
    DirectorySource(state).current()  # the thread that reads a directory stays
    before = (threading.active_count(), len(list(Path("/proc/self/fd").iterdir())))
    watched = Watched(state)
    watched.watch.close()
    watched.watch.close()
    (state / "shop.toml").write_text("2")
    assert watched.wakes.wait_quiet() == 0
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before
