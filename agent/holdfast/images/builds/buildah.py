"""Run buildah (1.28 and newer) for one app, on a storage of its own, behind a fence; nothing of it outlives a build.

    ROOT/builds/apps/APP/storage/    buildah's images and layers, kept from build to build: the layer cache
    ROOT/builds/apps/APP/work/       what one build needs; empty between builds
    ROOT/builds/apps/APP/lock        held by whoever builds, and by every process that this starts
    ROOT/builds/apps/APP/open        exists while the storage is written to, and after a crash; holds the boot id
    RUN_ROOT/builds/APP/             buildah's own state; deleted between builds

One build of an app runs at a time, and no app's builds can reach another's cache. What is in these folders may have
been written by a build that broke out of its step, so it is read without following links.
"""

from __future__ import annotations

import errno
import json
import os
import re
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, cast

from holdfast.drivers import Host
from holdfast.errors import Stopping, TryAgain, UnfitHost, WrongState
from holdfast.files import BENEATH, NO_SYMLINKS, openat2, remove_tree
from holdfast.images.builds import fence
from holdfast.images.builds.outside import Cage, Outside
from holdfast.images.disk import open_lock, write_whole
from holdfast.images.unpacking.unpack import own_process
from holdfast.syscalls import call

QUIET = 3600.0  # seconds without a word after which a build is given up
KEPT_LINES = 20_000  # of what a program says, for who asked; the longest answer is an image's configuration
LONGEST_LINE = 64 << 10  # bytes; more of one line is cut
LARGEST_INDEX = 64 << 20  # bytes of a file of buildah's that we read ourselves
CLEANING = 10.0  # seconds that a killed build is given to be gone
SETTING_UP = 30.0  # seconds that a fence may take until its program starts
STEP = re.compile(r"(\[\d+/\d+\] )?STEP \d+(/\d+)?: ?")  # what buildah says before it begins an instruction
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'  # what gets behind the fence has been checked before
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")  # of the agent's, handed to steps
FILES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "/etc/group": "root:x:0:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/containers/policy.json": POLICY,
    "/etc/containers/registries.conf": "",
}

Network = Literal["default", "host", "none"]


class Failed(Exception):
    """A program ended with another status than 0. output, errors: the last lines of what it said, where; errors of
    a build are those of its last step. exceeded: the limit that it ran into, "" for none."""

    def __init__(self, status: int, output: Sequence[str], errors: Sequence[str], exceeded: str = "") -> None:
        super().__init__(f"exit status {status}")
        self.output, self.errors, self.exceeded = output, errors, exceeded


