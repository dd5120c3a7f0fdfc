"""What follows the end of a process, and what a person asks for by hand."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from live.agent import LiveAgent, Status
from live.processes import kill

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""


def running(script: str, more: str = "") -> str:
    """A container that runs a line of shell."""
    return f'image = "busybox:1"\nnetworks = ["none"]\ncommand = ["sh", "-c", """{script}"""]\n{more}\n'


def container(status: Status, name: str) -> Any:
    """What the status says of a container of the app shop."""
    return status["apps"]["shop"]["containers"][name]


def told(agent: LiveAgent, subject: str, kind: str) -> list[Status]:
    """The events of a kind about a container. What an action did is told after it is done, and shown before."""
    return [event for event in agent.events() if (event["subject"], event["kind"]) == (subject, kind)]


def test_code_signal_and_lack_of_memory_are_told_apart(agent: LiveAgent) -> None:
    eater = "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    agent.write(
        "shop.toml",
        f"""
[containers.code]
{running("exit 7", 'restart = "no"')}
[containers.fine]
{running("true", 'restart = "no"')}
[containers.killed]
{running("kill -9 $$$$; sleep 1000", 'restart = "no"')}
init = true
[containers.eater]
{running(eater, 'restart = "no"')}
resources = {{ memory = "16MiB", memory_swap = "16MiB" }}
""",
    )
    states = {"code": "exited", "fine": "completed", "killed": "exited", "eater": "exited"}
    agent.sync()
    status = agent.wait_until(
        lambda now: {name: each["state"] for name, each in now["apps"]["shop"]["containers"].items()} == states
    )
    found = {name: container(status, name)["instances"][0] for name in states}
    assert (found["code"]["exit_code"], found["code"]["signal"], found["code"]["oom"]) == (7, None, False)
    assert found["fine"]["exit_code"] == 0
    assert found["killed"]["exit_code"] == 128 + signal.SIGKILL
    assert not found["killed"]["oom"]
    assert found["eater"]["oom"]
    assert "memory" in container(status, "eater")["reason"]
    assert not status["converged"]
    assert len({told(agent, f"shop/{name}", "exited")[0]["message"] for name in ("code", "fine", "eater")}) == 3


def test_on_failure_gives_up_visibly_and_a_change_is_a_new_chance(agent: LiveAgent) -> None:
    policy = 'restart_policy = { policy = "on-failure", max_attempts = 2, delay = "10ms" }'
    agent.write("shop.toml", f"[containers.web]\n{running('exit 3', policy)}")
    agent.sync()
    status = agent.wait_until(lambda now: container(now, "web")["state"] == "failed")
    web = container(status, "web")
    assert "gave up after 2 restarts" in web["reason"]
    assert web["instances"][0]["restarts"] == 2
    assert status["apps"]["shop"]["state"] == "degraded"
    assert "gave up" in agent.cli("status").stdout
    agent.write("shop.toml", f"[containers.web]\n{SLEEPER}")
    assert container(agent.converge(), "web")["state"] == "running"


def test_a_killed_container_is_back_at_once_and_the_back_off_grows_and_is_forgotten(agent: LiveAgent) -> None:
    policy = 'restart_policy = { policy = "always", delay = "400ms", factor = 2, jitter = 0, reset_after = "600ms" }'
    agent.write("shop.toml", f"[containers.web]\n{running('exit 1', policy)}[containers.steady]{SLEEPER}{policy}")
    agent.sync()
    agent.wait(lambda: len(told(agent, "shop/web", "started")) > 3, "it was restarted three times")
    ended = [event["at_exit"] for event in told(agent, "shop/web", "exited")]  # it may be noticed later
    begun = [event["at"] for event in told(agent, "shop/web", "started")][1:]
    waits = [start - end for end, start in zip(ended, begun, strict=False)]
    assert waits[1] >= 0.35
    assert waits[2] >= 0.75
    for _ in range(2):  # the second time, too: it ran long enough in between
        pid = agent.pid("shop/steady")
        agent.wait_until(lambda now: now["at"] - container(now, "steady")["instances"][0]["started_at"] > 0.7)
        os.kill(pid, signal.SIGKILL)
        agent.wait_until(
            lambda now, pid=pid: container(now, "steady")["instances"][0]["pid"] not in (None, pid)  # type: ignore[misc]
        )
    agent.wait(lambda: len(told(agent, "shop/steady", "started")) == 3, "its starts are told")
    streaks = [event["reason"] for event in told(agent, "shop/steady", "started")]
    assert all("restart 1 in a row" in reason for reason in streaks[1:])
    assert container(agent.status(), "steady")["instances"][0]["restarts"] == 2


def test_stop_sends_the_signal_waits_the_grace_period_and_kills(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        f"""
[containers.polite]
{running('trap "exit 5" USR1; echo ready; while :; do sleep 1000 & wait $!; done', 'stop_signal = "SIGUSR1"')}
[containers.deaf]
{running('trap "" TERM; while :; do sleep 1000; done', 'stop_grace_period = "300ms"')}
""",
    )
    agent.converge()
    agent.wait(lambda: agent.cli("logs", "shop/polite").stdout == "ready\n", "it listens for SIGUSR1")
    agent.cli("stop", "shop/polite")
    agent.cli("stop", "shop/deaf")
    status = agent.status()
    assert container(status, "polite")["instances"][0]["exit_code"] == 5
    assert container(status, "deaf")["instances"][0]["exit_code"] == 128 + signal.SIGKILL
    for name in ("shop/deaf", "shop/polite"):
        agent.wait(lambda name=name: bool(told(agent, name, "stopped")), "its stop is told")  # type: ignore[misc]
    assert told(agent, "shop/deaf", "stopped")[0]["took"] >= 0.3
    assert not told(agent, "shop/polite", "stopped")[0]["killed"]


def test_what_is_held_by_hand_is_drift_that_outlives_the_agent_until_released(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}restart = "always"\n[containers.other]{SLEEPER}')
    agent.converge()
    other = agent.pid("shop/other")
    agent.cli("stop", "web")
    status = agent.status()
    assert container(status, "web")["state"] == "stopped"
    assert "stopped by hand" in status["drift"]["shop/web"]
    assert "holdfast release shop/web" in agent.cli("status").stdout
    assert "stopped by hand" in agent.cli("plan", check=False).stdout
    agent.restart()
    agent.sync()
    status = agent.status()
    assert container(status, "web")["state"] == "stopped"
    assert "shop/web" in status["drift"]
    agent.cli("release", "shop/web")
    agent.wait_until(lambda now: bool(now["converged"]))
    assert not agent.status()["drift"]
    first = agent.pid("shop/web")
    agent.cli("restart", "shop/web")
    assert agent.pid("shop/web") != first
    agent.wait_until(lambda now: not now["drift"])  # a restart is over once it has happened
    agent.cli("stop", "shop/web")
    agent.cli("start", "shop/web")
    assert container(agent.status(), "web")["state"] == "running"
    assert agent.pid("shop/other") == other
    assert agent.cli("release", "shop/other", check=False).returncode == os.EX_USAGE


def test_containers_outlive_the_agent_and_exits_meanwhile_are_answered_on_return(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}restart = "always"\n[containers.other]{SLEEPER}')
    agent.converge()
    web, other = agent.pid("shop/web"), agent.pid("shop/other")
    agent.stop()
    assert Path(f"/proc/{web}").exists()
    assert Path(f"/proc/{other}").exists()
    kill(web)
    agent.start()
    status = agent.wait_until(lambda now: bool(now["converged"]))
    assert container(status, "web")["instances"][0]["restarts"] == 1
    assert agent.pid("shop/other") == other
    agent.kill()
    agent.start()
    agent.wait_until(lambda now: bool(now["converged"]))
    assert agent.pid("shop/other") == other


def test_sighup_takes_over_agent_toml_and_keeps_the_old_one_when_that_is_wrong(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}environment = {{ DOMAIN = "${{vars.domain:-old}}" }}')
    agent.converge()
    pid = agent.pid("shop/web")
    agent.configure(more="[nonsense]")
    process = agent.process
    assert process is not None
    process.send_signal(signal.SIGHUP)
    agent.wait(lambda: any("not taken over" in event["message"] for event in agent.events()), "the mistake is told")
    assert agent.pid("shop/web") == pid
    agent.configure(more='[vars]\ndomain = "new"')
    process.send_signal(signal.SIGHUP)
    agent.wait(lambda: any("read again" in event["message"] for event in agent.events()), "it is taken over")
    agent.converge()
    assert agent.exec("shop/web", "sh", "-c", "echo $DOMAIN").strip() == "new"


EATS = (
    'image = "busybox:1"\nresources.memory = "32MiB"\nresources.memory_swap = "32MiB"\nstop_grace_period = "100ms"\n'
)
HUNGRY = "tail /dev/zero"


def ends(agent: LiveAgent, container: str) -> list[str]:
    """What is told of the ends of a container, once there is one."""
    agent.wait(lambda: bool(told(agent, container, "exited")), "its end is told")
    return [event["message"] for event in told(agent, container, "exited")]


def test_a_child_without_memory_is_an_event_and_not_the_end_of_its_container(agent: LiveAgent) -> None:
    script = json.dumps(["sh", "-c", f"trap '' TERM; {HUNGRY}; while :; do sleep 1; done"])
    agent.write("shop.toml", f"[containers.web]\ncommand = {script}\n{EATS}")
    agent.converge()
    agent.wait(lambda: any(event["kind"] == "oom" for event in agent.events()), "the child's end is told")
    agent.cli("stop", "web")
    assert ends(agent, "shop/web") == ["it was ended by SIGKILL, exit code 137"]
    assert not agent.instances("shop/web")[0]["oom"]


def test_a_container_without_memory_is_told_so_although_a_child_was_before(agent: LiveAgent) -> None:
    script = json.dumps(["sh", "-c", f"{HUNGRY}; until [ -e /go ]; do sleep 0.1; done; exec {HUNGRY}"])
    agent.write("shop.toml", f"[containers.web]\ncommand = {script}\ninit = false\n{EATS}")
    agent.converge()
    agent.wait(lambda: any(event["kind"] == "oom" for event in agent.events()), "the child's end is told")
    agent.exec("web", "touch", "/go")
    assert ends(agent, "shop/web") == ["it was killed for want of memory (OOM), exit code 137"]
