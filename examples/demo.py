#!/usr/bin/env python3
"""Show holdfast at work on this host in six steps, and remove everything afterwards: `make demo`.

Each step says what it does, shows the real output, and is checked: the exit code is 0 only if everything was
observed. Ctrl-C and failures clean up, too. `make run` (--keep) runs an agent in the foreground on a copy of
examples/state until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from busybox_image import write_busybox_tar
from footprint import find_leftovers, leftovers, sweep
from holdfast.cli.client import Client
from holdfast.drivers import Host
from holdfast.errors import NoAgent, TryAgain

NAME = "hfdemo"  # not "demo": processes are found by it, and `make demo` is a process, too
POOL = "10.211.0.0/20"
HOLDFAST = Path(sys.executable).with_name("holdfast")
STATE = Path(__file__).with_name("state")
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
STEPS = itertools.count(1)
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
INDENT = " " * 5
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

os.environ["COLUMNS"] = str(
    min(shutil.get_terminal_size().columns, 100) - len(INDENT)
)  # holdfast folds its lines there
os.environ["PATH"] += os.pathsep + "/usr/local/sbin:/usr/sbin:/sbin"


class NotSeen(Exception):
    """A step did not show what it should."""


class Stage:
    """What the demo has on the host: a folder, a git repository, agent.toml, and an agent."""

    def __init__(self, home: Path, *, from_git: bool) -> None:
        self.home = home
        self.repository = home / "repository"
        self.config = home / "agent.toml"
        self.host = Host(NAME, home / "root", Path("/run") / NAME, POOL)
        self.port = free_port(8080)
        self.agent: subprocess.Popen[bytes] | None = None
        self.from_git = from_git
        self.repository.mkdir()
        state = f'{{ git = "{self.repository}", interval = "1h" }}' if from_git else f'"{self.repository}"'
        self.config.write_text(
            f'name = "{NAME}"\nstate = {state}\nroot = "{self.host.root}"\nrun_root = "{self.host.run_root}"\n\n'
            f'[node]\nname = "{socket.gethostname()}"\n\n[vars]\nport = "{self.port}"\n\n[network]\npool = "{POOL}"\n'
        )
        os.environ["HOLDFAST_CONFIG"] = str(self.config)

    def start_agent(self) -> None:
        """Start the agent and wait until it answers."""
        with (self.home / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [HOLDFAST, "agent", "--config", self.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.wait(self.answers, "the agent answers")

    def import_image(self, *, show: bool) -> None:
        write_busybox_tar(self.home / "busybox.tar")
        run("image", "import", str(self.home / "busybox.tar"), "busybox:1", show=show)

    def commit(self, message: str, *paths: str) -> None:
        """Commit all there is to commit, and show which lines of these files it changes."""
        git("add", "--all", at=self.repository)
        git("commit", "--quiet", f"--message={message}", at=self.repository)
        say(f"$ git commit -m {message!r}")
        for path in paths:
            shown = git("show", "--unified=0", "--format=", "HEAD", "--", path, at=self.repository).splitlines()
            say("\n".join(f"{path}: {line}" for line in shown if line[:1] in "-+" and line[:3] not in ("---", "+++")))

    def converge(self) -> float:
        """Have the agent fetch, wait until all is as committed, and return how long that took."""
        begun = time.monotonic()
        run("sync", show=False)
        self.wait(lambda: bool(self.status()["converged"]), "the agent says that it has converged")
        return time.monotonic() - begun

    def status(self) -> Mapping[str, Any]:
        """What `holdfast status --json` prints; asked here, because waiting asks it often."""
        return Client(self.host.run_root / "agent.sock").status()

    def answers(self) -> bool:
        """Whether the agent listens, and has done its first look at the host."""
        try:
            self.status()
        except (NoAgent, TryAgain):
            return False
        return True

    def instances(self) -> dict[str, dict[str, Any]]:
        """Every instance by its container's `app/name`."""
        apps = self.status()["apps"]
        return {
            f"{app}/{name}": instance
            for app, entry in apps.items()
            for name, container in entry["containers"].items()
            for instance in container["instances"]
        }

    def pids(self) -> dict[str, int]:
        """The process of every running container."""
        return {name: instance["pid"] for name, instance in self.instances().items() if instance["pid"]}

    def get(self, path: str = "/") -> str:
        """Fetch from the published port, anew: no proxy, no cache."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
        """Wait until condition holds; raises NotSeen when it does not, or when the agent died."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.agent and self.agent.poll() is not None:
                raise NotSeen(f"the agent ended with {self.agent.returncode}; its log: {self.log_tail()}")
            if time.monotonic() > deadline:
                raise NotSeen(
                    f"waited {timeout:.0f} s until {what}, without success; the agent's log: {self.log_tail()}"
                )
            time.sleep(0.01)

    def log_tail(self) -> str:
        log = self.home / "agent.log"
        return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else "(none)"

    def holds(self) -> bool:
        """Whether the host has anything with our name besides the agent and its files in run_root."""
        agent = f"process {self.agent.pid if self.agent else '-'}:"
        return any(not line.startswith((agent, "file ")) for line in find_leftovers(self.host))

    def stop_agent(self) -> None:
        if self.agent:
            self.agent.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.agent.wait(15)
            self.agent = None

    def clear(self) -> None:
        """Restore the host from any state: first with an empty commit, then by force."""
        if self.agent and self.agent.poll() is None and self.holds():
            with contextlib.suppress(NotSeen, subprocess.SubprocessError, OSError):
                for path in self.repository.glob("*.toml"):
                    path.unlink()
                if self.from_git:
                    git("commit", "--quiet", "--all", "--message=Nothing", at=self.repository)
                run("sync", show=False)
                self.wait(lambda: not self.holds(), "nothing is left", timeout=15)
        self.stop_agent()
        if leftovers(self.host):
            sweep(self.host)


