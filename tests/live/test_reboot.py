"""What lasts when the agent, its supervisors or the whole host go down, and how all of it comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from footprint import leftovers, sweep, tables
from ground import wait_for
from live.agent import LiveAgent, Status
from live.census import await_census, expected_census, stored_instances
from live.processes import kill

pytestmark = pytest.mark.live

PLAIN = """
[containers.{name}]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit {code}' TERM; {first} echo ready; sleep 10000 & wait"]
restart_policy = {{ policy = "{policy}", delay = "1ms" }}
"""
BASE = """
[containers.db]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; echo db >> /log/order; sleep 10000 & wait"]
networks = ["back"]
volumes = ["log:/log"]

[networks.back]
[volumes.log]
"""
SHOP = """
[app]
depends_on = ["base"]

[containers.migrate]
image = "busybox:1"
command = ["sh", "-c", "echo migrate >> /log/order"]
restart = "no"
networks = ["base/back"]
volumes = ["base/log:/log"]

[containers.api]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; echo api >> /log/order; sleep 10000 & wait"]
networks = ["base/back"]
volumes = ["base/log:/log"]
depends_on = { migrate = "completed" }

[containers.web]
image = "busybox:1"
command = ["sh", "-c", '''
trap 'exit 0' TERM
[ -e /mark ] && echo kept >> /log/layer
touch /mark
echo web >> /log/order
sleep 10000 & wait
''']
networks = ["base/back", "bridge"]
ports = ["PORT:80"]
volumes = ["base/log:/log"]
depends_on = { api = "started" }

