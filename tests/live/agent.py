"""A real agent for one test: its own name, places and addresses; driven by files and commands, like anyone's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from footprint import find_leftovers
from ground import Rootfs, patient, wait_for
from holdfast.cli.client import Client
from holdfast.drivers import Host
from holdfast.errors import NoAgent, TryAgain
from live import forkserver

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
Status = Mapping[str, Any]


class LiveAgent:
    """An agent's folder (agent.toml, state/, agent.log) and, between start and stop, its process."""

    def __init__(self, host: Host, home: Path, rootfs: Rootfs) -> None:
        self.host, self.home, self.rootfs = host, home, rootfs
        self.state = home / "state"
        self.config = home / "agent.toml"
        self.process: subprocess.Popen[bytes] | forkserver.Process | None = None
        self._read = ""  # the agent.toml that the process has read
        self.through: tuple[str, ...] = ()  # a program that runs the installed script `holdfast`, and its words
        self.state.mkdir(parents=True)
        self.configure()

    def configure(self, *, state: str | None = None, more: str = "") -> None:
        """Write agent.toml. state: the TOML value of `state` (default: the state folder). more: appended lines
        (dotted keys where they add to `node` or `network`)."""
        self._replace(
            self.config,
            f'name = "{self.host.name}"\nstate = {state or json.dumps(str(self.state))}\n'
            f'root = "{self.host.root}"\nrun_root = "{self.host.run_root}"\n'
            f'node.name = "node"\nnetwork.pool = "{self.host.pool}"\n{more}\n',
        )

    def start(self) -> None:
        """Start the process and wait until it answers."""
        self._read = self.config.read_text()
        words = ("agent", "--config", str(self.config))
        with (self.home / "agent.log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
            if self.through:
                self.process = subprocess.Popen(
                    [*self.through, HOLDFAST, *words],
                    stdin=nothing, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            else:
                self.process = forkserver.start(words, os.environ, [nothing.fileno(), log.fileno(), log.fileno()])
        self.wait(lambda: self._answers(), "the agent answers")

    def stop(self, signal_number: int = signal.SIGTERM, timeout: float = 20) -> None:
        """End the process; its containers run on. Does nothing when it is not running."""
        if self.process is not None:
            self.process.send_signal(signal_number)
            self.process.wait(patient(timeout))
            self.process = None

    def kill(self) -> None:
        """End the process with SIGKILL, in the middle of whatever it does."""
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def write(self, file: str, text: str) -> None:
        """Put a state file (or any file of the revision) in place with one rename, as editors and git do."""
        self._replace(self.state / file, text)

    def remove(self, file: str) -> None:
        (self.state / file).unlink()

    def image(self, name: str, tar: Path | None = None) -> None:
        """Import a root file system tar (default: busybox) under this name."""
        path = str(tar or self.rootfs.tar)
        try:
            Client(self.host.run_root / "agent.sock").import_image(path, name)
        except NoAgent:
            self.cli("image", "import", path, name)

    def cli(self, *args: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run `holdfast args…` against this agent; check: raise AssertionError unless it exits 0."""
        environment = {**os.environ, "HOLDFAST_CONFIG": str(self.config)}
        environment.pop("COLUMNS", None)  # a test that runs beside others has it, and tables would fold
        if self.through:
            done = subprocess.run(
                [*self.through, HOLDFAST, *args], check=False, env=environment, text=True, timeout=patient(timeout),
                stdin=subprocess.DEVNULL, capture_output=True,
            )  # fmt: skip
        else:
            done = forkserver.run(args, environment, patient(timeout))
        if check:
            assert done.returncode == 0, (
                f"holdfast {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def status(self) -> Status:
        """What `holdfast status --json` prints; asked here, because tests ask it often."""
        try:
            status: Status = Client(self.host.run_root / "agent.sock").status()
        except NoAgent:
            status = json.loads(self.cli("status", "--json").stdout)
        return status

    def instances(self, container: str) -> list[Status]:
        """What status says of the instances of `app/container`; none if it is not there."""
        app, _, name = container.partition("/")
        containers = self.status()["apps"].get(app, {}).get("containers", {})
        return list(containers.get(name, {}).get("instances", []))

    def pid(self, container: str) -> int:
        """The process id of a container that runs with one instance."""
        (instance,) = self.instances(container)
        assert instance["pid"], f"{container} does not run: {instance}"
        return int(instance["pid"])

    def exec(self, container: str, *command: str) -> str:
        """What a command prints inside a container; raise AssertionError unless it exits 0."""
        return self.cli("exec", container, *command).stdout

    def events(self) -> list[Status]:
        """Everything that happened so far, oldest first."""
        try:
            return [event for event in Client(self.host.run_root / "agent.sock").events() if event]
        except NoAgent:
            lines = self.cli("events", "--json", "--tail", "1000").stdout.splitlines()
            return [json.loads(line) for line in lines]

    def sync(self) -> None:
        """Have the agent read its source and compare, now."""
        Client(self.host.run_root / "agent.sock").sync()

    def converge(self, timeout: float = 60) -> Status:
        """Sync, then wait until the agent says that all is as committed."""
        self.sync()
        return self.wait_until(lambda status: bool(status["converged"]), timeout)

    def wait_until(self, condition: Callable[[Status], bool], timeout: float = 60) -> Status:
        """Wait until the status meets condition, and return it."""
        status: Status = {}

        def met() -> bool:
            nonlocal status
            status = self.status()
            return condition(status)

        self.wait(met, "the status is as expected", timeout, lambda: json.dumps(status, indent=1))
        return status

    def wait(
        self, condition: Callable[[], bool], what: str, timeout: float = 60, state: Callable[[], str] = lambda: ""
    ) -> None:
        """Wait until condition holds; fails at once when the agent that should see to it has died."""

        def met() -> bool:
            assert self.process is None or self.process.poll() is None, f"the agent died:\n{self.log()}"
            return condition()

        wait_for(met, what, timeout, state, pause=0.03)

    def log(self) -> str:
        """The last 16 KiB of what the agent wrote."""
        path = self.home / "agent.log"
        return path.read_text(errors="replace")[-16384:] if path.exists() else ""

    def close(self) -> None:
        """Ask for nothing, wait until the host is as it was, and stop. The test's last word: it may fail here."""
        if not any(find_leftovers(self.host)):
            self.process = None
            return
        self._empty_state()
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.sync()
            self.wait(lambda: not any(self._held()), "nothing is left", state=lambda: "\n".join(self._held()))
        finally:
            self.stop()

    def _held(self) -> Iterator[str]:
        """What is left besides the agent itself and its socket, lock and files of its own."""
        mine = str(self.process.pid) if self.process else "-"
        kept = (f"process {mine}:", "file ", "delegation ")
        return (line for line in find_leftovers(self.host) if not line.startswith(kept))

    def _empty_state(self) -> None:
        self.configure()  # a test may have pointed `state` elsewhere, or forbidden what it takes to clean up
        for path in self.state.rglob("*.toml"):
            path.unlink()
        if self.process and self.process.poll() is None and self._read != self.config.read_text():
            self.restart()

    def _answers(self) -> bool:
        try:
            Client(self.host.run_root / "agent.sock").status()
        except (NoAgent, TryAgain):  # it has not begun to listen, or its first pass is under way
            return False
        return True

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.replace(path)
