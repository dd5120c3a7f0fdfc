"""AppArmor: load the profile of an agent's containers into the kernel, if AppArmor is on.

It denies what other barriers deny, too: mounts, and writing to parts of /proc and /sys that are not the container's.
So it helps where one of them has a hole. Called by the node before a start, and when no container is left.
"""

from __future__ import annotations

import threading
from pathlib import Path

from holdfast.errors import UnfitHost, WrongState
from holdfast.files import read_text
from holdfast.runtime.binaries import find_program, run

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
LOADED = Path("/sys/kernel/security/apparmor/profiles")
ABI = Path("/etc/apparmor.d/abi/3.0")
TIMEOUT = 30.0  # seconds

PROFILE = Path(__file__).with_name("apparmor.profile")

_lock = threading.Lock()
_ours: set[str] = set()  # the profiles that this process has loaded


def enabled() -> bool:
    """Whether AppArmor is on."""
    return read_text(ENABLED).startswith("Y")


def text(name: str) -> str:
    """The profile in apparmor.d(5)'s language.

    It is written for AppArmor 3: a parser of version 4 would otherwise let it deny user namespaces and io_uring,
    which it does not mention.
    """
    return (f"abi <abi/{ABI.name}>,\n" if ABI.exists() else "") + PROFILE.read_text().replace("@NAME@", name)


def loaded() -> frozenset[str]:
    """The profiles that are loaded."""
    return frozenset(line.rpartition(" (")[0] for line in read_text(LOADED).splitlines())


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
    what = f"load of AppArmor profile '{name}'"
    done = run([parser, option, "--skip-cache"], what, timeout=TIMEOUT, input=text(name))
    if done.returncode:
        raise UnfitHost(f"{what}: {' '.join(done.stderr.split()) or 'no reason given'}")
