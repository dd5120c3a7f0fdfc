"""A command that is newer than the agent it reaches says so, instead of failing in the dark or keeping quiet."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

from holdfast.cli import main
from holdfast.cli.checkup import answers
from holdfast.cli.client import Client
from holdfast.errors import NotFound, OlderAgent
from holdfast.testing import temporary_host
from paper import PaperAgent, served

COMMANDS = [
    *(["status"], ["plan"], ["events"], ["logs", "shop/web"], ["inspect", "shop/web"], ["stats"]),
    *(["volume", "list"], ["volume", "inspect", "shop/data"], ["volume", "prune", "--force"]),
    *(["network", "list"], ["network", "inspect", "bridge"], ["plugin", "list"], ["sync"], ["stop", "shop/web"]),
    *(["image", "list"], ["image", "prune", "--force"], ["image", "outdated"], ["image", "pull", "app:1"]),
    *(["image", "history", "app:1"], ["system", "df"], ["system", "prune", "--force"], ["commit", "shop/web", "x:1"]),
    ["image", "tag", "app:1", "app:2"],
]
NAMES = {"web", "api", "db", "shop", "back", "bridge"}  # keys of answers that no agent lacks
TOLD = "is older than this command (restart it: systemctl restart holdfast)"


class Older(PaperAgent):
    """An agent whose answers lack a key wherever they would have it."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.lacks = ""
        self.keys: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found) or name in ("ask", "stop", "release", "events", "logs"):
            return found
        return lambda *words, **more: self._without(found(*words, **more))

    def _without(self, value: Any) -> Any:
        match value:
            case dict():
                self.keys.update(value)
                return {key: self._without(each) for key, each in value.items() if key != self.lacks}
            case list() | tuple():
                return [self._without(each) for each in value]
            case Iterator():
                return map(self._without, value)
            case _:
                return value


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(f'name = "{temporary_host(tmp_path).name}"\nroot = "{tmp_path}"\nrun_root = "{tmp_path}"\n')
    return path


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_answer_that_lacks_what_a_command_needs_is_told_as_that(
    words: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "web.log").write_text("2026-11-21T07:00:00.1+00:00 stdout F hello\n")
    older = Older(tmp_path / "web.log")

    def run() -> tuple[int, str]:
        code = main(["--config", str(config), *words])
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    with served(older, tmp_path / "agent.sock"):
        whole, told = run()
        assert whole == 0, told
        found = 0
        for key in sorted(older.keys - NAMES):
            older.lacks = key
            code, told = run()
            assert "this is a bug" not in told, f"without {key}: {told}"
            assert code in (0, 69), f"without {key}: {told}"
            found += TOLD in told
    printed_as_it_is = words[0] in ("inspect", "events", "stop") or words[1:2] in (["inspect"], ["tag"])
    assert found or not older.keys or printed_as_it_is


def test_the_doctor_tells_what_an_answer_lacks_among_its_other_checks(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Older(tmp_path / "web.log")
    monkeypatch.setenv("HOLDFAST_CONFIG", str(config))
    with served(older, tmp_path / "agent.sock"):
        with click.Context(click.Command("doctor")):
            assert not [check for check in answers() if TOLD in check.detail]
            lacking = []
            for key in sorted(older.keys - NAMES):
                older.lacks = key
                lacking += [key] if any(TOLD in check.detail for check in answers()) else []
        assert {"foreign", "source"} <= set(lacking)
        older.lacks = "foreign"
        assert main(["--config", str(config), "doctor"]) in (0, 69)
    told = " ".join(capsys.readouterr().out.split())
    assert TOLD in told and "kernel" in told


@contextmanager
def earlier(path: Path, status: str, answer: Any) -> Iterator[list[str]]:
    """An agent that does not say which requests it knows, and answers every one in the same way."""
    asked: list[str] = []
    body = json.dumps(answer)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(65536).decode())
                    connection.sendall(f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


NO_ROUTE = {"error": "POST '/v1/x': not found", "class": "WrongCall", "exit_code": 64}
Ask = Callable[[Client], Any]


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.forget_plugin("gone"),
        lambda client: list(client.logs(["shop/web", "shop/api"])),
        lambda client: client.outdated(),
    ],
    ids=["plugin forget", "logs of several", "image outdated"],
)
def test_a_request_that_an_agent_does_not_know_is_told_as_that(ask: Ask, tmp_path: Path) -> None:
    with earlier(tmp_path / "sock", "404 Not Found", NO_ROUTE), pytest.raises(OlderAgent, match="restart it"):
        ask(Client(tmp_path / "sock"))


def test_what_an_agent_would_overlook_is_not_taken_for_done(tmp_path: Path) -> None:
    client = Client(tmp_path / "sock")
    with earlier(tmp_path / "sock", "200 OK", {"argv": ["/bin/true"]}):
        with pytest.raises(OlderAgent, match="restart it"):
            client.exec_of("shop/web", ["true"], detach=True)
        assert client.exec_of("shop/web", ["true"])["argv"] == ["/bin/true"]


def test_what_is_not_there_is_told_as_that_by_agents_of_any_age(tmp_path: Path) -> None:
    missing = {"error": "volume 'x': there is no such volume", "class": "NotFound", "exit_code": 64}
    with earlier(tmp_path / "sock", "404 Not Found", missing), pytest.raises(NotFound, match="no such volume"):
        Client(tmp_path / "sock").volume("x")
