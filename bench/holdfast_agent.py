"""holdfast among the contestants: an agent with a name and places of its own, asked by renaming a file into place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestant import IMAGE, NO_NETWORK, Shape, quiet
from footprint import cgroups, leftovers, links, mounts, netns, sweep
from holdfast.drivers import Host
from machine import processes

HOLDFAST = Path(sys.executable).with_name("holdfast")


class Holdfast:
    """One state file, `bench.toml`, holds all containers; with apart, each is an app in a file of its own."""

    name = "holdfast"

    def __init__(self, home: Path, image: Path, gate: Path, runtime: str) -> None:
        self.home, self.image, self.gate, self.runtime = home, image, gate, runtime
        self.host = Host("hfbench", home / "root", Path("/run/hfbench"), "10.212.0.0/16")
        self.state, self.config = home / "state", home / "agent.toml"
        self.agent: subprocess.Popen[bytes] | None = None
        self.asked: Sequence[str] = ()
        self.shape = NO_NETWORK
        self.round = 0
        self.image_name = IMAGE
        self.apart = False

    def open(self) -> str:
        self.start()
        self.call("image", "import", str(self.image), IMAGE)
        return f"{self.call('version').strip()} ({self.runtime})"

    def start(self) -> None:
        """Start an agent on an empty store, and wait until it answers."""
        self.state.mkdir(parents=True)
        self.config.write_text(
            f'name = "{self.host.name}"\nstate = "{self.state}"\nroot = "{self.host.root}"\n'
            f'run_root = "{self.host.run_root}"\nruntime = "{self.runtime}"\nnetwork.pool = "{self.host.pool}"\n'
        )
        sweep(self.host)
        with (self.home / "agent.log").open("wb") as log:
            self.agent = subprocess.Popen(
                [HOLDFAST, "agent", "--config", self.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not self._answers():
            if self.agent.poll() is not None or time.monotonic() > deadline:
                said = Path(log.name).read_text().strip()[-500:]
                raise RuntimeError(f"the agent does not answer: {said or 'it said nothing'}")
            time.sleep(0.05)

    def up(self, names: Sequence[str], shape: Shape) -> None:
        self.asked, self.shape = names, shape
        self._write({})

    def same(self) -> None:
        self.call("sync")

    def change(self, name: str) -> None:
        self.round += 1
        self._write({name: str(self.round)}, [name])

    def strangers(self, count: int) -> None:
        """Have so many state files of other nodes beside its own."""
        for number in range(count):
            self._put(f"stranger{number}", f'[app]\nwhen.nodes = ["elsewhere"]\n[containers.c]\nimage = "{IMAGE}"\n')

    def pid(self, name: str) -> int:
        app = name if self.apart else "bench"
        (instance,) = self._status()["apps"][app]["containers"][name]["instances"]
        return int(instance["pid"])

    def show(self) -> None:
        self.call("status")

    def down(self) -> None:
        for file in self.state.glob("*.toml"):
            file.unlink()
        deadline = time.monotonic() + 180
        while any(any(True for _ in found(self.host)) for found in (netns, links, cgroups, mounts)):
            if time.monotonic() > deadline:
                raise TimeoutError("still there after 180 s: " + ", ".join(leftovers(self.host)[:5]))
            time.sleep(0.005)

    def settle(self) -> None:
        """Wait until the agent says that nothing is left to do."""
        while not self._status()["converged"]:
            time.sleep(0.05)

    def standing(self) -> list[int]:
        assert self.agent
        return [self.agent.pid, *processes("conmon", bearing=self.host.run_root)]

    def close(self) -> None:
        if self.agent and self.agent.poll() is None:
            try:
                self.down()
            finally:
                self.agent.terminate()
                self.agent.wait(30)
        sweep(self.host)

    def _write(self, rounds: dict[str, str], changed: Sequence[str] = ()) -> None:
        """Put the state in place: one rename for each file. changed: those that alone have to be written again."""
        texts = {name: self._container(name, rounds.get(name, "")) for name in self.asked}
        if self.apart:
            for name in changed or self.asked:
                self._put(name, texts[name])
        else:
            self._put("bench", "\n".join(texts.values()))

    def _put(self, app: str, text: str) -> None:
        fresh = self.state / f".{app}.toml.new"
        fresh.write_text(text)
        fresh.rename(self.state / f"{app}.toml")

    def _container(self, name: str, round: str) -> str:
        shape = self.shape
        volumes = [f"{self.gate}:/gate", *(["/var/tmp:/data"] if shape.volume else [])]
        return "\n".join([
            f"[containers.{name}]",
            f'image = "{self.image_name}"',
            f'command = ["/ready", "{name}"]',
            f"volumes = {json.dumps(volumes)}",
            'restart = "always"',
            *([] if shape.network else ['networks = ["none"]']),
            *([f'ports = ["{shape.port}:80"]'] if shape.port else []),
            *([f'environment = {{ ROUND = "{round}" }}'] if round else []),
            *([f"resources = {{ memory = {shape.memory} }}"] if shape.memory else []),
        ])  # fmt: skip

    def _status(self) -> Any:
        return json.loads(self.call("status", "--json"))

    def _answers(self) -> bool:
        try:
            self._status()
        except RuntimeError:
            return False
        return True

    def call(self, *args: str) -> str:
        """Run the command against this agent, and return what it prints."""
        return quiet(HOLDFAST, *args, env={**os.environ, "HOLDFAST_CONFIG": str(self.config)})
