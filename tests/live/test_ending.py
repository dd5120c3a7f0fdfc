"""An agent that is told to end does so within seconds, whatever it is waiting for; the next one goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from footprint import cgroups
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

GRACE = 40
STUBBORN = f"""
[containers.one]
image = "busybox:1"
stop_grace_period = "{GRACE}s"
command = ["sh", "-c", "trap 'echo asked' TERM; echo ready; while true; do sleep 0.1; done"]
"""


def output(agent: LiveAgent) -> str:
    return agent.cli("logs", "app/one").stdout


def test_a_stop_that_takes_long_is_left_to_the_next_agent_with_what_is_left_of_its_time(agent: LiveAgent) -> None:
    agent.write("app.toml", STUBBORN)
    agent.converge()
    pid = agent.pid("app/one")
    agent.wait(lambda: "ready" in output(agent), "it listens for signals")
    agent.remove("app.toml")
    agent.wait(lambda: "asked" in output(agent), "it was asked to stop")
    asked = time.monotonic()
    agent.stop(timeout=20)
    assert Path(f"/proc/{pid}").exists()
    agent.start()
    agent.wait(lambda: not Path(f"/proc/{pid}").exists(), "the next agent has stopped it", GRACE + 60)
    took = time.monotonic() - asked
    assert took > GRACE - 5
    told = [each["message"] for each in agent.events() if each["kind"] == "interrupted"]
    assert any("goes on with what is left of its time" in each for each in told)
    log = agent.host.root / "logs" / "app" / "one.log"
    assert not log.exists() or log.read_text().count("asked") == 1
    assert agent.converge()["apps"] == {}


def test_a_stop_that_was_cut_short_and_is_not_wanted_any_more_is_forgotten(agent: LiveAgent) -> None:
    agent.write("app.toml", STUBBORN)
    agent.converge()
    pid = agent.pid("app/one")
    agent.wait(lambda: "ready" in output(agent), "it listens for signals")
    agent.remove("app.toml")
    agent.wait(lambda: "asked" in output(agent), "it was asked to stop")
    agent.stop(timeout=20)
    agent.write("app.toml", STUBBORN)
    agent.start()
    assert agent.converge()["converged"]
    assert agent.pid("app/one") == pid
    agent.write("app.toml", STUBBORN.replace(f"{GRACE}s", "0s"))
    agent.converge()
    agent.remove("app.toml")
    agent.converge()
    assert not Path(f"/proc/{pid}").exists()


def test_a_first_start_that_fails_leaves_no_cgroup(agent: LiveAgent) -> None:
    agent.write("app.toml", '[containers.one]\nimage = "busybox:1"\ncommand = ["/bin/busybox", "nosuchapplet"]\n')
    agent.write("bad.toml", '[containers.one]\nimage = "busybox:1"\nworking_dir = "/proc/1/nothing"\n')
    agent.remove("app.toml")
    agent.cli("sync")
    status = agent.wait_until(
        lambda now: (
            now["apps"].get("bad", {}).get("state") in ("failed", "degraded") and not agent.instances("bad/one")
        )
    )
    assert cgroups(agent.host) == [], json.dumps(status["apps"]["bad"])
