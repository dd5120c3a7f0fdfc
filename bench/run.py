#!/usr/bin/env python3
"""How long, how much: holdfast beside Docker and podman where they are installed, and beside the floor: `make bench`.

    make bench                 whoever is installed
    make bench PEERS=yes       install Debian's Docker, Compose and podman first
    make bench BENCH="--counts 10,100 --only holdfast,docker"         or --quick
    make bench BENCH="--rows images,stacks"                           or containers, growth: what to measure

Method. Everyone runs in this one session, on the same workload (see `workload`), one after the other. A figure is the
median of several rounds. Time begins when the state file is renamed into place (or the command is called) and ends
when the last program has said itself that it runs. CPU is that of the whole machine, less its idle rate, because an
engine's work is not done by its client. Growth is measured of holdfast and the floor alone: one container changed, in
one app of so many and among so many apps of one, and a look that finds nothing changed. How pulling is measured,
`images` says. Ratios of one session mean something; absolute figures only on a quiet host. The table is also written
to bench.md and bench.json, in .bench or --output.

A hybrid host on which cgroup v2 still owns hugetlb makes crun refuse to run; the bench then mounts hugetlb as v1 on a
folder of its own for as long as it runs, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import images
import machine
from contestant import BRIDGE, NO_NETWORK, Contestant, Shape, Unsupported, full
from engines import Docker, Podman, mounts_below
from figures import Figures, Report
from floor import Floor
from forge import stacks
from holdfast_agent import HOLDFAST, Holdfast
from workload import Gate, write_image

PR_SET_CHILD_SUBREAPER = 36
REST = 0.3  # seconds after each removal, for everyone: the kernel takes namespaces apart behind the scenes
NAMES = ["holdfast", "docker", "podman", "floor"]
ROWS = ["containers", "growth", "images", "stacks"]
GROWTH = [10, 300, 1000]  # containers
STRANGERS = 2000  # state files of other nodes
HIGH = 20  # layers of a stack
PEERS = {"docker": ("dockerd", "docker"), "podman": ("podman",)}

os.environ["PATH"] += os.pathsep + "/usr/local/sbin:/usr/sbin:/sbin"


class Bench:
    """One contestant on the track: every row is a method, and leaves nothing running for the next."""

    def __init__(self, who: Contestant, gate: Gate, figures: Figures, rounds: int, idle: float) -> None:
        self.who, self.gate, self.figures, self.rounds, self.idle = who, gate, figures, rounds, idle

    def one(self, row: str, shape: Callable[[], Shape]) -> None:
        """One container up, and one down, from nothing."""
        up, down = [], []
        for _ in range(self.rounds + 1):
            up.append(self._up(["c0"], shape()))
            down.append(self._down())
        self._put(f"one up, {row}", "ms", up[1:])  # the first one pays for what is made once, as the bridge
        self._put(f"one down, {row}", "ms", down[1:])

    def many(self, count: int) -> None:
        """Many up from one edit, nothing changed, one changed, many down; and what it takes to stand there."""
        names = [f"c{number}" for number in range(count)]
        rounds = max(1, self.rounds // (1 + count // 50))
        up, cpu, same, change, down, listing = [], [], [], [], [], []
        for turn in range(rounds):
            busy, begun = machine.busy_seconds(), time.monotonic()
            up.append(self._up(names, BRIDGE) / 1000)
            self._settle()
            if self.idle <= machine.BUSY:
                cpu.append(machine.busy_seconds() - busy - self.idle * (time.monotonic() - begun))
            with contextlib.suppress(Unsupported):
                same.append(self._timed(self.who.same))
            listing += [self._timed(self.who.show) for _ in range(3)]
            change.append(self._change(names[turn % count]))
            self._settle()
            if turn == rounds - 1:
                self._standing(count)
            down.append(self._down() / 1000)
        for row, unit, values in (
            (f"{count} up, bridge", "s", up), (f"{count} up, CPU of the machine", "s", cpu),
            (f"{count}: nothing changed", "ms", same), (f"{count}: one changed, up", "ms", change),
            (f"{count} down", "s", down), (f"{count}: status / ps", "ms", listing),
        ):  # fmt: skip
            self._put(row, unit, values)

    def growth(self, count: int, shape: str) -> None:
        """One of many changed, and nothing changed, as often as a median takes."""
        names = [f"c{number}" for number in range(count)]
        took = self._up(names, BRIDGE) / 1000
        self._put(f"{shape}: all up", "s", [took])
        changed = []
        for turn in range(self.rounds + 1):
            changed.append(self._change(names[turn % count]))
            self._settle()
        self._put(f"{shape}: one changed, up", "ms", changed[1:])
        if isinstance(self.who, Holdfast):
            self._put(f"{shape}: nothing changed", "ms", [self._timed(self.who.same) for _ in range(self.rounds)])
            self._standing(count, of=shape)

    def beside_strangers(self) -> None:
        """One of ten changed, beside many state files of other nodes."""
        assert isinstance(self.who, Holdfast)
        self.who.strangers(STRANGERS)
        self.growth(10, f"10 apps beside {STRANGERS} files of other nodes")

    def first(self, image: str) -> float:
        """One container of an image, up and away again; milliseconds until it ran."""
        assert isinstance(self.who, Holdfast)
        self.who.image_name = image
        took = self._up(["c0"], NO_NETWORK)
        self._down()
        return took

    def killed(self) -> None:
        """SIGKILL → running, the first time and the fifth in a row."""
        first, fifth = [], []
        for _ in range(self.rounds):
            self._up(["c0"], BRIDGE)
            for turn in range(5):
                pid, begun = self.who.pid("c0"), time.monotonic()
                os.kill(pid, signal.SIGKILL)
                took = (self.gate.wait({"c0"}) - begun) * 1000
                if turn == 0:
                    first.append(took)
            fifth.append(took)
            self._settle()
            self._down()
        self._put("killed → up, first", "ms", first)
        self._put("killed → up, fifth in a row", "ms", fifth)

    def nothing(self) -> None:
        self._standing(0)

    def _standing(self, count: int, seconds: float = 5.0, of: str = "") -> None:
        """Memory and CPU of what stands there while nothing happens."""
        pids = self.who.standing()
        self._put(f"{of or count}: memory (PSS)", "MB", [machine.pss_bytes(pids) / 1e6])
        before = machine.cpu_seconds(pids)
        time.sleep(seconds)
        self._put(f"{of or count}: idle CPU", "% of a core", [(machine.cpu_seconds(pids) - before) / seconds * 100])

    def _up(self, names: list[str], shape: Shape) -> float:
        self.gate.clear()
        begun = time.monotonic()
        self.who.up(names, shape)
        took = (self.gate.wait({*names}) - begun) * 1000
        self._settle()
        return took

    def _change(self, name: str) -> float:
        self.gate.clear()
        begun = time.monotonic()
        self.who.change(name)
        return (self.gate.wait({name}) - begun) * 1000

    def _down(self) -> float:
        took = self._timed(self.who.down)
        time.sleep(REST)
        return took

    def _settle(self) -> None:
        if isinstance(self.who, Holdfast):
            self.who.settle()

    def _put(self, row: str, unit: str, values: list[float]) -> None:
        if values:
            self.figures.put(row, unit, self.who.name, values)

    @staticmethod
    def _timed(verb: Callable[[], None]) -> float:
        begun = time.monotonic()
        verb()
        return (time.monotonic() - begun) * 1000


def race(who: Contestant, bench: Bench, counts: list[int], ports: Iterator[int]) -> None:
    """All rows of one contestant; a row that it has no way to do stays empty."""
    rows: list[Callable[[], None]] = [
        bench.nothing,
        lambda: bench.one("no network", lambda: NO_NETWORK),
        lambda: bench.one("bridge", lambda: BRIDGE),
        lambda: bench.one("bridge, port, volume, memory", lambda: full(next(ports))),
        bench.killed,
        *(lambda count=count: bench.many(count) for count in counts),
    ]
    for row in rows:
        try:
            row()
        except Unsupported:
            who.down()


@contextlib.contextmanager
def fit_runtime(asked: str, home: Path) -> Iterator[str]:
    """The runtime to measure with. auto: crun wherever it can be made to work."""
    if asked == "runc" or not shutil.which("crun"):
        yield "runc"
        return
    unified = Path("/sys/fs/cgroup/unified/cgroup.controllers")
    if not unified.exists() or not unified.read_text().strip():
        yield "crun"
        return
    folder = home / "hugetlb"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "cgroup", "-o", "hugetlb", "hugetlb", folder], check=False, capture_output=True
    )
    if done.returncode != 0:
        print("bench: crun can't run on this hybrid host; measuring with runc", file=sys.stderr)
        yield "runc"
        return
    print("bench: hugetlb is mounted as cgroup v1 for as long as this runs, or crun would refuse", file=sys.stderr)
    try:
        yield "crun"
    finally:
        subprocess.run(["umount", folder], check=True)


def present(only: list[str]) -> list[str]:
    """Those of them that are installed; the others are named."""
    for name in only:
        if name not in NAMES:
            raise SystemExit(f"bench: '{name}' is nobody (expected {', '.join(NAMES)})")
        if any(shutil.which(program) is None for program in PEERS.get(name, ())):
            print(f"bench: {name} is not installed (make bench PEERS=yes installs Debian's)", file=sys.stderr)
    return [name for name in only if all(shutil.which(program) for program in PEERS.get(name, ()))]


def contestant(name: str, home: Path, image: Path, gate: Path, runtime: str) -> Contestant:
    match name:
        case "holdfast":
            return Holdfast(home, image, gate, runtime)
        case "docker":
            return Docker(home, image, gate)
        case "podman":
            return Podman(home, image, gate, runtime)
        case _:
            return Floor(home, image, gate, runtime)


def close(who: Contestant) -> None:
    """Take away what is left of one; what can't be is told, and the others are measured all the same."""
    try:
        who.close()
    except (RuntimeError, OSError) as error:
        print(f"bench: {who.name} left something behind: {error}", file=sys.stderr)


