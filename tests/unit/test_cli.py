"""The command as a person meets it: words and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from holdfast.cli import main
from holdfast.cli.command import places
from holdfast.cli.since import moment, seconds
from holdfast.config import load_config
from paper import PaperAgent, Run


def test_config_may_stand_after_the_command(agent: PaperAgent, config: Path) -> None:
    assert main(["status", "--config", str(config)]) == 0
    assert main(["volume", "list", "--config", str(config)]) == 0


def test_config_may_come_from_the_environment(
    agent: PaperAgent, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG", str(config))
    assert main(["status"]) == 0


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


def test_a_moment_is_a_span_before_now_or_a_time() -> None:
    assert moment("10m", 1000.0) == 400.0
    assert moment("1m30s", 1000.0) == 910.0
    assert moment("2026-11-21T07:00:00+00:00", 0) == 1795244400.0
    assert moment("12.5", 0) == 12.5
    for text in ("soon", "nan", "inf"):
        with pytest.raises(ValueError, match=text):
            moment(text, 0)


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


def test_a_log_that_can_not_be_written_stops_no_work() -> None:
    program = "from holdfast.cli.log import log_to_stderr; log_to_stderr(); import structlog, sys\n"
    program += "for n in range(3): structlog.get_logger().error('begun', number=n)\n"
    program += "sys.stderr.close(); structlog.get_logger().info('closed'); print('went on')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.stdout == b"went on\n"
