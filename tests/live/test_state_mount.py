"""A state directory whose file system is not mounted any more is not taken for an empty one."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from holdfast.config import StateSource
from holdfast.drivers import Host
from holdfast.errors import TryAgain
from holdfast.source import known_of, make_source
from live.agent import LiveAgent
from live.mounts import Mounts

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(400)]

WEB = """
[containers.web]
image = "busybox:1"
command = ["sleep", "10000"]
restart = "always"
stop_grace_period = "0s"
networks = ["none"]
"""


@pytest.fixture
def state(tmp_path: Path, mounts: Mounts) -> Path:
    """A state directory with one app, below a mount."""
    point = tmp_path / "usb"
    point.mkdir()
    mounts.tmpfs(point)
    folder = point / "state"
    folder.mkdir()
    (folder / "shop.toml").write_text(WEB)
    return folder


class Reader:
    """Reads a state directory, as one agent after another does; what they remember is kept as JSON."""

    def __init__(self, path: Path) -> None:
        self._state, self._kept = StateSource(directory=path), "null"
        self.again()

    def again(self) -> None:
        self._source = make_source(self._state, Path("/nowhere"), known=json.loads(self._kept))

    def files(self) -> set[str]:
        revision = self._source.current()
        self._kept = json.dumps(known_of(revision))
        return set(revision.files)

    def left_out(self) -> dict[str, str]:
        return dict(self._source.current().left_out)


@pytest.fixture(params=["the same agent", "the next agent"])
def reader(request: pytest.FixtureRequest) -> Callable[[Path], Reader]:
    """Make readers that have read a directory; each look after that is by the same process or by another."""

    def make(path: Path) -> Reader:
        reader = Reader(path)
        assert reader.files() == {"shop.toml"}
        if request.param == "the next agent":
            reader.again()
        return reader

    return make


Make = Callable[[Path], Reader]


def test_a_directory_that_went_with_its_mount_is_missing_and_not_empty(
    reader: Make, state: Path, mounts: Mounts
) -> None:
    reads = reader(state)
    mounts.gone(state.parent)
    with pytest.raises(TryAgain, match=r"no such directory, and .*/usb is not mounted any more \(it was disk\)"):
        reads.files()
    state.mkdir()
    (state / "README").write_text("mount the USB disk here\n")
    with pytest.raises(TryAgain, match=r"no state file, and .*/usb is not mounted any more .* empty vars.toml"):
        reads.files()
    state.joinpath("README").unlink()
    state.rmdir()
    mounts.tmpfs(state.parent)
    state.mkdir()
    (state / "shop.toml").write_text(WEB)
    assert reads.files() == {"shop.toml"}


def test_an_empty_file_system_over_the_directory_or_in_its_place_is_told(
    reader: Make, state: Path, mounts: Mounts
) -> None:
    reads = reader(state)
    mounts.tmpfs(state, "new")
    with pytest.raises(TryAgain, match=r"it lies on new at .*/usb/state and not on disk at .*/usb any more"):
        reads.files()
    mounts.gone(state)
    assert reads.files() == {"shop.toml"}
    mounts.gone(state.parent)
    mounts.tmpfs(state.parent, "other")
    state.mkdir()
    with pytest.raises(TryAgain, match="it lies on other at"):
        reads.files()


def test_a_bind_mount_that_went_or_became_another_folder_is_told(
    reader: Make, tmp_path: Path, mounts: Mounts
) -> None:
    state, full, empty = (tmp_path / name for name in ("state", "full", "empty"))
    for folder in (state, full, empty):
        folder.mkdir()
    (full / "shop.toml").write_text(WEB)
    mounts.bind(full, state)
    reads = reader(state)
    mounts.gone(state)
    with pytest.raises(TryAgain, match="/state is not mounted any more"):
        reads.files()
    mounts.bind(empty, state)
    with pytest.raises(TryAgain, match=r"it lies on .*/empty\] at .*/state and not on .*/full\]"):
        reads.files()


def test_a_directory_that_somebody_empties_is_empty(reader: Make, state: Path, mounts: Mounts) -> None:
    reads = reader(state)
    (state / "shop.toml").unlink()
    assert reads.files() == set()
    mounts.gone(state.parent)  # nothing is lost by that
    state.mkdir()
    assert reads.files() == set()


def test_a_state_that_moves_off_its_mount_is_read_from_where_it_is(reader: Make, state: Path, mounts: Mounts) -> None:
    reads = reader(state)
    mounts.gone(state.parent)
    state.mkdir()
    (state / "vars.toml").write_text("")  # as the message says
    assert reads.files() == {"vars.toml"}
    (state / "vars.toml").unlink()
    assert reads.files() == set()


def test_a_folder_of_the_state_that_went_with_its_mount_counts_as_left_out(
    reader: Make, tmp_path: Path, mounts: Mounts
) -> None:
    state, inner = tmp_path / "state", tmp_path / "state/apps"
    inner.mkdir(parents=True)
    (state / "shop.toml").write_text(WEB)
    reads = reader(state)
    mounts.tmpfs(inner, "apps")
    (inner / "blog.toml").write_text(WEB)
    assert reads.files() == {"shop.toml", "apps/blog.toml"}
    reads.again()
    mounts.gone(inner)
    for _ in range(2):  # it stays known as long as it is gone
        assert reads.files() == {"shop.toml"}
        assert "apps is not mounted any more" in reads.left_out()["apps"]
        reads.again()
    mounts.tmpfs(inner, "apps")
    (inner / "blog.toml").write_text(WEB)
    assert (reads.files(), reads.left_out()) == ({"shop.toml", "apps/blog.toml"}, {})


def test_an_empty_directory_is_not_believed_after_an_upgrade(
    new_agent: Callable[[Host], LiveAgent], site: Host, state: Path, mounts: Mounts
) -> None:
    agent = new_agent(site)
    agent.configure(state=json.dumps(str(state)))
    agent.start()
    agent.image("busybox:1")
    agent.converge()
    pid = agent.pid("shop/web")
    agent.stop()
    with closing(sqlite3.connect(site.root / "state.db")) as database, database:
        assert database.execute("DELETE FROM facts WHERE name = 'source'").rowcount == 1
    mounts.gone(state.parent)
    state.mkdir()
    agent.start()
    agent.sync()
    assert "not known on which file system it lay" in agent.status()["source"]["error"]
    assert agent.pid("shop/web") == pid
    (state / "vars.toml").write_text("")
    agent.wait(lambda: not agent.instances("shop/web"), "it is believed to be meant")


def test_what_runs_stays_when_the_state_goes_with_its_mount(
    new_agent: Callable[[Host], LiveAgent], site: Host, state: Path, mounts: Mounts
) -> None:
    agent = new_agent(site)
    agent.configure(state=json.dumps(str(state)))
    agent.start()
    agent.image("busybox:1")
    agent.converge()
    pid, told = agent.pid("shop/web"), f"{state.parent} is not mounted any more"

    def says(*command: str, exits: int = 0) -> bool:
        done = agent.cli(*command, check=False)
        return done.returncode == exits and told in " ".join(done.stdout.split())

    mounts.gone(state.parent)
    state.mkdir()
    agent.sync()
    assert agent.pid("shop/web") == pid
    agent.restart()  # as after a boot, before the mount
    agent.sync()
    assert agent.pid("shop/web") == pid
    assert says("status")
    assert says("plan", exits=1)
    assert says("doctor")
    assert told in [event["message"] for event in agent.events() if event["subject"] == "source"][-1]
    agent.stop()
    assert says("status")
    assert says("doctor")
    applied = agent.cli("apply", "--timeout", "5", check=False)
    assert applied.returncode != 0
    assert told in " ".join((applied.stdout + applied.stderr).split())
    assert agent.pid("shop/web") == pid

    agent.start()
    mounts.tmpfs(state.parent)
    state.mkdir()
    (state / "shop.toml").write_text(WEB + 'environment = { A = "1" }\n')
    agent.wait(
        lambda: [each["generation"] for each in agent.instances("shop/web")] == [2], "the mount is seen by itself"
    )
    (state / "shop.toml").unlink()
    agent.wait(lambda: not agent.instances("shop/web"), "and so is what changes in it", timeout=15)


def test_a_state_directory_that_does_not_answer_holds_up_nothing_else(
    new_agent: Callable[[Host], LiveAgent], site: Host, state: Path, hang: Callable[[Path], None]
) -> None:
    agent = new_agent(site)
    agent.configure(state=json.dumps(str(state)))
    agent.start()
    agent.image("busybox:1")
    agent.converge()
    hang(state.parent)

    def started_again(former: int) -> bool:
        return [each["pid"] not in (None, former) for each in agent.instances("shop/web")] == [True]

    for _ in ("with the state in memory", "after a restart"):
        before = agent.pid("shop/web")
        os.kill(before, signal.SIGKILL)
        agent.wait(partial(started_again, before), "it is started again")
        agent.wait(lambda: "has not answered since" in agent.status()["source"]["error"], "status says so")
        agent.restart()
