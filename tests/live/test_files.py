"""What a container may write to below the run root, its hosts file and copies of files, is bounded and its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
stop_grace_period = "0s"
"""
WEB = f"""
[containers.web]{SLEEPER}
volumes = ["./folder:/folder"]
configs = [{{ source = "page", target = "/page", on_change = "none" }}]
[containers.old]{SLEEPER}
[configs.page]
file = "./page"
"""
MOST = 8 << 20  # bytes


def files_of(agent: LiveAgent, container: str) -> Path:
    return agent.host.files(agent.instances(container)[0]["id"])


def fill(agent: LiveAgent, container: str, target: str) -> None:
    """Write into a file until there is no room, as root in the container."""
    agent.exec(container, "sh", "-c", f"! dd if=/dev/zero of={target} bs=64k count=1000 && ! echo more >> {target}")


@pytest.fixture
def full(agent: LiveAgent) -> LiveAgent:
    """An agent with shop/web, which has filled all that it can write to outside of its own layer."""
    agent.write("folder/note", "hello")
    agent.write("page", "<p>one")
    agent.write("shop.toml", WEB)
    agent.converge()
    agent.exec("shop/web", "sh", "-c", ": > /etc/hosts")
    fill(agent, "shop/web", "/etc/hostname")
    agent.exec("shop/web", "sh", "-c", "i=0; while true > /folder/$i; do i=$((i+1)); done; ! mkdir /folder/more")
    return agent


def test_what_a_container_fills_is_small_and_not_the_run_root(full: LiveAgent) -> None:
    found = os.statvfs(files_of(full, "shop/web"))
    assert found.f_bavail == found.f_ffree == 0
    assert found.f_blocks * found.f_frsize < MOST
    mine = (path.lstat() for path in files_of(full, "shop/web").parent.iterdir() if path.is_file())
    assert sum(each.st_size for each in mine) < MOST
    for text in ("one", "two"):
        assert full.exec("shop/web", "echo", text) == f"{text}\n"
    fill(full, "shop/old", "/etc/resolv.conf")  # which had room


def test_a_container_that_filled_its_files_hears_of_new_neighbours_and_of_changed_files(full: LiveAgent) -> None:
    page = "<p>" + 5000 * "two "
    full.write("page", page)
    full.write("shop.toml", WEB + f"[containers.new]{SLEEPER}")
    full.converge()
    assert full.exec("shop/web", "cat", "/page") == page
    full.wait(lambda: "new" in full.exec("shop/web", "cat", "/etc/hosts"), "its hosts file says so")
    assert "localhost" in full.exec("shop/web", "cat", "/etc/hosts")
    assert os.statvfs(files_of(full, "shop/web")).f_blocks * 4096 < MOST


def test_a_restart_begins_with_files_that_are_as_they_should_be(full: LiveAgent) -> None:
    before = full.instances("shop/web")[0]
    full.cli("restart", "shop/web")
    full.wait(lambda: full.instances("shop/web")[0]["started_at"] != before["started_at"], "it is restarted")
    full.converge()
    assert full.instances("shop/web")[0]["id"] == before["id"]
    assert full.exec("shop/web", "sh", "-c", "cat /etc/hostname /page /folder/*") == "web\n<p>onehello"
    full.exec("shop/web", "sh", "-c", "echo 10.0.0.1 mine >> /etc/hosts && echo mine > /folder/mine")
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert points.count(str(files_of(full, "shop/web"))) == 1


def test_files_of_commands_do_not_pile_up(agent: LiveAgent) -> None:
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.converge()
    bundle = agent.host.instance(agent.instances("shop/web")[0]["id"])
    for number in range(3):
        agent.exec("shop/web", "echo", str(number))
        for each in bundle.glob("exec-*"):
            os.utime(each, (1, 1))  # long ago
    agent.exec("shop/web", "echo", "last")
    assert len([*bundle.glob("exec-*")]) == 1
    agent.remove("shop.toml")
    agent.converge()
    assert not bundle.exists()
