"""Run containers: one conmon for each, with crun or runc below it. They go on when the agent ends.

Everything about a container is on disk under `Host.run_root` (the runtime's own state, conmon's pid and exit files,
a record of the run), so an agent that starts again adopts what it finds. Called by the node, from worker threads.
Conmon's arguments and its sync pipe are those of conmon(8). Exit files hold the exit code as a shell counts it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.drivers import Host
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongState, explained
from holdfast.files import discard_tree, held, names_in, read_text, write_whole
from holdfast.observed import Exit, Json
from holdfast.runtime import cgroup, delegation
from holdfast.runtime.binaries import ENVIRONMENT, RuntimeBinary, run
from holdfast.runtime.oci import signal_number
from holdfast.syscalls import call

LONGEST_POLL = 2**31 - 1  # milliseconds that poll(2) can wait: 24 days
CREATE_TIMEOUT = 60.0  # seconds
EXEC_READ = 60.0  # seconds after which the runtime has surely read the file of a command
CONMON_GRACE = 10.0  # seconds that conmon may need to write the last output and the exit file

OOM_FILE = "oom"  # made by conmon when the kernel kills a process of the container because memory is short
OOM_WINDOW = 5.0  # seconds between such a kill and the end of a container that it caused

_TOLD = "oom-told"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a container: enough to tell its processes from later ones with the same numbers.

    started_ticks and conmon_ticks: field 22 of /proc/PID/stat. boot_id: /proc/sys/kernel/random/boot_id.
    """

    pid: int
    conmon_pid: int
    started_ticks: int
    conmon_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """Creates, starts, updates and deletes the containers of one agent. Every method blocks and is thread-safe."""

    host: Host
    binary: RuntimeBinary
    conmon: Path

    @property
    def root(self) -> Path:
        """The runtime's own state directory (`--root`)."""
        return self.host.run_root / "runtime"

    @property
    def exits(self) -> Path:
        """Where conmon writes the exit status of each container, in a file named after it."""
        return self.host.run_root / "exits"

    def cgroup(self, id: str) -> str:
        """The cgroup of a container, relative to each hierarchy's root.

        A container that an earlier version started at the root of systemd's tree stays there until its next start.
        """
        if self.host.cgroup_root and (cgroup.ROOT / self.host.name / id).is_dir():
            return f"/{self.host.name}/{id}"
        return self.next_cgroup(id)

    def next_cgroup(self, id: str) -> str:
        """The cgroup that a container is in after its next start."""
        return f"{self.host.cgroup}/{id}"

    def leave_root(self, id: str) -> None:
        """Remove the cgroup at the root of systemd's tree that an earlier version made for a container."""
        if self.host.cgroup_root:
            for place in (cgroup.ROOT / self.host.name / id, cgroup.ROOT / self.host.name):
                with contextlib.suppress(OSError):  # nearly always it is not there; or others are in it
                    place.rmdir()

    def prepare(self) -> None:
        """Make the directories that conmon and the runtime expect; once, when the agent starts."""
        for place in (self.root, self.exits, self._sockets, self.host.run_root / "runs"):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)

    def settle(self) -> None:
        """Prepare the place for containers in the cgroup tree, and move every conmon into it."""
        delegation.ensure(self.host)
        for id in cgroup.children(cgroup.ROOT / self.host.name) if self.host.cgroup_root else ():
            self.leave_root(id)
        for id in names_in(self.host.run_root / "runs") if self.host.cgroup_root else ():
            if (run := self.run_of(id)) and self.supervised(run):
                delegation.adopt(self.host, run.conmon_pid)

    def create(self, id: str, bundle: Path, log_path: Path, *, name: str = "", log_size: int = -1) -> Run:
        """Create a container from the config.json in bundle; its process waits for `start`.

        name: used in errors (default: id). log_size: bytes after which conmon begins a new log file. Raises
        WrongState if its program can't be run, and UnfitHost for every other refusal, with the runtime's own words.
        What was begun is left for `delete`.
        """
        delegation.ensure(self.host)
        self.leave_root(id)
        record = self.record(id)
        record.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.exits / id).unlink(missing_ok=True)
        pid = self._spawn(bundle, self._conmon_argv(id, bundle, log_path, log_size), name or id)
        conmon_pid = int((record / "conmon.pid").read_text())
        run = Run(pid, conmon_pid, _ticks(pid), _ticks(conmon_pid), boot_id())
        write_whole(record / "run.json", json.dumps(asdict(run)))
        return run

    def start(self, id: str, *, name: str = "") -> None:
        """Let a created container's program run."""
        self._call("start", id, name=name or id)
        if self.host.cgroup_root and (run := self.run_of(id)):
            delegation.adopt(self.host, run.conmon_pid)  # only now: moving a process takes milliseconds

    def kill(self, id: str, signal: int | str, *, all: bool = False) -> None:
        """Send a signal to the first process of a container, or to all; do nothing if it has ended."""
        number = signal_number(signal)
        if all:
            kill_each(cgroup.pids(self.cgroup(id)), number)
        elif (run := self.run_of(id)) and self.alive(run):
            kill_each((run.pid,), number)

    def delete(self, id: str, *, force: bool = False) -> None:
        """Delete what is left of a container that has ended; with force, end it first.

        Handles everything that an interrupted create can leave: processes of the runtime, conmon, half-written
        state, cgroups in some hierarchies. Succeeds when nothing is there. Starts a process only if the configuration
        has `poststop` hooks: the runtime's own `delete` runs them. Raises UnfitHost if processes are left and force
        is not given.
        """
        if force:
            self._end(id)
        self._reap(id)
        if self._has_poststop(id):
            with contextlib.suppress(HoldfastError):  # the runtime spec says so: a failing hook stops nothing
                self._call("delete", id, name=id)
        cgroup.remove(self.cgroup(id))
        discard_tree(self.root / id)
        (self.exits / id).unlink(missing_ok=True)
        (self._sockets / id).unlink(missing_ok=True)
        discard_tree(self.record(id))

    def update(self, id: str, resources: Json) -> None:
        """Give a running container these resources (OCI `linux.resources`); limits that are left out are lifted."""
        cgroup.apply(self.cgroup(id), resources)

    def set_oom_score_adj(self, id: str, value: int) -> None:
        """Set the oom_score_adj of every process of a running container."""
        with explained(f"oom_score_adj '{value}' of '{id}'"):
            for pid in cgroup.pids(self.cgroup(id)):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    Path(f"/proc/{pid}/oom_score_adj").write_text(str(value))

    def state(self) -> frozenset[str]:
        """The ids of all containers of which the runtime or conmon has something on disk.

        Hidden names are no containers: crun keeps `.cache` beside them.
        """
        known = (*names_in(self.root), *names_in(self.host.run_root / "runs"))
        return frozenset(id for id in known if not id.startswith("."))

    def cgroups(self) -> frozenset[str]:
        """The ids of all containers that have a cgroup in some hierarchy, known to the runtime or not."""
        return frozenset(
            name for top in self.host.cgroups for place in cgroup.folders(top) for name in cgroup.children(place)
        )

    def run_of(self, id: str) -> Run | None:
        """The run that `create` recorded; None if it did not get that far."""
        try:
            return Run(**json.loads((self.record(id) / "run.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def process(self, id: str) -> dict[str, Any]:
        """How a container's first process was started: `process` of its config.json."""
        return dict(json.loads((self.host.instance(id) / "config.json").read_text())["process"])

    def exec_argv(self, id: str, process: Json, *, detach: bool = False) -> list[str]:
        """The command line that runs a process (`runtime.execs`) in a running container; the CLI executes it.

        The whole process is described in a file, because crun does not take what is missing (user, limits,
        environment) from the container. The file is deleted with the bundle.
        """
        text = json.dumps(process)
        bundle = self.host.instance(id)
        place = bundle / f"exec-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        _leave(place, text)
        command = self._command("exec")
        if self.binary.name == "runc":  # it would print a line of its log besides its message
            command[1:1] = ["--log", os.devnull]
        return [*command, *(["--detach"] if detach else []), "--process", str(place), id]

    def exit_of(self, id: str) -> Exit | None:
        """How a container ended, as conmon recorded it; None if it did not (it runs, or conmon was killed).

        Call it before `delete`, which removes the cgroup and with it the count of OOM kills.
        """
        place = self.exits / id
        text = read_text(place).strip()
        if not text.isdecimal():
            return None
        code, at = int(text), place.stat().st_mtime
        oom = code == 128 + signal.SIGKILL and self._died_for_memory(id, at)
        return Exit(code, signal.SIGKILL if oom else None, oom, at)

    def oom_kills(self, id: str) -> int:
        """How many processes of a container the kernel has killed because memory was short."""
        return cgroup.oom_kills(self.cgroup(id))

    def new_oom_kills(self, id: str) -> int:
        """How many of these kills `tell_oom_kills` has not counted yet."""
        return max(self.oom_kills(id) - int(read_text(self.record(id) / _TOLD) or 0), 0)

    def tell_oom_kills(self, id: str) -> int:
        """Count the kills of a container that runs on, so that its end is not taken for one; return the number."""
        (self.record(id) / OOM_FILE).unlink(missing_ok=True)  # conmon makes it anew at the next one
        if new := self.new_oom_kills(id):
            write_whole(self.record(id) / _TOLD, str(self.oom_kills(id)))
        return new

    def outlives(self, run: Run, seconds: float) -> bool:
        """Whether the first process of a run still exists after this many seconds."""
        return self.alive(run) and not wait_end(run.pid, time.monotonic() + seconds)

    def _died_for_memory(self, id: str, at: float) -> bool:
        """Whether a container that ended at `at` was killed for memory: a single kill long before was a child's."""
        new = self.new_oom_kills(id)
        try:
            first = (self.record(id) / OOM_FILE).stat().st_mtime
        except FileNotFoundError:
            first = at
        return new > 1 or (new == 1 and at - first <= OOM_WINDOW)

    def alive(self, run: Run) -> bool:
        """Whether the first process of a run still runs: the same process, in the same boot, and no zombie."""
        return run.boot_id == boot_id() and is_running(run.pid, run.started_ticks)

    def supervised(self, run: Run) -> bool:
        """Whether conmon still runs, and will record how the run ends."""
        return run.boot_id == boot_id() and is_running(run.conmon_pid, run.conmon_ticks)

    def wait_exit(self, id: str, run: Run, timeout: float | None = None, *, unless: int | None = None) -> Exit | None:
        """Wait until a run has ended; return None if it has not within timeout (seconds).

        Exit.code is None if conmon ended before. unless: a file descriptor that ends the wait when it is readable.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.alive(run) and not wait_end(run.pid, deadline, unless):
            return None
        if self.supervised(run):
            wait_end(run.conmon_pid, time.monotonic() + CONMON_GRACE)
        return self.exit_of(id) or Exit(None, at=time.time())

    def remove_parent_cgroup(self) -> None:
        """Remove the agent's own cgroup from every hierarchy, unless containers are left in it."""
        for top in self.host.cgroups:
            cgroup.remove_if_empty(top)

    def leave(self) -> None:
        """Give up the place in the cgroup tree, unless something runs in it, and delete the runtime's cache."""
        discard_tree(self.root / ".cache")  # crun's, of seccomp filters
        self.remove_parent_cgroup()
        delegation.dissolve(self.host)

    @property
    def _sockets(self) -> Path:
        return self.host.run_root / "attach"

    def record(self, id: str) -> Path:
        """Where conmon and this module record a run."""
        return self.host.run_root / "runs" / id

    def _command(self, verb: str) -> list[str]:
        return [str(self.binary.path), "--root", str(self.root), verb]

    def _spawn(self, bundle: Path, argv: list[str], name: str) -> int:
        """Start conmon, which detaches, and read the container's pid from its sync pipe."""
        ours, theirs = os.pipe()
        with held(ours):
            with held(theirs):
                process = subprocess.Popen(
                    argv,
                    env={**ENVIRONMENT, "_OCI_SYNCPIPE": str(theirs)},
                    pass_fds=(theirs,),
                    cwd=bundle,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            process.wait()  # only until conmon has detached
            return _pid_from(_read_line(ours, time.monotonic() + CREATE_TIMEOUT), name)

    def _conmon_argv(self, id: str, bundle: Path, log_path: Path, log_size: int) -> list[str]:
        record = self.record(id)
        options = {
            "--api-version": "1",
            "--cid": id,
            "--cuuid": id,
            "--name": id,
            "--runtime": self.binary.path,
            "--runtime-arg": f"--root={self.root}",
            "--bundle": bundle,
            "--log-path": f"k8s-file:{log_path}",
            "--log-size-max": log_size,
            "--log-level": "error",
            "--exit-dir": self.exits,
            "--persist-dir": record,
            "--conmon-pidfile": record / "conmon.pid",
            "--container-pidfile": record / "pid",
            "--socket-dir-path": self._sockets,
        }
        pairs = (str(part) for option in options.items() for part in option)
        return [str(self.conmon), *pairs, "--no-sync-log"]

    def _call(self, verb: str, id: str, *, name: str) -> None:
        """Run a command of the runtime that leaves no process; turn its message into an error."""
        answer = run([*self._command(verb), id], f"{verb} of '{name}'", timeout=CREATE_TIMEOUT)
        if answer.returncode:
            raise runtime_error(verb, name, answer.stderr)

    def _end(self, id: str) -> None:
        """End every process of a container: its own, then conmon and the runtime's."""
        deadline = time.monotonic() + CONMON_GRACE
        cgroup.thaw(self.cgroup(id))
        known = list(self._processes(id))
        kill_each(cgroup.pids(self.cgroup(id)), signal.SIGKILL)
        for pid, program in known:
            if program == str(self.conmon):
                wait_end(pid, time.monotonic() + 1.0)
        while left := {pid for pid, _ in self._processes(id)} | cgroup.pids(self.cgroup(id)):
            if time.monotonic() > deadline:
                raise TryAgain(f"end of '{id}': processes {sorted(left)} do not die")
            kill_each(left, signal.SIGKILL)
            for pid in left:
                wait_end(pid, time.monotonic() + 0.5)

    def _has_poststop(self, id: str) -> bool:
        """Whether the runtime would run hooks when it deletes a container, from the state that it keeps itself."""
        kept = (read_text(self.root / id / name) for name in ("state.json", "config.json"))  # runc's, crun's
        return any(map(_POSTSTOP.search, kept))

    def _reap(self, id: str) -> None:
        """Collect the exit status of ended processes whose parent is this process, as a subreaper."""
        run = self.run_of(id)
        for name in ("conmon.pid", "pid"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = int((self.record(id) / name).read_text())
                if run is None or _ticks(pid) in (run.conmon_ticks, run.started_ticks):  # else the pid was reused
                    reap(pid)

    def _processes(self, id: str) -> Iterator[tuple[int, str]]:
        """The conmon and the runtime processes of a container that run: pid and program.

        Once a run is recorded only its conmon can be left. Before that, all processes of the host are searched.
        """
        if run := self.run_of(id):
            if self.supervised(run):
                yield run.conmon_pid, str(self.conmon)
            return
        if not self.record(id).exists() and not (self.root / id).exists():
            return
        programs, root = (str(self.conmon), str(self.binary.path)), str(self.root)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                argv = read_text(entry / "cmdline").split("\0")  # "" of zombies, kernel threads and what has ended
                if argv[0] in programs and id in argv and any(root in part for part in argv):
                    yield int(entry.name), argv[0]


def _leave(place: Path, text: str) -> None:
    """Write the file of a command, which the runtime reads soon, and delete those that were read long ago."""
    now = time.time()
    for old in place.parent.glob("exec-*"):
        with contextlib.suppress(FileNotFoundError):
            if not now - EXEC_READ < old.stat().st_mtime <= now + EXEC_READ:
                old.unlink()
    try:
        os.utime(place)
    except FileNotFoundError:
        fresh = place.with_name(f"{place.name}.{threading.get_ident()}")
        fresh.write_text(text)
        fresh.replace(place)


@lru_cache(maxsize=1)
def boot_id() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def reopen_log(bundle: Path) -> None:
    """Make the conmon of a bundle reopen its log file, by its control FIFO; do nothing if it has ended."""
    try:
        control = os.open(bundle / "ctl", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):
            return
        raise
    with os.fdopen(control, "wb") as fifo:
        fifo.write(b"2 0 0\n")


def become_subreaper() -> None:
    """Become the parent of processes whose own parent has ended (prctl(2)), so that `reap` works on them."""
    call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(pid: int) -> bool:
    """Collect the exit status of a child that has ended; False if it runs, or is no child of ours."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def _read_line(pipe: int, deadline: float) -> bytes:
    """Read up to a line end, the end of the pipe or the deadline."""
    answer, poller = b"", select.poll()
    poller.register(pipe, select.POLLIN)
    while not answer.endswith(b"\n") and poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        answer += chunk
    return answer


def _pid_from(answer: bytes, name: str) -> int:
    try:
        said: dict[str, Any] = json.loads(answer)
    except ValueError as error:
        raise UnfitHost(f"start of '{name}': conmon ended without a message (see `holdfast doctor`)") from error
    if (pid := int(said.get("data", said.get("pid", -1)))) <= 0:
        raise runtime_error("start", name, str(said.get("message") or "no reason given"))
    return pid


_POSTSTOP = re.compile(r'"poststop":\s*\[')
_SPOKEN = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_PROGRAM = re.compile(
    r"executable file .*not found|: exec: |open executable|exec format error|chdir to |no such file.*exec", re.I
)


def runtime_error(verb: str, name: str, text: str) -> HoldfastError:
    """The last line that a runtime wrote, as an error: WrongState for what its program can't do."""
    last = (text.strip().splitlines() or ["no reason given"])[-1]
    if spoken := _SPOKEN.search(last):
        last = spoken[1].replace('\\"', '"')
    kind = WrongState if verb == "start" and _PROGRAM.search(text) else UnfitHost
    return kind(f"{verb} of '{name}': {last}")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; [] if there is no such process."""
    return read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process with this number and start time runs; a zombie does not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX" and int(fields[19]) == ticks


def wait_end(pid: int, deadline: float | None, unless: int | None = None) -> bool:
    """Wait until a process has ended (a zombie has); False at the deadline (monotonic) or once unless is readable."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with held(handle):
        poller = select.poll()
        for each in (handle, *(() if unless is None else (unless,))):
            poller.register(each, select.POLLIN)
        found = poller.poll(_milliseconds(deadline))
        while not found and deadline is not None and time.monotonic() < deadline:
            found = poller.poll(_milliseconds(deadline))
        return handle in dict(found)


def _milliseconds(deadline: float | None) -> float | None:
    """The time until a deadline (monotonic), limited to what poll(2) can wait."""
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()) * 1000, LONGEST_POLL)


def kill_each(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes; ignore those that have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
