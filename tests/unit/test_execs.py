"""exec: what runs beside a container's first process, and whether it can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import NoProgram, NotExecutable
from holdfast.runtime.execs import ExecWant, exec_process
from holdfast.runtime.inside import Inside
from holdfast.runtime.users import User

FIRST = {
    "args": ["serve"],
    "env": ["PATH=/bin", "HOME=/root", "A=1"],
    "cwd": "/",
    "user": {"uid": 0, "gid": 0, "additionalGids": [7]},
    "capabilities": {"bounding": ["CAP_CHOWN"]},
    "rlimits": [{"type": "RLIMIT_CORE"}],
}
ROOT = User()


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Inside]:
    handle = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield Inside(handle)
    os.close(handle)


def program(path: Path, content: bytes = Path("/bin/busybox").read_bytes()[:4096], mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_it_shares_limits_and_confinement_and_a_variable_is_replaced() -> None:
    made = exec_process(FIRST, ExecWant(argv=["id"], environment={"A": "2", "B": "3"}), None, home_is_set=False)
    assert (made["args"], made["user"], made["capabilities"], made["rlimits"]) == (
        ["id"],
        FIRST["user"],
        FIRST["capabilities"],
        FIRST["rlimits"],
    )
    assert made["env"] == ["PATH=/bin", "HOME=/root", "A=2", "B=3"]


def test_another_user_has_his_groups_and_home_unless_home_is_set() -> None:
    joe = User(5, 6, (7, 8), "/home/joe")
    made = exec_process(FIRST, ExecWant(argv=["id"], user="joe"), joe, home_is_set=False)
    assert made["user"] == {"uid": 5, "gid": 6, "additionalGids": [7, 8]}
    assert "HOME=/home/joe" in made["env"]
    assert "HOME=/root" in exec_process(FIRST, ExecWant(argv=["id"], user="joe"), joe, home_is_set=True)["env"]


def test_a_terminal_has_a_kind() -> None:
    assert "TERM=xterm" in exec_process(FIRST, ExecWant(argv=["sh"], tty=True), None, home_is_set=False)["env"]
    vt = ExecWant(argv=["sh"], tty=True, environment={"TERM": "vt100"})
    assert "TERM=vt100" in exec_process(FIRST, vt, None, home_is_set=False)["env"]
    assert not any(
        "TERM" in each for each in exec_process(FIRST, ExecWant(argv=["sh"]), None, home_is_set=False)["env"]
    )


def test_no_link_leads_out(look: Inside, tmp_path: Path) -> None:
    outside = program(tmp_path.parent / "secret", b"root:x:0:0::/:/bin/sh\n")
    (tmp_path / "etc").mkdir()
    for target in (str(outside), "../../../secret", "/proc/self/root/etc/passwd", "passwd"):
        link = tmp_path / "etc/passwd"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert look.read_file("/etc/passwd") is None


def test_nothing_but_a_regular_file_is_opened(look: Inside, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "passwd")
    assert look.read_file("/passwd") is None
    assert look.read_file("/") is None
    program(tmp_path / "file", b"x" * 100)
    assert look.read_file("/file", 10) == b"x" * 10


def test_a_program_is_found_through_links_and_path(look: Inside, tmp_path: Path) -> None:
    program(tmp_path / "usr/bin/tool")
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "usr/bin/abs").symlink_to("/bin/tool")
    for name in ("tool", "abs", "/bin/abs", "./usr/bin/tool"):
        look.check_program(name, "/sbin:/bin", "/", ROOT)


def test_what_is_not_there_is_told_from_what_can_not_be_run(look: Inside, tmp_path: Path) -> None:
    program(tmp_path / "bin/data", mode=0o644)
    program(tmp_path / "bin/mine", mode=0o700)
    program(tmp_path / "bin/text", b"hello\n")
    program(tmp_path / "bin/script", b"#!/bin/none -x\n")
    (tmp_path / "bin/folder").mkdir()
    nobody = User(65534, 65534)
    for words, user, kind in (
        ("nothere", ROOT, NoProgram),
        ("/bin/nothere", ROOT, NoProgram),
        ("/bin/data/x", ROOT, NoProgram),
        ("script", ROOT, NoProgram),
        ("data", ROOT, NotExecutable),
        ("/bin/folder", ROOT, NotExecutable),
        ("text", ROOT, NotExecutable),
        ("mine", nobody, NotExecutable),
    ):
        with pytest.raises(kind, match=f"exec '.*{words}': "):
            look.check_program(words, "/bin", "/", user)
    look.check_program("mine", "/bin", "/", ROOT)


def test_a_program_whose_linker_is_missing_can_not_be_run(look: Inside, tmp_path: Path) -> None:
    program(tmp_path / "bin/true", Path("/bin/true").read_bytes())
    with pytest.raises(NoProgram, match=r"needs '/lib.*', which is not there"):
        look.check_program("true", "/bin", "/", ROOT)
    program(tmp_path / "bin/busybox", Path("/bin/busybox").read_bytes())
    look.check_program("busybox", "/bin", "/", ROOT)
