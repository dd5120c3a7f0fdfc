"""What is wrong gives one clear line and an exit code by class, and whatever ran keeps running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import HOLDFAST, LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""


@pytest.fixture
def shop(agent: LiveAgent) -> LiveAgent:
    """An agent that runs shop/web, and another app beside it."""
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.write("other.toml", f"[containers.web]{SLEEPER}")
    agent.converge()
    return agent


def refused(agent: LiveAgent, text: str, *expected: str, app: str = "shop") -> str:
    """Commit a file that can't be carried out; return the reason once the app is failed or invalid."""
    agent.write(f"{app}.toml", text)
    agent.sync()
    status = agent.wait_until(lambda now: now["apps"][app]["state"] in ("failed", "invalid"))
    reason = str(status["apps"][app]["reason"])
    assert not status["converged"]
    assert "\n" not in reason
    for words in expected:
        assert words in reason
    return reason


def test_what_can_not_be_started_leaves_the_old_one_running(
    shop: LiveAgent, free_port: Callable[[], int], tmp_path: Path
) -> None:
    pid, other = shop.pid("shop/web"), shop.pid("other/web")
    web = f"[containers.web]{SLEEPER}"
    refused(shop, web.replace("busybox:1", "nowhere:1"), "nowhere:1", "shop/web")
    refused(shop, web.replace('"sleep 1000"', '"slepp 1000"'), "slepp", "shop/web")
    refused(shop, f'{web}volumes = ["{tmp_path}/missing:/data"]', f"{tmp_path}/missing", "shop/web")
    refused(shop, f'{web}user = "nobodyknows"', "nobodyknows", "shop/web")
    refused(shop, f'{web}devices = ["/dev/missing"]', "/dev/missing", "shop/web")
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        bridged = web.replace('networks = ["none"]\n', "")
        refused(shop, f'{bridged}ports = ["{port}:80"]', str(port), "shop/web")
        assert shop.pid("shop/web") == pid
    assert shop.pid("other/web") == other
    assert not [event for event in shop.events() if event["kind"] in ("stopped", "removed")]
    assert shop.converge()["apps"]["shop"]["state"] == "converged"  # the port is free now


def test_a_start_that_fails_is_told_and_leaves_nothing_half_made(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}sysctls = {{ "kernel.msgmax" = "lots" }}\n')
    agent.sync()
    status = agent.wait_until(lambda now: bool(now["apps"]["shop"]["containers"]["web"]["reason"]))
    agent.wait(lambda: any(event["kind"] == "failed" for event in agent.events()), "the failure is told")
    (failed, *_) = [event for event in agent.events() if event["kind"] == "failed"]
    assert "start 'shop/web'" in failed["message"] or "shop/web" in failed["message"]
    assert not status["converged"]
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.converge()
    assert len(agent.instances("shop/web")) == 1


def test_a_file_that_does_not_load_keeps_its_app_and_lets_the_others_go_on(shop: LiveAgent) -> None:
    pid = shop.pid("shop/web")
    reason = refused(shop, f"[containers.web]{SLEEPER}imag = 'x'\n", "shop.toml:", "containers.web.imag")
    assert "image" in reason
    shop.write("other.toml", f"[containers.web]{SLEEPER}[containers.more]{SLEEPER}")
    shop.sync()
    shop.wait_until(lambda now: now["apps"]["other"]["state"] == "converged")
    assert shop.pid("other/more")
    refused(shop, "[containers.web\n", "shop.toml:1")
    assert shop.pid("shop/web") == pid
    shop.write("shop.toml", f"[containers.web]{SLEEPER}")
    shop.converge()
    assert shop.pid("shop/web") == pid


def test_one_bad_file_refuses_the_whole_commit_where_agent_toml_says_so(shop: LiveAgent) -> None:
    shop.configure(more='on_invalid = "reject-revision"')
    shop.restart()
    pids = {name: shop.pid(name) for name in ("shop/web", "other/web")}
    shop.write("shop.toml", "[containers.web]\nimage = 1\n")
    shop.write("other.toml", f"[containers.web]{SLEEPER}[containers.more]{SLEEPER}")
    shop.remove("other.toml")
    shop.sync()
    status = shop.wait_until(lambda now: bool(now["problems"]))
    assert "shop.toml:2: containers.web.image" in status["problems"][0]
    assert not status["converged"]
    assert {name: shop.pid(name) for name in pids} == pids
    plan = shop.cli("plan", check=False)
    assert plan.returncode == 1  # the state files are wrong, and nothing would be done
    assert "nothing to do" in plan.stdout


