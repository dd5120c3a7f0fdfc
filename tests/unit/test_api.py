"""The agent behind its socket: who may ask, what is answered, and how an error travels."""

from __future__ import annotations

import io
import os
import pwd
import socket
import stat
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ground import wait_for
from holdfast.api import PER_USER, answers, listen
from holdfast.cli.client import Client
from holdfast.daemon.agent import Daemon
from holdfast.daemon.compose import one_each
from holdfast.daemon.offline import Offline
from holdfast.errors import Conflict, HoldfastError, NoAgent, NotFound, TryAgain, WrongCall, WrongConfig
from holdfast.questions import QUESTIONS, Question, Questions, Sink
from paper import Echo, PaperAgent, served


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "web.log"
    path.write_text("2026-11-21T07:00:00.1+00:00 stdout F one\n2026-11-21T07:00:01.1+00:00 stderr F two\n")
    return path


@pytest.fixture
def agent(tmp_path: Path, log: Path) -> Iterator[PaperAgent]:
    paper = PaperAgent(log)
    with served(paper, tmp_path / "agent.sock"):
        yield paper


@pytest.fixture
def client(agent: PaperAgent, tmp_path: Path) -> Client:
    return Client(tmp_path / "agent.sock")


def test_status_arrives_as_the_agent_made_it(client: Client, agent: PaperAgent) -> None:
    found = client.status()
    assert found["converged"]
    assert found["apps"]["shop"]["containers"]["web"]["instances"][0]["pid"] == 4242


def test_an_error_arrives_as_the_class_that_was_raised(client: Client) -> None:
    with pytest.raises(NotFound, match="shop/nope"):
        client.inspect("shop/nope")
    with pytest.raises(Conflict, match="mounted"):
        client.remove_volume("shop/data")


def test_a_hold_bears_the_name_of_whoever_asked(client: Client, agent: PaperAgent) -> None:
    client.stop("shop/web")
    assert agent.holds["shop/web"].kind == "stopped"
    assert agent.holds["shop/web"].by == pwd.getpwuid(os.getuid()).pw_name
    client.release("shop/web")
    assert agent.holds == {}


ARGUMENTS: dict[Any, Any] = {
    str: "a b/ü%",
    bool: True,
    int | None: 3,
    int: 3,
    float | None: 1.5,
    float: 1.5,
    Sequence[str]: ["a=1", "b ü"],
}


@pytest.mark.parametrize("question", QUESTIONS, ids=[each.name for each in QUESTIONS])
def test_every_question_arrives_with_all_that_was_said(question: Question, tmp_path: Path) -> None:
    echo, client, out = Echo(), Client(tmp_path / "agent.sock"), io.BytesIO()
    hints = question.hints()
    shown = {**ARGUMENTS, Sink: out}
    given: dict[str, Any] = {name: shown[hints[name]] for name in question.names if name not in ("by", "follow")}
    if hints.get("target") is str:
        given["target"] = "shop/web"
    expected = {"asked": question.name, **given}
    with served(echo, tmp_path / "agent.sock"):
        told = getattr(client, question.name)(**given)
        told = list(told)[-1] if isinstance(told, Iterator) else told[0] if isinstance(told, list) else told
    if "out" in expected:
        assert expected.pop("out").getvalue() == question.name.encode()
    if "by" in question.names:
        expected["by"] = pwd.getpwuid(os.getuid()).pw_name
    told = echo.told if told is None else dict(told)
    expected |= {name: told[name] for name in told if name == "seq"}
    assert told == expected


def test_an_agent_answers_every_question_and_without_one_all_but_few() -> None:
    def left(answers: type[Questions]) -> set[str]:
        return {each.name for each in QUESTIONS if hasattr(getattr(answers, each.name), "question")}

    assert left(Daemon) == set()
    assert left(Offline) == {"sync", "stop", "start", "restart", "release"}
    offline = Offline.__new__(Offline)
    with pytest.raises(NoAgent, match="stop: no agent runs"):
        offline.stop("shop/web")


