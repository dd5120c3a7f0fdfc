"""A name belongs to one root on a host: another root is refused, and takes nothing that is not its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from footprint import leftovers, sweep, wait_clean
from ground import Rootfs
from holdfast.drivers import Host
from holdfast.identity import PLACE, make_id
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SHOP = """
[containers.web]
image = "busybox:1"
init = true
command = "sleep 1000"
ports = ["127.0.0.1:{port}:80"]
"""


@pytest.fixture
def shop(agent: LiveAgent, free_port: Callable[[], int]) -> LiveAgent:
    """An agent with one container that runs, on a network and with a port."""
    agent.write("shop.toml", SHOP.format(port=free_port()))
    agent.converge()
    return agent


@pytest.fixture
def second(shop: LiveAgent, tmp_path: Path, busybox_rootfs: Rootfs) -> Iterator[LiveAgent]:
    """An agent.toml with the same name, another root and run root, and no state files. It is not started."""
    root = tmp_path / "second-root"
    host = replace(shop.host, root=root, run_root=tmp_path / "second-run", id="")
    made = LiveAgent(host, tmp_path / "second", busybox_rootfs)
    yield made
    made.stop()


def kernel(host: Host) -> list[str]:
    """What is on the host under the name, processes of agents and files aside."""
    return [line for line in leftovers(host) if not line.startswith(("file ", "process "))]


def agent_exit(agent: LiveAgent) -> tuple[int, str]:
    """What becomes of `holdfast agent` where it is refused."""
    done = agent.cli("agent", check=False)
    return done.returncode, done.stderr


def is_untouched(shop: LiveAgent, before: list[str], pid: int) -> None:
    assert kernel(shop.host) == before
    assert Path(f"/proc/{pid}").exists()


def test_a_second_root_with_the_name_of_a_running_agent_is_refused_and_both_places_are_named(
    shop: LiveAgent, second: LiveAgent
) -> None:
    before, pid = kernel(shop.host), shop.pid("shop/web")
    for done in (second.cli("apply", check=False), second.cli("agent", check=False)):
        assert done.returncode == 73, done.stderr
        assert str(shop.host.root) in done.stderr
        assert str(second.host.root) in done.stderr
    plan = second.cli("plan", check=False)
    assert plan.returncode == 1
    assert str(shop.host.root) in plan.stderr
    assert f"used by process {shop.process and shop.process.pid}" in second.status()["agent"]["note"]
    doctor = json.loads(second.cli("doctor", "--json", check=False).stdout)
    (check,) = (each for each in doctor if each["subject"] == "name")
    assert check["verdict"] == "bad"
    assert str(shop.host.root) in check["detail"]
    is_untouched(shop, before, pid)
    assert shop.converge()["converged"]
    assert shop.pid("shop/web") == pid


def test_a_name_stays_its_roots_while_containers_run_though_no_agent_does(shop: LiveAgent, second: LiveAgent) -> None:
    pid = shop.pid("shop/web")
    shop.kill()
    before = kernel(shop.host)
    for record in (True, False):  # what carries the id says the same as the record of the name
        if not record:
            (PLACE / shop.host.name).unlink()
        done = second.cli("apply", check=False)
        assert done.returncode == 73, done.stderr
        assert shop.host.id in done.stderr
        assert str(second.host.root) in done.stderr
        assert agent_exit(second)[0] == 73
        is_untouched(shop, before, pid)
    shop.start()
    shop.converge()
    assert shop.pid("shop/web") == pid


def test_an_agent_that_holds_another_root_refuses_every_request_before_it_does_anything(
    shop: LiveAgent, second: LiveAgent
) -> None:
    second.configure(more=f'socket = "{shop.host.run_root}/agent.sock"')
    pid = shop.pid("shop/web")
    for words in (
        ("stop", "shop/web"),
        ("sync",),
        ("apply",),
        ("status",),
        ("plan",),
        ("volume", "prune", "--force"),
    ):
        done = second.cli(*words, check=False)
        assert done.returncode == (1 if words == ("plan",) else 73), (words, done)
        assert str(shop.host.root) in done.stderr
        assert str(second.host.root) in done.stderr
    assert shop.pid("shop/web") == pid
    assert not shop.status()["drift"]


def test_a_root_that_is_found_by_another_path_is_still_the_same(shop: LiveAgent, tmp_path: Path) -> None:
    link = tmp_path / "by-a-link"
    link.symlink_to(shop.host.root)
    pid, plain = shop.pid("shop/web"), shop.config.read_text()
    shop.config.write_text(plain.replace(f'root = "{shop.host.root}"', f'root = "{link}"', 1))
    assert shop.status()["converged"]
    shop.restart()
    assert shop.converge()["converged"]
    assert shop.pid("shop/web") == pid


def test_a_copy_of_a_root_is_refused_while_the_first_has_containers(
    shop: LiveAgent, second: LiveAgent, tmp_path: Path
) -> None:
    pid = shop.pid("shop/web")
    shop.stop()
    before = kernel(shop.host)
    shutil.copytree(shop.host.root, second.host.root, symlinks=True)
    code, said = agent_exit(second)
    assert code == 73
    assert f"is a copy of '{shop.host.root}'" in said
    is_untouched(shop, before, pid)
    shop.start()
    shop.converge()
    assert shop.pid("shop/web") == pid


def test_a_root_keeps_its_name_and_its_run_root_while_it_has_containers(shop: LiveAgent, tmp_path: Path) -> None:
    pid, plain = shop.pid("shop/web"), shop.config.read_text()
    shop.stop()
    for old, new in ((f'name = "{shop.host.name}"', 'name = "other"'), (str(shop.host.run_root), f"{tmp_path}/run")):
        shop.config.write_text(plain.replace(old, new, 1))
        code, said = agent_exit(shop)
        assert code == 73, said
        assert f"netns {shop.host.name}-" in said
        assert Path(f"/proc/{pid}").exists()
    shop.config.write_text(plain)
    shop.start()
    shop.converge()
    assert shop.pid("shop/web") == pid


def test_what_bears_the_name_and_no_id_is_left_alone_and_told(shop: LiveAgent) -> None:
    name = shop.host.name
    table = f"table inet {name}"
    bridge = shop.host.link("bridge", "ghost/net")
    subprocess.run(["ip", "netns", "add", f"{name}-0123456789ab"], check=True)
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", bridge, "alias", "holdfast:0badcafe:network:ghost/net"], check=True)
    try:
        status = shop.converge()
        assert "does not say for which root" in status["foreign"]["netns 0123456789ab"]
        assert "the id 0badcafe" in status["foreign"]["network ghost/net"]
        assert json.loads(shop.cli("plan", "--json").stdout)["foreign"] == status["foreign"]
        assert "not ours" in shop.cli("status").stdout
        assert _told_by_doctor(shop) == "; ".join(f"{subject}: {why}" for subject, why in status["foreign"].items())
        assert {f"netns {name}-0123456789ab", f"link {bridge}"} <= set(kernel(shop.host))
        assert f"nft {table}" in kernel(shop.host)
    finally:
        subprocess.run(["ip", "netns", "delete", f"{name}-0123456789ab"], check=True)
        subprocess.run(["ip", "link", "delete", bridge], check=True)
    assert shop.converge()["foreign"] == {}
    assert _told_by_doctor(shop) == ""


def _told_by_doctor(agent: LiveAgent) -> str:
    checks = json.loads(agent.cli("doctor", "--json", check=False).stdout)
    return "; ".join(each["detail"] for each in checks if each["subject"] == "not ours")


def test_a_new_root_is_refused_where_an_earlier_version_left_things_without_an_id(
    new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    agent = new_agent(site)
    subprocess.run(["ip", "netns", "add", f"{site.name}-0123456789ab"], check=True)
    try:
        code, said = agent_exit(agent)
        assert code == 73
        assert "netns 0123456789ab" in said
    finally:
        subprocess.run(["ip", "netns", "delete", f"{site.name}-0123456789ab"], check=True)


def test_a_root_that_is_given_the_id_of_one_that_is_gone_takes_away_what_that_left(
    shop: LiveAgent, second: LiveAgent
) -> None:
    shop.kill()
    shop.process = None
    second.host.root.mkdir()
    (second.host.root / "id").write_text(f"{shop.host.id}\n")
    shutil.rmtree(shop.host.root / "images")  # it is gone, as far as that goes with what is mounted
    shop.host.root.rename(shop.host.root.with_name(f"{shop.host.root.name}.gone"))
    try:
        (PLACE / shop.host.name).unlink()
        second.start()
        second.sync()
        second.wait(lambda: not [line for line in kernel(shop.host) if "mount" not in line], "all of it is gone")
        second.stop()
    finally:
        shop.host.root.with_name(f"{shop.host.root.name}.gone").rename(shop.host.root)
        sweep(shop.host)


def test_commands_that_only_look_leave_nothing_in_a_fresh_root(
    new_site: Callable[[], Host], tmp_path: Path, busybox_rootfs: Rootfs
) -> None:
    site = new_site()
    fresh = replace(site, root=tmp_path / "fresh-root", run_root=tmp_path / "fresh-run")
    agent = LiveAgent(fresh, tmp_path / "fresh", busybox_rootfs)
    agent.write("shop.toml", SHOP.format(port=1))
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", "-b", "main", repository], check=True)
    for state in (None, f'{{ git = "{repository}" }}'):
        agent.configure(state=state)
        for words in (("status",), ("plan",), ("doctor",), ("volume", "list"), ("image", "list"), ("plugin", "list")):
            done = agent.cli(*words, check=False)
            assert "Traceback" not in done.stderr
            assert not fresh.root.exists(), words
            assert not fresh.run_root.exists(), words
            assert not (PLACE / fresh.name).exists(), words
    agent.configure()
    assert "shop" in agent.cli("plan", check=False).stdout


def test_the_name_is_free_once_the_last_container_is_gone(shop: LiveAgent, second: LiveAgent) -> None:
    shop.remove("shop.toml")
    shop.converge()
    shop.stop()
    assert not (PLACE / shop.host.name).exists()
    second.start()
    second.converge()
    second.stop()
    assert wait_clean(shop.host) == []


def test_containers_of_the_version_before_ids_survive_the_upgrade(shop: LiveAgent) -> None:
    """A root without an id, as the version before left it: instances are named without one, and marks are missing."""
    pid = shop.pid("shop/web")
    shop.stop()
    (shop.host.root / "id").unlink()
    (PLACE / shop.host.name).unlink()
    _make_old(shop.host)
    shop.start()
    assert shop.converge()["converged"]
    assert shop.pid("shop/web") == pid
    assert shop.status()["foreign"] == {}
    assert make_id(shop.host.root) != shop.host.id


def _make_old(host: Host) -> None:
    """Take the marks away that the version before did not make, from what is shared."""
    bridge = host.link("bridge", "shop/default")
    subprocess.run(["ip", "link", "set", bridge, "alias", "holdfast:network:shop/default"], check=True)
    assert Path(f"/sys/class/net/{bridge}").exists()
