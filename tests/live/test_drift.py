"""What was altered by hand is found and put right, with the reason in the event log."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from footprint import links, netns, tables
from holdfast.runtime.binaries import find_runtime
from live.agent import LiveAgent
from live.test_converge import memory_limit

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

WEB = """
[containers.web]
image = "busybox:1"
init = true
cap_add = ["NET_RAW"]  # for ping
command = "sleep 1000"
ports = ["127.0.0.1:{port}:80"]
restart = "always"
resources.memory = "64MiB"
[containers.other]
image = "busybox:1"
init = true
cap_add = ["NET_RAW"]
command = "sleep 1000"
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def reasons(agent: LiveAgent, since: int) -> str:
    return "\n".join(event["message"] for event in agent.events() if event["seq"] > since)


@pytest.fixture
def shop(agent: LiveAgent, free_port: Callable[[], int]) -> LiveAgent:
    agent.write("shop.toml", WEB.format(port=free_port()))
    agent.converge()
    return agent


def ping(agent: LiveAgent) -> None:
    """Wait until the containers reach each other by name."""
    words = ("exec", "shop/web", "ping", "-c", "1", "-W", "1", "other")
    agent.wait(lambda: agent.cli(*words, check=False).returncode == 0, "they reach each other")


def test_what_can_be_mended_under_a_running_container_is(shop: LiveAgent) -> None:
    pid = shop.pid("shop/web")
    ping(shop)

    mark = shop.events()[-1]["seq"]
    for family, table in tables(shop.host):
        run("nft", "delete", "table", family, table)
    shop.converge()
    assert tables(shop.host)
    shop.wait(lambda: "was altered" in reasons(shop, mark), "it is told, after the table is back")

    mark = shop.events()[-1]["seq"]
    _limit(shop, "memory.limit_in_bytes", "memory.max").write_text(str(48 << 20))
    shop.converge()
    assert memory_limit(pid) == 64 << 20
    assert "was altered" in reasons(shop, mark)

    mark = shop.events()[-1]["seq"]
    (space,) = [path for path in netns(shop.host) if shop.instances("shop/web")[0]["id"] in path.name]
    run("umount", space)
    space.unlink()
    shop.converge()
    assert space.exists()
    assert "its network namespace was unbound" in reasons(shop, mark)

    mark = shop.events()[-1]["seq"]
    for link in links(shop.host):
        if (link / "brport").exists():
            run("ip", "link", "delete", link.name)
    shop.converge()
    assert "its link to network shop/default was removed or altered" in reasons(shop, mark)
    ping(shop)

    mark = shop.events()[-1]["seq"]
    (bridge,) = [link for link in links(shop.host) if (link / "bridge").exists()]
    run("ip", "link", "delete", bridge.name)
    shop.converge()
    assert "it was removed or altered" in reasons(shop, mark)
    ping(shop)
    assert shop.pid("shop/web") == pid


def test_what_only_a_new_start_mends_is_started_anew(shop: LiveAgent) -> None:
    other, instance = shop.pid("shop/other"), shop.instances("shop/web")[0]
    root = f"{shop.host.run_root}/runtime"
    program = str(find_runtime("auto").path)

    mark = shop.events()[-1]["seq"]
    states = [path.parent for path in shop.host.run_root.rglob("state.json")]
    assert states, root
    run(program, "--root", states[0].parent, "kill", instance["id"], "KILL")
    shop.wait(
        lambda: shop.instances("shop/web")[0]["pid"] not in (None, instance["pid"]), "it runs again", timeout=30
    )
    assert "killed" in reasons(shop, mark) or "signal" in reasons(shop, mark)

    pid = shop.pid("shop/web")
    run(program, "--root", states[0].parent, "delete", "--force", instance["id"])
    shop.wait(lambda: shop.instances("shop/web")[0]["pid"] not in (None, pid), "it runs again", timeout=30)

    mark, pid = shop.events()[-1]["seq"], shop.pid("shop/web")
    mount = Path(shop.host.run_root) / "instances" / instance["id"] / "rootfs"
    assert os.path.ismount(mount)
    run("umount", "--lazy", mount)
    shop.converge()
    assert shop.pid("shop/web") != pid
    assert "its root file system is not mounted any more" in reasons(shop, mark)
    assert shop.exec("shop/web", "cat", "/etc/hostname").strip() == "web"
    assert shop.pid("shop/other") == other


