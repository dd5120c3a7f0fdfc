"""Find the program that execvp(3) would run, and say why it would fail. Pure.

Called by the node: when it stages, with a look-up through the image's layers and the mounts over them, so that what
can't be executed is found before anything stops; for `exec`, with a look into the running container.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from holdfast.errors import UnfitHost, WrongState

MAX_INTERPRETERS = 4  # binfmt_script of the kernel follows no more
HEAD = 4096  # bytes of a program that are looked at
LONGEST_WORD = 32 * 4096 - 1  # MAX_ARG_STRLEN, without the terminating zero
LONGEST_WORDS = 2 << 20  # a quarter of the default stack limit: arguments, environment and 8 bytes for each

#: e_machine of ELF (elf.h) that a kernel of this machine runs by itself.
MACHINES = {"x86_64": (62, 3), "i686": (3,), "aarch64": (183, 40), "armv7l": (40,), "riscv64": (243,), "s390x": (22,)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a path leads to. mode: st_mode, 0 for nothing; known: whether that can be told before the start.

    where: what it lies in, in words; fixed: whether only another commit changes that. noexec: it lies on a file
    system whose programs can't be executed. head: reads its first bytes.
    """

    path: str
    mode: int = 0
    known: bool = True
    where: str = "the image"
    fixed: bool = True
    noexec: bool = False
    head: Callable[[], bytes] = bytes


Look = Callable[[str], Candidate]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What execvp(3) would do. obstacle: why it would fail, "" if it would not, or if that is not known.

    missing: something is not there, as opposed to there and not executable. fixed: only another commit changes that.
    found: what would be run; None where that is not known.
    """

    obstacle: str = ""
    missing: bool = False
    fixed: bool = True
    found: Candidate | None = None


def find_executable(program: str, path: str, cwd: str, look: Look, *, any_format: bool = False) -> Candidate | None:
    """What execvp(3) would run; None if that is not known before the start (see `judge`).

    Raises WrongState, or UnfitHost if this host may mend it.
    """
    if not program:
        raise WrongState("command: its first word is empty (expected a program)")
    verdict = judge(program, path, cwd, look, any_format=any_format)
    if verdict.obstacle:
        kind = WrongState if verdict.fixed else UnfitHost
        raise kind(f"exec '{program}': {verdict.obstacle}")
    return verdict.found


def judge(program: str, path: str, cwd: str, look: Look, *, any_format: bool = False) -> Verdict:
    """Follow execvp(3), the interpreters of scripts, and the loaders of programs.

    path: the container's PATH. look: what an absolute path leads to, links followed. any_format: programs of other
    machines, and scripts without `#!`, are run by somebody (binfmt_misc).
    """
    worst = Verdict("" if "/" in program else f"not found in PATH ({path})", missing=True)
    for folder in [""] if "/" in program else path.split(":"):
        found = look(posixpath.join(cwd, folder, program))  # as it is, with its `..`: links before them decide
        if not found.known:
            return Verdict()
        if not found.mode:
            obstacle = worst.obstacle or f"no such file in {found.where}"
            worst = Verdict(obstacle, worst.missing, worst.fixed and found.fixed)
        elif wrong := _not_executable(found):
            worst = Verdict(wrong, missing=False, fixed=worst.fixed and found.fixed)
        else:
            return _judge_format(found, look, any_format)
    return worst


def _not_executable(found: Candidate) -> str:
    if stat.S_ISDIR(found.mode):
        return "is a directory"
    if not stat.S_ISREG(found.mode):
        return f"'{found.path}' is not a file"
    if not found.mode & 0o111:
        return f"'{found.path}' is not executable (chmod +x)"
    return f"'{found.path}' lies on a file system that is mounted noexec" if found.noexec else ""


def _judge_format(program: Candidate, look: Look, any_format: bool) -> Verdict:
    """Follow the interpreters: of a script, the one behind `#!`; of an ELF program, its dynamic loader."""
    found = program
    for _ in range(MAX_INTERPRETERS):
        head = found.head()
        interpreter = _interpreter(head)
        if interpreter is None:
            wrong = "" if any_format else _wrong_format(head)
            return Verdict(wrong and f"'{found.path}' {wrong}", False, found.fixed, program)
        inner = look(posixpath.join("/", interpreter))
        if not inner.known:
            break
        fixed = found.fixed and inner.fixed
        if not inner.mode:
            return Verdict(f"'{found.path}' needs '{interpreter}', which is not there", True, fixed)
        if wrong := _not_executable(inner):
            return Verdict(f"'{found.path}' is run by '{interpreter}': {wrong}", False, fixed)
        if not head.startswith(b"#!"):
            break  # a loader is run as it is
        found = inner
    return Verdict(found=program)


def _interpreter(head: bytes) -> str | None:
    """What runs a program: the word behind `#!`, or the PT_INTERP of an ELF; None for one that runs by itself."""
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n", 1)[0].strip(b" \t").replace(b"\t", b" ").split(b" ", 1)
        return os.fsdecode(words[0]) or None
    if head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return None
    with suppress(struct.error):
        offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        for index in range(count):
            kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", head, offset + index * size)
            if kind == 3 and at + length <= len(head):  # PT_INTERP
                return os.fsdecode(head[at : at + length].rstrip(b"\0")) or None
    return None


def _wrong_format(head: bytes) -> str:
    """Why the kernel would not run it (ENOEXEC); "" if it would."""
    if not head:
        return "is empty"
    if head.startswith(b"#!"):
        return "names no interpreter behind '#!'"
    if not head.startswith(b"\x7fELF"):
        return "is neither a program nor a script that begins with '#!'"
    if len(head) < 20:
        return "is cut off"
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    known = MACHINES.get(os.uname().machine)
    return "" if known is None or machine in known else f"is a program for another machine than {os.uname().machine}"


def check_size(args: tuple[str, ...], env: dict[str, str]) -> None:
    """Raise WrongState for words that execve(2) refuses as too long (E2BIG)."""
    words = {f"word {number} of the command": word for number, word in enumerate(args, 1)}
    words |= {f"environment.{name}": f"{name}={value}" for name, value in env.items()}
    sizes = {what: len(word.encode(errors="surrogateescape")) for what, word in words.items()}
    for what, size in sizes.items():
        if size > LONGEST_WORD:
            raise WrongState(f"{what}: {size} bytes (the kernel takes at most {LONGEST_WORD}; put it into a file)")
    total = sum(sizes.values()) + 9 * len(sizes)
    if total > LONGEST_WORDS:
        raise WrongState(f"command and environment: {total} bytes (the kernel takes at most {LONGEST_WORDS})")
