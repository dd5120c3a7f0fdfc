"""From an edited state file to the running container: what a change costs, and that the plan says so beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from live.agent import LiveAgent, Status

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""


def cgroup_file(pid: int, controller: str, v1: str, v2: str) -> Path:
    """The file of a process's cgroup that holds a limit, whichever version this host has."""
    groups = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}") / v1
    return Path(f"/sys/fs/cgroup{groups[-1][2]}") / v2


def memory_limit(pid: int) -> int:
    return int(cgroup_file(pid, "memory", "memory.limit_in_bytes", "memory.max").read_text())


def happened(agent: LiveAgent, since: int = 0) -> list[Status]:
    """The actions that were carried out after an event."""
    return [event for event in agent.events() if event["seq"] > since and "verb" in event]


def steps(plan: Mapping[str, Any]) -> dict[str, str]:
    """Subject → reason of every step that a plan prints."""
    return {step["subject"]: step["reason"] for app in plan["apps"].values() for step in app}


def test_limits_labels_restart_policy_and_ports_change_without_a_new_process(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}resources = {{ memory = "64MiB", oom_score_adj = 300 }}')
    agent.converge()
    pid = agent.pid("shop/web")
    assert memory_limit(pid) == 64 << 20
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "300"
    mark = agent.events()[-1]["seq"]
    agent.write(
        "shop.toml",
        f'[containers.web]{SLEEPER}resources = {{ memory = "128MiB", cpus = 0.5, pids = 77 }}\n'
        'labels = { tier = "front" }\nrestart = "on-failure:3"',
    )
    agent.converge()
    assert agent.pid("shop/web") == pid
    assert memory_limit(pid) == 128 << 20
    assert cgroup_file(pid, "pids", "pids.max", "pids.max").read_text().strip() == "77"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "0"
    done = happened(agent, mark)
    assert {event["verb"] for event in done} == {"StageGeneration", "UpdateInstance"}
    (update,) = [event for event in done if event["verb"] == "UpdateInstance"]
    assert "memory 64MiB → 128MiB; applied live" in update["reason"]
    assert "labels.tier none → front; noted, nothing restarts" in update["reason"]


def test_a_changed_image_or_variable_brings_a_new_container(agent: LiveAgent) -> None:
    text = f'[containers.web]{SLEEPER}environment = {{ LEVEL = "info" }}'
    agent.write("shop.toml", text)
    agent.converge()
    first = agent.pid("shop/web")
    agent.write("shop.toml", text.replace('"info"', '"debug"'))
    agent.converge()
    second = agent.pid("shop/web")
    assert second != first
    assert agent.exec("shop/web", "sh", "-c", "echo $LEVEL").strip() == "debug"
    agent.cli("image", "import", str(agent.rootfs.tar), "busybox:2", "--change", "ENV RELEASE=2")
    agent.write("shop.toml", text.replace('"info"', '"debug"').replace("busybox:1", "busybox:2"))
    agent.converge()
    reasons = [event["message"] for event in agent.events() if event["kind"] == "stopped"]
    assert "environment.LEVEL info → debug" in reasons[0]
    assert "restarts shop/web" in reasons[0]
    assert "image changed: busybox:1 → busybox:2" in reasons[1]


def test_the_plan_of_an_edit_is_what_then_happens_and_touches_nothing(agent: LiveAgent) -> None:
    agent.write("shop.toml", f"[containers.web]{SLEEPER}[containers.old]{SLEEPER}")
    agent.converge()
    assert agent.cli("plan").stdout.strip() == "nothing to do"
    before = agent.events()
    agent.stop()
    agent.write(
        "shop.toml",
        f'[containers.web]{SLEEPER}resources.memory = "32MiB"\n[containers.new]{SLEEPER}depends_on = ["web"]\n',
    )
    pids = {child.name for child in agent.host.root.joinpath("instances").iterdir()}
    planned = agent.cli("plan", "--json", check=False)
    assert planned.returncode == 2, planned.stderr
    told = steps(json.loads(planned.stdout))
    assert "memory none → 32MiB; applied live" in told["shop/web"]
    assert agent.cli("plan", check=False).returncode == 2
    assert agent.cli("events", "--json", "--tail", "1000").stdout.count("\n") == len(before)
    assert {child.name for child in agent.host.root.joinpath("instances").iterdir()} == pids
    agent.start()
    agent.converge()
    done = happened(agent, before[-1]["seq"])
    carried_out: dict[str, str] = {}
    for event in done:
        carried_out.setdefault(event["subject"], event["reason"])
    assert carried_out == told
    assert agent.cli("plan").returncode == 0


def test_a_plan_that_can_not_be_made_exits_1(agent: LiveAgent) -> None:
    agent.stop()
    agent.configure(more='nonsense = "yes"')
    failed = agent.cli("plan", check=False)
    assert failed.returncode == 1
    assert "nonsense" in failed.stderr


