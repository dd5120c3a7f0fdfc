"""Deny a cgroup the access to a device: both runtimes allow /dev/net/tun to every container.

The rules of config.json can't deny it, because crun and runc (before 1.2) append their own list to them. Called by
the node between the creation of a container and its start.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import UnfitHost, explained
from holdfast.files import held
from holdfast.runtime import cgroup
from holdfast.syscalls import call

TUN = (10, 200)

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}
_PROG_LOAD, _PROG_ATTACH = 5, 8  # bpf(2)
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE_HOOK, _ALLOW_MULTI = 15, 6, 2
_KINDS = {"b": 1, "c": 2}  # BPF_DEVCG_DEV_BLOCK, BPF_DEVCG_DEV_CHAR
_ACCESS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_MKNOD, BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE


class Rule(NamedTuple):
    """Access to devices, as cgroup v1 writes it ("c 1:3 rw"). kind: c or b. None: every number."""

    kind: str
    major: int | None
    minor: int | None
    access: str

    def __str__(self) -> str:
        numbers = ("*" if each is None else str(each) for each in (self.major, self.minor))
        return f"{self.kind} {':'.join(numbers)} {self.access}"


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
    """Deny the processes of a cgroup a character device; open files stay open."""
    rule = Rule("c", *device, "rwm")
    if cgroup.version() == 1:
        _write(cgroup.folder("devices", path) / "devices.deny", str(rule))
    else:
        attach(str(cgroup.folder("devices", path)), [rule], allowed=False)


def allow_only(path: str, rules: Sequence[Rule]) -> None:
    """Allow the processes of a cgroup only the devices that the rules name."""
    if cgroup.version() == 2:
        attach(str(cgroup.folder("devices", path)), rules, allowed=True)
    elif (place := cgroup.folder("devices", path)).is_dir():
        _write(place / "devices.deny", "a")
        for rule in rules:
            _write(place / "devices.allow", str(rule))


def attach(folder: str, rules: Sequence[Rule], *, allowed: bool) -> None:
    """Attach a program to a cgroup v2, in addition to the runtime's. allowed: whether it allows what the rules name
    and denies the rest, or the other way round."""
    with held(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as handle:
        program = _program(tuple(rules), allowed)
        _bpf(_PROG_ATTACH, struct.pack("=IIII", handle, program, _CGROUP_DEVICE_HOOK, _ALLOW_MULTI), folder)


def _write(place: Path, text: str) -> None:
    with explained(f"write of '{place}'"):
        place.write_text(text)


@lru_cache(maxsize=8)
def _program(rules: tuple[Rule, ...], allowed: bool) -> int:
    """The descriptor of a program that returns 1 for what it allows, and 0 for the rest.

    Its context is struct bpf_cgroup_dev_ctx: access_type (the kind in the lower half, the wanted access in the
    upper), major, minor. An allowing rule must have all of the wanted access, a denying rule any of it.
    """
    code = [
        _instruction(0x61, 2, 1, 0),  # r2 = access_type
        _instruction(0xBF, 3, 2, 0),  # r3 = r2
        _instruction(0x77, 3, 0, 0, 16),  # r3 >>= 16: what is asked for
        _instruction(0x57, 2, 0, 0, 0xFFFF),  # r2 &= 0xffff: the kind
        _instruction(0x61, 4, 1, 4),  # r4 = major
        _instruction(0x61, 5, 1, 8),  # r5 = minor
    ]
    for rule in rules:
        access = sum(_ACCESS[letter] for letter in rule.access)
        numbers = ((2, _KINDS[rule.kind]), (4, rule.major), (5, rule.minor))
        wanted = [(register, number) for register, number in numbers if number is not None]
        ending = [
            _instruction(0xBF, 0, 3, 0),  # r0 = r3
            _instruction(0x57, 0, 0, 0, 7 - access if allowed else access),  # r0 &= what decides
            _instruction(0x55 if allowed else 0x15, 0, 0, 2, 0),  # not of this rule: the next one
            _instruction(0xB7, 0, 0, 0, int(allowed)),
            _instruction(0x95, 0, 0, 0),  # exit
        ]
        for at, (register, value) in enumerate(wanted):
            left = len(wanted) - at - 1 + len(ending)
            code.append(_instruction(0x55, register, 0, left, value))  # if it differs: the next rule
        code += ending
    code += [_instruction(0xB7, 0, 0, 0, int(not allowed)), _instruction(0x95, 0, 0, 0)]
    text = b"".join(code)
    instructions, licence = ctypes.create_string_buffer(text, len(text)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ", _CGROUP_DEVICE_PROGRAM, len(code), ctypes.addressof(instructions), ctypes.addressof(licence)
    )
    return _bpf(_PROG_LOAD, attributes.ljust(128, b"\0"), "load")


def _instruction(code: int, target: int, source: int, offset: int, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, value)


def _bpf(command: int, attributes: bytes, subject: str) -> int:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise UnfitHost(f"bpf '{subject}': its number on {platform.machine()} is not known")
    with explained(f"bpf '{subject}'"):
        return call("syscall", number, command, attributes, len(attributes))
