"""Pulling and unpacking: a real image from a registry on this host into an empty store, and a second one that shares.

In each round everyone in turn begins on an ext4 just made (in a loop device, past the host's page cache): a store
emptied by deleting would be slow for some minutes, as ext4 looks at each inode deleted of late before it hands out
another one. The registry's files are in the page cache. Two moments count: when the tool says that it is done, and
when all of it has reached the disk (syncfs), because not everyone syncs before saying so: holdfast syncs each layer,
Docker 20.10 and podman 4 leave the files to the kernel's write-back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import machine
from contestant import quiet
from engines import dockerd, mounts_below, podman
from figures import Figures
from forge import Layer, push, real_images
from holdfast_agent import Holdfast

DISK = 16 << 30  # bytes; only what is written takes space
REST = 0.5
CACHE = Path(__file__).parents[1] / ".bench"
GOT = re.compile(r'"GET /v2/\S+ HTTP/[\d.]+" 200 (\d+)')
LIBC = ctypes.CDLL(None, use_errno=True)


class Store(Protocol):
    """Somebody's images, in a folder of the bench's own."""

    name: str

    def open(self, home: Path) -> str:
        """Be ready to pull into this folder, which is empty, and say which version this is."""
        ...

    def pull(self, reference: str) -> None:
        """Fetch and unpack; return when the tool says that it is done."""

    def close(self) -> None:
        """End what runs, and leave nothing mounted in the folder."""


class HoldfastStore:
    """An agent, and `holdfast image pull`."""

    name = "holdfast"

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.agent: Holdfast | None = None

    def open(self, home: Path) -> str:
        self.agent = Holdfast(home, home / "none", home, self.runtime)
        self.agent.start()
        return self.agent.call("version").strip()

    def pull(self, reference: str) -> None:
        assert self.agent
        self.agent.call("image", "pull", reference)

    def close(self) -> None:
        if self.agent is not None:
            self.agent.close()


class DockerStore:
    """A dockerd without a network of its own, and `docker pull`."""

    name = "docker"

    def __init__(self) -> None:
        self.host = ""
        self.daemon: subprocess.Popen[bytes] | None = None

    def open(self, home: Path) -> str:
        self.host = f"unix://{home}/docker.sock"
        self.daemon = dockerd(home, "--bridge=none", "--iptables=false", "--ip-forward=false")
        version = quiet("docker", "--host", self.host, "version", "--format", "{{.Server.Version}}").strip()
        return f"docker {version}"

    def pull(self, reference: str) -> None:
        quiet("docker", "--host", self.host, "pull", "--quiet", reference)

    def close(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(60)


class PodmanStore:
    """`podman pull`."""

    name = "podman"

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.base: list[str] = []
        self.home = Path()

    def open(self, home: Path) -> str:
        self.home, self.base = home, podman(home, self.runtime)
        quiet(*self.base, "images")  # makes the store
        return quiet("podman", "version", "--format", "podman {{.Client.Version}}").strip()

    def pull(self, reference: str) -> None:
        quiet(*self.base, "pull", "--quiet", "--tls-verify=false", reference)

    def close(self) -> None:
        for point in mounts_below(self.home):
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


@contextlib.contextmanager
def disk(home: Path) -> Iterator[Path]:
    """Mount a file system just made, which writes straight to the host's disk where that can be had."""
    image, folder = CACHE / "disk", home / "mounted"  # not on a /tmp that is memory
    with image.open("ab") as file:
        file.truncate(DISK)
    folder.mkdir(exist_ok=True)
    quiet("mkfs.ext4", "-F", "-q", "-J", "size=256", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", image)
    device = quiet("losetup", "--find", "--show", image).strip()
    try:
        subprocess.run(["losetup", "--direct-io=on", device], check=False, capture_output=True)
        quiet("mount", "-o", "noinit_itable", device, folder)
        try:
            inside = folder / "home"
            inside.mkdir()
            yield inside
        finally:
            quiet("umount", folder)
    finally:
        quiet("losetup", "--detach", device)


class Registry:
    """Debian's docker-registry on a free port of 127.0.0.1, without TLS; its log counts the bytes."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = log.with_suffix(".yml")
        config.write_text(
            f"version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: '{self.address}', secret: bench}}\n"
            f"storage: {{filesystem: {{rootdirectory: '{folder}'}}}}\n"
        )
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", config], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
                break
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise RuntimeError(f"docker-registry: {log.read_text()[-500:]}") from error
                time.sleep(0.05)

    def served(self) -> int:
        """Bytes of all bodies that were fetched so far."""
        return sum(int(match[1]) for match in GOT.finditer(self.log.read_text()))

    def warm(self) -> None:
        """Have every blob in the page cache."""
        for blob in self.folder.glob("docker/registry/v2/blobs/**/data"):
            with blob.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def registry(log: Path) -> Iterator[tuple[Registry, list[Layer], Layer]]:
    """A registry that has the images first and second; both are made and pushed once, and kept in the cache."""
    fresh = not (CACHE / "pushed").exists()
    if fresh:
        print(f"bench: making the images to pull, once, in {CACHE}", file=sys.stderr, flush=True)
    layout, layers, other = real_images(CACHE)
    (CACHE / "registry").mkdir(exist_ok=True)
    server = Registry(CACHE / "registry", log)
    try:
        if not (CACHE / "pushed").exists():
            for tag in ("first", "second"):
                push(layout, tag, f"{server.address}/bench:{tag}")
            (CACHE / "pushed").touch()
        yield server, layers, other
    finally:
        server.close()


def stores(names: list[str], runtime: str) -> list[Store]:
    """Those of these names who can pull."""
    every: list[Store] = [HoldfastStore(runtime), DockerStore(), PodmanStore(runtime)]
    return [store for store in every if store.name in names]


def race(stores: list[Store], home: Path, figures: Figures, rounds: int, idle: float) -> tuple[str, dict[str, str]]:
    """All rows, one round of everyone after the other; returns what was pulled, and the versions of who pulled it."""
    samples: dict[str, dict[tuple[str, str], list[float]]] = {store.name: {} for store in stores}
    versions: dict[str, str] = {}
    with registry(home / "registry.log") as (server, layers, other):
        for turn in range(rounds + 1):
            for store in [store for store in stores if store.name in samples]:
                print(f"{store.name}: pulling, round {turn}", file=sys.stderr, flush=True)
                try:
                    with disk(home) as folder, contextlib.closing(store):
                        versions[store.name] = store.open(folder)
                        for row, unit, value in _round(store, server, folder, idle):
                            samples[store.name].setdefault((row, unit), []).append(value)
                except (RuntimeError, OSError) as error:
                    print(f"bench: {store.name} gave up pulling: {error}", file=sys.stderr)
                    del samples[store.name]
    (CACHE / "disk").unlink(missing_ok=True)
    for name, rows in samples.items():
        print(name, file=sys.stderr)
        for (row, unit), values in rows.items():
            figures.put(row, unit, name, values[1:])  # the first round warms up whatever there is
    size, plain, files = (sum(getattr(layer, field) for layer in layers) for field in ("size", "plain", "files"))
    pulled = (
        f"{len(layers)} layers, {size / 1e6:.0f} MB (gzip), {plain / 1e6:.0f} MB plain, {files} entries; "
        f"the new layer {other.size / 1e6:.1f} MB, {other.files} entries"
    )
    return pulled, versions


def _round(store: Store, server: Registry, folder: Path, idle: float) -> Iterator[tuple[str, str, float]]:
    for tag, row in (("first", "pull"), ("second", "pull, one layer new")):
        server.warm()
        _sync(folder)
        time.sleep(REST)
        served, busy, begun = server.served(), machine.busy_seconds(), time.monotonic()
        store.pull(f"{server.address}/bench:{tag}")
        said = time.monotonic() - begun
        _sync(folder)
        durable = time.monotonic() - begun
        yield row, "s", said
        yield f"{row}, until on disk", "s", durable
        if idle <= machine.BUSY:
            yield f"{row}: CPU of the machine", "s", machine.busy_seconds() - busy - idle * durable
        yield f"{row}: from the registry", "MB", (server.served() - served) / 1e6


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if LIBC.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"sync the file system of {folder}")
    finally:
        os.close(descriptor)