class Buildah:
    """buildah of one app."""

    def __init__(self, host: Host, app: str, outside: Outside) -> None:
        self.app, self.outside = app, outside
        self.folder, self.run_folder = host.root / "builds/apps" / app, host.run_root / "builds" / app
        self.storage, self.work = self.folder / "storage", self.folder / "work"
        self._id = f"build-{sha256(app.encode()).hexdigest()[:8]}"
        self._mine, self._lock_file = threading.Lock(), -1
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from building while the block runs. What a killed build left is deleted first."""
        for program in ("buildah", "skopeo"):
            if find(program) is None:
                raise UnfitHost(f"run '{program}': no such program (expected the package {program}, for [images.*])")
        with self._mine, self._locked(CLEANING) as held:
            if not held:
                raise TryAgain("another process is building here")
            self._open()
            try:
                yield
                self._shut()
            finally:
                self._clear_run()

    def remove(self) -> bool:
        """Delete the storage and all that belongs to it; False, and nothing is done, while somebody builds."""
        if not self._mine.acquire(blocking=False):
            return False
        try:
            with self._locked() as held:
                if held:
                    remove_tree(self.folder)
                return held
        finally:
            self._mine.release()

    def sweep(self) -> None:
        """Delete what the build of a killed agent left, but nothing of a build that runs."""
        if not (self.folder.exists() or self.run_folder.exists()):
            return
        with self._mine, self._locked() as held:
            if held:
                self._clear_run()

    def close(self) -> None:
        """Kill what is being built, and build nothing any more."""
        self._closed = True
        if (process := self._process) is not None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # the fence kills all that is behind it, and waits for the end

    def scratch(self) -> Path:
        """Make a folder for one step of a build, with which it goes."""
        folder = self.work / str(time.monotonic_ns())
        folder.mkdir()
        return folder

    def run(self, *words: str) -> list[str]:
        """Run a command of buildah's; the last lines of its output. Raises Failed."""
        return self._run(["buildah", *self._place, *words])

    def build(
        self, words: Sequence[str], args: Mapping[str, str], network: Network, hear: Callable[[str], None]
    ) -> None:
        """Run `buildah build` with these words. args: build arguments. Raises Failed.

        buildah takes the values of arguments from its environment, where no other user of the host can read them.
        The fence is what separates steps from the host: within it, they run in a chroot, without a runtime.
        """
        fixed = ["--layers", "--force-rm", "--format", "oci", "--isolation", "chroot", "--network", "host"]
        given = [word for name in args for word in ("--build-arg", name)]
        self._run(["buildah", *self._place, "build", *fixed, *given, *words], hear, args, network)

    def take_in(self, layout: Path, name: str, tag: str = "latest") -> None:
        """Bring an image of an OCI layout below `work` into the storage, by this name. Raises Failed."""
        give(layout)
        self._copy(f"oci:{layout}:{tag}", f"{self._transport}{name}")

    def take_out(self, image: str, layout: Path) -> None:
        """Copy an image (its id) from the storage into an OCI layout, its layers plain; blobs that are there stay."""
        give(layout)
        self._copy("--dest-oci-accept-uncompressed-layers", f"{self._transport}@{image}", f"oci:{layout}:latest")
        check_plain(layout)

    def take_index(self, index: str, images: Sequence[str], layout: Path) -> None:
        """Write these images (ids) as one index, called so meanwhile, to a new OCI layout. Raises Failed."""
        layout.mkdir()
        give(layout)
        if index in self.names():
            self.run("manifest", "rm", index)
        self.run("manifest", "create", index, *images)
        self.run("manifest", "push", "--quiet", "--all", index, f"oci:{layout}:latest")
        check_plain(layout)

    def config(self, image: str) -> Any:
        """Read the OCI configuration of an image of the storage (name or id). Raises Failed."""
        return json.loads("\n".join(self.run("inspect", "--type", "image", image)))["OCIv1"]

    def names(self) -> dict[str, str]:
        """Read every name in the storage and its id."""
        images = self._read("overlay-images/images.json")
        return {name: image["id"] for image in images for name in image.get("names") or ()}

    def size(self) -> int:
        """Add up the bytes of all layers in the storage."""
        return sum(layer.get("diff-size", 0) for layer in self._read("overlay-layers/layers.json"))

    def prune(self, keep: Callable[[str], bool], limit: int) -> None:
        """Forget names that keep is not true of; where the storage is larger than limit (bytes) even so, forget what
        has no name, and at last everything."""
        doomed = [name for name in self.names() if not keep(name)]
        with suppress(Failed):
            if doomed:
                self.run("rmi", *doomed)
            if self.size() > limit:
                self.run("rmi", "--prune")
        if self.size() > limit:
            self.wipe()

    def wipe(self) -> None:
        """Empty the storage."""
        _remove(self.storage)

    def _copy(self, *words: str) -> None:
        self._run(["skopeo", "copy", "--quiet", *words])

    @property
    def _transport(self) -> str:
        """How skopeo names the storage (containers-transports(5))."""
        return f"containers-storage:[overlay@{self.storage}+{self.run_folder}/storage]"

    @property
    def _place(self) -> list[str]:
        return ["--root", str(self.storage), "--runroot", f"{self.run_folder}/storage", "--storage-driver", "overlay"]

    @property
    def _mark(self) -> Path:
        return self.folder / "open"

    def _read(self, path: str) -> list[Any]:
        try:
            found: list[Any] = json.loads(read_plain(self.storage, path))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return []
        return found

    @contextmanager
    def _locked(self, wait: float = 0) -> Iterator[bool]:
        """Hold the lock of all processes that build, waiting so many seconds at most; yields whether it is held. A
        killed agent's processes are gone once it can be had."""
        self._lock_file = open_lock(self.folder / "lock", wait)
        self.folder.parent.parent.chmod(0o700)
        try:
            yield self._lock_file >= 0
        finally:
            if self._lock_file >= 0:
                os.close(self._lock_file)
            self._lock_file = -1

    def _open(self) -> None:
        """Make ready. After a crash of the host half of the storage may be missing, after one of the agent a
        container may be left in it; a storage of an older version belongs to another user."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        self._clear_run()
        if self.storage.exists() and self.storage.lstat().st_uid != fence.FIRST_ID:
            self.wipe()
        for folder in (self.storage, self.work, self.run_folder):
            folder.mkdir(parents=True, exist_ok=True)
            give(folder)
        with suppress(FileNotFoundError):
            if self._mark.read_bytes() != boot:
                self._empty()
            else:
                try:
                    self.run("rm", "--all")
                except Failed:
                    self._empty()
        write_whole(self._mark, boot)

    def _empty(self) -> None:
        self.wipe()
        self.storage.mkdir()
        give(self.storage)

    def _shut(self) -> None:
        if self.storage.exists():
            _sync(self.storage)
        self._mark.unlink()

    def _clear_run(self) -> None:
        _remove(self.work)
        _remove(self.run_folder)
        with suppress(OSError):
            self.run_folder.parent.rmdir()

    def _run(
        self,
        command: Sequence[str],
        hear: Callable[[str], None] = lambda line: None,
        args: Mapping[str, str] | None = None,
        network: Network = "none",
    ) -> list[str]:
        """Run a program behind the fence; its last lines. Raises Failed, TryAgain (silent for too long), Stopping."""
        if self._closed:
            raise Stopping(f"run '{command[0]}': the agent is stopping")
        joins = network == "default" and self.outside.own_network
        own = network == "none" or joins
        if not (own or self.outside.host_network):
            raise UnfitHost(
                "without an agent it uses the host's network, which the rule 'host-network' in [policy] forbid of "
                'agent.toml forbids (expected network = "none" for it, or another --config)'
            )
        output: list[str] = []
        errors: list[str] = []
        with self.outside.cgroup(self._id) as cage, ExitStack() as stack:
            process, control = self._start(self._plan(command, args or {}, cage, own=own))
            self._process = process
            stack.callback(control.close)
            try:
                if pid := _pid_of(control):
                    if joins:
                        stack.enter_context(self.outside.network(self._id, pid))
                    with suppress(OSError):
                        control.send(b"x")
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
            exceeded = cage.exceeded() if status != 0 else ""
        if status != 0:
            if self._closed:
                raise Stopping(f"run '{command[0]}': the agent is stopping")
            raise Failed(status, output, errors, exceeded)
        return output

    def _plan(self, command: Sequence[str], args: Mapping[str, str], cage: Cage, *, own: bool) -> dict[str, Any]:
        """Make the plan for `fence`."""
        program = find(command[0])
        if program is None:
            raise UnfitHost(f"run '{command[0]}': no such program (expected the package {command[0]})")
        environment = {"HOME": "/root", "PATH": PATH, "TMPDIR": str(self.work), "LC_ALL": "C"}
        environment |= {name: value for name, value in os.environ.items() if name.lower() in PROXIES}
        return {
            "program": [str(program), *command[1:]],
            "environment": {**environment, **args, "_CONTAINERS_USERNS_CONFIGURED": "done"},
            "directory": str(self.work),
            "root": str(self.folder),
            "writable": [str(folder) for folder in (self.storage, self.work, self.run_folder)],
            "readable": [] if program.is_relative_to("/usr") else [str(program)],
            "files": {**FILES, "/etc/resolv.conf": self.outside.resolv_conf()},
            "cgroups": [str(folder) for folder in cage.folders],
            "network": "own" if own else "host",
        }

    def _start(self, plan: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a fence; our end of its control socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        described = os.memfd_create("plan")
        try:
            os.write(described, json.dumps(plan).encode())
            os.lseek(described, 0, os.SEEK_SET)
            process = subprocess.Popen(
                own_process(fence.__name__, os.getpid(), described, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"LC_ALL": "C"},
                start_new_session=True,
                pass_fds=[self._lock_file, described, theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(described)
            theirs.close()
        return process, ours


def _pid_of(control: socket.socket) -> int:
    """Receive the id of the process that waits in the fence's namespaces; 0 if there is none."""
    control.settimeout(SETTING_UP)
    with suppress(OSError):
        return int(control.recv(32) or 0)
    return 0


