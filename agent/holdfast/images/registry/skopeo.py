"""Run skopeo (1.9 and newer): make its arguments, follow the settings, end it and explain its errors.

skopeo itself finds credentials, mirrors, certificates and signature policies, where all container tools look for
them: containers-auth.json(5), containers-registries.conf(5), containers-certs.d(5), containers-policy.json(5).
`faults` makes errors of what it writes to its standard error.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, Stopping, UnfitHost, WrongCall
from holdfast.grammar.images import DIGEST, Reference
from holdfast.images.formats.references import parse
from holdfast.images.registry.faults import BUSY, SILENT, Fault, SkopeoError, explain, failure, message_of
from holdfast.images.registry.proxy import TICK, WAITING, Proxy, logged

Tick = Callable[[], None] | None  # called every millisecond while a command runs
DIR_VERSION = "version"  # the first file that a `dir:` destination writes
#: Has containers/image remember in memory which registry has which blob (pkg/blobinfocache): otherwise each blob is
#: noted and synced in a file of the host's, for which all processes wait and which we never ask.
NO_CACHE = {"_CONTAINERS_ROOTLESS_UID": "1", "XDG_DATA_HOME": "/proc/none"}


class Skopeo:
    """Every process of skopeo that one puller runs. They end when the agent does, and with `close`."""

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        # PR_SET_PDEATHSIG strikes when the *thread* that started a process ends: one thread starts all of them.
        self._starter = ThreadPoolExecutor(1, "skopeo")

    def close(self) -> None:
        """Kill what runs; every call under way raises Stopping."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()
        self._starter.shutdown(wait=False)

    def reference(self, ref: str, operation: str) -> Reference:
        """Read a reference that a registry is to be asked for. Raises WrongCall, and UnfitHost on an offline node."""
        if DIGEST.fullmatch(ref):
            raise WrongCall(f"{operation} {ref!r}: a digest alone names no registry (expected NAME@{ref})")
        reference = parse(ref)
        if reference.transport != "docker":
            raise WrongCall(f"{operation} {ref!r}: an archive of this host (expected an image of a registry)")
        if self.settings.offline:
            raise failure(
                UnfitHost,
                f"{operation} {ref!r}: this node is offline (expected the image in a bundle or an archive that is "
                "loaded here, or offline = false in [images] of agent.toml)",
            )
        return reference

    def manifest(self, reference: Reference, name: str, as_written: str, deadline: float | None = None) -> bytes:
        """Fetch the manifest or index that name (tag or digest) leads to, byte for byte. deadline: as `_run`."""
        words = ("inspect", "--raw", *self._access(reference), f"docker://{name}")
        return self._run("pull", reference, as_written, *words, deadline=deadline)

    def tags(self, reference: Reference, as_written: str) -> list[str]:
        """List every tag of the repository."""
        place = f"docker://{reference.repository}"
        data = self._run("list tags of", reference, as_written, "list-tags", *self._access(reference), place)
        return [str(tag) for tag in json.loads(data)["Tags"] or ()]

    def send(self, layout: Path, tag: str, reference: Reference, as_written: str, *, every: bool = False) -> None:
        """Copy an image of an OCI layout to the registry; every: all of an index. Blobs that are there stay."""
        access = self._access(reference, "dest-")
        target = f"docker://{reference.repository}:{reference.tag}"
        chosen = ("--all",) if every else ()
        words = ("copy", *chosen, "--preserve-digests", *access, f"oci:{layout}:{tag}", target)
        self._run("push", reference, as_written, *words, long=True)

    def configuration(self, reference: Reference, name: str, as_written: str) -> bytes:
        """Fetch the configuration of an image of any platform, byte for byte; name is its digest's."""
        words = ("inspect", "--config", "--raw", *self._access(reference), f"docker://{name}")
        return self._run("pull", reference, as_written, *words)

    def fetch_layers(
        self, reference: Reference, name: str, as_written: str, layout: Path, shared: Path, *, exact: bool
    ) -> None:
        """Copy an image into a new OCI layout, its blobs into shared (as sha256/HEX); those that are there stay.

        exact: fail rather than change its manifest; one that is not OCI's becomes another, its layers stay.
        """
        words = ["copy", *self._access(reference, "src-"), *(["--preserve-digests"] if exact else [])]
        words += ["--remove-signatures", "--dest-oci-accept-uncompressed-layers"]
        words += ["--dest-shared-blob-dir", str(shared)]
        self._run("pull", reference, as_written, *words, f"docker://{name}", f"oci:{layout}:image", long=True)

    def fetch_for(self, reference: Reference, platform: str, as_written: str, layout: Path) -> None:
        """Copy an image for a platform into a new OCI layout, under the tag `image`."""
        system, machine, *variant = platform.split("/")
        words = ["--override-os", system, "--override-arch", machine]
        words += ["--override-variant", variant[0]] if variant else []
        words += ["copy", *self._access(reference, "src-"), "--remove-signatures", f"docker://{reference.remote}"]
        self._run("pull", reference, as_written, *words, f"oci:{layout}:image", long=True)

    def admit(self, reference: Reference, as_written: str, layout: Path) -> None:
        """Copy an image of an archive into a new OCI layout, if policy.json allows it."""
        words = ("copy", "--remove-signatures", "--dest-oci-accept-uncompressed-layers", reference.name)
        self._run("load", reference, as_written, *words, f"oci:{layout}:admitted", long=True)

    def check_policy(self, reference: Reference, digests: Sequence[str], as_written: str, scratch: Path) -> bytes:
        """Have skopeo check policy.json for a reference; the bytes of the manifest that it checked.

        It copies the image into a directory, into which empty files are put in the place of the layers (digests) as
        soon as it has made it its own: what is there is not fetched. Were that too late, they would be fetched here.
        """
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            words = ("copy", *self._access(reference, "src-"), f"docker://{reference.remote}", f"dir:{folder}")
            pending = [Path(folder, digest.partition(":")[2]) for digest in digests]

            def put_placeholders() -> None:
                if pending and Path(folder, DIR_VERSION).exists():
                    while pending:
                        pending.pop().touch()

            self._run("pull", reference, as_written, *words, long=True, tick=put_placeholders)
            return Path(folder, "manifest.json").read_bytes()

    def policy_is_open(self) -> bool:
        """Check whether the policy in force accepts everything, so that there is nothing to check."""
        try:
            policy = json.loads(self._policy_path().read_bytes())
            scopes = [
                scope for transport in (policy.get("transports") or {}).values() for scope in transport.values()
            ]
            return all(
                [each["type"] for each in requirements] == ["insecureAcceptAnything"]
                for requirements in (policy["default"], *scopes)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # skopeo itself says what is wrong with it

    def proxy(self, reference: Reference) -> Proxy:
        """Start a process that is asked for blobs."""

        def start(stdin: int, stderr: BinaryIO) -> subprocess.Popen[bytes]:
            words = ("experimental-image-proxy", *self._access(reference))
            environment = {**os.environ, **NO_CACHE}
            return self._start(words, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)

        return Proxy(start, self.settings.stall_timeout)

    def end(self, proxy: Proxy) -> None:
        """End a process of `proxy`."""
        proxy.close()
        with self._lock:
            self._running.discard(proxy.process)

    def explain(
        self, error: SkopeoError, reference: Reference, as_written: str, operation: str = "pull"
    ) -> HoldfastError:
        """Make our error for one of skopeo's."""
        if self._closed:
            return Stopping("run 'skopeo': the agent is stopping")
        return explain(error, operation, as_written, noise(reference, as_written))

    def _run(
        self,
        operation: str,
        reference: Reference,
        as_written: str,
        *words: str,
        long: bool = False,
        tick: Tick = None,
        deadline: float | None = None,
    ) -> bytes:
        """Run a command and return what it prints. long: stall_timeout counts only while nothing is read or written.

        tick: called every millisecond while the command runs. deadline: when to give up at the latest (monotonic).
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self._start(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            try:
                fault = self._wait(process, err, deadline, long=long, tick=tick)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                with self._lock:
                    self._running.discard(process)
            if process.returncode == 0:
                out.seek(0)
                return out.read()
            said = fault.words if fault else message_of(logged(err)) or f"skopeo ended with {process.returncode}"
        raise self.explain(SkopeoError(said, fault), reference, as_written, operation)

    def _wait(
        self, process: subprocess.Popen[bytes], log: BinaryIO, deadline: float | None, *, long: bool, tick: Tick
    ) -> Fault | None:
        """Wait for the end; returns why a command is given up before."""
        poll, moved, look_at = select.poll(), (time.monotonic(), -1), time.monotonic() + TICK
        descriptor = os.pidfd_open(process.pid)
        try:
            poll.register(descriptor, select.POLLIN)
            while not poll.poll(1 if tick else TICK * 1000):
                if tick:
                    tick()
                if (now := time.monotonic()) < look_at:
                    continue
                look_at = now + TICK
                if WAITING in logged(log):
                    return BUSY
                if long and (count := _transferred(process.pid)) != moved[1]:
                    moved = (now, count)
                if now - moved[0] >= self.settings.stall_timeout or (deadline is not None and now >= deadline):
                    return SILENT
        finally:
            os.close(descriptor)
        return None

    def _start(self, words: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
        """Start skopeo as a child that dies with the agent. Raises UnfitHost."""
        program = shutil.which("skopeo")
        if program is None:
            raise UnfitHost("run 'skopeo': no such program (expected the package skopeo)")
        settings = self.settings
        common = ["--debug"]
        if settings.policy:
            common += ["--policy", str(settings.policy)]
        if settings.registries_conf:
            common += ["--registries-conf", str(settings.registries_conf)]
        killed = shutil.which("setpriv")
        before = [killed, "--pdeathsig", "KILL", "--"] if killed else []
        with self._lock:
            if self._closed:
                raise Stopping("run 'skopeo': the agent is stopping")
            job = self._starter.submit(_spawn, [*before, program, *common, *words], streams)
            try:
                process = job.result()
            except OSError as error:
                raise UnfitHost(f"run 'skopeo': {(error.strerror or str(error)).lower()}") from error
            self._running.add(process)
        return process

    def _access(self, reference: Reference, prefix: str = "") -> list[str]:
        """Make the arguments that say how to talk to a registry. prefix: of their names, as `src-`."""
        words = ["--authfile", str(self.settings.authfile)] if self.settings.authfile else []
        if is_loopback(reference.host) and not configured(reference.repository, self.registries()):
            words.append(f"--{prefix}tls-verify=false")
        return words

    def registries(self) -> Iterator[dict[str, Any]]:
        """Read the files of registries.conf that are in force, as skopeo chooses them."""
        own = Path(os.environ.get("HOME") or "/root", ".config/containers")
        main = self.settings.registries_conf
        folders = [own / "registries.conf.d", SYSTEM / "registries.conf.d"]
        if main is None:
            main = own / "registries.conf"
            if os.path.exists(main):  # noqa: PTH110 (it may be another user's: then it is not there for us)
                folders.pop()
            else:
                main = SYSTEM / "registries.conf"
        for path in (
            main,
            *(each for folder in folders if os.access(folder, os.R_OK) for each in sorted(folder.glob("*.conf"))),
        ):
            with suppress(OSError, ValueError):  # skopeo says what is wrong with it
                yield tomllib.loads(path.read_text())

    def _policy_path(self) -> Path:
        own = Path(os.environ.get("HOME") or "/root", ".config/containers/policy.json")
        return self.settings.policy or (own if os.path.exists(own) else SYSTEM / "policy.json")  # noqa: PTH110


SYSTEM = Path("/etc/containers")


def is_loopback(host: str) -> bool:
    """Check whether a registry is on this host, where Docker asks for no certificate. host: may have a port."""
    name = re.sub(r":\d+$", "", host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def entry_of(repository: str, files: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Find the entry of registries.conf that decides about a repository: the one with the longest prefix."""
    entries = [entry for document in files for entry in document.get("registry") or ()]
    fitting = [entry for entry in entries if _is_within(repository, prefix_of(entry))]
    return max(fitting, key=lambda entry: len(prefix_of(entry)), default={})


def prefix_of(entry: Mapping[str, Any]) -> str:
    """Read which repositories an entry of registries.conf is about."""
    return str(entry.get("prefix") or entry.get("location") or "")


def _is_within(repository: str, prefix: str) -> bool:
    host = re.sub(r":\d+$", "", repository.partition("/")[0])
    if prefix.startswith("*."):
        return host.endswith(prefix[1:])
    return bool(prefix) and (repository == prefix or repository.startswith((f"{prefix}/", f"{prefix}:")))


def configured(repository: str, files: Iterable[Mapping[str, Any]]) -> bool:
    """Check whether a registries.conf has an entry for a repository, also in its older form."""
    files = list(files)
    older = [kinds for document in files if isinstance(kinds := document.get("registries"), dict)]
    named = [host for kinds in older for kind in kinds.values() for host in kind.get("registries") or ()]
    return bool(entry_of(repository, files)) or repository.partition("/")[0] in named


def noise(reference: Reference, as_written: str) -> tuple[str, ...]:
    """List parts of skopeo's messages that are names, not causes."""
    return (reference.remote, reference.repository, reference.name, reference.host, reference.path, as_written)


def _spawn(words: Sequence[str], streams: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, **streams)


def _transferred(pid: int) -> int:
    """Count the bytes that a process has read and written so far (proc_pid_io(5))."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return -1
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("rchar", "wchar")))