[containers.idle]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; echo idle >> /log/order; sleep 10000 & wait"]
volumes = ["base/log:/log"]
"""


def plain(name: str, *, code: int = 0, policy: str = "always", first: str = "") -> str:
    return PLAIN.format(name=name, code=code, policy=policy, first=first)


def instance(status: Status, container: str) -> Status:
    app, _, name = container.partition("/")
    (found,) = status["apps"][app]["containers"][name]["instances"]
    return dict(found)


def lasting(found: Status) -> dict[str, Any]:
    """What of an instance has to be the same after the agent was away."""
    return {key: found[key] for key in ("id", "pid", "restarts", "addresses", "started_at", "exit_code")}


def settled(agent: LiveAgent, *containers: str) -> Status:
    """Converge, and wait until these containers of `plain` listen for signals: before that, SIGTERM does nothing."""
    status = agent.converge()
    for name in containers:
        agent.wait(lambda name=name: agent.cli("logs", name).stdout == "ready\n", f"{name} listens for signals")  # type: ignore[misc]
    return status


def conmon_of(agent: LiveAgent, id: str) -> int:
    return int((agent.host.run_root / "runs" / id / "conmon.pid").read_text())


def exits(agent: LiveAgent, container: str) -> list[str]:
    """What the event log says of the ends of a container."""
    lines = agent.cli("events", "--json").stdout.splitlines()
    return [line for line in lines if '"exited"' in line and f'"{container}"' in line]


def reboot(agent: LiveAgent) -> None:
    """Take away all that a reboot does: processes, mounts, links, namespaces, cgroups, the table, the run root."""
    agent.kill()

    def gone() -> bool:
        sweep(agent.host)
        return not leftovers(agent.host)

    wait_for(gone, "nothing is left", state=lambda: leftovers(agent.host))


# -- the agent is away ---------------------------------------------------------------------------------------


def test_containers_run_on_while_the_agent_is_dead_and_are_adopted(agent: LiveAgent) -> None:
    agent.write("app.toml", plain("one") + plain("two", code=3))
    os.kill(instance(settled(agent, "app/two"), "app/two")["pid"], signal.SIGTERM)
    status = agent.wait_until(lambda now: now["converged"] and instance(now, "app/two")["restarts"] == 1)
    before = {name: lasting(instance(status, name)) for name in ("app/one", "app/two")}
    agent.kill()
    for each in before.values():
        assert Path(f"/proc/{each['pid']}").exists()
    agent.start()
    status = agent.converge()
    assert {name: lasting(instance(status, name)) for name in before} == before


def test_exits_while_the_agent_is_dead_are_answered_when_it_is_back(agent: LiveAgent) -> None:
    agent.write("app.toml", plain("again", code=3) + plain("job", policy="no") + plain("fails", code=4, policy="no"))
    status = settled(agent, "app/again", "app/job", "app/fails")
    before = {name: instance(status, f"app/{name}") for name in ("again", "job", "fails")}
    agent.kill()
    for each in before.values():
        kill(each["pid"], signal.SIGTERM)
    agent.start()
    status = agent.wait_until(lambda now: instance(now, "app/again")["restarts"] == 1)
    again, job, fails = (instance(status, f"app/{name}") for name in ("again", "job", "fails"))
    assert (again["id"], again["restarts"]) == (before["again"]["id"], 1)
    assert again["pid"] != before["again"]["pid"]
    assert "exited with 3" in exits(agent, "app/again")[-1]
    assert (job["state"], job["exit_code"], job["restarts"]) == ("exited", 0, 0)
    assert (fails["state"], fails["exit_code"], fails["restarts"]) == ("exited", 4, 0)


def test_an_end_that_conmon_did_not_live_to_see_is_answered(agent: LiveAgent) -> None:
    agent.write("app.toml", plain("again", policy="on-failure"))
    before = instance(agent.converge(), "app/again")
    conmon = conmon_of(agent, before["id"])
    agent.kill()
    for pid in (conmon, before["pid"]):
        kill(pid)
    agent.start()
    after = instance(agent.converge(), "app/again")
    assert (after["id"], after["restarts"]) == (before["id"], 1)
    assert "ended unseen" in exits(agent, "app/again")[-1]
    instances = stored_instances(agent.host)
    expected = expected_census(instances, networks=1)
    assert await_census(agent.host, expected) == expected


def test_what_is_committed_while_the_agent_is_dead_is_converged_to(agent: LiveAgent) -> None:
    agent.write("gone.toml", plain("one"))
    agent.write("app.toml", plain("stays") + plain("changes"))
    status = agent.converge()
    before = {name: instance(status, f"app/{name}") for name in ("stays", "changes")}
    agent.kill()
    agent.remove("gone.toml")
    agent.write("app.toml", plain("stays") + plain("changes", first="true;"))
    agent.write("new.toml", plain("one"))
    agent.start()
    status = agent.converge()
    assert lasting(instance(status, "app/stays")) == lasting(before["stays"])
    assert instance(status, "app/changes")["id"] != before["changes"]["id"]
    assert sorted(status["apps"]) == ["app", "new"]


def test_what_is_held_stays_held_when_the_agent_was_dead(agent: LiveAgent) -> None:
    agent.write("app.toml", plain("one"))
    agent.converge()
    agent.cli("stop", "app/one")
    agent.wait_until(lambda now: instance(now, "app/one")["pid"] is None)
    agent.kill()
    agent.start()
    agent.sync()
    assert instance(agent.status(), "app/one")["pid"] is None
    agent.cli("release", "app/one")
    assert instance(agent.converge(), "app/one")["pid"]


# -- the host is away ----------------------------------------------------------------------------------------


def test_after_a_reboot_all_comes_back_in_order(agent: LiveAgent, free_port: Callable[[], int]) -> None:
    agent.write("base.toml", BASE)
    agent.write("shop.toml", SHOP.replace("PORT", str(free_port())))
    agent.converge()
    agent.cli("stop", "shop/idle")
    status = agent.wait_until(lambda now: instance(now, "shop/idle")["pid"] is None)
    names = ("base/db", "shop/migrate", "shop/api", "shop/web", "shop/idle")
    before = {name: instance(status, name) for name in names}
    log = agent.host.root / "volumes/base/log/_data"

    def said() -> list[str]:
        """What has begun, sorted: who starts first does so, but need not be the first to speak."""
        return sorted((log / "order").read_text().split())

    wait_for(lambda: said() == ["api", "db", "idle", "migrate", "web"], "all have begun", state=said)
    (log / "order").write_text("")

    reboot(agent)
    agent.start()
    agent.wait_until(lambda now: bool(instance(now, "shop/web")["pid"]))
    agent.sync()
    status = agent.status()
    after = {name: instance(status, name) for name in names}

    wait_for(lambda: said() == ["api", "db", "web"], "what ran runs again, and nothing else", state=said)
    started = [after[name]["started_at"] for name in ("base/db", "shop/api", "shop/web")]
    assert started == sorted(started)
    assert {name: each["id"] for name, each in after.items()} == {name: each["id"] for name, each in before.items()}
    assert {name: after[name]["addresses"] for name in names} == {name: before[name]["addresses"] for name in names}
    assert (after["shop/migrate"]["pid"], after["shop/migrate"]["exit_code"]) == (None, 0)
    assert after["shop/idle"]["pid"] is None
    assert (log / "layer").read_text() == "kept\n"
    assert tables(agent.host)
    failed = [line for line in agent.cli("events", "--json").stdout.splitlines() if '"failed"' in line]
    assert failed == []
