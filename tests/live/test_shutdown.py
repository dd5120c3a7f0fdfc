"""`holdfast shutdown`: what it stops, in which order, and what the next agent makes of it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ground import patient, wait_for
from holdfast.drivers import Host
from live.agent import HOLDFAST, LiveAgent
from live.processes import has_ended, open_files

pytestmark = pytest.mark.live

LOOP = "while :; do sleep 0.1; done"
SHOP = f"""
[containers.db]
image = "busybox:1"
command = ["sh", "-c", "trap 'echo -db >> /log/order; exit 0' TERM; echo +db >> /log/order; {LOOP}"]
volumes = ["log:/log"]

[containers.web]
image = "busybox:1"
command = ["sh", "-c", "trap 'echo -web >> /log/order; exit 0' INT; echo +web >> /log/order; {LOOP}"]
volumes = ["log:/log"]
stop_signal = "SIGINT"
depends_on = {{ db = "started" }}

[containers.once]
image = "busybox:1"
command = ["sh", "-c", "echo +once >> /log/order; {LOOP}"]
volumes = ["log:/log"]
restart = "no"
init = true

[containers.job]
image = "busybox:1"
command = ["sh", "-c", "echo +job >> /log/order; exit 3"]
volumes = ["log:/log"]

[containers.held]
image = "busybox:1"
command = ["sh", "-c", "{LOOP}"]
init = true

[volumes.log]
"""
PLAIN = """
[containers.back]
image = "busybox:1"
command = ["sleep", "100000"]
init = true
"""
STUBBORN = """
[containers.front]
image = "busybox:1"
command = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
stop_grace_period = "10m"
depends_on = { back = "started" }

[containers.back]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"]
"""


def order(agent: LiveAgent) -> list[str]:
    """What the containers have written so far when they began (+) and were asked to end (-)."""
    log = agent.host.root / "volumes/shop/log/_data/order"
    return log.read_text().split() if log.exists() else []


def state(agent: LiveAgent, name: str) -> str:
    containers = agent.status()["apps"].get("shop", {}).get("containers", {})
    return str(containers.get(name, {}).get("state"))


def test_a_shutdown_stops_dependents_first_and_the_next_agent_starts_what_ran(agent: LiveAgent) -> None:
    agent.write("shop.toml", SHOP)
    agent.wait(lambda: state(agent, "job") == "exited" and state(agent, "held") == "running", "they are started")
    agent.wait(lambda: sorted(order(agent)) == ["+db", "+job", "+once", "+web"], "all have begun")
    agent.cli("stop", "shop/held")
    agent.wait(lambda: state(agent, "held") == "stopped", "it is stopped")
    agent.stop()
    agent.cli("shutdown", "--now")
    assert [each for each in order(agent) if each.startswith("-")] == ["-web", "-db"]
    assert {name: agent.instances(f"shop/{name}")[0]["pid"] for name in ("db", "web", "once")} == {
        "db": None, "web": None, "once": None,
    }  # fmt: skip

    agent.start()
    reasons = [event["subject"] for event in agent.events() if event.get("reason") == "the host goes down"]
    assert sorted(reasons) == ["shop/db", "shop/once", "shop/web"]
    agent.wait(lambda: order(agent).count("+web") == order(agent).count("+db") == 2, "what ran runs again")
    agent.sync()
    assert (order(agent).count("+once"), order(agent).count("+job")) == (1, 1)
    assert [state(agent, name) for name in ("once", "job", "held")] == ["exited", "exited", "stopped"]
    assert not [event for event in agent.events() if "lost" in str(event)]


def test_all_containers_end_within_the_total_and_a_long_grace_takes_nothing_from_the_last(agent: LiveAgent) -> None:
    agent.write("shop.toml", STUBBORN)
    agent.converge()
    agent.wait(lambda: agent.cli("logs", "shop/back").stdout == "ready\n", "it listens for SIGTERM")
    agent.stop()
    agent.configure(more='shutdown_timeout = "4s"')
    began = time.monotonic()
    agent.cli("shutdown", "--now")
    assert time.monotonic() - began < patient(30)
    agent.remove("shop.toml")
    agent.start()
    ends = {event["subject"]: event for event in agent.events() if event.get("reason") == "the host goes down"}
    assert ends["shop/front"]["killed"]
    assert not ends["shop/back"]["killed"]


@pytest.fixture
def freezer(site: Host) -> Iterator[Path]:
    """A cgroup of its own, in which not even SIGKILL ends what is frozen."""
    place = Path("/sys/fs/cgroup/freezer") / f"ice-{site.name}"
    if not place.parent.is_dir():
        pytest.skip("cgroup v2 kills what is frozen")
    place.mkdir()
    yield place
    (place / "freezer.state").write_text("THAWED")
    wait_for(lambda: not (place / "cgroup.procs").read_text(), "what was frozen has ended", 30)
    place.rmdir()


def test_what_can_not_be_stopped_keeps_nothing_else_running(agent: LiveAgent, freezer: Path) -> None:
    agent.write("shop.toml", STUBBORN)
    agent.converge()
    agent.wait(lambda: agent.cli("logs", "shop/back").stdout == "ready\n", "it listens for SIGTERM")
    back = agent.pid("shop/back")
    (freezer / "cgroup.procs").write_text(str(agent.pid("shop/front")))
    (freezer / "freezer.state").write_text("FROZEN")
    agent.stop()
    agent.configure(more='shutdown_timeout = "20s"')
    done = agent.cli("shutdown", "--now", check=False, timeout=120)
    assert "shop/front" in done.stderr
    assert done.returncode == 75
    assert has_ended(back)
    ends = {event["subject"]: event for event in agent.events() if event.get("reason") == "the host goes down"}
    assert not ends["shop/back"]["killed"]


def test_a_shutdown_waits_for_nothing_that_runs_while_an_agent_holds_it(agent: LiveAgent) -> None:
    agent.write("shop.toml", PLAIN)
    agent.converge()
    done = agent.cli("shutdown", "--now", check=False)
    assert done.returncode == 73
    assert agent.pid("shop/back")


def test_a_shutdown_begins_as_soon_as_the_agent_has_ended(agent: LiveAgent) -> None:
    agent.write("shop.toml", PLAIN)
    agent.converge()
    back = agent.pid("shop/back")
    with subprocess.Popen([HOLDFAST, "--config", str(agent.config), "shutdown", "--now"]) as command:
        try:
            lock = str(agent.host.root / "agent.lock")
            agent.wait(lambda: lock in open_files(command.pid), "it tries for the agent's lock")
            agent.stop()
            assert command.wait(patient(60)) == 0
        finally:
            command.kill()
    assert has_ended(back)


def test_a_stop_of_the_unit_alone_stops_nothing(agent: LiveAgent) -> None:
    agent.write("shop.toml", PLAIN)
    agent.converge()
    agent.stop()
    assert "is not shutting down" in agent.cli("shutdown").stdout
    assert agent.pid("shop/back")
