"""An agent that is told to end does so within seconds, whatever it is waiting for; the next one goes on."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from footprint import cgroups
from holdfast.daemon.agent import HOUSEKEEPING
from live.agent import LiveAgent, Status
from live.processes import command_lines, has_ended

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
    log = agent.host.root / "logs" / "app" / "one.log"
    began = time.monotonic()
    agent.remove("app.toml")
    agent.wait(lambda: "asked" in output(agent), "it was asked to stop")
    agent.stop(timeout=20)
    assert not has_ended(pid)
    agent.start()
    with log.open() as said:  # which goes with the app
        agent.wait(lambda: has_ended(pid), "the next agent has stopped it", GRACE + 60)
        assert time.monotonic() - began > GRACE - 1
        assert said.read().count("asked") == 1
    told = [each["message"] for each in agent.events() if each["kind"] == "interrupted"]
    assert any("goes on with what is left of its time" in each for each in told)
    assert agent.converge()["apps"] == {}


def test_a_grace_period_of_a_month_is_waited_for_and_no_longer_than_it_takes(agent: LiveAgent) -> None:
    willing = STUBBORN.replace("echo asked", "echo asked; exit 0").replace(f"{GRACE}s", "30d")
    agent.write("app.toml", willing)
    agent.converge()
    agent.wait(lambda: "ready" in output(agent), "it listens for signals")
    agent.remove("app.toml")
    assert agent.converge()["apps"] == {}
    assert [each["message"] for each in agent.events() if each["kind"] == "failed"] == []


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
    assert has_ended(pid)


@pytest.fixture
def mute() -> Iterator[tuple[str, list[socket.socket]]]:
    """The URL of a git server that answers nobody, and the connections that it has."""
    server, held = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def serve() -> None:
        with suppress(OSError):
            while True:
                held.append(server.accept()[0])

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/state.git", held
    server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in (server, *held):
        each.close()


def ask_to_sync(agent: LiveAgent) -> socket.socket:
    asks = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asks.connect(str(agent.host.run_root / "agent.sock"))
    asks.sendall(b"POST /v1/sync HTTP/1.1\r\nHost: agent\r\nContent-Length: 2\r\n\r\n{}")
    return asks


def test_a_remote_that_hangs_holds_up_neither_passes_nor_answers_nor_the_end(
    agent: LiveAgent, mute: tuple[str, list[socket.socket]]
) -> None:
    url, asked = mute
    agent.stop()
    agent.configure(state=f'{{ git = "{url}", branch = "main" }}')
    agent.start()
    agent.wait(lambda: bool(asked), "the remote is asked")
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(ask_to_sync(agent))
        began = agent.status()["at"]
        agent.wait_until(lambda now: now["at"] > began + 1.5 * HOUSEKEEPING)
        agent.stop(timeout=20)
        mine = os.fsencode(agent.host.root)
        agent.wait(lambda: not [line for line in command_lines() if mine in line], "git has ended with it")


def test_a_damaged_index_of_images_ends_no_agent_and_is_told(agent: LiveAgent) -> None:
    agent.stop()
    index = agent.host.root / "images" / "index.json"
    whole = index.read_bytes()
    index.write_text("{")
    agent.start()
    process = agent.process
    assert process is not None
    agent.wait(lambda: any("image" in each["message"] for each in failed(agent)), "it is told")
    agent.stop()
    assert process.returncode == 0
    index.write_bytes(whole)


def failed(agent: LiveAgent) -> list[Status]:
    return [each for each in agent.events() if each["kind"] == "failed"]


def test_a_first_start_that_fails_leaves_no_cgroup(agent: LiveAgent) -> None:
    agent.write("app.toml", '[containers.one]\nimage = "busybox:1"\ncommand = ["/bin/busybox", "nosuchapplet"]\n')
    agent.write("bad.toml", '[containers.one]\nimage = "busybox:1"\nworking_dir = "/proc/1/nothing"\n')
    agent.remove("app.toml")
    agent.cli("sync")
    agent.wait_until(
        lambda now: (
            now["apps"].get("bad", {}).get("state") in ("failed", "degraded")
            and "app" not in now["apps"]  # which may have begun before it was taken back
        )
    )
    agent.wait(lambda: not cgroups(agent.host), "the cgroup is gone between one try and the next", state=agent.log)
