"""Runs buildah (1.28 and newer) on a storage of its own, behind a fence: none of it outlives a build, or the agent.

    ROOT/builds/storage/         buildah's images and layers, kept from build to build: the layer cache
    ROOT/builds/work/            what one build needs; empty between builds
    ROOT/builds/lock             held by whoever builds, and by every process that this started
    ROOT/builds/open             there while the storage is written to, and after a crash; holds the boot's id
    RUN_ROOT/builds/             buildah's and the OCI runtime's state; gone between builds

`build` calls it. One build at a time: the storage is small enough to be looked through, and a node has other work.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from holdfast.config import ImageSettings
from holdfast.drivers import Host, remove_tree
from holdfast.errors import TryAgain, UnfitHost
from holdfast.images import fence

CACHE_LIMIT = 10 << 30  # bytes of the storage; above it, what no image of the store is named after goes
QUIET = 3600.0  # seconds without a word after which a build is given up
KEPT_LINES = 20_000  # of what a program says, for who asked; the longest answer is an image's configuration
LONGEST_LINE = 64 << 10  # bytes; more of one line is cut
CLEANING = 10.0  # seconds that a killed build is given to be gone
STEP = re.compile(r"(\[\d+/\d+\] )?STEP \d+(/\d+)?: ?")  # what buildah says before it begins an instruction
POLICY = b'{"default": [{"type": "insecureAcceptAnything"}]}'  # for what never leaves this node

_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A program ended with another status than 0. output, errors: the last lines of what it said, where; errors of
    a build are those of its last step."""

    def __init__(self, status: int, output: Sequence[str], errors: Sequence[str]) -> None:
        super().__init__(f"exit status {status}")
        self.output, self.errors = output, errors


