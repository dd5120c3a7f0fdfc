"""The floor: overlay, conmon and crun (or runc) by hand. Nobody who uses them can be faster.

Whatever the shape asks for, there is no network, port, volume or limit here: what these cost, the others show.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from busybox_image import unpack_tar
from contestant import Shape, Unsupported, quiet
from machine import processes

LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2
CGROUP = "holdfast-bench-floor"
CPUS = os.cpu_count() or 1


class Floor:
    """A bundle per container, written beforehand; `up` mounts, starts conmon, and starts the container."""

    name = "floor"

    def __init__(self, home: Path, image: Path, gate: Path, runtime: str) -> None:
        self.home, self.image, self.gate, self.runtime = home, image, gate, runtime
        self.program = shutil.which(runtime) or runtime
        self.conmon = shutil.which("conmon") or "conmon"
        self.running: list[str] = []

    def open(self) -> str:
        for folder in ("lower", "state", "exits", "attach"):
            (self.home / folder).mkdir(parents=True)
        unpack_tar(self.image, self.home / "lower")
        (self.home / "template").mkdir()
        subprocess.run([self.program, "spec"], cwd=self.home / "template", check=True, stdout=subprocess.DEVNULL)
        self.template = json.loads((self.home / "template/config.json").read_text())
        return f"overlay, conmon and {self.runtime} by hand, without a network in any row"

    def up(self, names: Sequence[str], shape: Shape) -> None:
        with ThreadPoolExecutor(CPUS) as pool:
            list(pool.map(self._start, names))

    def same(self) -> None:
        raise Unsupported

    def change(self, name: str) -> None:
        self._stop(name)
        self.running.remove(name)
        self._start(name)

    def pid(self, name: str) -> int:
        raise Unsupported  # nobody would start it again

    def show(self) -> None:
        quiet(self.program, "--root", self.home / "state", "list")

    def down(self) -> None:
        with ThreadPoolExecutor(CPUS) as pool:
            list(pool.map(self._stop, self.running))
        self.running = []

    def standing(self) -> list[int]:
        return processes("conmon", bearing=self.home)

    def close(self) -> None:
        self.down()
        for group in Path("/sys/fs/cgroup").glob(f"**/{CGROUP}"):
            group.rmdir()

    def _start(self, name: str) -> None:
        bundle = self._bundle(name)
        layers = f"lowerdir={self.home}/lower,upperdir={bundle}/upper,workdir={bundle}/work".encode()
        if LIBC.mount(b"overlay", str(bundle / "rootfs").encode(), b"overlay", 0, layers) != 0:
            raise OSError(ctypes.get_errno(), f"mount overlay at {bundle}")
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        options: list[str | Path] = [
            "--api-version", "1", "--cid", name, "--cuuid", name, "--bundle", bundle,
            "--runtime", self.program, "--runtime-arg", f"--root={self.home}/state",
            "--container-pidfile", bundle / "pid", "--conmon-pidfile", bundle / "conmon",
            "--exit-dir", self.home / "exits", "--socket-dir-path", self.home / "attach",
            "--log-path", f"k8s-file:{bundle}/log",
        ]  # fmt: skip
        subprocess.run(
            [self.conmon, *options],
            check=True,
            pass_fds=[writing],
            env={**os.environ, "_OCI_SYNCPIPE": str(writing)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(writing)
        created = json.loads(os.read(reading, 65536) or b"{}")
        os.close(reading)
        if created.get("data", -1) <= 0:
            raise RuntimeError(f"conmon: {created}")
        self.running.append(name)
        subprocess.run([self.program, "--root", self.home / "state", "start", name], check=True)

    def _stop(self, name: str) -> None:
        bundle = self.home / name
        pid, conmon = (int((bundle / name).read_text()) for name in ("pid", "conmon"))
        os.kill(pid, signal.SIGTERM)
        for each in (pid, conmon):
            while Path(f"/proc/{each}").exists():
                time.sleep(0.001)
        subprocess.run([self.program, "--root", self.home / "state", "delete", "--force", name], check=True)
        LIBC.umount2(str(bundle / "rootfs").encode(), MNT_DETACH)
        shutil.rmtree(bundle)

    def _bundle(self, name: str) -> Path:
        bundle = self.home / name
        for folder in ("upper", "work", "rootfs"):
            (bundle / folder).mkdir(parents=True)
        config = json.loads(json.dumps(self.template))
        config["root"] = {"path": "rootfs"}
        config["process"] |= {"args": ["/ready", name], "terminal": False}
        config["mounts"].append(
            {"destination": "/gate", "type": "bind", "source": str(self.gate), "options": ["rbind"]}
        )
        config["linux"]["cgroupsPath"] = f"/{CGROUP}/{name}"
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle
