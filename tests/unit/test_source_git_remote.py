"""A git source whose remote hangs, refuses, moves or goes, and whose own git is killed."""

from __future__ import annotations

import http.server
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.errors import TryAgain, UnfitHost, WrongConfig
from holdfast.source.git import GitSource, next_pause
from holdfast.source.gitcommand import redact, telling_line
from repositories import Repository, fetched, mirror_of


class Daemon:
    """A git-daemon(1) on a free port of 127.0.0.1 that can be stopped and started."""

    def __init__(self, base: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.base = base
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        path = subprocess.run(["git", "--exec-path"], check=True, capture_output=True, text=True).stdout.strip()
        self.process = subprocess.Popen(
            [f"{path}/git-daemon", "--listen=127.0.0.1", f"--port={self.port}", "--export-all", "--reuseaddr",
             f"--base-path={self.base}", str(self.base)],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(self._answers, "git daemon listens")

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.stop()


def test_the_remote_may_go_and_come(
    repository: Repository, git_source: Callable[..., GitSource], daemon: Daemon
) -> None:
    url = f"git://127.0.0.1:{daemon.port}/repository"
    source = git_source(url)
    assert fetched(source)["shop.toml"] == b"1"
    before = source.current()
    daemon.stop()
    with pytest.raises(TryAgain, match=r"can't be fetched: .*[Cc]onnection refused"):
        source.refresh()
    assert source.current() is before
    restarted = git_source(url)
    with pytest.raises(TryAgain):
        restarted.refresh()
    assert restarted.current().files == before.files  # the last accepted commit outlives the agent
    repository.commit("Meanwhile", shop="2")
    daemon.start()
    assert fetched(restarted)["shop.toml"] == b"2"
    assert fetched(source)["shop.toml"] == b"2"


def test_a_remote_that_hangs_is_given_up(git_source: Callable[..., GitSource]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        source = git_source(f"git://127.0.0.1:{silent.getsockname()[1]}/repository", timeout=0.2)
        with pytest.raises(TryAgain, match=r"run 'git ls-remote': no end after 0.2 s"):
            source.refresh()


def test_closing_a_watch_does_not_wait_for_a_remote_that_hangs(git_source: Callable[..., GitSource]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        watch = git_source(f"git://127.0.0.1:{silent.getsockname()[1]}/repository").watch(lambda reason: None)
        connection, _ = silent.accept()
        begin = time.monotonic()
        watch.close()
        assert time.monotonic() - begin < 30, "it does not wait for an answer"
        connection.close()


def test_a_server_that_refuses_is_told_apart(git_source: Callable[..., GitSource]) -> None:
    """An HTTP server that wants a password; nobody is asked for one."""

    class Guard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Guard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(TryAgain, match="can't be fetched: could not read Username"):
                git_source(f"http://127.0.0.1:{server.server_port}/x.git").refresh()
            with pytest.raises(TryAgain, match="can't be fetched: Authentication failed for 'http://127"):
                git_source(f"http://me:s3cret@127.0.0.1:{server.server_port}/x.git").refresh()
        finally:
            server.shutdown()
            thread.join()


def test_two_agents_do_not_write_to_one_mirror_at_once(git_source: Callable[..., GitSource]) -> None:
    source, other = git_source(), git_source()
    source.refresh()
    with source._alone(), pytest.raises(TryAgain, match="another git is at work"):
        other.refresh()
    other.refresh()


FETCHES = """
import os, sys
from pathlib import Path
from holdfast.source.git import GitSource
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        GitSource(sys.argv[1], Path(sys.argv[2])).refresh()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture
def fetches(repository: Repository, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that forks for each line it is given, says the child's number, and has the child fetch."""
    words = [sys.executable, "-c", FETCHES, str(repository.path), str(tmp_path / "root")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet) as process:
        yield process


def test_a_fetch_killed_at_any_moment_leaves_a_mirror_that_works(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path, fetches: subprocess.Popen[bytes]
) -> None:
    (repository.path / "blob.bin").write_bytes(os.urandom(300_000))
    source = git_source()
    source.refresh()
    assert fetches.stdin is not None and fetches.stdout is not None
    for number in range(6):
        (repository.path / "blob.bin").write_bytes(os.urandom(300_000))
        repository.commit(f"Change {number}", shop=str(number))
        fetches.stdin.write(b"go\n")
        fetches.stdin.flush()
        child = int(fetches.stdout.readline())
        with suppress(ProcessLookupError):  # it may be done
            handle = os.pidfd_open(child)
            select.select([handle], [], [], 0.006 * (number + 1))
            os.close(handle)
            os.kill(child, signal.SIGKILL)
        assert source.current().files["shop.toml"] in (b"1", str(number - 1).encode(), str(number).encode())

        def refreshed() -> bool:
            try:
                source.refresh()
            except TryAgain as error:
                assert "another git is at work" in str(error)  # the orphan's: it ends by itself
                return False
            return True

        wait_for(refreshed, "the mirror is usable")
        assert source.current().files["shop.toml"] == str(number).encode()
    mirror = mirror_of(tmp_path)
    subprocess.run(["git", "-C", mirror, "fsck", "--strict"], check=True, capture_output=True)
    assert not list(mirror.rglob("*.lock")) and not list(mirror.rglob("tmp_*"))


def test_lock_files_of_a_killed_git_are_removed(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = git_source()
    source.refresh()
    mirror = mirror_of(tmp_path)
    for name in ("refs/holdfast/fetched.lock", "refs/holdfast/current.lock", "config.lock", "packed-refs.lock"):
        (mirror / name).touch()
    (mirror / "objects/pack/tmp_pack_x").touch()
    repository.commit("Raise", shop="2")
    assert fetched(source)["shop.toml"] == b"2"
    assert not list(mirror.rglob("*.lock")) and not list(mirror.rglob("tmp_*"))


def test_a_mirror_half_made_is_completed(git_source: Callable[..., GitSource], tmp_path: Path) -> None:
    source = git_source()
    source.refresh()
    mirror = mirror_of(tmp_path)
    shutil.rmtree(mirror)
    (mirror / "refs").mkdir(parents=True)
    assert "shop.toml" in fetched(git_source())


def test_nothing_of_the_environment_leads_astray(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "hooked"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("reference-transaction", "post-update", "pre-auto-gc"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (hooks / name).chmod(0o755)
    (tmp_path / ".gitconfig").write_text(f"[core]\nhooksPath = {hooks}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_WORK_TREE", "/nowhere")
    assert "shop.toml" in fetched(git_source())
    assert not marker.exists()


def test_commands_in_the_url_are_not_run(git_source: Callable[..., GitSource], tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="not allowed"):
        git_source(f"ext::touch {tmp_path}/run").refresh()
    with pytest.raises(WrongConfig):
        git_source("--upload-pack=touch run")
    with pytest.raises(WrongConfig):
        git_source(branch="-x")
    assert not (tmp_path / "run").exists()


def test_passwords_are_never_shown(git_source: Callable[..., GitSource]) -> None:
    source = git_source("http://me:s3cret@127.0.0.1:1/x.git")
    with pytest.raises(TryAgain) as failure:
        source.refresh()
    assert "s3cret" not in str(failure.value) + str(source.state())
    assert redact("https://token@h/x and ssh://git:pw@h/x") == "https://***@h/x and ssh://git:***@h/x"
    assert redact("ssh://git@h/x git@h:x 'http://a:b@c/d'") == "ssh://git@h/x git@h:x 'http://***@c/d'"


def test_the_line_that_tells_is_shown() -> None:
    said = "ssh: connect to host h port 22: No route to host\nfatal: Could not read from remote repository.\n\nPlease"
    assert telling_line(said) == "ssh: connect to host h port 22: No route to host"
    assert telling_line("warning: x\nfatal: repository 'y' does not exist\n") == "repository 'y' does not exist"
    assert telling_line("") == "git said nothing"


def test_a_host_without_git_is_told(git_source: Callable[..., GitSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnfitHost, match="install the package git"):
        git_source().refresh()


def test_a_poll_wakes_when_the_branch_moved_and_when_it_fails(
    repository: Repository, git_source: Callable[..., GitSource]
) -> None:
    source, woken, reasons = git_source(interval=0.01), threading.Event(), []

    def wake(reason: str) -> None:
        reasons.append(reason)
        woken.set()

    def wait_told(text: str) -> None:
        wait_for(lambda: any(text in reason for reason in reasons), text)

    watch = source.watch(wake)
    try:
        wait_told("Open the shop")
        assert source.current().message == "Open the shop"
        repository.commit("Raise", shop="2")
        wait_told("Raise")
        repository.git("branch", "-m", "main", "trunk")
        wait_told("is gone")
        repository.git("branch", "-m", "trunk", "main")
        wait_told("can be read again")
    finally:
        watch.close()
    assert len(reasons) == 4  # polls that find nothing wake nobody


def test_a_poke_polls_at_once(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    source, reasons = git_source(interval=3600), list[str]()
    watch = source.watch(reasons.append)
    try:
        wait_for(lambda: len(reasons) == 1, "the first poll")
        repository.commit("Raise", shop="2")
        watch.poke()
        wait_for(lambda: len(reasons) == 2, "the poked poll")
        next_try = source.state().next_try_at
        assert next_try is not None and next_try > time.time() + 3000
    finally:
        watch.close()


def test_pauses_double_up_to_ten_minutes_and_are_spread() -> None:
    assert [next_pause(30, failures, 0.5) for failures in (0, 1, 2, 5, 1000)] == [30, 60, 120, 600, 600]
    assert next_pause(3600, 9, 0.5) == 3600
    assert next_pause(30, 0, 0) == pytest.approx(27)
    assert next_pause(30, 0, 1) == pytest.approx(33)
