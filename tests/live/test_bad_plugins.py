"""Plugins that misbehave, in a real agent: it goes on, and says which plugin it is."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent

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
