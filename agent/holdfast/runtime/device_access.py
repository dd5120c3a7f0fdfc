"""Takes the access to a device away from a cgroup: both runtimes allow /dev/net/tun to every container.

The rules of a config.json can't say otherwise, because crun and runc (before 1.2) append their own list to them.
Called by the node between the creation of a container and its start.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from holdfast.errors import UnfitHost
from holdfast.runtime import cgroup

TUN = (10, 200)

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}
_PROG_LOAD, _PROG_ATTACH = 5, 8  # bpf(2)
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE_HOOK, _ALLOW_MULTI = 15, 6, 2
_CHARACTER = 2  # BPF_DEVCG_DEV_CHAR


def asked_for(config: Mapping[str, Any], device: tuple[int, int] = TUN) -> bool:
    """Whether a config.json allows a character device by its numbers, or every device."""
    rules = config.get("linux", {}).get("resources", {}).get("devices", ())
    return any(
        rule.get("allow")
        and set(rule.get("access", "")) & set("rw")
        and rule.get("type", "a") in ("a", "c")
        and rule.get("major") in (device[0], None)
        and rule.get("minor") in (device[1], None)
        for rule in rules
    )


def deny(path: str, device: tuple[int, int] = TUN) -> None:
    """Take a character device away from the processes of a cgroup; what they have open stays open."""
    if cgroup.version() == 1:
        place = cgroup.folder("devices", path) / "devices.deny"
        try:
            place.write_text(f"c {device[0]}:{device[1]} rwm")
        except OSError as error:
            raise UnfitHost(f"write of '{place}': {(error.strerror or '').lower()}") from error
    else:
        attach(str(cgroup.folder("devices", path)), device)


def attach(folder: str, device: tuple[int, int]) -> None:
    """Attach a program that refuses a device to a cgroup v2: it is asked beside the runtime's own."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _bpf(_PROG_ATTACH, struct.pack("=IIII", handle, _program(device), _CGROUP_DEVICE_HOOK, _ALLOW_MULTI), folder)
    finally:
        os.close(handle)


@lru_cache(maxsize=8)
def _program(device: tuple[int, int]) -> int:
    """The descriptor of a program that returns 0 for one character device, and 1 for all others.

    Its context is struct bpf_cgroup_dev_ctx: access_type (the kind in the lower half), major, minor.
    """
    code = b"".join(
        (
            _instruction(0x61, 2, 1, 0),  # r2 = access_type
            _instruction(0x57, 2, 0, 0, 0xFFFF),  # r2 &= 0xffff
            _instruction(0x55, 2, 0, 6, _CHARACTER),  # if r2 != character: allow
            _instruction(0x61, 2, 1, 4),  # r2 = major
            _instruction(0x55, 2, 0, 4, device[0]),
            _instruction(0x61, 2, 1, 8),  # r2 = minor
            _instruction(0x55, 2, 0, 2, device[1]),
            _instruction(0xB7, 0, 0, 0, 0),  # r0 = 0: refuse
            _instruction(0x95, 0, 0, 0),  # exit
            _instruction(0xB7, 0, 0, 0, 1),  # r0 = 1: allow
            _instruction(0x95, 0, 0, 0),
        )
    )
    instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ", _CGROUP_DEVICE_PROGRAM, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence)
    )
    return _bpf(_PROG_LOAD, attributes.ljust(128, b"\0"), "load")


def _instruction(code: int, target: int, source: int, offset: int, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, value)


def _bpf(command: int, attributes: bytes, subject: str) -> int:
    libc, number = ctypes.CDLL(None, use_errno=True), _SYS_BPF.get(platform.machine())
    if number is None:
        raise UnfitHost(f"bpf '{subject}': its number on {platform.machine()} is not known")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(libc.syscall(number, command, buffer, len(attributes)))
    if result < 0:
        raise UnfitHost(f"bpf '{subject}': {os.strerror(ctypes.get_errno()).lower()}")
    return result
