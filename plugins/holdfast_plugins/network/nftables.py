"""nft(8) scripts → the kernel's rule set, in process through libnftables(3), or by the program nft where it lacks.

One script is one transaction: all of it stands, or nothing changed.
"""

from __future__ import annotations

import ctypes
import shutil
import socket
import struct
import subprocess
import threading
from typing import Protocol

from holdfast.errors import UnfitHost

LIBRARY = "libnftables.so.1"
NETLINK_NETFILTER = 12
NFT_MSG_GETGEN = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES
NLM_F_REQUEST = 0x1
NFTA_GEN_ID = 1


class NftError(Exception):
    """What nft(8) has to say about a script, in its own words."""


class Nft(Protocol):
    """Runs scripts."""

    def run(self, script: str) -> str:
        """Run a script and return what it prints; raise NftError. Thread-safe."""
        ...


def open_nft() -> Nft:
    """The library if it is there, else the program; raise UnfitHost when neither is."""
    try:
        return Library(ctypes.CDLL(LIBRARY))
    except OSError:
        program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise UnfitHost(f"open '{LIBRARY}': neither it nor the program nft is there (apt install nftables)")
    return Program(program)


class Library:
    """libnftables: 0.1 ms for a small script. One context, which takes one script at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)
        self._lock = threading.Lock()

    def run(self, script: str) -> str:
        with self._lock:
            result = self._library.nft_run_cmd_from_buffer(self._context, script.encode())
            output = self._library.nft_ctx_get_output_buffer(self._context)
            complaint = self._library.nft_ctx_get_error_buffer(self._context)
        if result != 0:
            raise NftError(_first_line(complaint.decode(errors="replace")))
        return str(output.decode(errors="replace"))


class Program:
    """The program nft: about 10 ms for any script."""

    def __init__(self, path: str) -> None:
        self._path = path

    def run(self, script: str) -> str:
        done = subprocess.run([self._path, "-f", "-"], input=script, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NftError(_first_line(done.stderr))
        return done.stdout


class RuleSet:
    """The generation of this namespace's rule set: a number that every change, whoever makes it, adds one to.

    The socket is kept: closing one waits until the kernel has freed what was deleted, some 20 ms.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.bind((0, 0))

    def generation(self) -> int:
        """Read it; not for two threads at once."""
        self._socket.send(struct.pack("=IHHIIBBH", 20, NFT_MSG_GETGEN, NLM_F_REQUEST, 1, 0, 0, 0, 0))
        answer = self._socket.recv(4096)
        at = 20
        while at + 8 <= len(answer):
            length, kind = struct.unpack_from("=HH", answer, at)
            if kind == NFTA_GEN_ID:
                return int(struct.unpack_from(">I", answer, at + 4)[0])
            at += (length + 3) & ~3
        raise UnfitHost("read the rule set's generation: the kernel does not tell (a kernel with nf_tables)")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
