"""Plugins that misbehave, in a real agent: it goes on, and says which plugin it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import HOLDFAST, LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone")]

WEB = """
[containers.web]
image = "busybox:1"
command = ["sleep", "1000"]
stop_grace_period = "0s"
networks = ["none"]
restart = "always"
"""

PLAIN = """
from pathlib import Path
from holdfast.hookspecs import hookimpl
from holdfast.observed import Receipt

class Plain:
    name = "plain"
    def __init__(self, host):
        self.root = host.root / "volumes-plain"
    def check(self, want): pass
    def ensure(self, want):
        path = self.root / want.id.replace("/", "@")
        path.mkdir(parents=True, exist_ok=True)
        return Receipt("volume", self.name, want.id, data={"path": str(path)})
    def observe(self):
        for path in self.root.glob("*@*"):
            yield Receipt("volume", self.name, path.name.replace("@", "/"), data={"path": str(path)})
    def remove(self, receipt):
        (self.root / receipt.id.replace("/", "@")).rmdir()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a plugin where the agent's Python finds it, or without code take it away again."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def install(code: str | None, name: str = "odd") -> None:
        module, info = site / f"{name}_plugin.py", site / f"holdfast_{name}-1.0.dist-info"
        if code is None:
            module.unlink()
            for file in info.iterdir():
                file.unlink()
            info.rmdir()
            return
        info.mkdir(exist_ok=True)
        module.write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: holdfast-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[holdfast]\n{name} = {name}_plugin\n")

    return install


def plugin(agent: LiveAgent, name: str = "odd") -> dict[str, str]:
    found: list[dict[str, str]] = json.loads(agent.cli("plugin", "list", "--json").stdout)
    return next(each for each in found if each["name"] == name)


def test_an_observe_that_exits_or_hangs_hides_no_ended_container(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    switch = tmp_path / "switch"
    install(
        PLAIN
        + f"""
import sys, time
class Odd(Plain):
    name = "odd"
    def observe(self):
        switch = Path({str(switch)!r})
        match switch.read_text() if switch.exists() else "":
            case "exit": sys.exit(1)
            case "hang":
                while switch.exists(): time.sleep(0.05)
        return super().observe()

@hookimpl
def register_volume_drivers(register, host):
    register(Odd(host))
"""
    )
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB + 'volumes = ["data:/data"]\n[volumes.data]\ndriver = "odd"\n')
    agent.converge()
    for fault, words in (("exit", "raised SystemExit"), ("hang", "has not answered since")):
        switch.write_text(fault)
        before = agent.pid("shop/web")
        os.kill(before, signal.SIGKILL)
        agent.wait(lambda b=before: agent.instances("shop/web")[0]["pid"] not in (None, b), "it is up again")  # type: ignore[misc]
        assert "SystemExit" in plugin(agent)["error"] if fault == "exit" else words in plugin(agent)["error"]
        assert "shop/data" in agent.cli("volume", "list").stdout
        agent.sync()
        assert any(each["name"] == "odd" for each in agent.status()["plugins"])
    agent.stop()
    shown = json.loads(agent.cli("status", "--json").stdout)
    assert "has not answered since" in next(each for each in shown["plugins"] if each["name"] == "odd")["error"]
    switch.unlink()
    agent.start()
    agent.converge()
    assert plugin(agent)["state"] == "ok"
    agent.remove("shop.toml")
    agent.converge()
    agent.cli("volume", "prune", "--force")


