"""The command as a person meets it: words, tables, exit codes."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from holdfast.cli import main, render
from holdfast.cli.checkup import overlay
from holdfast.cli.command import places
from holdfast.cli.render import ago, pairs, size, span
from holdfast.cli.since import moment, seconds
from holdfast.cli.status import app_reason, limits, ports, show_apps, show_status
from holdfast.config import load_config
from holdfast.errors import WrongState
from holdfast.observed import container_of
from holdfast.plan.actions import Plan, StartInstance
from holdfast.testing import temporary_host
from paper import LIMITS, PaperAgent, served

Run = Callable[..., int]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    name = temporary_host(tmp_path).name  # of its own: another test may use the default's
    path.write_text(f'name = "{name}"\nroot = "{tmp_path}"\nrun_root = "{tmp_path}"\n')
    return path


@pytest.fixture
def agent(tmp_path: Path, config: Path) -> Iterator[PaperAgent]:
    log = tmp_path / "web.log"
    log.write_text("2026-11-21T07:00:00.1+00:00 stdout F hello\n2026-11-21T07:00:01.1+00:00 stderr F oops\n")
    paper = PaperAgent(log)
    with served(paper, tmp_path / "agent.sock"):
        yield paper


@pytest.fixture
def run(config: Path) -> Run:
    return lambda *words: main(["--config", str(config), *words])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


def test_status_is_a_table_with_a_headline(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("status") == 0
    head, _, columns, *rows = said().splitlines()
    assert head.startswith("edge-1: converged  c0ffee1234  Add the shop  (Ann, ")
    assert columns.split() == ["NAME", "STATE", "GEN", "SINCE", "ADDRESS", "PORTS", "IMAGE"]
    assert [row.split()[:3] for row in rows if row.startswith("shop")] == [["shop", "converged", "3"]]
    assert any(
        row.split() == ["web", "running", "1", "1m", "10.209.0.2", "8080:80", "shop/web:1.27", "(1)"] for row in rows
    )


def test_status_tells_what_is_on_its_way_and_what_is_newer(agent: PaperAgent, said: Callable[[], str]) -> None:
    status = agent.status()
    web = status["apps"]["shop"]["containers"]["web"]
    web["newer"] = f"app:2@sha256:{'c' * 64}"
    layers = [
        {"digest": "sha256:a", "state": "done", "done": 1 << 20, "total": 1 << 20},
        {"digest": "sha256:b", "state": "pulling", "done": 1 << 20, "total": 3 << 20},
        {"digest": "sha256:c", "state": "here", "done": 0, "total": 9 << 20},
    ]
    coming = {"ref": "app:3", "state": "pulling", "done": 2 << 20, "total": 4 << 20, "layers": layers}
    building = {"image": "images.shop/web", "step": "STEP 2/3: RUN make", "began": time.time(), "error": ""}
    broken = {"image": "images.shop/db", "step": "", "began": time.time(), "error": "build 'images.shop/db': exit 1"}
    show_status(
        {**status, "transfers": [coming, {"ref": "db:1", "state": "resolving"}], "builds": [building, broken]}
    )
    told = said()
    assert "images.shop/web: being built for" in told and "STEP 2/3: RUN make" in told
    assert "failed builds\n  build 'images.shop/db': exit 1" in told
    assert "newer image: app:2 (cccccccccccc)" in told
    assert "app:3: 2MiB of 4MiB, 1 of 2 layers" in told
    assert "db:1: the registry is asked" in told


def test_status_says_once_what_a_container_lacks(agent: PaperAgent, said: Callable[[], str]) -> None:
    status = agent.status()
    web = status["apps"]["shop"]["containers"]["web"]
    web["reason"] = "its link was removed"
    (run,) = web["instances"]
    web["instances"] = [{**run, "faults": ["its link was removed"], "warnings": ["no limit"]}]
    show_status(status)
    assert [line.strip() for line in said().splitlines() if line.startswith("    ")] == [
        "its link was removed",
        "warning: no limit",
    ]


def test_status_json_is_what_the_agent_says(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("status", "--json") == 0
    assert json.loads(said()) == json.loads(json.dumps(agent.status()))


def test_config_may_stand_after_the_command(agent: PaperAgent, config: Path) -> None:
    assert main(["status", "--config", str(config)]) == 0
    assert main(["volume", "list", "--config", str(config)]) == 0


def test_config_may_come_from_the_environment(
    agent: PaperAgent, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG", str(config))
    assert main(["status"]) == 0


def test_plan_exits_with_2_when_there_are_changes(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("plan") == 0
    assert said() == "nothing to do\n"
    start = StartInstance(app="shop", container="web", generation=1, reason="it is not there")
    agent.plan_now = (Plan(actions=(start,)), Plan(waiting={container_of("shop", "api"): "waits for web"}))
    assert run("plan") == 2
    assert said().splitlines() == [
        "shop",
        "  + start web  it is not there",
        "waiting",
        "  shop/api: waits for web",
        "",
        "1 change",
    ]


def test_plan_shows_what_is_wrong_with_the_state_files_and_exits_with_1(
    agent: PaperAgent, run: Run, said: Callable[[], str]
) -> None:
    agent.problems = ("shop.toml:3: containers.web.port: unknown key 'port' (did you mean 'ports'?)",)
    assert run("plan") == 1
    assert said().splitlines() == ["state files", f"  {agent.problems[0]}", "nothing to do"]


def test_plan_shows_hints_which_are_no_problem(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    agent.hints = (".shop.toml: a hidden TOML file: it is not read (expected NAME.toml)",)
    assert run("plan") == 0
    assert ".shop.toml: a hidden TOML file" in said()


def test_plan_exits_with_1_on_any_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("run_root = 7\n")
    assert main(["plan", "--config", str(broken)]) == 1
    assert capsys.readouterr().err.startswith("holdfast: ")


@pytest.mark.parametrize("words", [("bogus",), ("status", "--bogus"), ("check",), ("logs", "web", "--since", "soon")])
def test_a_wrong_call_exits_with_64_and_one_line(
    run: Run, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 64
    told = capsys.readouterr().err
    assert told.startswith("holdfast: ")
    assert told.count("\n") == 1


def test_a_short_name_must_be_unique(agent: PaperAgent, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "db") == 0
    assert run("inspect", "web") == 64
    assert capsys.readouterr().err == "holdfast: container 'web': there are several (back/web, shop/web)\n"


def test_an_unknown_name_gets_the_nearest_one(
    agent: PaperAgent, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "shop/wbe") == 64
    assert "did you mean 'shop/web'?" in capsys.readouterr().err


def test_without_an_agent_a_hold_exits_with_69(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stop", "shop/web") == 69
    assert "start it with 'holdfast agent'" in capsys.readouterr().err


def test_stop_waits_until_the_container_is_stopped(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("stop", "shop/web") == 0
    assert run("status") == 0
    assert "held" in said()
    assert run("release", "shop/web") == 0


def test_a_stop_that_does_not_come_exits_with_75(
    agent: PaperAgent, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stop", "shop/api", "--timeout", "0") == 75
    assert "stop 'shop/api': it is running" in capsys.readouterr().err


def test_logs_keep_stdout_and_stderr_apart(agent: PaperAgent, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("logs", "shop/web") == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("hello\n", "oops\n")


def test_logs_are_printed_byte_for_byte(
    agent: PaperAgent, run: Run, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert agent.log_path
    start = b"2026-11-21T07:00:00.1+00:00 stdout"
    agent.log_path.write_bytes(start + b" F \x1b[31mred\xff\n" + start + b" P no end\n")
    assert run("logs", "shop/web") == 0
    assert capfdbinary.readouterr().out == b"\x1b[31mred\xff\nno end"


def test_lists_and_details_of_every_kind_print(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    for words, expected in {
        ("volume", "list"): "shop/data",
        ("volume", "inspect", "shop/data"): "driver: managed",
        ("volume", "prune"): "no orphans",
        ("volume", "remove", "--force", "shop/data"): "removed shop/data",
        ("network", "list"): "10.209.0.0/24",
        ("network", "inspect", "bridge"): "gateway: 10.209.0.1",
        ("image", "list"): "no images",
        ("plugin", "list"): "no module named 'odd'",
        ("events",): "started",
        ("events", "--json"): '"seq": 1',
        ("inspect", "shop/api"): "init: no",
        ("stats",): "1MiB / 8MiB (asked 16MiB)",
        ("sync",): "edge-1: converged",
        ("apply",): "edge-1: converged",
    }.items():
        assert run(*words) == 0, words
        assert expected in said(), words


def test_image_import_hands_on_an_absolute_path(
    agent: PaperAgent, run: Run, tmp_path: Path, said: Callable[[], str]
) -> None:
    (tmp_path / "root.tar").touch()
    assert run("image", "import", str(tmp_path / "root.tar"), "app:1") == 0
    assert said() == "app:1  sha256:abc\n"


IMAGES = [
    {"ref": "app:1", "digest": "sha256:" + "a" * 64, "size": 1 << 20, "used_by": ["shop/web"], "source": "registry"},
    {"ref": "localhost/images/shop/web:0123456789abcdef", "digest": "sha256:" + "a" * 64, "size": 1 << 20},
    {"ref": "", "digest": "sha256:" + "b" * 64, "size": 1 << 10, "used_by": ["shop/old"]},
]


def test_images_without_a_name_are_listed_as_such(
    agent: PaperAgent, run: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "images", lambda: IMAGES)
    assert run("image", "list") == 0
    lines = said().splitlines()
    assert [line.split()[0] for line in lines] == ["IMAGE", "app:1", "<none>"]
    assert "shop/old" in lines[2]
    for words, expected in {
        ("-q",): ["a" * 12, "b" * 12],
        ("-q", "--no-trunc", "--filter", "dangling=true"): ["sha256:" + "b" * 64],
        ("-q", "--filter", "reference=app*"): ["a" * 12],
        ("-q", "ap"): [],
        ("-a", "-q", "localhost/*:0*"): ["a" * 12],
    }.items():
        assert run("image", "list", *words) == 0
        assert said().split() == expected, words
    assert run("image", "list", "--filter", "since=x") == 64


def test_an_archive_is_written_whole_or_not_at_all(
    agent: PaperAgent, run: Run, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "x.tar").write_bytes(b"before")
    assert run("image", "save", "-o", str(tmp_path / "x.tar"), "gone:1") == 64
    assert [(path.name, path.read_bytes()) for path in tmp_path.glob("*x.tar*")] == [("x.tar", b"before")]
    assert run("image", "save", "-o", str(tmp_path / "x.tar"), "app:1") == 0
    assert (tmp_path / "x.tar").read_bytes() == b"tar" * 1_000_000 + b"oci-archive"
    capfdbinary.readouterr()
    assert run("export", "shop/web") == 0
    assert capfdbinary.readouterr().out == b"shop/web"


def test_what_images_are_asked_for_is_said_in_a_line(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    for words, expected in {
        ("image", "pull", "app:1"): "app:1  sha256:abc",
        ("image", "push", "app:1", "r.test/a:1"): "r.test/a:1  sha256:abc",
        ("image", "history", "app:1"): "CMD",
        ("image", "inspect", "app:1"): '"RepoTags"',
        ("image", "prune", "--all", "--force"): "removed sha256:abc",
        ("commit", "shop/web", "app:2", "-m", "why"): "app:2",
        ("system", "prune", "--force", "--volumes"): "removed shop/old",
    }.items():
        assert run(*words) == 0, words
        assert expected in said(), words
    assert run("image", "pull", "gone:1") == 64


def test_check_counts_what_is_well_and_lists_what_is_wrong(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "shop.toml").write_text('[containers.web]\nimage = "app:1"\n')
    assert run("check", str(state)) == 0
    assert capsys.readouterr().out == "1 app, 1 container: ok\n"
    (state / "bad.toml").write_text('[containers.web]\nimge = "app:1"\n')
    assert run("check", str(state)) == 65
    assert "bad.toml:2: containers.web.imge" in capsys.readouterr().out


def test_check_of_one_file_finds_what_it_mounts_and_leaves_its_neighbours_alone(
    run: Run, tmp_path: Path, said: Callable[[], str]
) -> None:
    (tmp_path / "web.conf").write_text("x")
    (tmp_path / "broken.toml").write_text("[")
    (tmp_path / "shop.toml").write_text('[containers.web]\nimage = "app:1"\nvolumes = ["./web.conf:/web.conf:ro"]\n')
    assert run("check", str(tmp_path / "shop.toml")) == 0
    assert said() == "1 app, 1 container: ok\n"


def test_the_socket_is_where_agent_toml_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", 'name = "edge"', 'run_root = "/run/x"', 'socket = "/run/y.sock"\nrun_root = "/run/x"'):
        (tmp_path / "agent.toml").write_text(text)
        monkeypatch.setenv("HOLDFAST_CONFIG", str(tmp_path / "agent.toml"))
        with click.Context(click.Command("x")):
            assert places()[0] == load_config().socket


def test_completion_scripts_come_for_three_shells(run: Run, said: Callable[[], str]) -> None:
    for shell in ("zsh", "fish", "bash"):
        assert run("completion", shell) == 0
        assert "_HOLDFAST_COMPLETE" in said()


def test_the_shell_completes_containers_by_their_names(
    agent: PaperAgent, config: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    for name, value in {
        "_HOLDFAST_COMPLETE": "bash_complete",
        "COMP_WORDS": "holdfast logs sh",
        "COMP_CWORD": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOLDFAST_CONFIG", str(config))
    with pytest.raises(SystemExit):
        main([])
    assert said().split() == ["plain,shop/web", "plain,shop/api"]


def test_check_of_one_file_finds_what_its_images_are_built_from(
    run: Run, said: Callable[[], str], tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "Dockerfile").write_text("FROM images.base\n")
    (tmp_path / "web/Base").write_text("FROM scratch\n")
    (tmp_path / "broken.toml").write_text("[containers\n")
    text = '[images.web]\ncontext = "."\n[images.base]\ncontext = "./web"\ndockerfile = "Base"\n'
    (tmp_path / "shop.toml").write_text(text + '[containers.web]\nimage = "images.web"\n')
    assert run("check", str(tmp_path / "shop.toml")) == 0
    assert "1 app, 1 container: ok" in said()
    (tmp_path / "web/Base").write_text("FROM images.bsae\n")
    assert run("check", str(tmp_path / "shop.toml")) == 65
    assert "did you mean 'base'?" in said()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_check_does_not_wait_for_a_pipe_or_read_a_device(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "app.toml"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")
    assert run("check", str(place)) == 64
    assert "not a file (expected a regular file" in capsys.readouterr().err


def test_check_reads_no_file_that_is_too_large_for_a_revision(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "app.toml").write_text('[containers.a]\nimage = "x:1"\nvolumes = ["./disk.img:/disk.img"]\n')
    with (tmp_path / "disk.img").open("wb") as file:
        file.truncate(1 << 40)
    assert run("check", str(tmp_path / "app.toml")) == 65
    assert "at most 64 MiB" in capsys.readouterr().err


def test_doctor_prints_a_verdict_for_each_check(run: Run, said: Callable[[], str]) -> None:
    assert run("doctor", "--json") in (0, 69)
    found = json.loads(said())
    assert {"kernel", "runtime", "conmon", "overlayfs", "seccomp profile"} <= {check["subject"] for check in found}
    assert all(check["remedy"] for check in found if check["verdict"] == "bad")


def test_overlayfs_that_is_a_module_need_not_be_loaded_yet(tmp_path: Path) -> None:
    known, modules = tmp_path / "filesystems", tmp_path / platform.release()
    known.write_text("nodev\tproc\n\text4\n")
    assert overlay(known, tmp_path).verdict == "bad"
    modules.mkdir()
    (modules / "modules.dep").write_text("kernel/fs/overlayfs/overlay.ko.xz:\n")
    assert overlay(known, tmp_path).verdict == "ok"
    known.write_text("nodev\toverlay\n")
    assert overlay(known, tmp_path / "none").verdict == "ok"


def test_a_reader_that_goes_away_gets_no_traceback(agent: PaperAgent, config: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "import sys; from holdfast.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "status", "--config", str(config)],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr.decode()) == (1, "")


LIGHT = {f"holdfast.{name}" for name in ("cli", "convergence", "errors", "grammar", "questions")} | {"holdfast"}
HEAVY = {
    *("asyncio", "sqlite3", "subprocess", "logging", "tempfile", "shutil", "email", "http", "ssl", "traceback"),
    *("difflib", "importlib.metadata"),
}


@pytest.mark.parametrize(
    "words",
    [
        *(["--version"], ["version"], ["--help"], ["status"], ["status", "--json"], ["stop", "shop/web"]),
        *(["events"], ["inspect", "shop/web"], ["volume", "list"], ["network", "list"], ["image", "list"]),
        *(["plan"], ["sync"], ["plugin", "list"], ["system", "df"]),
    ],
    ids=" ".join,
)
def test_a_command_that_only_asks_the_agent_imports_nothing_heavy(
    words: list[str], agent: PaperAgent, config: Path
) -> None:
    program = """
