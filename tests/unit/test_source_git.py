"""A git branch → Revision, against real repositories and a real git daemon on the loopback."""

from __future__ import annotations

import http.server
import json
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
from dataclasses import asdict
from pathlib import Path

import pytest

from ground import wait_for
from holdfast.config import StateSource
from holdfast.errors import TryAgain, UnfitHost, WrongConfig, WrongState
from holdfast.source import make_source
from holdfast.source.directory import DirectorySource
from holdfast.source.git import GitSource, next_pause
from holdfast.source.gitcommand import redact, telling_line
from holdfast.source.revision import MAX_BYTES


class Repository:
    """A work tree with a branch main, as somebody who commits has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        settings = ("-c", "user.name=Ada", "-c", "user.email=ada@example", "-c", "protocol.file.allow=always")
        command = ["git", "-C", str(self.path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str, **files: str | None) -> str:
        for name, content in files.items():
            path = self.path / (name.replace("__", "/") + ".toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "repository")
    repository.commit("Open the shop\n\nAt last.", shop="1", nodes__edge__web="1")
    return repository


@pytest.fixture
def make(repository: Repository, tmp_path: Path) -> Callable[..., GitSource]:
    def make(url: str = str(repository.path), **settings: object) -> GitSource:
        return GitSource(url, tmp_path / "root", **settings)  # type: ignore[arg-type]

    return make


def fetched(source: GitSource) -> dict[str, bytes]:
    source.refresh()
    return dict(source.current().files)


def mirror_of(tmp_path: Path) -> Path:
    (mirror,) = (tmp_path / "root/source").glob("*.git")
    return mirror


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


def test_a_commit_becomes_a_revision(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    revision = source.current()
    assert revision.files == {"shop.toml": b"1", "nodes/edge/web.toml": b"1"}
    assert revision.id == repository.git("rev-parse", "HEAD")
    assert (revision.author, revision.message) == ("Ada <ada@example>", "Open the shop")
    assert revision.at is not None and abs(revision.at - time.time()) < 60
    assert json.loads(json.dumps(asdict(source.state())))["revision"] == revision.id


def test_only_the_folder_that_is_named_is_read(make: Callable[..., GitSource]) -> None:
    for path in ("nodes/edge", "/nodes/edge/", "./nodes/edge"):
        assert fetched(make(path=path)) == {"web.toml": b"1"}


def test_an_unmoved_branch_gives_the_same_object(make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    before = source.current()
    source.refresh()
    assert source.current() is before


def test_a_moved_branch_is_followed(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    second = repository.commit("Raise", shop="2")
    assert source.current().files["shop.toml"] == b"1"
    assert fetched(source)["shop.toml"] == b"2"
    assert source.current().id == second


def test_nothing_is_current_before_the_first_fetch(make: Callable[..., GitSource]) -> None:
    with pytest.raises(TryAgain, match="not fetched yet"):
        make().current()


def test_a_branch_that_never_was_is_told(make: Callable[..., GitSource]) -> None:
    source = make(branch="release/2")
    with pytest.raises(TryAgain, match="there is no branch 'release/2'"):
        source.refresh()
    with pytest.raises(TryAgain, match="there is no branch 'release/2'"):
        source.current()


def test_a_removed_branch_keeps_what_runs(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    before = source.current()
    repository.git("branch", "-m", "main", "trunk")
    with pytest.raises(TryAgain, match="branch 'main' is gone: what runs stays"):
        source.refresh()
    assert source.current() is before
    repository.git("branch", "-m", "trunk", "main")
    source.refresh()
    assert source.state().error == ""


def test_a_removed_folder_keeps_what_runs_until_it_is_back(
    repository: Repository, make: Callable[..., GitSource]
) -> None:
    source = make(path="nodes/edge")
    source.refresh()
    before = source.current()
    repository.commit("Tidy up", nodes__edge__web=None)
    for _ in range(2):
        with pytest.raises(
            WrongState, match=r"folder 'nodes/edge' is not in commit \w{10} \(Tidy up\): what runs stays"
        ):
            source.refresh()
        assert source.current() is before
    assert source.state().failures == 2
    repository.commit("Bring it back", nodes__edge__web="2")
    assert fetched(source) == {"web.toml": b"2"}


def test_a_rewritten_history_is_refused_until_somebody_agrees(
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = make()
    source.refresh()
    before = source.current()
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    for again in (source, source, make()):  # refused by a restarted agent, too
        with pytest.raises(TryAgain, match=r"history of branch 'main' was rewritten: .*what runs stays"):
            again.refresh()
        assert again.current().id == before.id
    source.refresh(accept_rewrite=True)
    assert source.current().message == "Forged"
    source.refresh()
    assert source.state().error == ""


def test_a_refused_tip_is_fetched_once(
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = make()
    source.refresh()
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    with pytest.raises(TryAgain):
        source.refresh()
    ref = mirror_of(tmp_path) / "refs/holdfast/fetched"
    ref.unlink()
    with pytest.raises(TryAgain, match="rewritten"):
        source.refresh()
    assert not ref.exists()


def test_a_branch_put_back_where_it_was_is_well_again(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    good = repository.git("rev-parse", "HEAD")
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    with pytest.raises(TryAgain):
        source.refresh()
    repository.git("reset", "--quiet", "--hard", good)
    source.refresh()
    assert (source.state().error, source.state().failures) == ("", 0)


def test_the_remote_may_go_and_come(repository: Repository, make: Callable[..., GitSource], daemon: Daemon) -> None:
    url = f"git://127.0.0.1:{daemon.port}/repository"
    source = make(url)
    assert fetched(source)["shop.toml"] == b"1"
    before = source.current()
    daemon.stop()
    with pytest.raises(TryAgain, match=r"can't be fetched: .*[Cc]onnection refused"):
        source.refresh()
    assert source.current() is before
    restarted = make(url)
    with pytest.raises(TryAgain):
        restarted.refresh()
    assert restarted.current().files == before.files  # the last accepted commit outlives the agent
    repository.commit("Meanwhile", shop="2")
    daemon.start()
    assert fetched(restarted)["shop.toml"] == b"2"
    assert fetched(source)["shop.toml"] == b"2"


def test_a_remote_that_hangs_is_given_up(make: Callable[..., GitSource]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        source = make(f"git://127.0.0.1:{silent.getsockname()[1]}/repository", timeout=0.2)
        with pytest.raises(TryAgain, match=r"run 'git ls-remote': no end after 0.2 s"):
            source.refresh()


def test_closing_a_watch_does_not_wait_for_a_remote_that_hangs(make: Callable[..., GitSource]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        watch = make(f"git://127.0.0.1:{silent.getsockname()[1]}/repository").watch(lambda reason: None)
        connection, _ = silent.accept()
        begin = time.monotonic()
        watch.close()
        assert time.monotonic() - begin < 30, "it does not wait for an answer"
        connection.close()


def test_a_server_that_refuses_is_told_apart(make: Callable[..., GitSource]) -> None:
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
            with pytest.raises(TryAgain, match="access refused: could not read Username"):
                make(f"http://127.0.0.1:{server.server_port}/x.git").refresh()
            with pytest.raises(TryAgain, match="access refused: Authentication failed for 'http://127"):
                make(f"http://me:s3cret@127.0.0.1:{server.server_port}/x.git").refresh()
        finally:
            server.shutdown()
            thread.join()


def test_a_directory_source_and_a_git_source_give_the_same_files(
    repository: Repository, make: Callable[..., GitSource]
) -> None:
    for name in (".hidden.toml", "shop.toml~", ".htpasswd", "#shop.toml#"):
        (repository.path / name).write_text("x")
    (repository.path / "link").symlink_to("nodes")
    repository.commit("Add")
    source = make()
    revision = DirectorySource(repository.path).current()
    assert fetched(source) == dict(revision.files)
    assert source.current().ignored == revision.ignored - {".git"}
    assert {".hidden.toml", "shop.toml~"} <= revision.ignored


def test_programs_are_told_apart_links_to_them_included(
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path
) -> None:
    script = repository.path / "web/run.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (repository.path / "start").symlink_to("web/run.sh")
    repository.commit("programs", data="plain")
    source = make()
    source.refresh()
    assert source.current().executable == {"web/run.sh", "start"}
    repository.git("clone", "--quiet", str(repository.path), str(tmp_path / "clone"))
    assert DirectorySource(tmp_path / "clone").current().executable == {"web/run.sh", "start"}


def test_the_settings_choose_the_kind_of_source(repository: Repository, tmp_path: Path) -> None:
    directory = make_source(StateSource(directory=repository.path), tmp_path / "root")
    assert directory.state().kind == "directory"
    settings = StateSource(git=str(repository.path), branch="main", path="nodes", interval=5)
    source = make_source(settings, tmp_path / "root")
    source.refresh()
    assert source.current().files == {"edge/web.toml": b"1"}
    assert source.state().kind == "git"


def test_two_agents_do_not_write_to_one_mirror_at_once(make: Callable[..., GitSource]) -> None:
    source, other = make(), make()
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
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path, fetches: subprocess.Popen[bytes]
) -> None:
    (repository.path / "blob.bin").write_bytes(os.urandom(300_000))
    source = make()
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
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = make()
    source.refresh()
    mirror = mirror_of(tmp_path)
    for name in ("refs/holdfast/fetched.lock", "refs/holdfast/current.lock", "config.lock", "packed-refs.lock"):
        (mirror / name).touch()
    (mirror / "objects/pack/tmp_pack_x").touch()
    repository.commit("Raise", shop="2")
    assert fetched(source)["shop.toml"] == b"2"
    assert not list(mirror.rglob("*.lock")) and not list(mirror.rglob("tmp_*"))


def test_a_mirror_half_made_is_completed(make: Callable[..., GitSource], tmp_path: Path) -> None:
    source = make()
    source.refresh()
    mirror = mirror_of(tmp_path)
    shutil.rmtree(mirror)
    (mirror / "refs").mkdir(parents=True)
    assert "shop.toml" in fetched(make())


def test_packed_refs_are_read(make: Callable[..., GitSource], tmp_path: Path) -> None:
    make().refresh()
    subprocess.run(["git", "-C", mirror_of(tmp_path), "gc", "--quiet"], check=True)
    assert not (mirror_of(tmp_path) / "refs/holdfast/current").exists()
    source = make()
    assert "shop.toml" in source.current().files
    source.refresh()


def test_links_are_followed_within_the_commit(repository: Repository, make: Callable[..., GitSource]) -> None:
    edge = repository.path / "nodes/edge"
    (edge / "shop.toml").symlink_to("../../shop.toml")
    (edge / "all").symlink_to("../..")
    (edge / "out").symlink_to("../../../secret")
    (edge / "etc").symlink_to("/etc/passwd")
    (edge / "broken").symlink_to("nothing")
    repository.commit("Link")
    source = make(path="nodes/edge")
    files = fetched(source)
    assert files["shop.toml"] == b"1"
    assert files["all/shop.toml"] == b"1"
    assert not any(name.startswith("all/nodes/edge/") for name in files)
    assert set(source.current().left_out) == {"out", "etc", "broken", "all/nodes/edge"}


def test_the_folder_may_be_a_link(repository: Repository, make: Callable[..., GitSource]) -> None:
    (repository.path / "here").symlink_to("nodes/edge")
    repository.commit("Link")
    assert fetched(make(path="here")) == {"web.toml": b"1"}


def test_submodules_and_lfs_pointers_are_left_out_and_told(
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path
) -> None:
    library = Repository(tmp_path / "library")
    library.commit("Begin", lib="1")
    repository.git("submodule", "--quiet", "add", str(library.path), "library")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    (repository.path / "logo.png").write_text(pointer)
    repository.commit("Add")
    source = make()
    files = fetched(source)
    assert "logo.png" not in files and "shop.toml" in files
    assert "git submodule" in source.current().left_out["library"]
    assert "git LFS pointer" in source.current().left_out["logo.png"]


def test_odd_names_and_contents_survive(repository: Repository, make: Callable[..., GitSource]) -> None:
    odd = {"a b\tc\nd.txt": b"\n\n", "ünï.txt": b"\0\xff", "empty": b"", 'quo"te': b"blob 1\n"}
    for name, content in odd.items():
        (repository.path / name).write_bytes(content)
    repository.commit("Be odd")
    files = fetched(make())
    assert {name: files[name] for name in odd} == odd


def test_a_commit_that_is_too_large_is_refused(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    with (repository.path / "image.tar").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    repository.commit("Add an image")
    with pytest.raises(WrongState, match="64 MiB of files"):
        source.refresh()
    assert source.current().message == "Open the shop"


def test_nothing_of_the_environment_leads_astray(
    repository: Repository, make: Callable[..., GitSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert "shop.toml" in fetched(make())
    assert not marker.exists()


def test_commands_in_the_url_are_not_run(make: Callable[..., GitSource], tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="not allowed"):
        make(f"ext::touch {tmp_path}/run").refresh()
    with pytest.raises(WrongConfig):
        make("--upload-pack=touch run")
    with pytest.raises(WrongConfig):
        make(branch="-x")
    assert not (tmp_path / "run").exists()


def test_passwords_are_never_shown(make: Callable[..., GitSource]) -> None:
    source = make("http://me:s3cret@127.0.0.1:1/x.git")
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


def test_a_host_without_git_is_told(make: Callable[..., GitSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnfitHost, match="install the package git"):
        make().refresh()


def test_a_poll_wakes_when_the_branch_moved_and_when_it_fails(
    repository: Repository, make: Callable[..., GitSource]
) -> None:
    source, woken, reasons = make(interval=0.01), threading.Event(), []

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


def test_a_poke_polls_at_once(repository: Repository, make: Callable[..., GitSource]) -> None:
    source, reasons = make(interval=3600), list[str]()
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


def test_newest_shows_a_commit_before_it_is_accepted(repository: Repository, make: Callable[..., GitSource]) -> None:
    source = make()
    source.refresh()
    first = source.current().id
    second = repository.commit("Paint it", shop="2")
    assert source.newest().id == second
    assert source.current().id == first
    source.refresh()
    assert source.current().id == second


def test_an_author_can_not_steer_a_terminal(repository: Repository, make: Callable[..., GitSource]) -> None:
    repository.commit("\x1b[2Jgone\x07", shop="2")
    source = make()
    source.refresh()
    assert source.current().message == "\N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}"