def test_a_port_of_another_container_is_refused_before_anything_stops(
    shop: LiveAgent, free_port: Callable[[], int]
) -> None:
    bridged = SLEEPER.replace('networks = ["none"]\n', "")
    port = free_port()
    shop.write("other.toml", f'[containers.web]{bridged}ports = ["{port}:80"]')
    shop.converge()
    pid = shop.pid("shop/web")
    shop.write("shop.toml", f'[containers.web]{bridged}ports = ["127.0.0.1:{port}:80"]')
    shop.sync()
    status = shop.wait_until(lambda now: not now["converged"])
    told = " ".join((*status["problems"], *status["blockers"]))
    assert str(port) in told
    assert "other" in told
    assert shop.pid("shop/web") == pid


def test_commands_end_with_the_code_of_their_class(agent: LiveAgent, tmp_path: Path) -> None:
    def code(*args: str) -> int:
        done = agent.cli(*args, check=False)
        assert done.stderr.startswith("holdfast: "), done.stderr
        assert "Traceback" not in done.stderr
        return done.returncode

    (tmp_path / "bad.toml").write_text("[containers.web]\nimage = 3\n")
    assert code("frobnicate") == os.EX_USAGE
    assert code("status", "--frobnicate") == os.EX_USAGE
    assert code("logs", "nothere") == os.EX_USAGE
    assert code("image", "import", "/nonexistent", "x:1") == os.EX_USAGE
    assert agent.cli("check", str(tmp_path / "bad.toml"), check=False).returncode == os.EX_DATAERR
    assert code("--config", "/nonexistent/agent.toml", "status") in (os.EX_CONFIG, os.EX_USAGE)
    taken = agent.cli("agent", check=False)
    assert taken.returncode == os.EX_CANTCREAT
    assert "one agent a root" in taken.stderr
    agent.stop()
    assert code("sync") == os.EX_UNAVAILABLE


def test_a_host_that_lacks_a_program_says_which(agent: LiveAgent) -> None:
    agent.stop()
    agent.configure(more='runtime = "/nonexistent/crun"')
    missing = agent.cli("agent", check=False)
    assert missing.returncode == os.EX_UNAVAILABLE
    assert "/nonexistent/crun" in missing.stderr
    assert missing.stderr.count("\n") == 1


def test_nobody_but_root_may_run_an_agent_or_ask_one(agent: LiveAgent) -> None:
    channel = (agent.host.run_root / "agent.sock").stat()
    assert stat.S_IMODE(channel.st_mode) & 0o007 == 0
    assert channel.st_uid == 0
    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        config = shutil.copy(agent.config, open_to_all)
        for command in ("agent", "status", "plan", "apply"):
            words = [HOLDFAST, command, "--config", config]
            stranger = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words]
            done = subprocess.run(stranger, capture_output=True, text=True, check=False)
            assert done.returncode == (1 if command == "plan" else os.EX_NOPERM), (command, done.stderr)
            assert done.stderr.count("\n") == 1
            assert "root" in done.stderr


def test_a_link_out_of_the_bind_roots_is_refused_while_what_runs_stays(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    (allowed / "data").mkdir(parents=True)
    (allowed / "out").symlink_to("/")
    agent = new_agent(site)
    agent.configure(more=f'policy.bind_roots = ["{allowed}"]')
    agent.start()
    agent.image("busybox:1")
    text = f'[containers.web]{SLEEPER}volumes = ["{allowed}/data:/x"]'
    agent.write("shop.toml", text)
    agent.converge()
    before = agent.pid("shop/web")
    agent.write("shop.toml", text.replace("/data:", "/out/etc:"))
    agent.sync()
    status = agent.wait_until(lambda status: "outside the bind_roots" in str(status["apps"]["shop"]))
    assert not status["converged"]
    assert agent.pid("shop/web") == before


def test_a_plan_says_that_the_state_can_not_be_read(agent: LiveAgent) -> None:
    agent.configure(state=json.dumps(str(agent.home / "gone")))
    agent.restart()
    done = agent.cli("plan", check=False)
    assert done.returncode == 1
    assert "gone': no such directory" in " ".join(done.stdout.split())
