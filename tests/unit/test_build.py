"""What a build is made of on disk, by which name it is known, how loud it may be, and what its fence lets go of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from holdfast.errors import UnfitHost, WrongState
from holdfast.images import build as rooms
from holdfast.images.build import Log, built_name, check_platforms, lay_out
from holdfast.images.fence import detached
from holdfast.images.image import architecture
from holdfast.images.references import parse
from holdfast.spec.model import Build


def a_build(**fields: object) -> Build:
    fixed = {"key": "0123456789abcdef" * 4, "context": "web", "dockerfile": "web/Dockerfile"}
    return Build.model_validate({**fixed, "tree": "", "instructions": "", **fields})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("shop/web", "localhost/images/shop/web:0123456789abcdef"),
        ("a..b-/c___d.", "localhost/images/a-b/c-d:0123456789abcdef"),
        ("0/9-_9", "localhost/images/0/9-9:0123456789abcdef"),
    ],
)
def test_what_is_built_is_known_by_its_key(name: str, known: str) -> None:
    assert built_name(name, a_build()) == known == parse(known).name


def test_a_context_is_laid_out_alike_every_time(tmp_path: Path) -> None:
    contents = {sha256(data).hexdigest(): data for data in (b"script", b"text", b"FROM scratch")}
    script, text, dockerfile = contents
    odd = "odd \udcff\nname"
    tree = json.dumps({"bin/run": [script, True], "etc/deep/x": [text, False], odd: [text, False]}).encode()
    contents[sha256(tree).hexdigest()] = tree
    old = os.umask(0o077)
    try:
        lay_out(a_build(tree=sha256(tree).hexdigest(), instructions=dockerfile), contents, tmp_path)
    finally:
        os.umask(old)
    context = tmp_path / "context"
    seen = {str(path.relative_to(context)): path.stat() for path in context.rglob("*")}
    assert {path: oct(stat.st_mode & 0o7777) for path, stat in seen.items()} == {
        "bin": "0o755", "bin/run": "0o755", "etc": "0o755", "etc/deep": "0o755", "etc/deep/x": "0o644", odd: "0o644",
    }  # fmt: skip
    assert {stat.st_mtime for stat in seen.values()} == {rooms.MTIME} == {context.stat().st_mtime}
    assert (tmp_path / "Dockerfile").read_bytes() == b"FROM scratch"


def test_an_image_for_other_platforms_alone_is_refused() -> None:
    check_platforms("shop/web", a_build())
    check_platforms("shop/web", a_build(platforms=[f"linux/{architecture()}"]))
    with pytest.raises(WrongState, match=r"^build 'images.shop/web': its platforms are linux/mips \(expected linux/"):
        check_platforms("shop/web", a_build(platforms=["linux/mips"], push=True))


def test_a_platform_that_nothing_here_can_run_is_refused_where_it_is_to_be_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "BINFMT", tmp_path)
    platforms = [f"linux/{architecture()}", "linux/mips64le"]
    check_platforms("shop/web", a_build(platforms=platforms))
    with pytest.raises(UnfitHost, match=r"linux/mips64le can't be run here: no qemu-mips64le in .*qemu-user-static"):
        check_platforms("shop/web", a_build(platforms=platforms, push=True))
    (tmp_path / "qemu-mips64le").touch()
    check_platforms("shop/web", a_build(platforms=platforms, push=True))
    with pytest.raises(WrongState, match=r"starts from 'images.shop/base'"):
        check_platforms("shop/web", a_build(platforms=platforms, push=True, bases={"images.base": "shop/base"}))


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, told: list[str]) -> Iterator[Log]:
    with Log(tmp_path / "shop/web.log", told.append) as log:
        yield log


def test_events_carry_the_steps_and_only_the_beginning_of_what_they_say(log: Log, told: list[str]) -> None:
    for step in (1, 2):
        log.hear(f"STEP {step}/2: RUN yes")
        for number in range(1000):
            log.hear(f"line {number}")
    assert told[0] == "STEP 1/2: RUN yes"
    assert any(line.startswith("STEP 2/2: RUN yes (") and "left out before it" in line for line in told)
    assert 2 * rooms.LOUD <= len(told) < 3 * rooms.LOUD
    assert log.path.read_text().count("\n") == 2002


def test_a_line_without_end_is_cut_in_events_and_kept_in_the_log(log: Log, told: list[str]) -> None:
    log.hear("x" * 5000)
    assert told == ["x" * rooms.LONGEST_EVENT + "…"]
    assert log.path.read_text() == "x" * 5000 + "\n"


def test_a_log_ends_where_it_would_fill_the_disk(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "LOG_LIMIT", 100)
    for _ in range(20):
        log.hear("nine char")
    assert log.path.read_text() == "nine char\n" * 10 + "what follows is not kept\n"


def test_the_log_of_the_build_before_is_kept(log: Log, told: list[str]) -> None:
    log.hear("first")
    with Log(log.path, told.append) as second:
        second.hear("second")
    assert (log.path.read_text(), log.path.with_name("web.log.1").read_text()) == ("second\n", "first\n")


def test_a_fence_lets_go_of_every_mount_that_its_program_does_not_need() -> None:
    points = [
        "/", "/proc", "/sys", "/sys/fs/cgroup", "/dev/shm", "/var", "/var/lib/other", "/srv", "/srv/data",
        "/srv/database", "/etc/resolv.conf", "/run", "/run/holdfast/instances/a/rootfs", "/usr",
    ]  # fmt: skip
    assert detached(points, ["/srv/data/builds", "/var/lib", "/run/holdfast/builds"]) == [
        "/run/holdfast/instances/a/rootfs", "/srv/database", "/var/lib/other",
    ]  # fmt: skip
