"""A git branch → Revision, against real repositories."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from holdfast.config import StateSource
from holdfast.errors import TryAgain, WrongState
from holdfast.source import make_source
from holdfast.source.directory import DirectorySource
from holdfast.source.git import GitSource
from holdfast.source.revision import MAX_BYTES
from repositories import Repository, fetched, mirror_of


def test_a_commit_becomes_a_revision(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    source = git_source()
    source.refresh()
    revision = source.current()
    assert revision.files == {"shop.toml": b"1", "nodes/edge/web.toml": b"1"}
    assert revision.id == repository.git("rev-parse", "HEAD")
    assert (revision.author, revision.message) == ("Ada <ada@example>", "Open the shop")
    assert revision.at is not None and abs(revision.at - time.time()) < 60
    assert json.loads(json.dumps(asdict(source.state())))["revision"] == revision.id


def test_only_the_folder_that_is_named_is_read(git_source: Callable[..., GitSource]) -> None:
    for path in ("nodes/edge", "/nodes/edge/", "./nodes/edge"):
        assert fetched(git_source(path=path)) == {"web.toml": b"1"}


def test_an_unmoved_branch_gives_the_same_object(git_source: Callable[..., GitSource]) -> None:
    source = git_source()
    source.refresh()
    before = source.current()
    source.refresh()
    assert source.current() is before


def test_a_moved_branch_is_followed(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    source = git_source()
    source.refresh()
    second = repository.commit("Raise", shop="2")
    assert source.current().files["shop.toml"] == b"1"
    assert fetched(source)["shop.toml"] == b"2"
    assert source.current().id == second


def test_nothing_is_current_before_the_first_fetch(git_source: Callable[..., GitSource]) -> None:
    with pytest.raises(TryAgain, match="not fetched yet"):
        git_source().current()


def test_a_branch_that_never_was_is_told(git_source: Callable[..., GitSource]) -> None:
    source = git_source(branch="release/2")
    with pytest.raises(TryAgain, match="there is no branch 'release/2'"):
        source.refresh()
    with pytest.raises(TryAgain, match="there is no branch 'release/2'"):
        source.current()


def test_a_removed_branch_keeps_what_runs(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    source = git_source()
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
    repository: Repository, git_source: Callable[..., GitSource]
) -> None:
    source = git_source(path="nodes/edge")
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
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = git_source()
    source.refresh()
    before = source.current()
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    for again in (source, source, git_source()):  # refused by a restarted agent, too
        with pytest.raises(TryAgain, match=r"history of branch 'main' was rewritten: .*what runs stays"):
            again.refresh()
        assert again.current().id == before.id
    source.refresh(accept_rewrite=True)
    assert source.current().message == "Forged"
    source.refresh()
    assert source.state().error == ""


def test_a_refused_tip_is_fetched_once(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path
) -> None:
    source = git_source()
    source.refresh()
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    with pytest.raises(TryAgain):
        source.refresh()
    ref = mirror_of(tmp_path) / "refs/holdfast/fetched"
    ref.unlink()
    with pytest.raises(TryAgain, match="rewritten"):
        source.refresh()
    assert not ref.exists()


def test_a_branch_put_back_where_it_was_is_well_again(
    repository: Repository, git_source: Callable[..., GitSource]
) -> None:
    source = git_source()
    source.refresh()
    good = repository.git("rev-parse", "HEAD")
    repository.git("commit", "--quiet", "--amend", "-m", "Forged")
    with pytest.raises(TryAgain):
        source.refresh()
    repository.git("reset", "--quiet", "--hard", good)
    source.refresh()
    assert (source.state().error, source.state().failures) == ("", 0)


def test_a_directory_source_and_a_git_source_give_the_same_files(
    repository: Repository, git_source: Callable[..., GitSource]
) -> None:
    for name in (".hidden.toml", "shop.toml~", ".htpasswd", "#shop.toml#"):
        (repository.path / name).write_text("x")
    (repository.path / "link").symlink_to("nodes")
    repository.commit("Add")
    source = git_source()
    revision = DirectorySource(repository.path).current()
    assert fetched(source) == dict(revision.files)
    assert source.current().ignored == revision.ignored - {".git"}
    assert {".hidden.toml", "shop.toml~"} <= revision.ignored


def test_programs_are_told_apart_links_to_them_included(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path
) -> None:
    script = repository.path / "web/run.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (repository.path / "start").symlink_to("web/run.sh")
    repository.commit("programs", data="plain")
    source = git_source()
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


def test_packed_refs_are_read(git_source: Callable[..., GitSource], tmp_path: Path) -> None:
    git_source().refresh()
    subprocess.run(["git", "-C", mirror_of(tmp_path), "gc", "--quiet"], check=True)
    assert not (mirror_of(tmp_path) / "refs/holdfast/current").exists()
    source = git_source()
    assert "shop.toml" in source.current().files
    source.refresh()


def test_links_are_followed_within_the_commit(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    edge = repository.path / "nodes/edge"
    (edge / "shop.toml").symlink_to("../../shop.toml")
    (edge / "all").symlink_to("../..")
    (edge / "out").symlink_to("../../../secret")
    (edge / "etc").symlink_to("/etc/passwd")
    (edge / "broken").symlink_to("nothing")
    repository.commit("Link")
    source = git_source(path="nodes/edge")
    files = fetched(source)
    assert files["shop.toml"] == b"1"
    assert files["all/shop.toml"] == b"1"
    assert not any(name.startswith("all/nodes/edge/") for name in files)
    assert set(source.current().left_out) == {"out", "etc", "broken", "all/nodes/edge"}


def test_the_folder_may_be_a_link(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    (repository.path / "here").symlink_to("nodes/edge")
    repository.commit("Link")
    assert fetched(git_source(path="here")) == {"web.toml": b"1"}


def test_submodules_and_lfs_pointers_are_left_out_and_told(
    repository: Repository, git_source: Callable[..., GitSource], tmp_path: Path
) -> None:
    library = Repository(tmp_path / "library")
    library.commit("Begin", lib="1")
    repository.git("submodule", "--quiet", "add", str(library.path), "library")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    (repository.path / "logo.png").write_text(pointer)
    repository.commit("Add")
    source = git_source()
    files = fetched(source)
    assert "logo.png" not in files and "shop.toml" in files
    assert "git submodule" in source.current().left_out["library"]
    assert "git LFS pointer" in source.current().left_out["logo.png"]


def test_odd_names_and_contents_survive(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    odd = {"a b\tc\nd.txt": b"\n\n", "ünï.txt": b"\0\xff", "empty": b"", 'quo"te': b"blob 1\n"}
    for name, content in odd.items():
        (repository.path / name).write_bytes(content)
    repository.commit("Be odd")
    files = fetched(git_source())
    assert {name: files[name] for name in odd} == odd


def test_a_commit_that_is_too_large_is_refused(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    source = git_source()
    source.refresh()
    with (repository.path / "image.tar").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    repository.commit("Add an image")
    with pytest.raises(WrongState, match="64 MiB of files"):
        source.refresh()
    assert source.current().message == "Open the shop"


def test_newest_shows_a_commit_before_it_is_accepted(
    repository: Repository, git_source: Callable[..., GitSource]
) -> None:
    source = git_source()
    source.refresh()
    first = source.current().id
    second = repository.commit("Paint it", shop="2")
    assert source.newest().id == second
    assert source.current().id == first
    source.refresh()
    assert source.current().id == second


def test_an_author_can_not_steer_a_terminal(repository: Repository, git_source: Callable[..., GitSource]) -> None:
    repository.commit("\x1b[2Jgone\x07", shop="2")
    source = git_source()
    source.refresh()
    assert source.current().message == "\N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}"