def come_up(stage: Stage) -> None:
    step("The committed state comes up", "An agent follows a git repository; examples/state is committed to it.")
    git("init", "--quiet", "--initial-branch=main", at=stage.repository)
    git("commit", "--quiet", "--allow-empty", "--message=Nothing yet", at=stage.repository)
    stage.start_agent()
    stage.import_image(show=True)
    shutil.copytree(STATE, stage.repository, dirs_exist_ok=True)
    stage.commit("A site and its visitor")
    took = stage.converge()
    run("status")
    expect({"site/server", "visitor/client"} <= stage.pids().keys(), "server and client run")
    expect(stage.instances()["site/prepare"]["exit_code"] == 0, "the job is done")
    say(f"from the commit to converged in {took:.2f} s")


def answer(stage: Stage) -> None:
    step("It answers", f"Port {stage.port} of this host leads to site/server.")
    say(f"$ curl http://127.0.0.1:{stage.port}/")
    page = stage.get()
    say(page)
    expect("held fast" in page, "the page is the one in the repository")
    say(f"$ curl http://127.0.0.1:{stage.port}/notes/prepared.txt")
    note = stage.get("/notes/prepared.txt")
    say(note)
    expect("prepared on" in note, "the job's file is there, through the volume")
    stage.wait(
        lambda: "answers" in run("logs", "visitor/client", show=False).stdout, "the visitor has reached the server"
    )
    run("logs", "--tail", "1", "visitor/client")


def edit(stage: Stage) -> None:
    step("A commit changes it", "A new page and more memory for the server. First the plan, which changes nothing:")
    before = stage.pids()
    replace(stage.repository / "site.toml", 'memory = "64MiB"', 'memory = "96MiB"')
    stage.commit("More memory for the server", "site.toml")
    plan = run("plan", ok=2)
    expect(
        "memory" in plan.stdout and stage.pids() == before, "the plan names the change, and nothing has changed yet"
    )
    took = stage.converge()
    expect(stage.pids() == before, "memory changed while the same processes run on")
    say(f"converged in {took:.2f} s; site/server is still process {before['site/server']}")
    replace(stage.repository / "index.html", "held fast", "held faster")
    stage.commit("A better page", "index.html")
    run("plan", ok=2)
    took = stage.converge()
    say(f"$ curl http://127.0.0.1:{stage.port}/")
    stage.wait(lambda: "held faster" in page_or_nothing(stage), "the new page is served")
    say(stage.get())
    say(f"converged in {took:.2f} s")
    run("plan")


