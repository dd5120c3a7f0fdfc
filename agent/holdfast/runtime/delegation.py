"""The part of the cgroup tree that is the agent's: on a host with systemd, below a unit that has it delegated.

systemd writes to every cgroup of a v2 tree except those below a unit with Delegate=yes (CGROUP_DELEGATION). The
agent's own unit is not the place: whatever stops, restarts or kills the agent would reach its containers. So systemd
is asked to run a service that does nothing but keep the place:

    /system.slice/NAME-containers.service
        keeper          the one process of the service: a cgroup with children has no processes of its own
        conmon          every conmon
        NAME/ID         a container
        NAME-build      processes of builds

It lasts until no container is left. A host without systemd, or with cgroup v1, has /NAME alone. Called by the node.

The unit is a file in /run, not a transient unit: systemd makes no transient unit of a name that has settings of an
administrator (drop-ins, `systemctl set-property`), or whose last run it remembers because another unit names it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess

from holdfast.drivers import Host
from holdfast.errors import TryAgain, UnfitHost, explained
from holdfast.files import read_text, write_whole
from holdfast.runtime import cgroup
from holdfast.runtime.binaries import run

BOOTED = Path("/run/systemd/system")  # sd_booted(3)
TIMEOUT = 60.0  # seconds that systemd may take
LAST_LOOK = 5.0  # seconds to see the place go
NOT_FOUND = 5  # what systemctl exits with
UNIT = Path(__file__).with_name("containers.service")
_making = threading.Lock()


def unit_of(name: str) -> str:
    """The service that keeps the place of an agent's containers."""
    return f"{name}-containers.service"


def unit_file(host: Host) -> Path:
    """Where that service is described; gone with the last container."""
    return BOOTED / unit_of(host.name)


def place_of(name: str) -> str:
    """`Host.cgroup_root` of an agent on this host: "" where nobody has to be asked for a cgroup."""
    return f"/system.slice/{unit_of(name)}" if BOOTED.is_dir() and cgroup.version() == 2 else ""


def ensure(host: Host) -> None:
    """Have the place delegated. Costs one read where it is already.

    A place that lost its keeper can't be given a new one while containers run in it; systemd leaves it alone.
    """
    if (top := _folder(host)) is None or cgroup.processes(top / "keeper"):
        return
    with _making:
        if not cgroup.counts(top / "cgroup.events").get("populated"):
            _delegate(host)
        for pid in cgroup.processes(top):
            (top / "keeper").mkdir(exist_ok=True)
            (top / "keeper/cgroup.procs").write_text(str(pid))


def adopt(host: Host, conmon: int) -> None:
    """Move a conmon out of the agent's own unit; nothing happens when it has ended."""
    now = read_text(f"/proc/{conmon}/cgroup")
    if (top := _folder(host)) is None or not now or f"0::{host.cgroup_root}/conmon\n" in now:
        return
    with contextlib.suppress(ProcessLookupError):
        (top / "conmon").mkdir(exist_ok=True)
        (top / "conmon/cgroup.procs").write_text(str(conmon))


def dissolve(host: Host) -> None:
    """Give the place up, unless something still runs in it."""
    top = _folder(host)
    if top is None or not top.is_dir():
        return
    for leaf in (top / "conmon", top / host.name, top / f"{host.name}-build"):
        with contextlib.suppress(OSError):
            leaf.rmdir()
    if {*cgroup.children(top)} <= {"keeper"}:
        for pid in cgroup.processes(top / "keeper"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + LAST_LOOK
        cgroup.wait_event(top, "populated", 0, deadline)
        while top.is_dir() and time.monotonic() < deadline:  # systemd removes it; the kernel announces that to nobody
            time.sleep(0.02)
        unit_file(host).unlink(missing_ok=True)


def used(host: Host) -> bool:
    """Whether the place exists."""
    return (top := _folder(host)) is not None and top.is_dir()


def keeps(host: Host) -> bool:
    """Whether the place is delegated, or need not be."""
    return (top := _folder(host)) is None or bool(cgroup.processes(top / "keeper"))


def _delegate(host: Host) -> None:
    unit, file = unit_of(host.name), unit_file(host)
    with explained(f"write unit file '{file}'", TryAgain):
        write_whole(file, UNIT.read_text().replace("@NAME@", host.name))
    done = _systemctl(host, "start", unit)
    if done.returncode == NOT_FOUND:  # it was looked for before, and systemd remembers that
        _systemctl(host, "daemon-reload")
        done = _systemctl(host, "start", unit)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise TryAgain(f"delegate cgroup '{host.cgroup_root}': {said} (see systemctl status {unit})")


def _systemctl(host: Host, *words: str) -> CompletedProcess[str]:
    what = f"delegate cgroup '{host.cgroup_root}'"
    program = shutil.which("systemctl", path="/usr/bin:/bin")
    if program is None:
        raise UnfitHost(f"{what}: systemctl is missing (apt-get install systemd)")
    return run([program, "--no-ask-password", *words], what, timeout=TIMEOUT)


def _folder(host: Host) -> Path | None:
    return cgroup.ROOT / host.cgroup_root.lstrip("/") if host.cgroup_root else None
