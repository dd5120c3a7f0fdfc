"""The id of a root, and the lock on a name: files and kernel locks only."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from holdfast import identity
from holdfast.errors import Conflict, UnfitHost
from holdfast.identity import Record, drop, hold_name, look_up, make_id, names_of, read_id


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the names of this test's host."""
    monkeypatch.setattr(identity, "PLACE", tmp_path / "names")
    return tmp_path / "names"


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def test_a_root_keeps_the_id_that_it_got_first(tmp_path: Path) -> None:
    assert read_id(tmp_path) == ""
    id = make_id(tmp_path)
    assert len(id) == 8
    assert make_id(tmp_path) == id == read_id(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["id"]


def test_reading_the_id_of_a_root_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    assert read_id(tmp_path / "none") == ""
    assert list(tmp_path.iterdir()) == []


def test_many_that_make_the_id_at_once_get_the_same_one(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(make_id(tmp_path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 16


@pytest.mark.parametrize("text", ["", "ABCDEF01\n", "0123456", "012345678", "../../etc", "\0\0\0\0\0\0\0\0"])
def test_a_file_that_holds_no_id_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "id").write_text(text)
    for call in (read_id, make_id):
        with pytest.raises(UnfitHost, match="is not the id of a root"):
            call(tmp_path)
    assert (tmp_path / "id").read_text() == text


def test_a_name_has_one_holder_and_the_second_is_told_both_places(tmp_path: Path) -> None:
    one, two = folder(tmp_path, "one"), folder(tmp_path, "two")
    with hold_name("shop", one) as held:
        held.bind(one, "00000001", tmp_path / "run")
        with (
            pytest.raises(Conflict, match=f"on '{two}': process .* uses the name for '{one}'"),
            hold_name("shop", two),
        ):
            pass
        with pytest.raises(Conflict, match=f"on '{one}': process .* does already"), hold_name("shop", one):
            pass
        with hold_name("other", two):
            pass
    with hold_name("shop", two) as held:
        assert held.known is not None
        assert held.known.is_of(one)


def test_a_name_is_free_as_soon_as_its_process_is_killed(tmp_path: Path, place: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from holdfast import identity as i; i.PLACE = Path(sys.argv[1])\n"
        "with i.hold_name('shop', Path('/')) as n: n.bind(Path('/'), '00000001', Path('/run')); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert look_up("shop") == (look_up("shop")[0], True)
        with pytest.raises(Conflict, match=f"process {process.pid}"), hold_name("shop", tmp_path):
            pass
        process.kill()
        process.wait()
    assert look_up("shop")[1] is False
    with hold_name("shop", tmp_path):
        pass


def test_a_name_that_was_not_bound_leaves_nothing(tmp_path: Path, place: Path) -> None:
    with hold_name("shop", tmp_path):
        assert place.exists()
    assert not place.exists()


def test_looking_up_a_name_takes_nothing_and_makes_nothing(tmp_path: Path, place: Path) -> None:
    assert look_up("shop") == (None, False)
    assert not place.exists()
    with hold_name("shop", tmp_path) as held:
        held.bind(tmp_path, "00000001", tmp_path)
        record, is_held = look_up("shop")
        assert is_held
        assert record is not None
        assert record.root == str(tmp_path)


def test_a_root_is_known_after_it_was_renamed_and_a_copy_is_not(tmp_path: Path) -> None:
    one, copy = folder(tmp_path, "one"), folder(tmp_path, "copy")
    with hold_name("shop", one) as held:
        held.bind(one, "00000001", tmp_path)
    record = look_up("shop")[0]
    assert record is not None
    assert not record.is_of(copy)
    moved = one.rename(tmp_path / "moved")
    assert record.is_of(moved)
    assert names_of(moved) == ["shop"]
    assert names_of(copy) == []
    drop("shop")
    assert names_of(moved) == []


def test_a_record_that_cannot_be_read_is_none(place: Path) -> None:
    place.mkdir()
    for text in ("", "{", "[]", '{"root": 1}', "null"):
        (place / "shop").write_text(text)
        assert look_up("shop") == (None, False)


def test_a_link_in_the_place_of_a_name_is_not_followed(tmp_path: Path, place: Path) -> None:
    place.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (place / "shop").symlink_to(victim)
    with pytest.raises(UnfitHost), hold_name("shop", tmp_path):
        pass
    assert victim.read_text() == "precious"


def test_names_come_and_go_at_once_without_harm(tmp_path: Path, place: Path) -> None:
    """The folder goes with the last name in it, perhaps just when another name comes."""
    errors: list[Exception] = []

    def work(name: str) -> None:
        try:
            for _ in range(200):
                with hold_name(name, tmp_path):
                    pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_record_says_for_which_root_it_is(tmp_path: Path) -> None:
    assert Record(str(tmp_path), "00000001", "/run/x", 1).is_of(tmp_path)
    assert not Record("/elsewhere", "00000001", "/run/x", 1).is_of(tmp_path)