def kill_container(stage: Stage) -> None:
    before = stage.pids()
    pid = before["site/server"]
    step("A container is killed", "SIGKILL to the server's process, behind the agent's back:")
    say(f"$ kill -9 {pid}")
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    stage.wait(lambda: stage.pids().get("site/server", pid) != pid, "the server runs again")
    stage.wait(lambda: "held faster" in page_or_nothing(stage), "the server answers again")
    took = time.monotonic() - begun
    now = stage.pids()
    expect(now["site/server"] != pid, f"the server answers again after {took:.2f} s, as process {now['site/server']}")
    expect(now["visitor/client"] == before["visitor/client"], "the other containers were left alone")
    run("events", "--tail", "3")


def kill_agent(stage: Stage) -> None:
    before = stage.pids()
    assert stage.agent
    step(
        "The agent is killed",
        "Containers do not depend on it: they keep running, and the next agent takes them over.",
    )
    say(f"$ kill -9 {stage.agent.pid}")
    stage.agent.kill()
    stage.agent.wait()
    stage.agent = None
    expect(all(Path(f"/proc/{pid}").exists() for pid in before.values()), "every container runs on")
    expect("held faster" in stage.get(), "the site answers without an agent")
    stage.start_agent()
    stage.converge()
    run("status")
    expect(stage.pids() == before, "the new agent has taken over the same processes")


def remove(stage: Stage, before: set[str] | None) -> None:
    step("The files go, and all goes with them", "Containers, networks, ports; data only when asked for.")
    git("rm", "--quiet", "-r", ".", at=stage.repository)
    stage.commit("Nothing")
    took = stage.converge()
    stage.wait(lambda: not stage.holds(), "nothing of it is left")
    run("status")
    run("volume", "list")
    run("volume", "prune", "--force")
    stage.stop_agent()
    left = leftovers(stage.host)
    expect(not left, f"nothing on this host has the name {NAME} any more", lambda: "left: " + ", ".join(left))
    if before is not None:
        same = "mounts, links, network namespaces, cgroups and nft tables are those from before"
        expect(not (host_objects() ^ before), same, lambda: different(before))
    say(f"removed in {took:.2f} s; this host is as before")


def different(before: set[str]) -> str:
    """Say what appeared and disappeared since then."""
    now = host_objects()
    lines = [*(f"+ {each}" for each in sorted(now - before)), *(f"- {each}" for each in sorted(before - now))]
    return "\n  ".join(["if other programs change this host: make demo DEMO=--shared", *lines])


