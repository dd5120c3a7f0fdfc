"""State that is committed to git, and state that people write into a directory."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from holdfast.drivers import Host
from holdfast.errors import TryAgain
from holdfast.source.git import GitSource
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""


class Remote:
    """A repository with a work tree, as whoever operates the node has one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *args: str) -> str:
        who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in WHO.items()}
        environment = {**os.environ, **who, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(
            ["git", "-C", self.place, *args], check=True, capture_output=True, text=True, env=environment
        ).stdout.strip()

    def commit(self, message: str, **files: str) -> str:
        """Write nodes/edge/NAME.toml for each file, commit, and return the commit's id."""
        for name, text in files.items():
            path = self.place / "nodes" / "edge" / f"{name}.toml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "--all")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")


WHO = {"NAME": "Ada", "EMAIL": "ada@example.org"}


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "remote")


@pytest.fixture
def follower(new_agent: Callable[[Host], LiveAgent], site: Host, remote: Remote) -> LiveAgent:
    """An agent that follows the folder nodes/edge of the remote's main, and was not started yet."""
    agent = new_agent(site)
    agent.configure(state=f'{{ git = {json.dumps(str(remote.place))}, path = "nodes/edge", interval = "300ms" }}')
    return agent


def test_a_commit_converges_by_itself_and_is_named(follower: LiveAgent, remote: Remote) -> None:
    first = remote.commit("Bring up the shop", shop=f"[containers.web]{SLEEPER}")
    (remote.place / "elsewhere.toml").write_text("not ours")
    follower.start()
    follower.image("busybox:1")
    status = follower.converge()
    assert status["revision"] == first
    assert (status["commit"]["author"], status["commit"]["message"]) == ("Ada <ada@example.org>", "Bring up the shop")
    assert "Bring up the shop" in follower.cli("status").stdout
    (event, *_) = [event for event in follower.events() if event["kind"] == "revision"]
    assert "Ada" in event["message"]
    assert event["revision"] == first
    second = remote.commit("Add a cache", cache=f"[containers.web]{SLEEPER}")
    status = follower.wait_until(lambda now: now["revision"] == second and bool(now["converged"]))
    assert set(status["apps"]) == {"shop", "cache"}
    assert status["apps"]["cache"]["revision"] == second


def test_what_runs_stays_whatever_becomes_of_the_remote(follower: LiveAgent, remote: Remote) -> None:
    first = remote.commit("One", shop=f"[containers.web]{SLEEPER}")
    follower.start()
    follower.image("busybox:1")
    follower.converge()
    pid = follower.pid("shop/web")

    def told(*words: str) -> str:
        """Wait until the source's error has one of the words; the container runs on, by the first commit."""
        status = follower.wait_until(lambda now: any(word in now["source"]["error"] for word in words))
        assert status["revision"] == first
        assert status["source"]["next_try_at"]
        assert follower.pid("shop/web") == pid
        failed = follower.cli("sync", check=False)
        assert failed.returncode in (os.EX_TEMPFAIL, os.EX_DATAERR), failed.stderr
        return str(status["source"]["error"])

    aside = remote.place.with_name("aside")
    remote.place.rename(aside)
    told("does not exist", "not found", "not appear")
    follower.restart()  # from what was fetched before
    assert follower.pid("shop/web") == pid
    told("does not exist", "not found", "not appear")
    aside.rename(remote.place)
    remote.git("branch", "-m", "main", "elsewhere")
    assert "main" in told("branch")
    remote.git("branch", "-m", "elsewhere", "main")
    follower.converge()

    remote.git("mv", "nodes/edge", "nodes/gone")
    remote.git("commit", "-q", "-m", "Move the node away")
    told("nodes/edge")
    remote.git("reset", "-q", "--hard", first)
    remote.git("commit", "-q", "--amend", "-m", "Another one")
    told("rewritten", "histor")
    follower.cli("sync", "--accept-rewrite")
    follower.wait_until(lambda now: now["commit"].get("message") == "Another one" and bool(now["converged"]))
    assert follower.pid("shop/web") == pid


def test_every_way_of_saving_a_file_in_the_directory_arrives(agent: LiveAgent) -> None:
    def arrives(count: int) -> None:
        agent.wait_until(
            lambda now: bool(now["converged"]) and sorted(now["apps"]) == [f"a{n}" for n in range(count)], timeout=20
        )

    text = f"[containers.web]{SLEEPER}"
    agent.write("a0.toml", text)
    arrives(1)
    (agent.state / ".a1.toml.swp").write_text("what an editor keeps")
    (agent.state / "a1.toml~").write_text("broken [")
    (agent.state / "a1.toml").write_text(text)  # in place, not by rename
    arrives(2)
    agent.write("deep/er/a2.toml", text)
    arrives(3)
    (agent.state / "deep/er/a2.toml").rename(agent.state / "deep" / "a2.toml")
    elsewhere = agent.home / "elsewhere"
    elsewhere.mkdir()
    for name in ("a0", "a1", "a2", "a3"):
        (elsewhere / f"{name}.toml").write_text(text)
    old = agent.state.rename(agent.home / "old")
    elsewhere.rename(agent.state)
    arrives(4)
    pids = [agent.pid(f"a{n}/web") for n in range(3)]
    for path in sorted(old.rglob("*.toml")):
        path.unlink()
    agent.remove("a3.toml")
    arrives(3)
    assert pids == [agent.pid(f"a{n}/web") for n in range(3)]


def test_a_link_that_is_flipped_to_another_release_arrives(
    new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    agent = new_agent(site)
    agent.configure(state=json.dumps(str(agent.home / "current")))
    for release, names in (("one", ["a"]), ("two", ["a", "b"])):
        for name in names:
            place = agent.home / release / f"{name}.toml"
            place.parent.mkdir(exist_ok=True)
            place.write_text(f"[containers.web]{SLEEPER}")
    link = agent.home / "current"
    link.symlink_to("one")
    agent.start()
    agent.image("busybox:1")
    agent.sync()
    agent.wait_until(lambda now: bool(now["converged"]) and set(now["apps"]) == {"a"})
    pid = agent.pid("a/web")
    fresh = agent.home / "fresh"
    fresh.symlink_to("two")
    fresh.replace(link)
    agent.wait_until(lambda now: bool(now["converged"]) and set(now["apps"]) == {"a", "b"})
    assert agent.pid("a/web") == pid


class Guarded(SimpleHTTPRequestHandler):
    """A repository for whoever has the password, and the command lines of this host while it is asked."""

    lines: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Basic {b64encode(b'user:s3cret of git').decode()}":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="here"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                self.lines.append(entry.read_bytes())
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_password_of_a_repository_is_in_no_command_line(remote: Remote, site: Host) -> None:
    tip = remote.commit("Open the shop", shop="[volumes.data]\n")
    remote.git("update-server-info")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(remote.place / ".git"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://user:s3cret%20of%20git@127.0.0.1:{server.server_port}/"
        source = GitSource(url, site.root)
        source.refresh()
        assert source.current().id == tip
        wrong = GitSource(url.replace("user", "nobody"), site.root)
        with pytest.raises(TryAgain) as caught:
            wrong.refresh()
        server.shutdown()
    assert any(b"git" in line for line in Guarded.lines)
    assert not [line for line in Guarded.lines if b"s3cret" in line]
    assert "s3cret" not in str(caught.value)
    assert not [path for path in site.root.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
