#!/usr/bin/env python3
"""How long, how much: holdfast beside Docker and podman where they are installed, and beside the floor: `make bench`.

    make bench                 whoever is installed
    make bench PEERS=yes       install Debian's Docker, Compose and podman first
    make bench BENCH="--counts 10,100 --only holdfast,docker"         or --quick

Method. Everyone runs in this one session, on the same workload (see `workload`), one after the other. A figure is the
median of several rounds. Time begins when the state file is renamed into place (or the command is called) and ends
when the last program has said itself that it runs. CPU is that of the whole machine, less its idle rate, because an
engine's work is not done by its client. Ratios of one session mean something; absolute figures only on a quiet host.

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from rich.console import Console
from rich.table import Table

import machine
from contestant import BRIDGE, NO_NETWORK, Contestant, Shape, Unsupported, full
from engines import Docker, Podman, mounts_below
from floor import Floor
from holdfast_agent import HOLDFAST, Holdfast
from workload import Gate, write_image

PR_SET_CHILD_SUBREAPER = 36
REST = 0.3  # seconds after each removal, for everyone: the kernel takes namespaces apart behind the scenes
PEERS = {"docker": ("dockerd", "docker"), "podman": ("podman",)}

os.environ["PATH"] += os.pathsep + "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass
class Figures:
    """What was measured: row → contestant → median; rows in the order in which they first came up."""

    unit: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, float]] = field(default_factory=dict)

    def put(self, row: str, unit: str, who: str, values: list[float]) -> None:
        self.unit[row] = unit
        self.cells.setdefault(row, {})[who] = statistics.median(values)
        print(f"  {row}: {statistics.median(values):.4g} {unit}", file=sys.stderr, flush=True)


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

    def _standing(self, count: int, seconds: float = 5.0) -> None:
        """Memory and CPU of what stands there while nothing happens."""
        pids = self.who.standing()
        self._put(f"{count}: memory (PSS)", "MB", [machine.pss_bytes(pids) / 1e6])
        before = machine.cpu_seconds(pids)
        time.sleep(seconds)
        self._put(f"{count}: idle CPU", "% of a core", [(machine.cpu_seconds(pids) - before) / seconds * 100])

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


def show(figures: Figures, who: list[str], versions: dict[str, str], about: str) -> None:
    """The table: medians, and how holdfast compares with each of the others."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=about, title_justify="left", caption="\n".join(versions.values()), caption_justify="left")
    table.add_column("")
    table.add_column("unit")
    for name in who:
        table.add_column(name, justify="right")
    peers = [name for name in who if name not in ("holdfast", "floor")]
    for name in peers:
        table.add_column(f"÷ {name}", justify="right")
    for row, cells in figures.cells.items():
        own = cells.get("holdfast")
        table.add_row(
            row,
            figures.unit[row],
            *(figure(cells[name]) if name in cells else "" for name in who),
            *(ratio(own, cells.get(name)) for name in peers),
        )
    console.print(table)


def figure(value: float) -> str:
    """Three digits, and none of them an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(own: float | None, other: float | None) -> str:
    """holdfast as a part of the other: 1/7.3 where it takes less, ×2.0 where it takes more."""
    if not own or not other or own <= 0 or other <= 0:
        return ""
    return f"1/{other / own:.1f}" if own < other else f"×{own / other:.1f}"


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


def contestants(home: Path, image: Path, gate: Path, runtime: str, only: list[str]) -> Iterator[Contestant]:
    """Those who take part: holdfast, the peers that are installed, the floor."""
    for name in only:
        if any(shutil.which(program) is None for program in PEERS.get(name, ())):
            print(f"bench: {name} is not installed (make bench PEERS=yes installs Debian's)", file=sys.stderr)
            continue
        match name:
            case "holdfast":
                yield Holdfast(home / name, image, gate, runtime)
            case "docker":
                yield Docker(home / name, image, gate)
            case "podman":
                yield Podman(home / name, image, gate, runtime)
            case "floor":
                yield Floor(home / name, image, gate, runtime)
            case _:
                raise SystemExit(f"bench: '{name}' is nobody (expected holdfast, docker, podman, floor)")


def close(who: Contestant) -> None:
    """Take away what is left of one; what can't be is told, and the others are measured all the same."""
    try:
        who.close()
    except (RuntimeError, OSError) as error:
        print(f"bench: {who.name} left something behind: {error}", file=sys.stderr)


def measure(arguments: argparse.Namespace, home: Path) -> None:
    gate, figures, versions = Gate(home / "gate"), Figures(), {}
    program = write_image(home / "image.tar")
    idle = machine.idle_rate(2)
    ports = iter(range(18_000, 19_000))
    with fit_runtime(arguments.runtime, home) as runtime:
        for who in contestants(home, home / "image.tar", gate.folder, runtime, arguments.only):
            print(f"{who.name}", file=sys.stderr, flush=True)
            try:
                versions[who.name] = f"{who.name}: {who.open()}"
                race(who, Bench(who, gate, figures, arguments.rounds, idle), arguments.counts, ports)
            except (RuntimeError, TimeoutError, OSError) as error:
                print(f"bench: {who.name} gave up: {error}", file=sys.stderr)
            finally:
                close(who)
    about = f"medians of {arguments.rounds} rounds; {program}; {os.cpu_count()} cores, Linux {os.uname().release}"
    show(figures, [name for name in arguments.only if name in versions], versions, about)


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
        "--only", type=lambda text: text.split(","), default=["holdfast", "docker", "podman", "floor"]
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.counts = 2, [10]
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