@dataclass(frozen=True)
class Session:
    """What one run of the bench has: places, what was measured so far, and who was there in which version."""

    home: Path
    gate: Gate
    runtime: str
    rounds: int
    counts: list[int]
    names: list[str]
    idle: float
    sizes: list[int]
    figures: Figures = field(default_factory=Figures)
    versions: dict[str, str] = field(default_factory=dict)

    def containers(self) -> str:
        """Starting, changing, stopping: everyone who is there, one after the other; returns what was started."""
        image = self.home / "image.tar"
        program = write_image(image)
        ports = iter(range(18_000, 19_000))
        for name in self.names:
            who = contestant(name, self.home / name, image, self.gate.folder, self.runtime)
            print(name, file=sys.stderr, flush=True)
            try:
                self.versions[name] = f"{name}: {who.open()}"
                bench = Bench(who, self.gate, self.figures, self.rounds, self.idle)
                race(who, bench, self.counts, ports)
            except (RuntimeError, TimeoutError, OSError) as error:
                print(f"bench: {name} gave up: {error}", file=sys.stderr)
            finally:
                close(who)
        return f"containers: {program}"

    def growth(self) -> str:
        """One change in ever more containers: holdfast in both shapes, and the floor, which knows no apps."""
        image = self.home / "image.tar"
        write_image(image)
        for name in (name for name in ("holdfast", "floor") if name in self.names):
            for apart in (False, True):
                home = self.home / f"{name}-{'apart' if apart else 'together'}"
                who = contestant(name, home, image, self.gate.folder, self.runtime)
                bench = Bench(who, self.gate, self.figures, self.rounds, self.idle)
                try:
                    self.versions.setdefault(name, f"{name}: {who.open()}")
                    if isinstance(who, Holdfast):
                        who.apart = apart
                    for count in self.sizes:
                        bench.growth(count, f"{count} apps of one" if apart else f"one app of {count}")
                        who.down()
                    if apart and isinstance(who, Holdfast):
                        bench.beside_strangers()
                except (RuntimeError, TimeoutError, OSError) as error:
                    print(f"bench: {name} gave up: {error}", file=sys.stderr)
                finally:
                    close(who)
        return "growth: what a change costs where there is more"

    def images(self) -> str:
        """Pulling into an empty store, and what shares layers; returns what was pulled."""
        stores = images.stores(self.names, self.runtime)
        pulled, versions = images.race(stores, self.home, self.figures, self.rounds, self.idle)
        self.versions.update(
            {name: f"{name}: {text}" for name, text in versions.items() if name not in self.versions}
        )
        return f"images: {pulled}"

    def stacks(self) -> str:
        """The first container of an image of one layer, and of one of twenty: state file renamed → program runs."""
        heights = [1, HIGH] * (self.rounds + 1)
        layout, home = self.home / "stacks", self.home / "stacked"
        write_image(self.home / "image.tar")
        stacks(layout, self.home / "image.tar", heights)
        who = Holdfast(home, self.home / "image.tar", self.gate.folder, self.runtime)
        bench = Bench(who, self.gate, self.figures, self.rounds, self.idle)
        try:
            self.versions["holdfast"] = f"holdfast: {who.open()}"
            who.call("image", "load", str(layout))
            took = [bench.first(f"{layout.name}:{number}") for number in range(len(heights))]
        except (RuntimeError, TimeoutError, OSError) as error:
            print(f"bench: holdfast gave up: {error}", file=sys.stderr)
        else:
            for height, values in ((1, took[2::2]), (HIGH, took[3::2])):  # the first pair warms up
                self.figures.put(f"first container, image of {height} layers", "ms", "holdfast", values)
        finally:
            close(who)
        return f"stacks: each image is used for the first time, its {HIGH} layers are no other one's"