def test_archives_come_whole_through_the_agent_or_not_at_all(client: Client) -> None:
    out = io.BytesIO()
    assert client.save_images(["a:1", "b:1"], "docker-archive", out) == {"images": ["a:1", "b:1"]}
    assert out.getvalue() == b"tar" * 1_000_000 + b"docker-archive"
    with pytest.raises(NotFound, match="'gone:1'"):
        client.save_images(["gone:1"], "oci-archive", io.BytesIO())
    out = io.BytesIO()
    assert client.export("shop/web", out, pause=False) == {"target": "shop/web", "pause": False}
    client.export_image("app:1", out)
    assert out.getvalue() == b"shop/webexport_image"
    with pytest.raises(WrongCall, match="'ref': string should have at least 1 character"):
        client.export_image("", io.BytesIO())


def test_a_reader_who_stops_reading_is_given_up(
    agent: PaperAgent, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def export(target: str, out: Any, pause: bool = True) -> dict[str, Any]:
        try:
            while True:
                out.write(bytes(1 << 20))
        finally:
            ended.set()

    monkeypatch.setattr(agent, "export", export)
    monkeypatch.setattr("holdfast.api.routes.STALLED", 0.2)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "agent.sock"))
        connection.sendall(b"GET /v1/containers/shop/web/export HTTP/1.0\r\n\r\n")
        assert ended.wait(10)
    assert client.status()


def test_what_fails_while_an_image_is_pulled_arrives_as_it_was_raised(client: Client) -> None:
    lines = client.pull_image("gone:1")
    assert next(lines) == {"transfers": []}
    with pytest.raises(NotFound, match="the registry has no such image"):
        next(lines)


def test_of_two_transfers_of_one_image_the_farther_one_is_shown() -> None:
    asking = {"ref": "a:1", "state": "resolving", "done": 0}
    near, far = ({"ref": "a:1", "state": "pulling", "done": done} for done in (1, 2))
    other = {"ref": "b:1", "state": "resolving", "done": 0}
    assert one_each([asking, near, other, far]) == [far, other]
    assert one_each([asking, asking]) == [asking]


def test_a_pull_that_ends_in_a_bug_is_no_result(
    agent: PaperAgent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "pull_image", lambda ref: iter(({"transfers": []}, {"transfers": [{}]})))
    with pytest.raises(NoAgent, match="hung up in the middle"):
        list(client.pull_image("app:1"))


def line(heard: Iterator[Any]) -> Any:
    """The next line that says something."""
    return next(each for each in heard if each)


def nobody_reads() -> bool:
    return not any(thread.name == "answer" for thread in threading.enumerate())


def close(lines: Iterator[Any]) -> None:
    assert isinstance(lines, Generator)
    lines.close()


def test_events_are_read_from_where_the_reader_was(client: Client) -> None:
    assert [event["message"] for event in client.events() if event] == ["started"]
    assert list(client.events(after=1)) == []


def test_a_follower_hears_of_events_as_they_happen(client: Client, agent: PaperAgent) -> None:
    heard = client.events(follow=True)
    assert line(heard)["seq"] == 1
    agent.log.append({"seq": 2, "at": 1.0, "kind": "exit", "subject": "shop/web", "message": "ended"})
    assert line(heard)["seq"] == 2


def test_a_follower_knows_while_nothing_happens_that_the_agent_lives(client: Client) -> None:
    heard = client.events(after=1, follow=True)
    assert [next(heard), next(heard)] == [None, None]


def test_logs_are_read_through_the_agent(client: Client) -> None:
    assert [each["text"] for each in client.logs(["shop/web"]) if each] == ["one", "two"]
    assert [each["text"] for each in client.logs(["shop/web"], tail=1) if each] == ["two"]


def test_logs_of_several_containers_bear_their_names(client: Client) -> None:
    lines = [line for line in client.logs(["shop/web", "shop/api"]) if line]
    assert [(line["target"], line["text"]) for line in lines] == [
        *(("shop/web", "one"), ("shop/api", "one"), ("shop/web", "two"), ("shop/api", "two"))
    ]


def test_a_reader_that_has_gone_ends_the_reading(client: Client, log: Path) -> None:
    log.write_text("2026-11-21T07:00:00.1+00:00 stdout F one\n" * 200_000)
    lines = client.logs(["shop/web"])
    assert line(lines)["text"] == "one"
    close(lines)
    wait_for(nobody_reads, "the reader ends")


