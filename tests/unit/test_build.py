"""What a build is made of on disk, by which name it is known, how loud it may be, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from holdfast.cli.checkup import programs
from holdfast.errors import NotFound, UnfitHost, Unreachable, WrongState
from holdfast.images.builds import build as rooms
from holdfast.images.builds import buildlog
from holdfast.images.builds.build import built_name, check_platforms, lay_out
from holdfast.images.builds.buildah import Failed
from holdfast.images.builds.buildlog import Log, failed
from holdfast.images.builds.hazards import check_mounts, is_safe, parse_version
from holdfast.images.formats.manifests import architecture
from holdfast.images.formats.references import parse
from holdfast.runtime import binaries
from holdfast.runtime.binaries import version_in
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


def test_a_log_tells_the_steps_and_keeps_the_last_lines_at_hand(log: Log, told: list[str]) -> None:
    for step in (1, 2):
        log.hear(f"STEP {step}/2: RUN yes")
        for number in range(1000):
            log.hear(f"line {number}")
    assert told == ["STEP 1/2: RUN yes", "STEP 2/2: RUN yes"]
    assert list(log.last) == [f"line {number}" for number in range(1000 - buildlog.LAST_LINES, 1000)]
    assert log.path.read_text().count("\n") == 2002


def test_a_line_without_end_is_cut_in_events_and_kept_in_the_log(log: Log) -> None:
    log.hear("x" * 5000)
    assert list(log.last) == ["x" * buildlog.LONGEST_EVENT + "…"]
    assert log.path.read_text() == "x" * 5000 + "\n"


def test_a_log_ends_where_it_would_fill_the_disk(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buildlog, "LOG_LIMIT", 100)
    for _ in range(20):
        log.hear("nine char")
    assert log.path.read_text() == "nine char\n" * 10 + "what follows is not kept\n"


def test_the_log_of_the_build_before_is_kept(log: Log, told: list[str]) -> None:
    log.hear("first")
    with Log(log.path, told.append) as second:
        second.hear("second")
    assert (log.path.read_text(), log.path.with_name("web.log.1").read_text()) == ("second\n", "first\n")


@pytest.mark.parametrize(
    ("mount", "wrong"),
    [
        ("type=cache,target=/c,id=npm", ""),
        ("type=bind,from=stage,target=/p", ""),
        ("type=bind,source=src,target=/p", ""),
        ("type=cache,target=/c,id=../../x", "id '../../x' leads out of its place"),
        ("type=bind,source=../x,target=/p", "source '../x' leads out of its place"),
        ("type=bind,from=stage,target=/p,bind-propagation=shared", "bind-propagation reaches out"),
        ("type=bind,from=stage,source=/link,target=/p", "source '/link' in 'stage': buildah 1.28.2 follows links"),
        ("type=cache,from=stage,src=/link,target=/p", "source '/link' in 'stage': buildah 1.28.2 follows links"),
    ],
)
def test_a_mount_that_leads_out_of_a_build_is_refused_with_its_line(mount: str, wrong: str) -> None:
    text = f"FROM a AS stage\nRUN ln -s / /link\nFROM a\nRUN \\\n  --mount={mount} \\\n  true\n"
    if not wrong:
        check_mounts(text, (1, 28, 2))
        return
    with pytest.raises(WrongState, match=re.escape(f"line 4: RUN --mount: {wrong}")):
        check_mounts(text, (1, 28, 2))


@pytest.mark.parametrize(
    "text",
    [
        "RUN\t--mount=type=bind,from=s,source=/l,target=/p true\n",
        "RUN --mount=type=bind,from=s,sou\\\nrce=/l,target=/p true\n",
        'RUN --mount=type=bind,from=s,"source=/l",target=/p true\n',
        "RUN true <<EOF\nRUN --mount=type=bind,from=s,source=/l,target=/p true\n",
        "RUN true <<CMD\nRUN --mount=type=bind,from=s,source=/l,target=/p true\nCMD\n",
        "RUN cat <<<x\nRUN --mount=type=bind,from=s,source=/l,target=/p true\nx\n",
    ],
)
def test_no_way_of_writing_hides_a_mount_from_the_check(text: str) -> None:
    with pytest.raises(WrongState, match=r"source '/l' in 's': buildah 1\.28\.2 follows links"):
        check_mounts(f"FROM a\n{text}", (1, 28, 2))


def test_what_a_step_reads_from_a_here_document_mounts_nothing() -> None:
    text = "FROM a\nRUN sh <<EOF\nRUN --mount=type=bind,bind-propagation=shared\nEOF\n"
    check_mounts(text, (1, 38, 1))


@pytest.mark.parametrize(
    ("said", "safe"),
    [
        ("buildah version 1.28.2 (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)", False),
        ("buildah version 1.33.7", False),
        ("buildah version 1.33.12 (image-spec 1.1.0)", True),
        ("buildah version 1.38.0", False),
        ("buildah version 1.39.3 (image-spec 1.1.0, runtime-spec 1.2.0)", True),
        ("who knows", False),
    ],
)
def test_a_buildah_is_trusted_by_its_version(said: str, safe: bool) -> None:
    assert is_safe(parse_version(said)) == safe


R = "127.0.0.1:5941"
PULL = f"Error: creating build container: initializing source docker://{R}/nonono:1: "
CONTEXT = 'checking on sources under "/var/lib/holdfast/builds/work/5504/context": '


@pytest.mark.parametrize(
    ("steps", "errors", "kind", "line"),
    [
        (  # an image that can't be had
            [f"STEP 1/1: FROM {R}/nonono:1"],
            [f"{PULL}reading manifest 1 in {R}/nonono: manifest unknown: manifest unknown"],
            NotFound,
            f"FROM {R}/nonono:1: manifest unknown",
        ),
        (
            [f"[1/2] STEP 1/2: FROM {R}/nonono:1 AS unauthorized"],
            [f"{PULL}reading manifest 1 in {R}/nonono: unauthorized: authentication required"],
            UnfitHost,
            f"FROM {R}/nonono:1 AS unauthorized: unauthorized: authentication required",
        ),
        (
            ["STEP 1/1: FROM nowhere.invalid/x:1"],
            [
                "Trying to pull nowhere.invalid/x:1...",
                "Error: creating build container: initializing source docker://nowhere.invalid/x:1: pinging "
                'container registry nowhere.invalid: Get "https://nowhere.invalid/v2/": dial tcp: lookup '
                "nowhere.invalid on 10.255.255.53:53: no such host",
            ],
            Unreachable,
            "FROM nowhere.invalid/x:1: lookup nowhere.invalid on 10.255.255.53:53: no such host",
        ),
        (
            ["STEP 2/2: COPY --from=nonono /a /"],
            ["Error: COPY --from=nonono: no stage or image found with that name"],
            WrongState,
            "COPY --from=nonono /a /: COPY --from=nonono: no stage or image found with that name",
        ),
        (  # what is to be copied is not there
            ["STEP 2/2: COPY secret1 /"],
            [
                f'Error: building at STEP "COPY secret1 /": {CONTEXT}copier: stat: "/secret1": no such file or '
                "directory"
            ],
            WrongState,
            'COPY secret1 /: "/secret1": no such file or directory',
        ),
        (  # what a step said
            ["STEP 1/2: RUN make", "angry", "STEP 2/2: RUN exit 3"],
            ['Error: building at STEP "RUN exit 3": while running runtime: exit status 3'],
            WrongState,
            "RUN exit 3: exit status 3",
        ),
        (
            ["STEP 4/4: RUN echo '{\"a\": 1}' && false", '{"a": 1}'],
            ["Error: building at STEP \"RUN echo '{\"a\": 1}' && false\": while running runtime: exit status 1"],
            WrongState,
            "RUN echo '{\"a\": 1}' && false: exit status 1: {\"a\": 1}",
        ),
        (
            ["STEP 4/4: RUN dd if=/dev/zero of=/x", "it failed"],
            [
                "dd: error writing '/x': No space left on device",
                "247+0 records in",
                "246+0 records out",
                'Error: building at STEP "RUN dd if=/dev/zero of=/x": while running runtime: exit status 1',
            ],
            WrongState,
            "RUN dd if=/dev/zero of=/x: exit status 1: dd: error writing '/x': No space left on device (see "
            "'holdfast system df')",
        ),
        (
            ["STEP 4/4: COPY big {} /", "COMMIT localhost/images/site/web:cc393912f1635360"],
            [
                "Error: committing container for step {Env:[PATH=/bin] Command:copy Args:[big {} /] Flags:[] "
                "Attrs:map[] Message:COPY big {} / Original:COPY big {} /}: copying layers and metadata for "
                'container "0ed5b3e6": writing blob: storing blob to file "/x/work/storage36/1": write /x/work/'
                "storage36/1: no space left on device"
            ],
            WrongState,
            "COPY big {} /: write /x/work/storage36/1: no space left on device (see 'holdfast system df')",
        ),
        (
            [],
            [
                'time="2026-11-21T12:32:43Z" level=fatal msg="writing blob: write /tmp/x: no space left on device"',
            ],
            WrongState,
            "write /tmp/x: no space left on device (see 'holdfast system df')",
        ),
        (
            ["STEP 1/1: RUN " + "x" * 100],
            ["Error: is too long"],
            WrongState,
            f"RUN {'x' * 76}…: is too long",
        ),
    ],
)  # fmt: skip
def test_what_buildah_says_becomes_one_line(steps: list[str], errors: list[str], kind: type, line: str) -> None:
    error = failed("site/web", Failed(1, steps, errors), Path("/logs/web.log"))
    assert str(error) == f"build 'images.site/web': {line} (all of it is in /logs/web.log)"
    assert type(error) is kind
    assert (error.retry, error.wait) == (True, 60)


def test_a_limit_that_a_build_ran_into_is_told_instead_of_its_words() -> None:
    error = failed("site/web", Failed(137, ["STEP 1/1: RUN make"], ["Killed"], "it needs more memory"), Path("/l"))
    assert str(error) == "build 'images.site/web': RUN make: it needs more memory (all of it is in /l)"


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ("buildah version 1.28.2 (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)\n", "1.28.2"),
        ("crun version 1.8.1\ncommit: f8a096b\n", "1.8.1"),
        ("runc version 1.1.5+ds1\n", "1.1.5+ds1"),
        ("git version 2.39.5 (Apple Git-154)\n", "2.39.5"),
        ("skopeo version 1.14.0, commit 5f1\n", "1.14.0"),
        ("nftables v1.0.6 (Lester Gooch #5)\n", "v1.0.6"),
        ("crun version UNKNOWN\n", "UNKNOWN"),
        ("", ""),
    ],
)
def test_a_version_is_found_in_what_a_program_prints(answer: str, version: str) -> None:
    assert version_in(answer) == version


def test_a_host_without_skopeo_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(binaries, "_PATH", "/nowhere")
    [check] = [check for check in programs() if check.subject == "skopeo"]
    assert (check.verdict, check.detail) == ("warn", "not installed: needed to pull images")
    assert check.remedy == "apt-get install skopeo"
