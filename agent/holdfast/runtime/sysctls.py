"""Kernel settings of containers, tried before anything is stopped.

A thread unshares its network and IPC namespaces, writes the settings there as the runtime will, and ends; the
kernel alone knows which names and values it takes. Called by the node when it stages.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import HoldfastError, NotPermitted, WrongState

CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS = 0x40000000, 0x08000000, 0x04000000

_libc = ctypes.CDLL(None, use_errno=True)


def try_sysctls(settings: Mapping[str, str]) -> None:
    """Raise WrongState for settings that the kernel does not know or refuses; the host's own are left alone."""
    if not settings:
        return
    failure: list[HoldfastError] = []
    thread = threading.Thread(target=_write, args=(settings, failure), name="sysctls")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _write(settings: Mapping[str, str], failure: list[HoldfastError]) -> None:
    if _libc.unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) != 0:
        cause = os.strerror(ctypes.get_errno()).lower()
        failure.append(NotPermitted(f"sysctls '{next(iter(settings))}': can't be tried: {cause}"))
        return
    for name, value in settings.items():
        try:
            Path("/proc/sys", *_anywhere(name).split(".")).write_text(value)
        except FileNotFoundError:
            failure.append(WrongState(f"sysctls '{name}': the kernel of this host has no such setting"))
        except OSError as error:
            cause = (error.strerror or "").lower()
            failure.append(WrongState(f"sysctls '{name}': the kernel refuses '{value}': {cause}"))


def _anywhere(name: str) -> str:
    """The setting of an interface as one that every namespace has: eth0 is made only by the start."""
    return re.sub(r"^(net\.ipv[46]\.(?:conf|neigh))\.(?!all\.)[^.]+\.", r"\1.default.", name)