def measure(arguments: argparse.Namespace, home: Path) -> None:
    gate, idle = Gate(home / "gate"), machine.idle_rate(2)
    names = present(arguments.only)
    if idle > machine.BUSY:
        print(
            f"bench: this host is busy ({idle:.1f} cores without us): believe no figure, CPU is left out",
            file=sys.stderr,
        )
    with fit_runtime(arguments.runtime, home) as runtime:
        session = Session(home, gate, runtime, arguments.rounds, arguments.counts, names, idle, arguments.sizes)
        about = [f"medians of {arguments.rounds} rounds; runtime {runtime}; {idle:.2f} cores busy without us"]
        for row in arguments.rows:
            try:
                about.append(getattr(session, row)())
            except (RuntimeError, OSError) as error:  # no registry, no loop devices, no Debian
                print(f"bench: {row} can't be measured here: {error}", file=sys.stderr)
    who = [name for name in names if name in session.versions]
    report = Report(session.figures, who, session.versions, about, machine.facts())
    report.show()
    print("written:", *report.write(arguments.output))


def reap_orphans() -> None:
    """Go on in a child, whose orphans come to the parent and are reaped at once.

    An init that takes its time would be measured otherwise: podman's tear-down waits for zombies to go.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    bench = os.fork()
    if bench == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child has it from the terminal, too, and cleans up
    signal.signal(signal.SIGTERM, lambda *_: os.kill(bench, signal.SIGINT))
    ended = 0
    while ended != bench:
        ended, status = os.wait()
    sys.exit(os.waitstatus_to_exitcode(status))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, 10 containers at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtime", choices=["auto", "crun", "runc"], default="auto")
    parser.add_argument("--counts", type=lambda text: [int(part) for part in text.split(",")], default=[10, 50, 100])
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=NAMES, help="who takes part: %(default)s"
    )
    parser.add_argument(
        "--sizes", type=lambda text: [int(part) for part in text.split(",")], default=GROWTH, help="of growth"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / ".bench", help="folder")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=ROWS, help="what: %(default)s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.counts, arguments.sizes = 2, [10], [10]
    if unknown := {*arguments.rows} - {*ROWS}:
        raise SystemExit(f"bench: there are no rows '{unknown.pop()}' (expected {', '.join(ROWS)})")
    if os.geteuid() != 0:
        raise SystemExit("bench: must be root")
    if not HOLDFAST.exists():
        raise SystemExit("bench: run make setup first")
    reap_orphans()
    home = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
    try:
        measure(arguments, home)
    except KeyboardInterrupt:
        sys.exit("bench: stopped; everything was taken away again")
    finally:
        if not mounts_below(home):
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