def give(path: Path) -> None:
    """Have a folder of ours, and those in it, belong to who is root behind the fence; files stay as they are."""
    for top, folders, _ in os.walk(path):
        os.chown(top, fence.FIRST_ID, fence.FIRST_ID, follow_symlinks=False)
        folders[:] = [each for each in folders if not Path(top, each).is_symlink()]


def check_plain(folder: Path) -> None:
    """Raise WrongState for a folder with anything but folders and files in it. Nobody may write to it meanwhile."""
    for top, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = Path(top, name).lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise WrongState(
                    f"read what was built: {name!r} is neither a file nor a folder (its storage is damaged)"
                )


def read_plain(folder: Path, path: str) -> bytes:
    """Read a file below a folder, through no link. Raises OSError, ValueError (it is too large, or no file)."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(openat2(path, flags, BENEATH | NO_SYMLINKS, dir_fd=descriptor), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_INDEX:
                raise ValueError(f"{path!r} is no file that can be read")
            return file.read(LARGEST_INDEX)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path!r} is a link") from error
        raise
    finally:
        os.close(descriptor)


def find(program: str) -> Path | None:
    """Find a program, whatever PATH the agent was started with."""
    found = shutil.which(program, path=os.pathsep.join(filter(None, (os.environ.get("PATH"), PATH))))
    return Path(found) if found else None


def _lines(process: subprocess.Popen[bytes], quiet: float) -> Iterator[tuple[str, bool]]:
    """Read the output of a process: each line as printable text, and whether it is an error.

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
    """Remove escape sequences and replace control characters, so that the text steers no terminal."""
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


def _sync(folder: Path) -> None:
    """Have everything on the folder's file system on disk (syncfs(2)): buildah syncs nothing."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        call("syncfs", descriptor)
    finally:
        os.close(descriptor)
