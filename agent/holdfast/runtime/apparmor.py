"""AppArmor: load the profile of an agent's containers into the kernel, if AppArmor is on.

It denies what other barriers deny, too: mounts, and writing to parts of /proc and /sys that are not the container's.
So it helps where one of them has a hole. Called by the node before a start, and when no container is left.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

from holdfast.errors import UnfitHost, WrongState
from holdfast.runtime.binaries import find_program

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
LOADED = Path("/sys/kernel/security/apparmor/profiles")
ABI = Path("/etc/apparmor.d/abi/3.0")
TIMEOUT = 30.0  # seconds

_TEXT = """
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (receive) peer={{runc,crun,/usr/bin/runc,/usr/bin/crun,/usr/sbin/runc}},
  # As peers, processes of a container have the runtime's profile, too, where that has one (Debian 13: crun).
  signal (send,receive) peer="{{{name},*//&{name},{name}//&*}}",
  ptrace (trace,read,tracedby,readby) peer="{{{name},*//&{name},{name}//&*}}",

  deny mount,
  deny /proc/* w,
  deny /proc/{{acpi,bus,fs,irq,scsi,sys}}/** w,
  deny /proc/{{kcore,kmem,mem,sysrq-trigger}} rwklx,
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"""

_lock = threading.Lock()
_ours: set[str] = set()  # the profiles that this process has loaded


def enabled() -> bool:
    """Whether AppArmor is on."""
    try:
        return ENABLED.read_text().startswith("Y")
    except OSError:
        return False


def text(name: str) -> str:
    """The profile in apparmor.d(5)'s language.

    It is written for AppArmor 3: a parser of version 4 would otherwise let it deny user namespaces and io_uring,
    which it does not mention.
    """
    return (f"abi <abi/{ABI.name}>,\n" if ABI.exists() else "") + _TEXT.format(name=name)


def loaded() -> frozenset[str]:
    """The profiles that are loaded."""
    try:
        lines = LOADED.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(line.rpartition(" (")[0] for line in lines)


def ensure(name: str) -> tuple[str, str]:
    """Load a profile unless it is loaded. Return its name, "" if none applies, and a warning or "".

    Each process loads it once: another version of the agent may have loaded another text.
    """
    if not enabled():
        return "", ""
    with _lock:
        if name in _ours and name in loaded():
            return name, ""
        parser = find_program("apparmor_parser")
        if parser is None:
            return "", "AppArmor does not confine it: apparmor_parser is not installed (apt-get install apparmor)"
        _parse(parser, "--replace", name)
        _ours.add(name)
        return name, ""


def require(name: str) -> str:
    """The name of a profile, if it is loaded; WrongState if not."""
    if not enabled():
        raise WrongState(f"apparmor '{name}': AppArmor is off on this host (default or unconfined)")
    if name not in loaded():
        raise WrongState(f"apparmor '{name}': no such profile is loaded (apparmor_parser -r FILE)")
    return name


def remove(name: str) -> None:
    """Unload a profile; succeed when it is not loaded."""
    with _lock:
        if enabled() and name in loaded() and (parser := find_program("apparmor_parser")):
            _parse(parser, "--remove", name)


def _parse(parser: Path, option: str, name: str) -> None:
    try:
        done = subprocess.run(
            [parser, option, "--skip-cache"],
            input=text(name),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnfitHost(f"load of AppArmor profile '{name}': {error}") from error
    if done.returncode:
        raise UnfitHost(f"load of AppArmor profile '{name}': {' '.join(done.stderr.split()) or 'no reason given'}")