def host_objects() -> set[str]:
    """Mounts, links, network namespaces, cgroups and nft tables of this host, ours or not."""
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    folders = (Path("/sys/class/net"), Path("/run/netns"), Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/"))
    return {
        *(f"mount {point}" for point in mounts),
        *(f"{path}" for folder in folders if folder.is_dir() for path in folder.iterdir()),
        *tables.splitlines(),
    }


def page_or_nothing(stage: Stage) -> str:
    try:
        return stage.get()
    except OSError:
        return ""


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise NotSeen(f"{old!r} in {path.name}")
    path.write_text(text.replace(old, new))


def step(title: str, about: str) -> None:
    print(f"\n{bold(f'{next(STEPS)}. {title}')}\n   {about}", flush=True)


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if COLOUR else text


def say(text: str) -> None:
    for line in text.rstrip().splitlines():
        print((INDENT + line).rstrip(), flush=True)


def expect(seen: bool, what: str, why_not: Callable[[], str] = str) -> None:
    """Go on if it was seen, and say so; raise NotSeen if not, with what explains it."""
    if not seen:
        raise NotSeen(f"{what} ({why_not()})" if why_not() else what)
    print(f"   ✓ {what}", flush=True)


def run(*args: str, show: bool = True, ok: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run `holdfast args…`, show it and its output. ok: the exit code it must have; None: any."""
    done = subprocess.run([HOLDFAST, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    if show:
        say(f"$ holdfast {shlex.join(args)}")
        say(done.stdout + done.stderr)
    if ok is not None and done.returncode != ok:
        raise NotSeen(
            f"exit code {ok} from holdfast {shlex.join(args)}, but {done.returncode}: {done.stderr.strip()}"
        )
    return done


def git(*args: str, at: Path) -> str:
    who = ("-c", "user.name=Demo", "-c", "user.email=demo@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *args], cwd=at, check=True, capture_output=True, text=True).stdout


def free_port(first: int) -> int:
    """The first port from this one on that nobody listens on."""
    for port in range(first, first + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
    raise SystemExit("demo: no free port")


@contextlib.contextmanager
def staged(*, from_git: bool) -> Iterator[Stage]:
    """Make a stage that is cleared in any case; only one at a time on a host."""
    lock = Path("/run/lock/holdfast-demo")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("demo: another demo is running on this host") from None
        home = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
        forwarding = IP_FORWARD.read_text()
        stage = Stage(home, from_git=from_git)
        try:
            sweep(stage.host)  # what a demo that was killed may have left
            yield stage
        finally:
            for ending in ENDINGS:  # a second Ctrl-C must not interrupt the cleaning up
                signal.signal(ending, signal.SIG_IGN)
            stage.clear()
            if IP_FORWARD.read_text() != forwarding:
                IP_FORWARD.write_text(forwarding)
            shutil.rmtree(home, ignore_errors=True)


def demonstrate(*, shared: bool) -> None:
    before = None if shared else host_objects()
    begun = time.monotonic()
    with staged(from_git=True) as stage:
        for part in (come_up, answer, edit, kill_container, kill_agent):
            part(stage)
        remove(stage, before)
    print(f"\n{bold('Everything was observed')}, in {time.monotonic() - begun:.0f} s.")
    print("Next: `make run` runs an agent in the foreground, with files that you can edit.")


def keep() -> None:
    """Run an agent on a copy of examples/state until Ctrl-C."""
    with staged(from_git=False) as stage:
        stage.start_agent()
        stage.import_image(show=False)
        shutil.copytree(STATE, stage.repository, dirs_exist_ok=True)
        stage.converge()
        run("status")
        print(f"\n{bold('The agent follows')} {stage.repository}, and http://127.0.0.1:{stage.port}/ answers.")
        print("In another terminal, edit a file there and watch:\n")
        print(f"   export HOLDFAST_CONFIG={stage.config}\n   {HOLDFAST} status --watch\n")
        print("Ctrl-C ends it and removes everything. The agent's log follows.\n", flush=True)
        assert stage.agent
        with (stage.home / "agent.log").open() as log:
            while stage.agent.poll() is None:
                print(log.read(), end="", flush=True)
                time.sleep(0.2)
        raise NotSeen(f"the agent ended with {stage.agent.returncode}")


def interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="run an agent on a copy of examples/state until Ctrl-C")
    parser.add_argument("--shared", action="store_true", help="other programs change this host at the same time")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("demo: must be root (it makes namespaces, mounts and links)")
    for ending in ENDINGS:
        signal.signal(ending, interrupt)
    try:
        keep() if arguments.keep else demonstrate(shared=arguments.shared)
    except KeyboardInterrupt:
        print("\nstopped; everything was taken away again")
        return 0 if arguments.keep else 130
    except NotSeen as missing:
        print(f"\n{bold('Not observed')}: {missing}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
