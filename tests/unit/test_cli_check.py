"""`holdfast check` and `holdfast doctor`: what they find wrong, and what they leave alone."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli.checkup import overlay
from paper import Run


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
