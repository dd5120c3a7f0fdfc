"""A bind mount waits for the file system that its source is meant to lie on, and tells when that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent
from live.mounts import Mounts

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(400)]

STATE = """
[containers.web]
image = "busybox:1"
command = ["sh", "-c", "echo up >> /data/log; exec sleep 10000"]
restart = "always"
stop_grace_period = "0s"
networks = ["none"]
[[containers.web.volumes]]
source = "{source}"
target = "/data"
create_host_path = true
"""


def test_a_start_waits_for_the_mount_and_a_lost_one_is_told(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    etc, point = tmp_path / "etc", tmp_path / "nfs"
    for folder in (etc, point):
        folder.mkdir()
    (etc / "fstab").write_text(f"none {point} tmpfs noauto 0 0\n")
    agent = new_agent(site)
    over = f"mount -t overlay -o lowerdir={etc}:/etc none /etc"  # not every host has an fstab to mount another on
    agent.through = ("unshare", "--mount", "sh", "-c", f'{over} && exec "$@"', "sh")
    agent.start()
    agent.image("busybox:1")

    def inside(*command: str) -> str:
        """What a command prints in the agent's mount namespace."""
        assert agent.process is not None
        words = ["nsenter", "--mount", "--target", str(agent.process.pid), *command]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def waits() -> bool:
        return f"{point} is not mounted, which /etc/fstab names" in " ".join(agent.cli("status").stdout.split())

    agent.write("shop.toml", STATE.format(source=point / "deep/data"))
    agent.sync()
    agent.wait(waits, "status says what it waits for", state=lambda: agent.cli("status").stdout)
    assert list(point.iterdir()) == []
    inside("mount", "-t", "tmpfs", "none", str(point))
    agent.converge()
    log = f"{point}/deep/data/log"
    agent.wait(lambda: inside("sh", "-c", f"[ ! -e {log} ] || cat {log}") == "up\n", "it has written")
    assert list(point.iterdir()) == []
    assert [event for event in agent.events() if event["kind"] == "failed"] == []

    pid = agent.pid("shop/web")
    inside("umount", "--lazy", str(point))
    agent.sync()
    agent.wait(lambda: "not mounted any more" in agent.cli("status").stdout, "status says so")
    assert [event["subject"] for event in agent.events() if event["kind"] == "unmounted"] == ["shop/web"]
    assert agent.pid("shop/web") == pid
    os.kill(pid, signal.SIGKILL)
    agent.wait(waits, "it is not started without", state=lambda: agent.cli("status").stdout)
    agent.write("shop.toml", STATE.format(source=point / "deep/data") + "require_mount = false\n")
    agent.converge()
    agent.wait((point / "deep/data/log").exists, "it has begun")
    agent.wait(lambda: (point / "deep/data/log").read_text() == "up\n", "it has written")


BOUND = """
[containers.{name}]
image = "busybox:1"
command = ["sleep", "10000"]
restart = "always"
stop_grace_period = "0s"
networks = ["none"]
volumes = ["{source}:/data"]
"""


def test_a_container_with_an_old_mount_is_told_of_until_it_is_restarted(
    agent: LiveAgent, mounts: Mounts, tmp_path: Path
) -> None:
    usb, link, full, over = (tmp_path / name for name in ("usb", "link", "full", "over"))
    for folder in (usb, full / "data", over):
        folder.mkdir(parents=True)
    link.symlink_to(usb)
    mounts.tmpfs(usb)
    (usb / "data").mkdir()
    sources = {"web": usb / "data", "linked": link / "data", "later": over, "plain": tmp_path}
    agent.write("shop.toml", "".join(BOUND.format(name=name, source=source) for name, source in sources.items()))
    agent.converge()

    def warnings() -> dict[str, str]:
        agent.sync()
        found = {name: agent.instances(f"shop/{name}")[0]["warnings"] for name in sources}
        return {name: " ".join(each) for name, each in found.items() if each}

    assert warnings() == {}
    mounts.gone(usb)
    assert {name: "usb is not mounted any more" in words for name, words in warnings().items()} == OLD
    mounts.bind(full, usb)  # the same disk as that of everything else here
    assert {name: "usb was mounted anew" in words for name, words in warnings().items()} == OLD
    mounts.gone(usb)
    mounts.tmpfs(usb, "other")
    (usb / "data").mkdir()
    mounts.tmpfs(over, "nfs")
    assert warnings().keys() == {"web", "linked", "later"}
    assert "nfs was mounted at" in warnings()["later"]
    pid = agent.pid("shop/web")
    agent.cli("stop", "shop/plain")  # what follows looks at nothing but processes
    assert "mounted anew" in str(agent.instances("shop/web")[0]["warnings"])
    assert str(usb / "data") in agent.cli("status").stdout.replace("\n", "")
    assert agent.pid("shop/web") == pid
    agent.restart()
    assert warnings().keys() == {"web", "linked", "later"}
    for name in ("web", "linked", "later"):
        agent.cli("restart", f"shop/{name}")
    agent.wait(lambda: warnings() == {}, "they have what is there now")
    told = sorted({event["subject"] for event in agent.events() if event["kind"] == "unmounted"})
    assert told == ["shop/later", "shop/linked", "shop/web"]


OLD = {"web": True, "linked": True}


def test_a_file_system_that_does_not_answer_holds_up_nothing_else(
    agent: LiveAgent, mounts: Mounts, hang: Callable[[Path], None], tmp_path: Path
) -> None:
    point = tmp_path / "nfs"
    point.mkdir()
    mounts.tmpfs(point)
    agent.write("shop.toml", STATE.format(source=point / "data") + "require_mount = true\n")
    agent.write("other.toml", BOUND.format(name="web", source=tmp_path))
    agent.converge()
    before = agent.pid("other/web")
    hang(point)
    os.kill(before, signal.SIGKILL)
    agent.wait(lambda: is_another(agent, "other/web", before), "the other app is seen to")
    agent.sync()
    assert str(point) in agent.cli("status").stdout.replace("\n", "")


def is_another(agent: LiveAgent, container: str, pid: int) -> bool:
    return [each["pid"] not in (None, pid) for each in agent.instances(container)] == [True]