class Buildah:
    """buildah of one agent. runtime: crun's or runc's path."""

    def __init__(self, settings: ImageSettings, host: Host, runtime: Path) -> None:
        self.settings, self.host, self.runtime = settings, host, runtime
        self.folder, self.run_folder = host.root / "builds", host.run_root / "builds"
        self.storage, self.work = self.folder / "storage", self.folder / "work"
        self._mine, self._lock_file = threading.Lock(), -1
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Build while the block runs: nobody else does. What a killed build left is cleared away before."""
        for program in ("buildah", "skopeo"):
            if find(program) is None:
                raise UnfitHost(f"run '{program}': no such program (expected the package {program}, for [images.*])")
        with self._mine, self._locked(wait=True):
            self._clear()
            self.work.mkdir(parents=True)
            self.run_folder.mkdir(parents=True, exist_ok=True)
            _write_synced(self._open, _boot())
            try:
                yield
                if self.storage.exists():
                    _sync(self.storage)
                self._open.unlink()
            finally:
                self._clear_run()

    def sweep(self) -> None:
        """Clear away what a killed agent's build left; what is being built is left alone. Blocks for a moment."""
        if not (self.folder.exists() or self.run_folder.exists()):
            return
        with self._mine, self._locked(wait=False) as held:
            if held:
                self._clear_run()

    def close(self) -> None:
        """Kill what is being built, and build nothing any more."""
        self._closed = True
        if (process := self._process) is not None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # the fence kills all that is behind it, and waits for the end

    def run(self, *words: str, hear: Callable[[str], None] = lambda line: None) -> list[str]:
        """Run a command of buildah's; the last lines of its output. hear: called with every line. Raises Failed."""
        common = [*self._place, "--storage-driver", "overlay"]
        if self.settings.registries_conf:
            common += ["--registries-conf", str(self.settings.registries_conf)]
        return self._run(["buildah", *common, *words], hear)

    def build(self, words: Sequence[str], hear: Callable[[str], None]) -> None:
        """Run `buildah build` with these arguments. Raises Failed."""
        runtime = ["--runtime", str(self.runtime), "--runtime-flag", f"root={self.run_folder}/runtime"]
        policy = ["--signature-policy", str(self.settings.policy)] if self.settings.policy else []
        authfile = ["--authfile", str(self.settings.authfile)] if self.settings.authfile else []
        fixed = ["--layers", "--force-rm", "--format", "oci", "--isolation", "oci", "--cgroup-parent", self.cgroup]
        self.run("build", *fixed, *runtime, *policy, *authfile, *words, hear=hear)

    def take_in(self, layout: Path, name: str) -> None:
        """Bring an image of an OCI layout (tag `latest`) into the storage, by this name. Raises Failed."""
        self._copy(f"oci:{layout}:latest", f"{self._transport}{name}")

    def take_out(self, image: str, layout: Path) -> None:
        """Copy an image (its id) from the storage into an OCI layout, its layers plain; blobs that are there stay."""
        self._copy("--dest-oci-accept-uncompressed-layers", f"{self._transport}@{image}", f"oci:{layout}:latest")

    def send(self, index: str, tag: str, hear: Callable[[str], None]) -> None:
        """Push an index of the storage, with all images in it, to a registry. Raises Failed."""
        words = ["--authfile", str(self.settings.authfile)] if self.settings.authfile else []
        words += ["--tls-verify=false"] if on_loopback(tag) else []
        policy = ["--signature-policy", str(self._lenient())]
        self.run("manifest", "push", "--quiet", "--all", *policy, *words, index, f"docker://{tag}", hear=hear)

    def config(self, image: str) -> Any:
        """The OCI configuration of an image of the storage (name or id). Raises Failed."""
        return json.loads("\n".join(self.run("inspect", "--type", "image", image)))["OCIv1"]

    def names(self) -> dict[str, str]:
        """Every name in the storage and the id it leads to."""
        images = self._read("overlay-images/images.json")
        return {name: image["id"] for image in images for name in image.get("names") or ()}

    def size(self) -> int:
        """Bytes of all layers in the storage."""
        return sum(layer.get("diff-size", 0) for layer in self._read("overlay-layers/layers.json"))

    def prune(self, keep: Callable[[str], bool]) -> None:
        """Forget names that keep is not true of; where the storage is too large even so, forget what has no name, and
        at last everything."""
        doomed = [name for name in self.names() if not keep(name)]
        with suppress(Failed):
            if doomed:
                self.run("rmi", *doomed)
            if self.size() > CACHE_LIMIT:
                self.run("rmi", "--prune")
        if self.size() > CACHE_LIMIT:
            self.wipe()

    def wipe(self) -> None:
        """Empty the storage."""
        _remove(self.storage)

    def _copy(self, *words: str) -> None:
        self._run(["skopeo", "--policy", str(self._lenient()), "copy", "--quiet", *words], lambda line: None)

    @property
    def _transport(self) -> str:
        """How skopeo names the storage (containers-transports(5))."""
        return f"containers-storage:[overlay@{self.storage}+{self.run_folder}/storage]"

    @property
    def cgroup(self) -> str:
        """Where RUN steps live, relative to each hierarchy's root."""
        return f"{self.host.cgroup}-build"

    @property
    def _place(self) -> list[str]:
        return ["--root", str(self.storage), "--runroot", f"{self.run_folder}/storage"]

    @property
    def _open(self) -> Path:
        return self.folder / "open"

    def _read(self, path: str) -> list[Any]:
        try:
            found: list[Any] = json.loads((self.storage / path).read_bytes())
        except (FileNotFoundError, ValueError):
            return []
        return found

    def _lenient(self) -> Path:
        path = self.work / "policy.json"
        path.write_bytes(POLICY)
        return path

    @contextmanager
    def _locked(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of all processes that build; a killed agent's are gone once it can be had."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + CLEANING
        try:
            while True:
                try:
                    fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        if not wait:
                            yield False
                            return
                        raise TryAgain("another process is building here") from None
                    time.sleep(0.02)
            yield True
        finally:
            os.close(self._lock_file)
            self._lock_file = -1

    def _clear(self) -> None:
        """Clear away what a killed build left. After a crash of the host, half of the storage may be missing."""
        self._clear_run()
        try:
            boot = self._open.read_bytes()
        except FileNotFoundError:
            return
        if boot != _boot():
            self.wipe()
            return
        self.work.mkdir()
        self.run_folder.mkdir(parents=True)
        try:
            self.run("rm", "--all")
        except Failed:
            self.wipe()
        self._clear_run()

    def _clear_run(self) -> None:
        _remove(self.work)
        _remove(self.run_folder)
        hierarchies = Path("/sys/fs/cgroup")
        for top in (hierarchies / self.cgroup[1:], *hierarchies.glob(f"*{self.cgroup}")):
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()

    def _run(self, command: Sequence[str], hear: Callable[[str], None]) -> list[str]:
        """Run a program behind the fence; its last lines. Raises Failed, TryAgain (silent for too long, closed)."""
        if self._closed:
            raise TryAgain(f"run '{command[0]}': the agent is stopping")
        program = str(find(command[0]) or command[0])
        kept = [str(self.folder), str(self.run_folder), *map(str, filter(None, (self._files_of_settings())))]
        start = [sys.executable, "-I", "-S", fence.__file__, str(os.getpid()), ":".join(kept)]
        work = str(self.work)
        process = subprocess.Popen(
            [*start, program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_environment(), "TMPDIR": work},
            cwd=work,
            start_new_session=True,
            pass_fds=[self._lock_file],
        )
        self._process = process
        output: list[str] = []
        errors: list[str] = []
        try:
            for line, is_error in _lines(process, QUIET):
                hear(line)
                kept_lines = errors if is_error else output
                kept_lines.append(line)
                del kept_lines[:-KEPT_LINES]
                if not is_error and STEP.match(line):
                    errors.clear()
            status = process.wait()
        finally:
            self._process = None
            _end(process)
        if status != 0:
            if self._closed:
                raise TryAgain(f"run '{command[0]}': the agent is stopping")
            raise Failed(status, output, errors)
        return output

    def _files_of_settings(self) -> tuple[Path | None, ...]:
        return self.settings.authfile, self.settings.registries_conf, self.settings.policy


def on_loopback(name: str) -> bool:
    """Whether an image's registry is on 127.0.0.0/8, and so may be without TLS, as Docker has it."""
    return re.match(r"(127\.\d+\.\d+\.\d+|localhost)(:\d+)?/", name) is not None


def find(program: str) -> Path | None:
    """Where a program is, whatever PATH the agent was started with."""
    found = shutil.which(program, path=_environment()["PATH"])
    return Path(found) if found else None


def _environment() -> dict[str, str]:
    stray = re.compile(r"(BUILDAH|STORAGE|CONTAINERS_STORAGE)_.*|_CONTAINERS_.*")
    kept = {name: value for name, value in os.environ.items() if not stray.fullmatch(name)}
    path = os.pathsep.join(filter(None, (kept.get("PATH"), "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")))
    return {"HOME": "/root", **kept, "PATH": path, "LC_ALL": "C"}


def _lines(process: subprocess.Popen[bytes], quiet: float) -> Iterator[tuple[str, bool]]:
    """What a process says, line by line, as printable text, and whether it is on its standard error.

    Raises TryAgain after so many seconds without a word.
    """
    assert process.stdout is not None and process.stderr is not None
    pending = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in pending:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(quiet)
            if not ready:
                raise TryAgain(f"not a word for {quiet:g} s")
            streams = [cast("IO[bytes]", key.fileobj) for key, _ in ready]
            for stream in sorted(streams, key=lambda stream: stream is process.stderr):  # a step begins on stdout
                data = os.read(stream.fileno(), LONGEST_LINE)
                if data:
                    *whole, rest = re.split(rb"\r*\n|\r", pending[stream] + data)
                else:
                    whole, rest = [pending[stream]], b""
                    selector.unregister(stream)
                if len(rest) > LONGEST_LINE:
                    whole, rest = [*whole, rest], b""
                pending[stream] = rest
                yield from ((_printable(line), stream is process.stderr) for line in whole if line.strip())


def _printable(line: bytes) -> str:
    """Text that steers no terminal: escape sequences go, other control characters are shown as such."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-_])", "", line.decode(errors="replace").replace("\t", "    "))
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text).rstrip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the fence, and wait until it has ended all that is behind it."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(CLEANING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(folder)


def _boot() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have everything on the folder's file system on disk (syncfs(2)): buildah syncs nothing."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _libc.syncfs(descriptor)
    finally:
        os.close(descriptor)