import sys
before = set(sys.modules)  # what the site of this installation needs
from holdfast.cli import main
main(sys.argv[1:])
named = [(name, getattr(sys.modules[name], "__file__", None) or "") for name in sys.modules.keys() - before]
print("\\n", *(name for name, file in named if "-packages/" in file or name.startswith("holdfast")))
print(*(name for name, _ in named))
"""
    environment = {**os.environ, "HOLDFAST_CONFIG": str(config), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=True
    )
    *_, ours, every = done.stdout.splitlines()
    strange = {name for name in ours.split() if name.split(".")[0] not in ("holdfast", "click")}
    packages = {".".join(name.split(".")[:2]) for name in ours.split() if name.startswith("holdfast")}
    heavy = HEAVY & set(every.split())
    if words == ["--help"]:
        heavy -= {"shutil"}  # click asks how wide it may be
    assert (strange, packages - LIGHT, heavy) == (set(), set(), set())


def test_the_version_is_that_of_the_installation(run: Run, said: Callable[[], str]) -> None:
    from importlib.metadata import version

    assert run("--version") == 0
    assert said() == f"holdfast {version('holdfast')}\n"


def test_times_and_sizes_read_as_people_say_them() -> None:
    assert [ago(100, at) for at in (100, 142, 280, 7300, 100 + 86400 * 12)] == [
        "now",
        "42s ago",
        "3m ago",
        "2h ago",
        "12d ago",
    ]
    assert ago(130, 100) == "in 30s"
    assert ago(None) == ""
    assert [size(number) for number in (0, 512, 1536, 10 << 20, 3 << 40)] == ["0B", "512B", "1.5KiB", "10MiB", "3TiB"]
    assert span(59.9) == "59s"
    assert list(pairs({"a": {"b": [1, 2]}, "none": None, "c": [{"d": True}]})) == [
        "a:",
        "  b: 1, 2",
        "c:",
        "  - d: yes",
    ]


def test_a_moment_is_a_span_before_now_or_a_time() -> None:
    assert moment("10m", 1000.0) == 400.0
    assert moment("1m30s", 1000.0) == 910.0
    assert moment("2026-11-21T07:00:00+00:00", 0) == 1795244400.0
    assert moment("12.5", 0) == 12.5
    for text in ("soon", "nan", "inf"):
        with pytest.raises(ValueError, match=text):
            moment(text, 0)


def test_a_reason_that_a_container_tells_is_not_told_by_its_app_as_well() -> None:
    containers = {"web": {"reason": "waits until shop/db has started"}, "db": {"reason": ""}}
    waiting = {"state": "waiting", "reason": "shop/web: waits until shop/db has started", "containers": containers}
    assert app_reason("shop", waiting) == ""
    assert app_reason("shop", {**waiting, "state": "failed", "reason": "shop/web: exec 'x': not found"})


def test_a_reason_that_an_app_tells_is_not_told_by_its_containers_as_well(said: Callable[[], str]) -> None:
    container: dict[str, Any] = {
        "state": "waiting",
        "reason": "no such image (tried once)",
        "next_at": None,
        "instances": [],
        "ports": [],
        "published": [],
        "image": "app:1",
        "digest": "",
        "newer": "",
    }
    app = {"state": "failed", "reason": "no such image", "generation": None, "containers": {"web": container}}
    show_apps({"at": 0.0, "apps": {"shop": app}})
    assert said().count("no such image") == 1


@pytest.mark.parametrize(
    ("asked", "published", "state", "shown"),
    [
        (["8080:80/tcp", "53:53/udp"], ["8080:80/tcp", "53:53/udp"], "running", "8080:80 53:53/udp"),
        (["8080:80/tcp", "53:53/udp"], ["53:53/udp"], "running", "53:53/udp (asked 8080:80)"),
        (["8080:80/tcp"], [], "running", "none (asked 8080:80)"),
        (["8080:80/tcp"], ["8080:81/tcp"], "running", "8080:81 (asked 8080:80)"),
        (["8080:80/tcp"], [], "failed", ""),
        (["8080:80/tcp"], None, "running", "8080:80"),
    ],
)
def test_ports_are_shown_as_the_kernel_publishes_them_beside_what_is_missing(
    asked: list[str], published: list[str] | None, state: str, shown: str
) -> None:
    assert ports({"ports": asked, "published": published, "state": state}) == shown


@pytest.mark.parametrize(
    ("asked", "observed", "shown"),
    [
        ({"memory": 1 << 30}, {"memory": 1 << 30, "memory_swap": 2 << 30}, "1GiB"),
        ({"memory": 1 << 30, "cpus": 0.5}, {"memory": 512 << 20, "cpus": 0.5}, "512MiB (asked 1GiB), 0.5 CPUs"),
        ({"memory": 1 << 30}, {}, "no memory limit (asked 1GiB)"),
        ({}, {"cpus": 0.25}, "0.25 CPUs (asked no CPU limit)"),
        ({}, {"pids": 10}, "10 processes (asked 2048 processes)"),
        ({"memory": 1000}, {"memory": 1000, "memory_swap": 4000}, "1000B"),
        ({}, {}, ""),
        ({"memory": 1 << 30}, None, ""),
    ],
)
def test_limits_are_shown_as_the_kernel_has_them_beside_what_was_asked_where_that_differs(
    asked: dict[str, Any], observed: dict[str, Any] | None, shown: str
) -> None:
    whole = {"asked": {**LIMITS, **asked}, "observed": None if observed is None else {**LIMITS, **observed}}
    assert limits({"limits": whole}) == shown


@pytest.mark.parametrize("words", [(), ("image",), ("bundle",), ("system",)])
def test_a_group_without_a_verb_prints_its_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    told = capsys.readouterr().err
    assert told.startswith("Usage: holdfast") and "\nCommands:\n" in told


def test_words_of_docker_lead_to_ours(agent: PaperAgent, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for word, expected in {"pull": "holdfast image pull", "ps": "holdfast status", "login": "skopeo login"}.items():
        assert run(word, "x") == 64
        assert capsys.readouterr().err.startswith(f"holdfast: no such command '{word}' ({expected}")
    assert run("image", "ls") == run("volume", "ls") == 0
    assert "no images" in capsys.readouterr().out
    assert run("image", "--help") == 0
    assert " ls " not in capsys.readouterr().out
    assert run("--version") == run("version") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_an_empty_name_is_a_wrong_call(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("image", "pull", "") == 64
    assert "it is empty (expected [HOST/]NAME[:TAG])" in capsys.readouterr().err


def test_who_stops_watching_a_pull_hears_that_it_goes_on(
    agent: PaperAgent, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = threading.Event()

    def pull_image(ref: str) -> Iterator[dict[str, Any]]:
        yield {"transfers": []}
        os.kill(os.getpid(), signal.SIGINT)  # while the command waits for more
        assert heard.wait(30)
        yield {"image": {"ref": ref, "digest": "sha256:abc"}}

    monkeypatch.setattr(agent, "pull_image", pull_image)
    code = run("image", "pull", "app:1")
    heard.set()
    assert code == 130
    assert capsys.readouterr().err == (
        "holdfast: pull 'app:1': the agent goes on pulling it (see 'holdfast status')\n"
    )


def test_a_prune_names_what_goes_and_asks_before(
    agent: PaperAgent, run: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [{"ref": ref, "digest": "sha256:abc"} for ref in ("app:1", "app:2")]
    gone = {"images": ["sha256:abc"], "layers": ["sha256:1", "sha256:2"], "freed": 1024}
    monkeypatch.setattr(agent, "images", lambda: names)
    monkeypatch.setattr(agent, "prune_images", lambda all=False: gone)
    assert run("image", "prune", "--force") == 0
    assert said().splitlines() == [
        "removed sha256:abc  app:1  app:2",
        "removed 2 layers that no image needs",
        "freed 1KiB",
    ]
    left = {"images": [], "volumes": [], "freed": 1, "kinds": {"images": 1}}
    monkeypatch.setattr(agent, "prune", lambda all=False, volumes=False: left)
    assert run("system", "prune", "--force") == 0
    assert said().splitlines() == ["removed layers that no image needs", "freed 1B"]
    for kind in ("image", "system"):
        monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
        assert run(kind, "prune") == 0
        assert said().endswith("nothing is removed\n")


def test_what_comes_by_a_pipe_is_called_standard_input(
    agent: PaperAgent, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str) -> None:
        raise WrongState(f"load {path!r}: neither an archive nor a layout")

    monkeypatch.setattr(agent, "load_image", load)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    assert run("image", "load") == 65
    assert capsys.readouterr().err == "holdfast: load 'standard input': neither an archive nor a layout\n"


@pytest.mark.parametrize("to_journal", [True, False])
def test_lines_of_the_log_have_a_time_unless_the_journal_adds_one(to_journal: bool, tmp_path: Path) -> None:
    program = "from holdfast.cli.log import log_to_stderr; log_to_stderr(); import structlog\n"
    program += "structlog.get_logger().info('begun')"
    with (tmp_path / "log").open("w") as log:
        found = os.fstat(log.fileno())
        stream = f"{found.st_dev}:{found.st_ino if to_journal else 0}"
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "JOURNAL_STREAM": stream}, stderr=log, check=True
        )
    line = (tmp_path / "log").read_text()
    assert "begun" in line
    assert bool(re.match(r"\d{4}-", line)) is not to_journal


@pytest.mark.parametrize(
    ("text", "expected"), [("30", 30.0), ("30s", 30.0), ("1m30s", 90.0), ("500ms", 0.5), ("2h", 7200.0)]
)
def test_a_timeout_is_written_as_in_state_files(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1", "nan", "inf", "5 apples"])
def test_what_is_no_timeout_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


def test_sizes_are_never_printed_with_an_exponent() -> None:
    for power in range(1, 52):
        for count in ((1 << power) - 1, 1 << power, 999 << (power // 10 * 10), 1023 << (power // 10 * 10)):
            assert "e" not in size(count).removesuffix("iB"), count


def test_a_table_that_is_too_wide_is_folded_between_words_and_then_between_columns(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    head = ["NAME", "PORTS", "IMAGE"]
    rows = [["shop/web", "8080:80 127.0.0.1:9090:9090", "registry.example:5000/shop/web:1.27 (0123456789ab)"]]
    for columns in (40, 60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        render.table(head, rows)
        lines = said().splitlines()
        assert max(map(len, lines)) <= columns
        words = " ".join(lines).split()
        assert {"8080:80", "127.0.0.1:9090:9090", "registry.example:5000/shop/web:1.27"} <= set(words)


def test_a_volume_that_is_not_there_is_named_whatever_its_name(
    run: Run, agent: PaperAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x", "shop/x", "a/b/c"):
        assert run("volume", "rm", name) == 64
        assert "/v1" not in capsys.readouterr().err


def test_the_list_of_commands_cuts_no_sentence(run: Run, said: Callable[[], str]) -> None:
    run("--help")
    run("image", "--help")
    assert "..." not in said().replace("COMMAND [ARGS]...", "")


LACKING = """
[images.web]
context = "./web"
[containers.web]
image = "images.web"
volumes = ["./conf:/conf:ro"]
"""


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the file"])
def test_check_says_what_a_revision_would_lack_of_mounts_and_contexts(
    run: Run, tmp_path: Path, said: Callable[[], str], whole: bool
) -> None:
    state = tmp_path / "clone/state"
    for folder in ("conf", "web/lib", "conf/sub"):
        (state / folder).mkdir(parents=True)
    (tmp_path / "clone/.git").mkdir()
    (tmp_path / "outside").write_text("x")
    (state / "web/Dockerfile").write_text("FROM scratch\n")
    (state / "conf/app.conf").write_text("x")
    (state / "shop.toml").write_text(LACKING)

    def check(exits: int) -> str:
        assert run("check", str(state if whole else state / "shop.toml")) == exits
        return said()

    check(0)
    pointer = state / "conf/model.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git LFS pointer" in check(65)
    pointer.unlink()
    (state / "web/lib/link").symlink_to(tmp_path / "outside")
    assert "'web/lib/link', a symbolic link that leads out" in check(65).replace(f"{state}/", "")
    (state / "web/.dockerignore").write_text("lib\n")
    check(0)
    (tmp_path / "clone/.gitmodules").write_text('[submodule "a"]\n\tpath = state/conf/sub\n\turl = x\n')
    assert "conf/sub', a git submodule that is not checked out" in check(65)
    (state / "conf/sub/file").write_text("x")
    check(0)
    os.mkfifo(state / "conf/pipe")
    assert "a socket, a pipe or a device" in check(65)


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the file"])
def test_check_names_what_is_left_out_for_its_name_where_it_may_count(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    state = tmp_path / "state"
    for folder in ("conf", "web"):
        (state / folder).mkdir(parents=True)
    (state / "web/Dockerfile").write_text("FROM scratch\n")
    for name in ("conf/app.conf", "conf/notes~", "web/.ruff.toml", "web/.a.swp", ".shop.toml", "shop.toml~", "4913"):
        (state / name).write_text("")
    (state / "web/.dockerignore").write_text("*.swp\n")
    (state / "shop.toml").write_text(LACKING)
    assert run("check", str(state if whole else state / "shop.toml")) == 0
    told = capsys.readouterr().err.replace(f"{state}/", "").splitlines()
    expected = ["conf/notes~: a name of editors' temporary files", "web/.ruff.toml: a hidden TOML file"]
    assert [": ".join(line.split(": ")[:2]) for line in told if "buildah" not in line] == [
        *([".shop.toml: a hidden TOML file"] if whole else []),
        *expected,
    ]
    (state / "shop.toml").write_text('[containers.web]\nimage = "x"\nvolumes = ["./conf/notes~:/notes"]\n')
    assert run("check", str(state if whole else state / "shop.toml")) == 65
    assert "a name of editors' temporary files" in capsys.readouterr().out


def test_check_of_several_files_reads_them_as_one_revision(run: Run, tmp_path: Path, said: Callable[[], str]) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text('[containers.web]\nimage = "app:1"\nvolumes = ["./conf:/conf:ro"]\n')
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/own.toml").write_text("")
    assert run("check", str(tmp_path / "one.toml"), str(tmp_path / "two.toml")) == 0
    assert said().startswith("3 apps, 2 containers")  # as an agent takes it: any TOML file is an app


def test_a_log_that_can_not_be_written_stops_no_work() -> None:
    program = "from holdfast.cli.log import log_to_stderr; log_to_stderr(); import structlog, sys\n"
    program += "for n in range(3): structlog.get_logger().error('begun', number=n)\n"
    program += "sys.stderr.close(); structlog.get_logger().info('closed'); print('went on')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.stdout == b"went on\n"
