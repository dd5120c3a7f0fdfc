"""An agent that builds what its containers run: when, within which limits, and what it tells of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from footprint import leftovers
from ground import patient, wait_for
from holdfast.runtime import cgroup, delegation
from live.agent import HOLDFAST, LiveAgent
from live.debian import debian_tar
from live.processes import command_line
from live.registry import make_island
from live.workshop import BUSYBOX, DOCKERFILE, SERVE, STATE, busybox, commit, failures, shop

pytestmark = pytest.mark.live


def test_a_container_runs_what_is_built_until_the_context_changes(agent: LiveAgent) -> None:
    files = shop(DOCKERFILE, serve=SERVE)
    commit(agent, files)
    shown = agent.cli("apply", timeout=180).stderr
    assert "building images.shop/web  STEP" in shown and "building images.shop/web  ended after" in shown
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    messages = [event["message"] for event in agent.events() if event["subject"] == "image shop/web"]
    assert [message.partition(" ")[0] for message in messages] == ["building", "built"], "its output is in the log"
    assert "the version is made" in (agent.host.root / "builds/logs/shop/web.log").read_text()
    pid, built = agent.pid("shop/web"), len(messages)

    agent.restart()
    commit(agent, {"other.toml": "[volumes.data]\n", "web2/readme": "nothing of the context"})
    agent.converge()
    assert agent.pid("shop/web") == pid
    assert len([event for event in agent.events() if event["subject"] == "image shop/web"]) == built

    commit(agent, {"web/Dockerfile": DOCKERFILE.replace("echo one", "cat nothing")})
    agent.sync()
    agent.wait(lambda: bool(failures(agent)), "the build fails")
    assert agent.pid("shop/web") == pid, "what runs stays"
    assert "cat: can't open 'nothing'" in failures(agent)[0]
    assert failures(agent)[0].count("shop/web") == 2, "in the name, and in the path of the log"

    commit(agent, {"web/Dockerfile": DOCKERFILE.replace("echo one", "echo two")})
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "two\n"


def test_a_failed_build_is_told_at_once_while_the_rest_of_its_app_is_built(agent: LiveAgent) -> None:
    files = shop(BUSYBOX + "RUN echo so it is; exit 3\n")
    files["shop.toml"] = STATE + '[images.zoo]\ncontext = "./zoo"\n[containers.zoo]\nimage = "images.zoo"\n'
    commit(agent, {**files, "zoo/Dockerfile": BUSYBOX + "RUN sleep 1000\n", "zoo/busybox": busybox()})
    agent.sync()
    agent.wait(lambda: any("sleep 1000" in each["step"] for each in agent.status()["builds"]), "the second is built")
    (broken,) = (each for each in agent.status()["builds"] if each["error"])
    assert "RUN echo so it is; exit 3: exit status 3: so it is" in broken["error"]
    assert failures(agent) == [broken["error"]]
    assert "failed builds" in agent.cli("status").stdout
    assert "\n    so it is" in agent.cli("events").stdout
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE, "shop.toml": STATE})
    agent.restart()
    agent.converge()
    assert not agent.status()["builds"]


def test_a_build_that_ends_with_its_agent_has_not_failed_and_is_begun_by_the_next(agent: LiveAgent) -> None:
    commit(agent, shop(BUSYBOX + "RUN echo begun; sleep 1000\n", slow="x"))
    for _ in range(2):
        agent.sync()
        agent.wait(lambda: any("RUN echo begun" in each["step"] for each in agent.status()["builds"]), "it is built")
        agent.restart()
    assert failures(agent) == []
    told = [event["message"] for event in agent.events() if event["kind"] == "interrupted"]
    assert told == ["StageGeneration was cut short; it is finished or undone now"] * 2
    assert agent.status()["apps"]["shop"]["state"] == "changing"
    agent.stop()  # a build that nobody waits for any more goes on


def test_a_build_that_is_killed_with_its_agent_leaves_nothing(agent: LiveAgent) -> None:
    commit(agent, shop(BUSYBOX + "RUN echo begun; sleep 1000\n", slow="x"))
    agent.sync()
    agent.wait(lambda: any("RUN echo begun" in each["step"] for each in agent.status()["builds"]), "the step runs")
    wait_for(lambda: any("sleep 1000" in line for line in leftovers(agent.host)), "the step runs")
    agent.kill()
    held = ("process", "mount", "netns")
    wait_for(lambda: not any(line.startswith(held) for line in leftovers(agent.host)), "all is over")
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE})
    agent.start()
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    wait_for(lambda: not cgroup.folders(f"{agent.host.cgroup}-build"), "its cgroup goes")


def test_a_node_without_buildah_says_so(agent: LiveAgent, mounts_alone: None) -> None:
    commit(agent, shop(BUSYBOX))
    hide = 'mount --bind /dev/null "$0" && exec "$@"'
    agent.through = ("unshare", "--mount", "sh", "-c", hide, shutil.which("buildah") or "")
    agent.restart()
    agent.sync()
    agent.wait(lambda: any("the package buildah" in each for each in failures(agent)), "the app can't be staged")
    environment = {**os.environ, "HOLDFAST_CONFIG": str(agent.config)}
    for words, told in (
        (("check", str(agent.state)), "can't build images.shop/web"),
        (("doctor",), "needed for [images"),
    ):
        done = subprocess.run(
            [*agent.through, HOLDFAST, *words], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0 or words == ("doctor",)
        assert told in done.stdout + done.stderr


@pytest.mark.timeout(400)
def test_a_container_runs_what_is_built_on_a_real_debian(agent: LiveAgent) -> None:
    try:
        agent.image("debian:12", debian_tar())
    except LookupError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    libc = "/home/shop/libc"
    steps = f"useradd --create-home shop && dpkg-query --show libc6 > {libc} && chown shop: {libc}"
    dockerfile = f"FROM debian:12\nRUN {steps}\nUSER shop\nWORKDIR /home/shop\nCMD exec sleep 1000\n"
    commit(agent, {"shop.toml": STATE + 'stop_signal = "SIGKILL"\n', "web/Dockerfile": dockerfile})
    agent.converge(120)
    assert agent.exec("shop/web", "cat", "libc").startswith("libc6")
    assert agent.exec("shop/web", "stat", "--format", "%U %a", "libc", "/usr/bin/passwd").split() == [
        "shop",
        "644",
        "root",
        "4755",
    ]
    assert agent.exec("shop/web", "id", "--user", "--name") == "shop\n"


@pytest.mark.timeout(400)
def test_a_build_is_held_to_its_limits_and_says_which_it_ran_into(agent: LiveAgent) -> None:
    agent.configure(more='[builds]\nmemory = "256MiB"\npids = 64\n')
    agent.restart()
    swell = "RUN tail /dev/zero\n"
    commit(agent, shop(BUSYBOX + swell))
    agent.sync()
    agent.wait(lambda: bool(failures(agent)), "the build fails", 120)
    assert "more than the 256 MiB of memory that a build may use" in failures(agent)[0]
    bomb = "RUN f() { f & f; }; i=0; while [ $i -lt 200 ]; do i=$((i+1)); sleep 100 & done; wait\n"
    commit(agent, {"web/Dockerfile": BUSYBOX + bomb})
    agent.sync()
    agent.wait(lambda: "RUN f()" in failures(agent)[-1], "the build fails", 120)
    assert "more than the 64 processes of a build" in failures(agent)[-1]
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE})
    agent.converge(120)


def test_a_build_has_a_cgroup_of_the_agents_that_keeps_devices_from_it_and_goes(agent: LiveAgent) -> None:
    above = f"{agent.host.cgroup}-build"
    agent.configure(more='[builds]\nmemory = "256MiB"\npids = 64\n')
    agent.restart()
    commit(agent, shop(BUSYBOX + "RUN sleep 1000\n"))
    agent.sync()
    wait_for(lambda: any(b"sleep\x001000" in command_line(pid) for pid in cgroup.pids(above)), "the step runs there")
    (name,) = cgroup.children(cgroup.folder("pids", above))
    held = cgroup.snapshot(f"{above}/{name}")
    assert held["pids.max"] == "64"
    assert held["memory.max" if cgroup.version() == 2 else "memory.limit_in_bytes"] == str(256 << 20)
    assert held.get("memory.swap.max", "0") == "0"
    assert held.get("memory.memsw.limit_in_bytes", str(256 << 20)) == str(256 << 20)
    words = "for each in null zero urandom kmsg loop-control; do (exec </dev/$each && echo $each); done 2>&1"
    inside = f"echo 0 > {cgroup.folder('devices', f'{above}/{name}/cgroup.procs')} && {words}"
    said = subprocess.run(
        ["sh", "-c", inside], check=False, capture_output=True, text=True, timeout=patient(60)
    ).stdout
    assert said.splitlines()[:3] == ["null", "zero", "urandom"]
    assert re.search(r"/dev/kmsg: Operation not permitted\n.*/dev/loop-control: Operation not permitted$", said), said
    for pid in cgroup.pids(above):
        if b"sleep" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    agent.wait(lambda: bool(failures(agent)), "the build fails")
    wait_for(lambda: not cgroup.folders(above), "its cgroup goes")
    assert delegation.keeps(agent.host)
    agent.stop()
    assert not delegation.used(agent.host)


def listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


@pytest.mark.timeout(400)
def test_a_build_has_a_network_of_its_own_that_leads_out(agent: LiveAgent, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("from far away\n")
    octet = agent.host.pool.split(".")[1]
    with ExitStack() as stack:
        island = make_island(stack, f"i{agent.host.name}", f"10.{octet}.255.1", f"10.{octet}.255.2")
        serve = ("ip", "netns", "exec", island.namespace, "busybox", "httpd", "-f", "-p", "80", "-h", str(tmp_path))
        server = subprocess.Popen(serve)
        stack.callback(server.wait)
        stack.callback(server.kill)
        wait_for(lambda: listens(island.address, 80), "the server listens")
        with socket.create_server(("127.0.0.1", 0)) as own:
            port = own.getsockname()[1]
            steps = f"RUN ip link > /links; wget -O /page http://{island.address}/index.html\n"
            steps += f"RUN ! nc -w 1 127.0.0.1 {port} </dev/null\n"
            commit(agent, shop(BUSYBOX + steps + "COPY serve /serve\nCMD /serve\n", serve=SERVE + "", version="x"))
            agent.converge(120)
    assert agent.exec("shop/web", "cat", "/page") == "from far away\n"
    links = agent.exec("shop/web", "cat", "/links")
    assert "eth0" in links
    assert f"{agent.host.name}-" not in links
    wait_for(lambda: not cgroup.folders(f"{agent.host.cgroup}-build"), "its cgroup goes")


def test_what_may_not_be_built_is_not_built(agent: LiveAgent) -> None:
    agent.configure(more='[policy]\nforbid = ["builds"]\n')
    agent.restart()
    commit(agent, shop(BUSYBOX))
    agent.sync()
    agent.wait(lambda: "forbidden by the rule 'builds'" in str(agent.status()), "it is told")
    assert not agent.host.root.joinpath("builds/logs").exists()
