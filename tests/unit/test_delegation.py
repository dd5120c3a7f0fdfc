"""Whose cgroup a host's containers are in, read from a tree of folders that looks like the kernel's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from holdfast.drivers import Host
from holdfast.runtime import cgroup, delegation
from holdfast.runtime.binaries import RuntimeBinary
from holdfast.runtime.conmon import Runtime


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose cgroup tree is a folder, with a v2 tree and systemd."""
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/cgroup.controllers").touch()
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(delegation, "BOOTED", tmp_path)
    place = delegation.place_of("holdfast")
    return Host("holdfast", tmp_path / "root", tmp_path / "run", cgroup_root=place)


def runtime_of(host: Host) -> Runtime:
    return Runtime(host, RuntimeBinary("crun", Path("/bin/true"), "1"), Path("/bin/true"))


def test_on_a_host_of_systemd_containers_live_below_a_service_that_is_not_the_agents(host: Host) -> None:
    assert host.cgroup == "/system.slice/holdfast-containers.service/holdfast"
    assert runtime_of(host).cgroup("abc") == f"{host.cgroup}/abc"


def test_without_systemd_and_with_cgroup_v1_the_tree_is_as_it_was(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delegation, "BOOTED", tmp_path / "none")
    assert delegation.place_of("holdfast") == ""
    monkeypatch.setattr(delegation, "BOOTED", tmp_path)
    (tmp_path / "cgroup/cgroup.controllers").unlink()
    assert delegation.place_of("holdfast") == ""
    assert Host("holdfast", tmp_path, tmp_path).cgroup == "/holdfast"


def test_a_container_of_an_earlier_version_is_found_where_it_runs(host: Host) -> None:
    (cgroup.ROOT / "holdfast/old").mkdir(parents=True)
    runtime = runtime_of(host)
    assert (runtime.cgroup("old"), runtime.cgroup("new")) == ("/holdfast/old", f"{host.cgroup}/new")
    assert host.cgroups == (host.cgroup, "/holdfast")


def test_a_container_of_an_earlier_version_moves_with_its_next_start(host: Host) -> None:
    for id in ("old", "other"):
        (cgroup.ROOT / "holdfast" / id).mkdir(parents=True)
    runtime = runtime_of(host)
    assert runtime.next_cgroup("old") == f"{host.cgroup}/old"
    runtime.leave_root("old")
    assert (runtime.cgroup("old"), runtime.cgroup("other")) == (f"{host.cgroup}/old", "/holdfast/other")
    runtime.leave_root("other")
    assert not (cgroup.ROOT / "holdfast").exists()


def test_what_the_runtime_keeps_for_itself_goes_with_the_last_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    runtime = runtime_of(Host("holdfast", tmp_path / "root", tmp_path / "run"))
    cached = runtime.root / ".cache/seccomp/0123"
    cached.parent.mkdir(parents=True)
    cached.touch()
    runtime.leave()
    assert list(runtime.root.iterdir()) == []


def test_a_place_that_is_kept_is_asked_for_no_second_time(host: Host) -> None:
    keeper = cgroup.ROOT / host.cgroup_root[1:] / "keeper"
    keeper.mkdir(parents=True)
    (keeper / "cgroup.procs").write_text(f"{os.getpid()}\n")
    delegation.ensure(host)
    assert delegation.keeps(host)


def test_what_an_earlier_version_left_empty_at_the_root_of_the_tree_goes_when_the_agent_starts(host: Host) -> None:
    keeper = cgroup.ROOT / host.cgroup_root[1:] / "keeper"
    keeper.mkdir(parents=True)
    (keeper / "cgroup.procs").write_text(f"{os.getpid()}\n")
    for id in ("ended", "running"):
        (cgroup.ROOT / "holdfast" / id).mkdir(parents=True)
    (cgroup.ROOT / "holdfast/running/process").mkdir()  # what the kernel refuses to remove
    runtime_of(host).settle()
    assert cgroup.children(cgroup.ROOT / "holdfast") == ["running"]


def test_what_was_moved_half_way_is_moved_to_its_leaf(host: Host) -> None:
    top = cgroup.ROOT / host.cgroup_root[1:]
    top.mkdir(parents=True)
    (top / "cgroup.procs").write_text("4711\n")
    (top / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    delegation.ensure(host)
    assert (top / "keeper/cgroup.procs").read_text() == "4711"


def test_a_conmon_is_moved_out_of_the_agents_unit_and_one_that_has_ended_is_not(host: Host) -> None:
    (cgroup.ROOT / host.cgroup_root[1:]).mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        delegation.adopt(host, sleeper.pid)
        assert (cgroup.ROOT / host.cgroup_root[1:] / "conmon/cgroup.procs").read_text() == str(sleeper.pid)
        sleeper.kill()
    (cgroup.ROOT / host.cgroup_root[1:] / "conmon/cgroup.procs").unlink()
    delegation.adopt(host, sleeper.pid)
    assert not (cgroup.ROOT / host.cgroup_root[1:] / "conmon/cgroup.procs").exists()


def test_what_a_runtime_hides_beside_its_containers_is_no_container(host: Host) -> None:
    runtime = runtime_of(host)
    for name in (".cache", "abc"):
        (runtime.root / name).mkdir(parents=True)
    assert runtime.state() == {"abc"}
