"""State files as people write them for real services: what such files use together, on one agent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent

pytestmark = pytest.mark.live

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
"""


def test_apply_waits_for_a_job_that_others_wait_for(new_agent: Callable[[Host], LiveAgent], site: Host) -> None:
    agent = new_agent(site)
    agent.image("busybox:1")
    agent.write(
        "shop.toml",
        f"""
[containers.migrate]
image = "busybox:1"
command = "sleep 1"
networks = ["none"]
[containers.web]{SLEEPER}networks = ["none"]
depends_on = {{ migrate = "completed" }}
""",
    )
    agent.cli("apply", "--timeout", "30")


def test_what_apply_has_brought_about_is_converged_without_an_agent(
    new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    agent = new_agent(site)
    agent.image("busybox:1")
    agent.write("shop.toml", f"[containers.api]{SLEEPER}[containers.web]{SLEEPER}")
    agent.cli("apply", "--timeout", "30")
    assert agent.status()["blockers"] == []
    assert agent.cli("plan", check=False).returncode == 0


def give_program(root: Path) -> None:
    """Put right what the image lacks."""
    program = root / "bin/serve"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)


def test_sysctls_of_a_network_of_its_own_are_set(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        f'[containers.web]{SLEEPER}networks = ["none"]\nsysctls = {{ "net.core.somaxconn" = 1025 }}',
    )
    agent.converge()
    assert agent.exec("shop/web", "cat", "/proc/sys/net/core/somaxconn").strip() == "1025"


def test_what_check_takes_for_a_sysctl_or_a_signal_the_runtime_takes_too(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        """
        [containers.web]
        image = "busybox:1"
        command = ["sh", "-c", "trap 'exit 7' 63; echo ready; while :; do sleep 0.1; done"]
        sysctls = { "kernel.domainname" = "shop.example", "kernel.msgmax" = "9000" }
        stop_signal = "RTMAX-1"
        """,
    )
    agent.converge()
    settings = agent.exec("shop/web", "cat", "/proc/sys/kernel/domainname", "/proc/sys/kernel/msgmax")
    assert settings.split() == ["shop.example", "9000"]
    agent.wait(lambda: agent.cli("logs", "shop/web").stdout == "ready\n", "it listens for the signal")
    agent.cli("stop", "shop/web")
    assert agent.instances("shop/web")[-1]["exit_code"] == 7


def test_a_state_that_could_not_be_is_tried_again_when_asked_to(agent: LiveAgent, tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    shutil.copytree(agent.rootfs.path, root, symlinks=True)
    agent.write(
        "shop.toml",
        f'[containers.web]\nrootfs = "{root}"\ncommand = "/bin/serve 1000"\nnetworks = ["none"]\ninit = true',
    )
    agent.sync()
    agent.wait_until(lambda status: status["apps"].get("shop", {}).get("state") == "failed")
    give_program(root)
    agent.converge()


def test_a_state_that_could_not_be_is_tried_again_by_the_next_agent(agent: LiveAgent, tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    shutil.copytree(agent.rootfs.path, root, symlinks=True)
    agent.write(
        "shop.toml",
        f'[containers.web]\nrootfs = "{root}"\ncommand = "/bin/serve 1000"\nnetworks = ["none"]\ninit = true',
    )
    agent.sync()
    agent.wait_until(lambda status: status["apps"].get("shop", {}).get("state") == "failed")
    agent.stop()
    give_program(root)
    agent.start()
    agent.wait_until(lambda status: bool(status["converged"]))


def test_a_command_runs_inside_as_the_container_does(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        f'[containers.web]{SLEEPER}networks = ["none"]\nuser = "1000:1001"\ngroup_add = [1002]\n'
        'environment = { COLOUR = "red" }\nulimits = { nofile = 512 }\nworking_dir = "/tmp"',
    )
    agent.converge()
    script = "id -u; id -G; ulimit -n; echo $COLOUR $SIZE; pwd"
    assert agent.exec("shop/web", "sh", "-c", script).split("\n")[:5] == ["1000", "1001 1002", "512", "red", "/tmp"]
    said = agent.cli("exec", "-u", "7:8", "-e", "SIZE=big", "-w", "/", "shop/web", "sh", "-c", script).stdout
    assert said.split("\n")[:5] == ["7", "8 1002", "512", "red big", "/"]
