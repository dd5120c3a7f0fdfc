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
import subprocess
import threading
import time
from pathlib import Path

from holdfast.drivers import Host
from holdfast.errors import TryAgain, UnfitHost
from holdfast.files import write_whole
from holdfast.runtime import cgroup

BOOTED = Path("/run/systemd/system")  # sd_booted(3)
TIMEOUT = 60.0  # seconds that systemd may take
LAST_LOOK = 5.0  # seconds to see the place go
NOT_FOUND = 5  # what systemctl exits with
_UNIT = """\
[Unit]
Description=Containers of {name}
RefuseManualStop=yes
IgnoreOnIsolate=yes
CollectMode=inactive-or-failed

[Service]
Type=exec
ExecStart=/bin/sleep infinity
Delegate=yes
TasksMax=infinity
# Whatever ends the keeper, the containers go on.
KillMode=process
OOMPolicy=continue
OOMScoreAdjust=-1000
"""
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
    top = _folder(host)
    if top is None or cgroup.processes(top / "keeper"):
        return
    with _making:
        if not cgroup.counts(top / "cgroup.events").get("populated"):
            _delegate(host)
        for pid in cgroup.processes(top):
            (top / "keeper").mkdir(exist_ok=True)
            (top / "keeper/cgroup.procs").write_text(str(pid))


def adopt(host: Host, conmon: int) -> None:
    """Move a conmon out of the agent's own unit; nothing happens when it has ended."""
    top = _folder(host)
    if top is None:
        return
    leaf = top / "conmon"
    with contextlib.suppress(ProcessLookupError):
        if Path(f"/proc/{conmon}/cgroup").exists() and not _is_in(conmon, f"{host.cgroup_root}/conmon"):
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(conmon))


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
        while (
            top.is_dir() and time.monotonic() < deadline
        ):  # systemd removes it, which the kernel announces to nobody
            time.sleep(0.02)
        unit_file(host).unlink(missing_ok=True)


def used(host: Host) -> bool:
    """Whether the place exists."""
    top = _folder(host)
    return top is not None and top.is_dir()


def keeps(host: Host) -> bool:
    """Whether the place is delegated, or need not be."""
    top = _folder(host)
    return top is None or bool(cgroup.processes(top / "keeper"))


def _delegate(host: Host) -> None:
    unit, file = unit_of(host.name), unit_file(host)
    try:
        write_whole(file, _UNIT.format(name=host.name))
    except OSError as error:
        raise TryAgain(f"write unit file '{file}': {(error.strerror or '').lower()}") from error
    done = _systemctl(host, "start", unit)
    if done.returncode == NOT_FOUND:  # it was looked for before, and systemd remembers that
        _systemctl(host, "daemon-reload")
        done = _systemctl(host, "start", unit)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise TryAgain(f"delegate cgroup '{host.cgroup_root}': {said} (see systemctl status {unit})")


def _systemctl(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    what = f"delegate cgroup '{host.cgroup_root}'"
    program = shutil.which("systemctl", path="/usr/bin:/bin")
    if program is None:
        raise UnfitHost(f"{what}: systemctl is missing (apt-get install systemd)")
    try:
        return subprocess.run(
            [program, "--no-ask-password", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False,
            env={"PATH": "/usr/bin:/bin"},  # NOTIFY_SOCKET is the agent's
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TryAgain(f"{what}: systemd does not answer in {TIMEOUT:g} s") from error


def _folder(host: Host) -> Path | None:
    return cgroup.ROOT / host.cgroup_root.lstrip("/") if host.cgroup_root else None


def _is_in(pid: int, path: str) -> bool:
    return f"0::{path}\n" in Path(f"/proc/{pid}/cgroup").read_text()