def test_a_followed_log_goes_on_and_its_reader_thread_ends_with_the_caller(client: Client, log: Path) -> None:
    lines = client.logs(["shop/web"], tail=1, follow=True)
    assert line(lines)["text"] == "two"
    with log.open("a") as file:
        file.write("2026-11-21T07:00:02.1+00:00 stdout F three\n")
    assert line(lines)["text"] == "three"
    close(lines)
    wait_for(nobody_reads, "the reader ends")


def test_a_wrong_path_or_body_is_one_line(client: Client, tmp_path: Path) -> None:
    for request in (
        b"GET /v2/nothing HTTP/1.0\r\n\r\n",
        b"PUT /v1/status HTTP/1.0\r\n\r\n",
        b"GET /v1/sync HTTP/1.0\r\n\r\n",
        b"what is this\r\n\r\n",
        b"POST /v1/sync HTTP/1.0\r\nContent-Length: 1\r\n\r\n[",
        b"POST /v1/sync HTTP/1.0\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /v1/sync HTTP/1.0\r\nContent-Length: 9999999\r\n\r\n{}",
        b"GET /v1/status HTTP/1.0\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.0\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / "agent.sock"))
            connection.sendall(request)
            answer = all_of(connection)
        assert b'"exit_code": 64' in answer, request[:80]
        assert b"Traceback" not in answer


def test_a_bug_in_an_answer_is_told_as_one_and_the_next_question_is_answered(
    agent: PaperAgent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    for name in ("plan", "events", "export_image"):
        monkeypatch.setattr(agent, name, fails)
    for call in (client.plan, lambda: list(client.events()), lambda: client.export_image("a:1", io.BytesIO())):
        with pytest.raises(HoldfastError, match="failed by a bug \\(see the agent's log\\)"):
            call()
    assert client.status()["converged"]


def test_followers_end_soon_after_the_agent(tmp_path: Path) -> None:
    with served(PaperAgent(), tmp_path / "agent.sock"):
        heard = Client(tmp_path / "agent.sock").events(follow=True)
        assert line(heard)["seq"] == 1
    assert not any(heard)


def test_without_a_group_the_socket_is_its_owners_alone(agent: PaperAgent, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600


def test_a_group_may_ask_when_it_is_named(tmp_path: Path) -> None:
    import grp

    group = grp.getgrgid(os.getgid())
    path = tmp_path / "agent.sock"
    listen(path, group=group.gr_name).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_gid == group.gr_gid


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongConfig, match="no such group"):
        listen(tmp_path / "agent.sock", group="no-such-group")


def test_a_socket_that_somebody_answers_on_is_left_alone(agent: PaperAgent, client: Client, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="another agent"):
        listen(tmp_path / "agent.sock")
    assert client.status()["converged"]


def test_a_socket_that_a_dead_agent_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    listen(path).close()
    assert not answers(path)
    with listen(path):
        assert answers(path)


def test_no_agent_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(NoAgent, match="nobody answers"):
        Client(tmp_path / "agent.sock").status()
    assert not Client(tmp_path / "agent.sock").listens()


def test_one_user_may_open_so_many_connections_and_no_more(client: Client, agent: PaperAgent) -> None:
    held = []
    try:
        for _ in range(PER_USER):
            held.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            held[-1].connect(str(client.path))
        with pytest.raises(TryAgain, match=f"at most {PER_USER}"):
            client.status()
    finally:
        for each in held:
            each.close()

    def answered() -> bool:
        with suppress(TryAgain):
            return bool(client.status()["converged"])
        return False

    wait_for(answered, "the agent has noticed that they are gone")


def test_connections_that_no_thread_could_answer_are_closed_and_do_not_count(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def starts(thread: threading.Thread) -> None:
        if thread.name == "answer":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr("holdfast.api.server.REST", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starts)
        for _ in range(PER_USER + 1):
            with pytest.raises((NoAgent, ConnectionResetError)):
                client.status()
    assert client.status()["converged"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, '{"command": ' + "[" * 200_000])
def test_a_body_that_is_nested_too_deeply_is_a_wrong_call(client: Client, text: str) -> None:
    answer = answer_to(client.path, "POST", "/v1/sync", text.encode())
    assert b" 400 " in answer.splitlines()[0]
    assert b'"exit_code": 64' in answer


def answer_to(path: Path, method: str, target: str, body: bytes = b"") -> bytes:
    """What the agent answers to a request that our own client would not send."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.connect(str(path))
        raw.sendall(f"{method} {target} HTTP/1.0\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return all_of(raw)


def all_of(connection: socket.socket) -> bytes:
    """All that the agent sends. It resets a connection from which it has not read everything."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    ("method", "target", "body", "told"),
    [
        ("POST", "/v1/images/pull", b"\xff\xfe\xfd", b"body is not JSON"),
        ("POST", "/v1/images/pull", b'{"ref": 5}', b"'ref': input should be a valid string"),
        ("POST", "/v1/images/pull", b'{"ref": ""}', b"'ref': string should have at least 1 character"),
        ("POST", "/v1/images/pull", b"{}", b"'ref': field required"),
        ("POST", "/v1/containers/shop/web/exec", b'{"command": []}', b"'command': value should have at least 1 item"),
        ("POST", "/v1/containers/shop/web/exec", b'{"command": "ls"}', b"'command': 'str' instances are not allowed"),
        ("POST", "/v1/containers/shop/web/exec", b'{"command": ["a"], "env": 5}', b"'env': input should be"),
        ("POST", "/v1/containers/shop/web/exec", b'{"command": ["a"], "tty": "no"}', b"'tty': input should be"),
        ("POST", "/v1/containers/shop/web/commit", b'{"name": "a:1", "changes": [5]}', b"'changes': input should be"),
        ("POST", "/v1/images/prune", b'{"all": "false"}', b"'all': input should be a valid boolean"),
        ("POST", "/v1/prune", b'{"volumes": 1}', b"'volumes': input should be a valid boolean"),
        ("DELETE", "/v1/volumes/shop/data?force=perhaps", b"", b"'force': input should be a valid boolean"),
        ("GET", "/v1/logs?target=shop/web&tail=-5", b"", b"'tail': input should be greater than or equal to 0"),
        ("GET", "/v1/logs?target=shop/web&tail=1.5", b"", b"'tail': input should be a valid integer"),
        ("GET", "/v1/logs?tail=1", b"", b"'target': field required"),
        ("GET", "/v1/events?limit=-1", b"", b"'limit': input should be greater than or equal to 0"),
        ("GET", "/v1/events?follow=1&beat=soon", b"", b"'beat': input should be a valid number"),
        ("GET", "/v1/events?follow=1&beat=nan", b"", b"'beat': input should be"),
        ("GET", "/v1/events?follow=1&beat=1e308", b"", b"'beat': input should be less than"),
    ],
)
def test_a_value_of_another_kind_is_a_wrong_call_and_never_guessed_at(
    client: Client, method: str, target: str, body: bytes, told: bytes
) -> None:
    answer = answer_to(client.path, method, target, body)
    assert b" 400 " in answer.splitlines()[0]
    assert told in answer


def test_a_volume_that_is_mounted_is_kept_from_who_says_that_it_is_not_to_be_forced(client: Client) -> None:
    assert b" 409 " in answer_to(client.path, "DELETE", "/v1/volumes/shop/data?force=0").splitlines()[0]
    assert b" 200 " in answer_to(client.path, "DELETE", "/v1/volumes/shop/data?force=1").splitlines()[0]


def test_a_caller_who_means_the_agent_of_another_root_is_refused(client: Client, tmp_path: Path) -> None:
    other = Client(client.path, tmp_path / "elsewhere")
    for call in (other.status, other.plan, lambda: other.stop("shop/web")):
        with pytest.raises(Conflict, match=f"holds '{tmp_path}'.*'{tmp_path}/elsewhere'"):
            call()
    assert Client(client.path, tmp_path).status()["converged"]
    (tmp_path / "link").symlink_to(tmp_path)
    assert Client(client.path, tmp_path / "link").status()["converged"]