def test_an_ensure_that_exits_is_tried_again_later_and_later(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    install(
        PLAIN
        + """
import sys
class Odd(Plain):
    name = "odd"
    def ensure(self, want): sys.exit("no more")

@hookimpl
def register_volume_drivers(register, host):
    register(Odd(host))
"""
    )
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("good.toml", WEB)
    agent.write("shop.toml", WEB + 'volumes = ["data:/data"]\n[volumes.data]\ndriver = "odd"\n')
    agent.sync()
    reason = "volume driver 'odd': ensure: raised SystemExit: no more"
    agent.wait_until(lambda status: reason in json.dumps(status["apps"].get("shop", {})))
    assert len([each for each in agent.events() if each["kind"] == "failed"]) < 5, "it backs off"
    agent.wait(lambda: bool(agent.instances("good/web")), "the other app is up")
    agent.remove("shop.toml")
    agent.converge()


def test_threads_that_a_plugin_leaves_behind_keep_no_agent_alive(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    install(
        """
import threading, time
threading.Thread(target=lambda: time.sleep(600), daemon=False).start()
"""
    )
    agent = new_agent(site)
    agent.start()
    began = time.monotonic()
    agent.stop(timeout=30)
    assert time.monotonic() - began < 30
    assert agent.cli("version", timeout=30).stdout.startswith("holdfast "), sys.executable


def test_an_agent_starts_beside_a_driver_that_can_not_say_what_became_of_a_removal(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    removing, broken = tmp_path / "removing", tmp_path / "broken"
    install(
        PLAIN
        + f"""
import time
class Odd(Plain):
    name = "odd"
    def observe(self):
        if Path({str(broken)!r}).exists():
            raise RuntimeError("lost my way")
        return super().observe()
    def remove(self, receipt):
        Path({str(removing)!r}).touch()
        while not Path({str(broken)!r}).exists(): time.sleep(0.05)
        super().remove(receipt)

@hookimpl
def register_volume_drivers(register, host):
    register(Odd(host))
"""
    )
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB + 'volumes = ["data:/data"]\n[volumes.data]\ndriver = "odd"\n')
    agent.converge()
    agent.remove("shop.toml")
    agent.converge()
    with subprocess.Popen(
        [HOLDFAST, "--config", str(agent.config), "volume", "remove", "--force", "shop/data"]
    ) as asks:
        agent.wait(removing.exists, "the volume is being removed")
        asks.kill()  # else it would remove it by itself
    agent.kill()
    broken.touch()
    agent.start()
    assert "lost my way" in plugin(agent)["error"]
    broken.unlink()


PATCH = """
from holdfast.hookspecs import hookimpl
{declared}
@hookimpl
def adjust_oci_config(config):
    {body}
"""
ENV = """return {"process": {"env": [*config["process"]["env"], "PATCHED=yes"]}}"""


def env_of(agent: LiveAgent, container: str) -> str:
    return Path(f"/proc/{agent.pid(container)}/environ").read_text()


def test_a_container_that_lacks_a_required_patch_is_started_again_with_it(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB)
    agent.converge()
    before = agent.pid("shop/web")

    install(PATCH.format(declared="", body="raise KeyError('no patch')"))
    agent.restart()
    agent.write("new.toml", WEB)
    agent.sync()
    agent.wait_until(lambda status: status["apps"]["new"]["state"] == "failed")
    assert "plugin 'odd': adjust_oci_config: KeyError: 'no patch'" in agent.status()["apps"]["new"]["reason"]
    assert agent.pid("shop/web") == before, "to stop it would not get it the patch"

    install(PATCH.format(declared="", body=ENV))
    agent.restart()
    agent.converge()
    assert agent.pid("shop/web") != before
    assert "PATCHED=yes" in env_of(agent, "shop/web")
    assert "PATCHED=yes" in env_of(agent, "new/web")
    assert any("plugin 'odd' has not adjusted" in str(event.get("message")) for event in agent.events())

    install(None)
    agent.restart()
    agent.sync()
    patched = agent.pid("shop/web")
    agent.write("late.toml", WEB)
    agent.sync()
    agent.wait_until(lambda status: status["apps"]["late"]["state"] == "failed")
    assert "holdfast plugin forget odd" in agent.status()["apps"]["late"]["reason"]
    assert plugin(agent)["state"] == "missing"
    assert "plugin odd" in agent.cli("doctor", check=False).stdout
    assert agent.cli("plugin", "forget", "web", check=False).returncode == 64
    agent.cli("plugin", "forget", "odd")
    agent.converge()
    assert "PATCHED" not in env_of(agent, "late/web")
    assert agent.pid("shop/web") == patched


def test_an_optional_patch_that_fails_is_a_warning(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    install(PATCH.format(declared='ADJUST_OCI_CONFIG = "optional"', body="return 5"))
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB)
    agent.converge()
    (instance,) = agent.instances("shop/web")
    assert instance["warnings"] == ["plugin 'odd': adjust_oci_config: returned int (expected a table or None)"]


def test_a_start_that_fails_with_a_patch_names_the_plugin(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    install(PATCH.format(declared="", body="return {'process': {'args': ['/no/such/program']}}"))
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB)
    agent.sync()
    shown = agent.wait_until(lambda status: "/no/such/program" in json.dumps(status["apps"].get("shop", {})))
    assert "with a config.json that was adjusted by plugin odd" in json.dumps(shown["apps"]["shop"])


def test_poststop_hooks_run_when_the_container_is_deleted(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"echo x >> {mark}"]}
    install(PATCH.format(declared="", body=f"return {{'hooks': {{'poststop': [{hook!r}]}}}}"))
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB)
    agent.converge()
    before = agent.pid("shop/web")
    os.kill(before, signal.SIGKILL)
    agent.wait(lambda: mark.exists() and mark.read_text() == "x\n", "the hook ran before the next start")
    agent.remove("shop.toml")
    agent.converge()
    assert mark.read_text() == "x\nx\n"


