"""Try kernel settings of containers before anything is stopped.

Only the kernel knows which names and values it accepts: a thread unshares its namespaces, writes the settings there
as the runtime will, and ends. Called by the node when it stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import NotPermitted, WrongState, explained
from holdfast.syscalls import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS, call, in_thread


def try_sysctls(settings: Mapping[str, str]) -> None:
    """Raise WrongState for settings that the kernel does not know or refuses; the host's own are left alone."""
    if settings:
        in_thread(lambda: _write(settings), "sysctls")


def _write(settings: Mapping[str, str]) -> None:
    with explained(f"sysctls '{next(iter(settings))}': can't be tried", NotPermitted):
        call("unshare", CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    for name, value in settings.items():
        with explained(f"sysctls '{name}': the kernel refuses '{value}'", WrongState):
            try:
                Path("/proc/sys", *_anywhere(name).split(".")).write_text(value)
            except FileNotFoundError as error:
                raise WrongState(f"sysctls '{name}': the kernel of this host has no such setting") from error


def _anywhere(name: str) -> str:
    """Replace the name of an interface by `default`, which every namespace has: eth0 is made by the start."""
    return re.sub(r"^(net\.ipv[46]\.(?:conf|neigh))\.(?!all\.)[^.]+\.", r"\1.default.", name)