TRUTH = """
[containers.web]
image = "busybox:1"
init = true
command = "sleep 1000"
ports = ["127.0.0.1:{port}:80", "{other}:81/udp"]
resources.memory = "64MiB"
resources.cpus = 0.5
resources.pids = 100
"""


def test_limits_and_ports_are_shown_as_the_kernel_has_them_with_and_without_an_agent(
    agent: LiveAgent, free_port: Callable[[], int]
) -> None:
    agent.stop()
    agent.configure(more='full_pass_interval = "1h"')  # nothing is mended meanwhile
    agent.start()
    port, other = free_port(), free_port()
    agent.write("shop.toml", TRUTH.format(port=port, other=other))
    agent.converge()
    asked = [f"127.0.0.1:{port}:80/tcp", f"{other}:81/udp"]

    def seen(*command: str) -> Any:
        return json.loads(agent.cli(*command, "--json").stdout)

    def web() -> Any:
        return seen("status")["apps"]["shop"]["containers"]["web"]

    def words(*command: str) -> str:
        return " ".join(agent.cli(*command).stdout.split())

    limits = {"memory": 64 << 20, "memory_swap": None, "cpus": 0.5, "pids": 100}
    shown = web()["instances"][0]["limits"]
    assert (web()["ports"], web()["published"]) == (asked, asked)
    assert shown["asked"] == limits
    assert shown["observed"] | {"memory_swap": None} == limits  # whether swap is counted is the kernel's matter

    _limit(agent, "memory.limit_in_bytes", "memory.max").write_text(str(48 << 20))
    for found in (seen("stats")[0], seen("inspect", "shop/web")["instances"][0]):
        assert found["limits"]["asked"] == limits
        assert found["limits"]["observed"]["memory"] == 48 << 20
    assert "/ 48MiB (asked 64MiB)" in words("stats")

    agent.stop()
    run("nft", "delete", "element", "inet", agent.host.name, "bound", f"{{ tcp . 127.0.0.1 . {port} }}")
    assert (web()["ports"], web()["published"]) == (asked, asked[1:])
    assert seen("inspect", "shop/web")["instances"][0]["published"] == asked[1:]
    assert f"{other}:81/udp (asked 127.0.0.1:{port}:80) 48MiB (asked 64MiB), 0.5 CPUs" in words("status")

    agent.start()
    agent.converge()
    assert web()["published"] == asked
    assert web()["instances"][0]["limits"]["observed"]["memory"] == 64 << 20


def _limit(agent: LiveAgent, version_1: str, version_2: str) -> Path:
    """A file of the memory controller of shop/web."""
    group = f"{agent.host.cgroup}/{agent.instances('shop/web')[0]['id']}"
    if Path(f"/sys/fs/cgroup/memory/{agent.host.name}").is_dir():
        return Path(f"/sys/fs/cgroup/memory{group}/{version_1}")
    return Path(f"/sys/fs/cgroup{group}/{version_2}")


def test_a_stray_of_our_name_is_taken_away(agent: LiveAgent) -> None:
    run("ip", "link", "add", agent.host.link("bridge", "gone/net"), "type", "bridge")
    run(
        "ip",
        "link",
        "set",
        agent.host.link("bridge", "gone/net"),
        "alias",
        f"holdfast:{agent.host.id}:network:gone/net",
    )
    run("ip", "netns", "add", agent.host.netns(f"{agent.host.id}-01234567").name)
    agent.converge()
    assert links(agent.host) == []
    assert netns(agent.host) == []
    assert "carries our id and belongs to nothing" in reasons(agent, 0)