def test_a_driver_that_is_uninstalled_while_it_is_in_use_is_shown(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    driver = "\n@hookimpl\ndef register_volume_drivers(register, host):\n    register(Plain(host))\n"
    install(PLAIN + driver)
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    state = WEB + 'volumes = ["data:/data"]\n[volumes.data]\ndriver = "plain"\n'
    agent.write("shop.toml", state)
    agent.converge()
    install(None)
    agent.restart()
    agent.sync()
    status = agent.status()
    title, words = "volume driver 'plain'", "no plugin offers it, and it made shop/data (install holdfast-odd again)"
    assert not status["converged"]
    assert status["waiting"][title] == words
    assert {"name": title, "state": "missing", "error": words}.items() <= status["plugins"][0].items()
    plan = agent.cli("plan", check=False)
    assert plan.returncode != 0
    assert words in " ".join(plan.stdout.split())
    checked = agent.cli("check", str(agent.state), check=False)
    assert checked.returncode == 65
    assert "shop.toml:10: volumes.data.driver: no plugin offers the volume driver 'plain'" in checked.stdout
    assert agent.cli("check", "--any-driver", str(agent.state)).returncode == 0
    install(PLAIN + driver)
    agent.restart()
    agent.converge()
    agent.remove("shop.toml")
    agent.converge()
    agent.cli("volume", "prune", "--force")


def test_a_policy_that_comes_to_something_else_reaches_running_containers(
    install: Callable[..., None], new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    policy = """
from holdfast.hookspecs import hookimpl

class Few:
    name = "few"
    def check(self, want): pass
    def settings(self, want): return {"resources": {"pids": {"limit": %d}}}

@hookimpl
def register_cgroup_policies(register, host):
    register(Few())
"""
    install(policy % 77)
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", WEB + '[containers.web.resources]\npolicy = ["limits", "few"]\n')
    agent.converge()
    before = agent.pid("shop/web")
    assert pids_max(before) == "77"
    install(policy % 88)
    agent.restart()
    agent.converge()
    assert pids_max(before) == "88"
    assert agent.pid("shop/web") == before


def pids_max(pid: int) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "pids":
            return Path(f"/sys/fs/cgroup/pids{path}/pids.max").read_text().strip()
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path(f"/sys/fs/cgroup{path}/pids.max").read_text().strip()
    raise AssertionError(f"process {pid} is in no pids cgroup")
