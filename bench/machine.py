"""Reads the machine: CPU time of everything on it, memory and CPU time of single processes."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

BUSY = 0.2  # CPU seconds a second: a machine that spends more without us tells nothing of what we spend
TICK = 1 / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything but idling and waiting for disks."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) * TICK


def facts() -> dict[str, str]:
    """What somebody has to know who compares figures of two machines."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    system = dict(
        line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    name, host = system.get("PRETTY_NAME", "Linux").strip('"'), os.uname()
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "system": f"{name}, Linux {host.release}, {host.machine}",
        "processor": f"{os.cpu_count()} × {model.partition(':')[2].strip() or 'unknown'}",
        "memory": f"{int(memory.split()[1]) / 2**20:.1f} GiB",
        "cgroup": "v2" if unified else "v1 or hybrid",
        "python": platform.python_version(),
    }


def idle_rate(seconds: float) -> float:
    """CPU seconds that the machine spends each second while nobody asks anything of it."""
    before, begun = busy_seconds(), time.monotonic()
    time.sleep(seconds)
    return (busy_seconds() - before) / (time.monotonic() - begun)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds that these processes, and their children that have ended, have spent."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in pids) * TICK


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes, shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def processes(*names: str, bearing: Path | str = "") -> list[int]:
    """Processes that run a program of one of these names, with this text in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_text()  # empty for a zombie
            if line and str(bearing) in line and (folder / "comm").read_text().strip() in names:
                found.append(int(folder.name))
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; the second may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
