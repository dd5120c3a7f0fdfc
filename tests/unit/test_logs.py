"""Output as conmon writes it: rotated, read and followed."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from holdfast.runtime import logs


def row(number: int, text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"2026-01-01T00:00:{number:02}.123456789+00:00 {stream} {tag} {text}\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "web.log"


def texts(log: Path, tail: int | None = None, since: float | None = None) -> list[str]:
    return [line.text for line in logs.read(logs.log_files(log), tail, since)]


def test_rotated_files_are_read_oldest_first(log: Path) -> None:
    for name, text in (("web.log.2", "a"), ("web.log.1", "b"), ("web.log", "c"), ("web.log.tmp", "x")):
        log.with_name(name).write_text(row(1, text))
    assert texts(log) == ["a", "b", "c"]
    assert texts(log, tail=2) == ["b", "c"]
    assert texts(log, tail=0) == []


def test_parts_of_lines_are_joined_by_stream(log: Path) -> None:
    log.write_text(
        row(1, "one ", "P") + row(1, "err", stream="stderr") + row(2, "two") + row(3, "") + row(4, "$ ", "P")
    )
    lines = list(logs.read([log]))
    assert [(line.stream, line.text, line.partial) for line in lines] == [
        ("stderr", "err", False),
        ("stdout", "one two", False),
        ("stdout", "", False),
        ("stdout", "$ ", True),
    ]


def test_since_leaves_out_what_is_older(log: Path) -> None:
    log.write_text("".join(row(second, str(second)) for second in range(5)))
    at = next(logs.read([log])).at
    assert texts(log, since=at + 2.5) == ["3", "4"]


def test_rotation_keeps_as_many_files_as_asked(log: Path) -> None:
    reopened: list[int] = []
    for number in range(5):
        log.write_text(row(number, str(number)))
        assert logs.rotate(log, 10, 3, lambda: reopened.append(1))
    assert [file.name for file in logs.log_files(log)] == ["web.log.2", "web.log.1"]
    assert len(reopened) == 5
    assert texts(log) == ["3", "4"]


def test_small_log_is_left_alone_and_a_single_file_starts_over(log: Path) -> None:
    log.write_text(row(1, "a"))
    assert not logs.rotate(log, 1000, 3, lambda: pytest.fail("reopened"))
    assert logs.rotate(log, 10, 1, lambda: None)
    assert logs.log_files(log) == []


def test_rotation_that_was_cut_off_is_finished(log: Path) -> None:
    log.with_name("web.log.1").write_text(row(1, "a"))
    reopened: list[int] = []
    assert not logs.rotate(log, 10, 3, lambda: reopened.append(1))
    assert reopened == [1]


def test_following_survives_rotation_and_loses_nothing(log: Path) -> None:
    log.write_text(row(0, "0"))
    stop, seen = threading.Event(), queue.Queue[str]()

    def listen() -> None:
        for line in logs.follow(log, stop):
            seen.put(line.text)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert seen.get(timeout=5) == "0"
        for number in range(1, 30):
            with log.open("a") as file:
                file.write(row(number, str(number)))
            logs.rotate(log, 100, 2, lambda: None)
            assert seen.get(timeout=5) == str(number)
    finally:
        stop.set()
        listener.join()


def test_following_starts_with_the_tail(log: Path) -> None:
    log.write_text("".join(row(second, str(second)) for second in range(5)))
    stop = threading.Event()
    lines = logs.follow(log, stop, tail=2)
    assert [next(lines).text, next(lines).text] == ["3", "4"]
    stop.set()
    assert list(lines) == []


def test_fewer_files_than_before_are_kept_from_the_next_rotation_on(log: Path) -> None:
    for name in ("web.log.4", "web.log.3", "web.log.2", "web.log.1", "web.log"):
        log.with_name(name).write_text(row(1, name))
    assert logs.rotate(log, 10, 2, lambda: None)
    assert texts(log) == ["web.log"]
