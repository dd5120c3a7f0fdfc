"""Docker (with Compose for many) and podman among the contestants, with storage and state of their own.

dockerd is started here, by hand, on folders and a socket below the bench's own; it is stopped by its pid, and what it
left in the firewall and among the links is taken away again. An engine that runs already is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contestant import IMAGE, NO_NETWORK, Shape, Unsupported, quiet
from machine import processes

LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")  # podman would raise them; a host may forbid that
AT_A_TIME = 4  # `podman run`s side by side: more of them are not faster on a small machine


def run_options(name: str, shape: Shape, gate: Path) -> list[str]:
    """What `docker run` and `podman run` have in common."""
    return [
        "--detach", "--name", name, "--restart", "always", "--volume", f"{gate}:/gate",
        *([] if shape.network else ["--network", "none"]),
        *(["--publish", f"{shape.port}:80"] if shape.port else []),
        *(["--volume", "/var/tmp:/data"] if shape.volume else []),
        *(["--memory", str(shape.memory)] if shape.memory else []),
    ]  # fmt: skip


def dockerd(home: Path, *options: str) -> subprocess.Popen[bytes]:
    """An engine with all it has in home, answering on its docker.sock. Raises RuntimeError if it does not."""
    with (home / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", home / "data", "--exec-root", home / "exec", "--pidfile", home / "dockerd.pid",
             "--host", f"unix://{home}/docker.sock", *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            quiet("docker", "--host", f"unix://{home}/docker.sock", "version")
            return daemon
        except RuntimeError:
            if daemon.poll() is not None or time.monotonic() > deadline:
                daemon.kill()
                raise
            time.sleep(0.1)


def podman(home: Path, runtime: str) -> list[str]:
    """How every command to a podman begins that has all it has in home."""
    return ["podman", "--root", str(home / "root"), "--runroot", str(home / "run"), "--runtime", runtime,
            "--cgroup-manager", "cgroupfs", "--storage-driver", "overlay"]  # fmt: skip


class Docker:
    """`docker run` for one container, Compose for several and for everything after."""

    name = "docker"

    def __init__(self, home: Path, image: Path, gate: Path) -> None:
        self.home, self.image, self.gate = home, image, gate
        self.host = f"unix://{home}/docker.sock"
        # Compose v1 deadlocks with many services unless it may start them all at once.
        self.env = {
            **os.environ,
            "DOCKER_HOST": self.host,
            "COMPOSE_PARALLEL_LIMIT": "1000",
            "COMPOSE_HTTP_TIMEOUT": "300",
        }
        self.compose_file = home / "compose.json"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.ruleset: str | None = None
        self.asked: Sequence[str] = ()
        self.shape = NO_NETWORK
        self.round = 0

    def open(self) -> str:
        if processes("dockerd"):
            raise RuntimeError("a dockerd runs on this host already; stop it to have docker measured")
        self.home.mkdir(parents=True)
        self.tables = nft_tables()
        self.ruleset = quiet("iptables-save") if shutil.which("iptables-save") and self.tables else None
        self.daemon = dockerd(self.home)
        version = self._docker("version", "--format", "{{.Server.Version}}").strip()
        self._docker("import", str(self.image), IMAGE)
        self.compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        return f"docker {version}, {quiet(*self.compose, 'version', '--short').strip()} for many"

    def up(self, names: Sequence[str], shape: Shape) -> None:
        self.asked, self.shape = names, shape
        if len(names) == 1:
            self._docker("run", *run_options(names[0], shape, self.gate), IMAGE, "/ready", names[0])
            return
        self._write({})
        self.same()

    def same(self) -> None:
        quiet(*self.compose, "--file", self.compose_file, "--project-name", "bench", "up", "--detach", env=self.env)

    def change(self, name: str) -> None:
        self.round += 1
        self._write({name: str(self.round)})
        self.same()

    def pid(self, name: str) -> int:
        return int(self._docker("inspect", "--format", "{{.State.Pid}}", name))

    def show(self) -> None:
        self._docker("ps")

    def down(self) -> None:
        if len(self.asked) > 1:
            quiet(*self.compose, "--file", self.compose_file, "--project-name", "bench", "down", env=self.env)
        elif self.asked:
            self._docker("stop", *self.asked)
            self._docker("rm", *self.asked)
        self.asked = ()

    def standing(self) -> list[int]:
        return processes("dockerd", "containerd", "containerd-shim", "containerd-shim-runc-v2", "docker-proxy")

    def close(self) -> None:
        if self.daemon is None:
            return
        if self.daemon.poll() is None:
            with contextlib.suppress(RuntimeError):
                self.down()
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(60)
        for table in nft_tables() - self.tables:
            quiet("nft", "delete", "table", *table.split())
        if self.ruleset is not None:
            subprocess.run(["iptables-restore"], input=self.ruleset.encode(), check=True)
        subprocess.run(["ip", "link", "delete", "docker0"], check=False, capture_output=True)

    def _write(self, rounds: dict[str, str]) -> None:
        self.compose_file.write_text(json.dumps({
            "version": "2.4",
            "services": {name: self._service(name, rounds.get(name, "")) for name in self.asked},
        }))  # fmt: skip

    def _service(self, name: str, round: str) -> dict[str, object]:
        return {
            "image": IMAGE,
            "container_name": name,
            "command": ["/ready", name],
            "volumes": [f"{self.gate}:/gate"],
            "restart": "always",
            "network_mode": "bridge" if self.shape.network else "none",
            **({"environment": {"ROUND": round}} if round else {}),
        }

    def _docker(self, *args: str) -> str:
        return quiet("docker", "--host", self.host, *args)


class Podman:
    """`podman run`, several side by side for many."""

    name = "podman"

    def __init__(self, home: Path, image: Path, gate: Path, runtime: str) -> None:
        self.home, self.image, self.gate = home, image, gate
        self.base = podman(home, runtime)
        self.asked: Sequence[str] = ()
        self.shape = NO_NETWORK
        self.links: set[str] = set()

    def open(self) -> str:
        self.home.mkdir(parents=True)
        self.links, self.tables = link_names(), nft_tables()
        quiet(*self.base, "import", self.image, IMAGE)
        return quiet("podman", "version", "--format", "podman {{.Client.Version}}").strip()

    def up(self, names: Sequence[str], shape: Shape) -> None:
        self.asked, self.shape = names, shape
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(self._run, names))

    def same(self) -> None:
        raise Unsupported  # nothing that compares: `podman run` fails, `kube play` replaces

    def change(self, name: str) -> None:
        quiet(*self.base, "rm", "--force", name)
        self._run(name)

    def pid(self, name: str) -> int:
        return int(quiet(*self.base, "inspect", "--format", "{{.State.Pid}}", name))

    def show(self) -> None:
        quiet(*self.base, "ps")

    def down(self) -> None:
        if self.asked:
            quiet(*self.base, "stop", *self.asked)
            quiet(*self.base, "rm", "--force", *self.asked)
        self.asked = ()

    def standing(self) -> list[int]:
        return processes("conmon", bearing=self.home)

    def close(self) -> None:
        self.down()
        subprocess.run([*self.base, "rmi", "--all", "--force"], check=False, capture_output=True)
        for point in mounts_below(self.home):
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
        for link in link_names() - self.links:
            subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)
        for table in nft_tables() - self.tables:
            quiet("nft", "delete", "table", *table.split())

    def _run(self, name: str) -> None:
        options = [*run_options(name, self.shape, self.gate), *LIMITS]
        quiet(*self.base, "run", *options, IMAGE, "/ready", name)


def nft_tables() -> set[str]:
    """Tables of nftables, as `family name`."""
    return {line.removeprefix("table ") for line in quiet("nft", "list", "tables").splitlines()}


def link_names() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def mounts_below(folder: Path) -> list[str]:
    """Mount points below a folder, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith(f"{folder}/")]
