"""Output as conmon writes it: bounded, read and followed."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path

import pytest

from holdfast.runtime import logs
from holdfast.runtime.output import output


def row(number: int, text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"2026-01-01T00:00:{number:02}.123456789+00:00 {stream} {tag} {text}\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "web.log"


def texts(log: Path, tail: int | None = None, since: float | None = None, until: float | None = None) -> list[str]:
    return [line.text for line in logs.read(log, logs.Wanted(tail, since, until))]


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
    lines = list(logs.read(log))
    assert [(line.stream, line.text, line.partial) for line in lines] == [
        ("stderr", "err", False),
        ("stdout", "one two", False),
        ("stdout", "", False),
        ("stdout", "$ ", True),
    ]


def test_since_leaves_out_what_is_older(log: Path) -> None:
    log.write_text("".join(row(second, str(second)) for second in range(5)))
    at = next(logs.read(log)).at
    assert texts(log, since=at + 2.5) == ["3", "4"]
    assert texts(log, until=at + 1.5) == ["0", "1"]
    assert texts(log, since=at + 0.5, until=at + 1.5) == ["1"]


def replaced(log: Path, text: str) -> None:
    """Do as conmon does when a file is full."""
    fresh = log.with_name(f"{log.name}.tmp")
    fresh.write_text(text)
    fresh.rename(log)


def names(log: Path) -> list[str]:
    return sorted(file.name for file in log.parent.iterdir())


def test_what_conmon_leaves_is_numbered_and_no_more_than_asked_is_kept(log: Path) -> None:
    logs.begin(log, 1000, 3)
    for number in range(5):
        replaced(log, row(number, str(number)))
        logs.roll(log, 3)
    assert names(log) == ["web.log", "web.log.0", "web.log.1", "web.log.2"]
    assert texts(log) == ["2", "3", "4"]


def test_what_conmon_left_is_read_before_it_is_numbered(log: Path) -> None:
    logs.begin(log, 1000, 3)
    replaced(log, row(1, "a"))
    logs.roll(log, 3)
    replaced(log, row(2, "b"))
    assert texts(log) == ["a", "b"]
    logs.roll(log, 3)
    assert texts(log) == ["a", "b"]


@pytest.mark.parametrize("files", [1, 2, 3])
def test_runs_that_end_early_do_not_add_up(log: Path, files: int) -> None:
    most = 0
    for number in range(200):
        size = logs.begin(log, 1000, files)
        with log.open("a") as file:
            file.write(
                row(number % 60, "x" * (size - 60)) if number % 3 == 0 and size > 60 else row(number % 60, "y")
            )
        most = max(most, sum({each.stat().st_ino: each.stat().st_size for each in log.parent.iterdir()}.values()))
    assert most <= 1000 * files


def test_fewer_files_than_before_are_kept_from_the_next_one_on(log: Path) -> None:
    for name in ("web.log.4", "web.log.3", "web.log.2", "web.log.1", "web.log"):
        log.with_name(name).write_text(row(1, name))
    logs.roll(log, 2)
    replaced(log, row(2, "new"))
    logs.roll(log, 2)
    assert texts(log) == ["web.log", "new"]


def test_numbering_that_was_cut_off_is_finished(log: Path) -> None:
    for name, text in (("web.log.0", "b"), ("web.log.2", "a")):  # web.log.1 is web.log.2 already
        log.with_name(name).write_text(row(1, text))
    logs.roll(log, 4)
    assert texts(log) == ["a", "b"]


def test_conmon_that_knows_no_limit_is_told_to_begin_a_new_file(log: Path) -> None:
    reopened: list[int] = []
    log.write_text(row(1, "x" * 500))
    logs.keep(log, 1000, 3, lambda: reopened.append(1))
    assert not reopened
    logs.keep(log, 100, 3, lambda: reopened.append(1))
    assert reopened


def test_runs_are_kept_apart(log: Path) -> None:
    for number in range(3):
        logs.begin(log, 10_000, 3)
        with log.open("a") as file:
            file.write(row(number, f"fatal {number}", "P"))
    lines = list(logs.read(log))
    assert [(line.text, line.partial) for line in lines] == [
        ("fatal 0", False),
        ("fatal 1", False),
        ("fatal 2", True),
    ]
    assert len({line.time for line in lines}) == 3
    assert texts(log, tail=1) == ["fatal 2"]


def test_characters_are_whole_wherever_their_bytes_were_parted(log: Path) -> None:
    text = ("äöü€😀" * 10_000).encode()
    with log.open("wb") as file:
        for place in range(0, len(text), 8191):
            file.write(b"2026-01-01T00:00:01.1+00:00 stdout P " + text[place : place + 8191] + b"\n")
        file.write(row(2, "").encode())
    lines = list(logs.read(log))
    assert b"".join(line.data for line in lines) == text
    assert all("\ufffd" not in line.text for line in lines)
    assert [line.partial for line in lines] == [True] * (len(lines) - 1) + [False]


def test_bytes_that_are_no_text_arrive_as_they_are(log: Path) -> None:
    log.write_bytes(b"2026-01-01T00:00:01.1+00:00 stdout F \xff\x00\x1b[31m\n")
    (line,) = logs.read(log)
    assert line.data == b"\xff\x00\x1b[31m"
    assert logs.line_of(json.loads(json.dumps(line.json()))) == line


def test_endless_line_comes_in_pieces_and_its_end_is_found_at_once(log: Path) -> None:
    with log.open("w") as file:
        file.write(row(0, "first"))
        for _ in range(2000):
            file.write(row(1, "a" * 8192, "P"))
    lines = list(logs.read(log))
    assert max(len(line.data) for line in lines) <= logs.LINE + 8192
    assert len(texts(log, tail=1)) == 1
    with log.open("a") as file:
        file.write("".join(row(2, str(number)) for number in range(3)))
    assert texts(log, tail=2) == ["1", "2"]


def test_tail_is_the_same_wherever_the_blocks_begin(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = log.with_name("web.log.1"), log
    older.write_text("".join(row(each, f"{each} ", "P") + row(each, "x" * each) for each in range(40)))
    newer.write_text("".join(row(number % 60, "y" * number) for number in range(40)) + row(5, "rest", "P"))
    whole = texts(log)
    for block in (100, 177, 1000, 4096):
        monkeypatch.setattr(logs, "_BLOCK", block)
        for tail in (0, 1, 2, 39, 40, 41, 42, 60, 80, 81, 200):
            assert texts(log, tail) == (whole[-tail:] if tail else [])


def test_following_survives_new_files_and_loses_nothing(log: Path) -> None:
    log.write_text(row(0, "0"))
    logs.roll(log, 2)
    stop, seen = threading.Event(), queue.Queue[str]()

    def listen() -> None:
        for line in output([("", log)], stop=stop):
            if line is not None:
                seen.put(line.text)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert seen.get(timeout=30) == "0"
        for number in range(1, 300):  # the files are renamed at every moment of a look
            if number % 3:
                with log.open("a") as file:
                    file.write(row(number % 60, str(number)))
            else:
                replaced(log, row(number % 60, str(number)))
            if number % 2:
                logs.roll(log, 2)
            assert seen.get(timeout=30) == str(number)
    finally:
        stop.set()
        listener.join()


def test_what_a_power_cut_left_in_a_log_hides_nothing_that_came_after_it(log: Path) -> None:
    log.write_bytes(row(0, "before").encode() + bytes(5000) + row(1, "after").encode() + b"2026-13-99 stdout F x\n")
    for sources in ([("", log)], [("shop/web", log), ("shop/db", log)]):
        for since in (None, 0.0):
            found = [line.text for line in output(sources, logs.Wanted(since=since)) if line]
            assert found == sorted(["before", "after"] * len(sources), key=("before", "after").index)


def test_following_waits_for_what_has_never_run(tmp_path: Path) -> None:
    log, stop, seen = tmp_path / "logs/shop/web.log", threading.Event(), queue.Queue[str]()

    def listen() -> None:
        for line in output([("", log)], stop=stop):
            seen.put("" if line is None else line.text)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert seen.get(timeout=30) == ""
        log.parent.mkdir(parents=True)
        log.write_text(row(0, "first"))
        assert next(text for text in iter(lambda: seen.get(timeout=30), None) if text) == "first"
    finally:
        stop.set()
        listener.join()


def test_following_shows_what_is_not_ended_and_ends_it_with_its_run(log: Path) -> None:
    log.write_text(row(1, "one") + row(2, "$ ", "P"))
    stop = threading.Event()
    lines = output([("", log)], logs.Wanted(tail=2), stop)
    assert [(line.text, line.partial) for line in (next(lines), next(lines)) if line] == [
        ("one", False),
        ("$ ", True),
    ]
    assert next(lines) is None
    logs.begin(log, 10_000, 3)
    assert [(line.text, line.partial) for line in (next(lines),) if line] == [("", False)]
    stop.set()
    assert [line for line in lines if line] == []


def test_several_logs_are_merged_by_time(log: Path) -> None:
    other = log.with_name("db.log")
    log.write_text(row(1, "a") + row(4, "d"))
    other.write_text(row(2, "b") + row(3, "c"))
    merged = output([("shop/web", log), ("shop/db", other)])
    assert [(line.target, line.text) for line in merged if line] == [
        ("shop/web", "a"),
        ("shop/db", "b"),
        ("shop/db", "c"),
        ("shop/web", "d"),
    ]