def test_dependencies_start_in_order_and_stop_in_reverse(agent: LiveAgent) -> None:
    agent.write("base.toml", f"[containers.db]{SLEEPER}")
    agent.write(
        "shop.toml",
        '[app]\ndepends_on = ["base"]\n'
        f'[containers.web]{SLEEPER}depends_on = {{ migrate = "completed", api = "started" }}\n'
        f'[containers.migrate]\nimage = "busybox:1"\ncommand = "true"\nnetworks = ["none"]\nrestart = "no"\n'
        f"[containers.api]{SLEEPER}",
    )
    status = agent.converge()
    assert status["apps"]["shop"]["containers"]["migrate"]["state"] == "completed"
    events = agent.events()
    started = [event["subject"] for event in events if event["kind"] == "started"]
    assert started[0] == "base/db"
    assert started[-1] == "shop/web"
    ended = next(event["seq"] for event in events if event["kind"] == "exited" and event["subject"] == "shop/migrate")
    assert ended < next(e["seq"] for e in events if e["kind"] == "started" and e["subject"] == "shop/web")
    agent.remove("shop.toml")  # first, because the agent may read the directory in between
    agent.remove("base.toml")
    agent.converge()
    stopped = [event["subject"] for event in agent.events() if event["kind"] == "stopped"]
    assert stopped[0] == "shop/web"
    assert stopped[-1] == "base/db"


def test_configs_and_files_follow_a_commit_as_they_were_asked_to(agent: LiveAgent) -> None:
    trap = 'trap "date >> /tmp/hup" HUP; trap "exit 0" TERM; echo ready; while :; do sleep 1000 & wait $!; done'
    agent.write("conf/a.conf", "one")
    agent.write(
        "shop.toml",
        f"""
[configs.live]
file = "./live.conf"
[containers.anew]{SLEEPER}volumes = ["./conf:/etc/conf:ro"]
[containers.told]
image = "busybox:1"
networks = ["none"]
command = ["sh", "-c", '{trap}']
configs = [{{ source = "live", target = "/etc/live.conf", on_change = "SIGHUP" }}]
[containers.quiet]{SLEEPER}configs = [{{ source = "live", target = "/etc/live.conf", on_change = "none" }}]
""",
    )
    assert agent.cli("check", str(agent.state), check=False).returncode == os.EX_DATAERR  # live.conf is not there
    agent.write("live.conf", "one")
    agent.converge()
    agent.wait(lambda: agent.cli("logs", "shop/told").stdout == "ready\n", "it listens for SIGHUP")
    pids = {name: agent.pid(f"shop/{name}") for name in ("anew", "told", "quiet")}
    assert agent.exec("shop/anew", "cat", "/etc/conf/a.conf") == "one"
    agent.write("conf/a.conf", "two")
    agent.write("live.conf", "two")
    agent.converge()
    assert agent.pid("shop/anew") != pids.pop("anew")
    assert {name: agent.pid(f"shop/{name}") for name in pids} == pids
    assert agent.exec("shop/anew", "cat", "/etc/conf/a.conf") == "two"
    assert agent.exec("shop/told", "cat", "/etc/live.conf") == "two"
    assert agent.exec("shop/quiet", "cat", "/etc/live.conf") == "two"
    agent.wait(
        lambda: agent.cli("exec", "shop/told", "test", "-s", "/tmp/hup", check=False).returncode == 0,
        "SIGHUP arrived",
    )


def test_apply_converges_once_without_an_agent(agent: LiveAgent) -> None:
    agent.stop()
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.cli("apply", "--timeout", "30")
    pid = agent.pid("shop/web")
    assert Path(f"/proc/{pid}").exists()
    agent.write("shop.toml", f"[containers.web]{SLEEPER.replace('busybox:1', 'nowhere:1')}")
    late = agent.cli("apply", "--timeout", "5", check=False)
    assert late.returncode == os.EX_TEMPFAIL
    assert "nowhere:1" in late.stderr
    assert agent.pid("shop/web") == pid


def test_ports_of_a_running_container_change_without_touching_it(
    agent: LiveAgent, free_port: Callable[[], int]
) -> None:
    before, after = str(free_port()), str(free_port())
    text = f'[containers.web]{SLEEPER}ports = ["127.0.0.1:PORT:80"]'.replace('networks = ["none"]\n', "")
    agent.write("shop.toml", text.replace("PORT", before))
    agent.converge()
    pid = agent.pid("shop/web")
    agent.write("shop.toml", text.replace("PORT", after))
    agent.converge()
    assert agent.pid("shop/web") == pid
    assert after in agent.cli("status").stdout
