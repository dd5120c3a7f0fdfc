"""Run nft(8) scripts, and read the kernel's rule set.

Scripts run in process by libnftables(3), or else by the program nft. One script is one transaction: all of it is
done, or nothing. The rule set is read by nfnetlink.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
import threading
from contextlib import suppress
from typing import Protocol

from holdfast.errors import UnfitHost
from holdfast_plugins.network.wire import NETLINK_NETFILTER, Socket, attribute, attributes, text

LIBRARY = "libnftables.so.1"
NFT, INET = 10, 1  # NFNL_SUBSYS_NFTABLES, NFPROTO_INET
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE = 1, 4, 7
NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFT_MSG_GETGEN = 10, 13, 16
NFTA_TABLE_FLAGS, NFTA_TABLE_USERDATA, NFTNL_UDATA_TABLE_COMMENT = 2, 6, 0
NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_HOOK_HOOKNUM = 3, 4, 5, 1
FORWARDING = (1, 2, 7)  # NFPROTO_INET, NFPROTO_IPV4, NFPROTO_BRIDGE
FORWARD_HOOK, DROPS = (2).to_bytes(4, "big"), bytes(4)  # NF_INET_FORWARD and NF_BR_FORWARD; NF_DROP
NFTA_TABLE, NFTA_SET, NFTA_SET_ELEMENTS, NFTA_GEN_ID = 1, 2, 3, 1
NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 2, 4
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_DATA_VALUE = 1, 2, 1


class NftError(Exception):
    """The message of nft(8) about a script."""


class Nft(Protocol):
    """Runs scripts."""

    def run(self, script: str) -> str:
        """Run a script and return what it prints; raise NftError. Thread-safe."""
        ...


def open_nft() -> Nft:
    """Open the library if it is installed, else the program; raise UnfitHost if neither is."""
    try:
        return Library(ctypes.CDLL(LIBRARY))
    except OSError:
        program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise UnfitHost(f"open '{LIBRARY}': neither it nor the program nft is installed (apt install nftables)")
    return Program(program)


class Library:
    """libnftables: 0.1 ms for a small script. It has one context, for one script at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self._library.nft_ctx_free(self._context)

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
    """Reads the kernel's rule set by nfnetlink: whether it changed, and what is in one table.

    Not for two threads at once. The socket stays open: closing it waits some 20 ms, until the kernel has freed what
    was deleted.
    """

    def __init__(self) -> None:
        self._socket = Socket(NETLINK_NETFILTER)

    def generation(self) -> int:
        """A number that grows by one with every change in this network namespace, whoever makes it."""
        for body in self._ask(NFT_MSG_GETGEN, dump=False):
            return int.from_bytes(dict(attributes(body))[NFTA_GEN_ID], "big")
        raise UnfitHost("read the rule set's generation: the kernel does not tell (a kernel with nf_tables)")

    def fingerprint(self, table: str) -> str | None:
        """The digest of all that is in a table of family inet, handles included; None without such a table.

        It differs after any change by another program, even if the same rules are written again. The order of rules
        counts, the order of a set's elements does not.
        """
        name = attribute(NFTA_TABLE, table.encode() + b"\0")
        while True:
            before = self.generation()
            found = [body for body in self._ask(NFT_MSG_GETTABLE) if body.startswith(name)]
            if found:
                found += [body for body in self._ask(NFT_MSG_GETCHAIN) if body.startswith(name)]
                found += self.rules(table)
            if self.generation() == before:  # else it changed meanwhile
                return hashlib.sha256(b"".join(found)).hexdigest() if found else None

    def comment(self, table: str) -> str | None:
        """The comment of a table of family inet, "" if it has none; None when there is no such table."""
        name = attribute(NFTA_TABLE, table.encode() + b"\0")
        for body in self._ask(NFT_MSG_GETTABLE):
            if body.startswith(name):
                return _comment(dict(attributes(body)).get(NFTA_TABLE_USERDATA, b""))
        return None

    def dropping_forward(self) -> list[tuple[int, str, str]]:
        """The chains (family, table, name) that see forwarded packets and have the policy drop."""
        found = []
        for family in FORWARDING:
            for body in self._ask(NFT_MSG_GETCHAIN, b"", family):
                chain = dict(attributes(body))
                hook = dict(attributes(chain.get(NFTA_CHAIN_HOOK, b""))).get(NFTA_HOOK_HOOKNUM)
                if hook == FORWARD_HOOK and chain.get(NFTA_CHAIN_POLICY) == DROPS:
                    found.append((family, text(chain[NFTA_TABLE]), text(chain[NFTA_CHAIN_NAME])))
        return found

    def frame(self, table: str) -> list[str]:
        """A digest of each part of a table of family inet but for its sets: its flags, its chains, its rules.

        Handles are left out: what is deleted and made again as it was has the same digest.
        """
        name = attribute(NFTA_TABLE, table.encode() + b"\0")
        kinds = {
            NFT_MSG_GETTABLE: (NFTA_TABLE_FLAGS,),
            NFT_MSG_GETCHAIN: (NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY),
            NFT_MSG_GETRULE: (NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS),
        }
        return [
            _digest(body, *attributes)
            for kind, attributes in kinds.items()
            for body in self._ask(kind, name if kind == NFT_MSG_GETRULE else b"")
            if body.startswith(name)
        ]

    def elements(self, table: str, map: str) -> list[tuple[bytes, bytes]]:
        """Key and value of each element of a map of family inet, as the kernel keeps them."""
        which = attribute(NFTA_TABLE, table.encode() + b"\0") + attribute(NFTA_SET, map.encode() + b"\0")
        answers = self._ask(NFT_MSG_GETSETELEM, which)
        elements = (dict(attributes(each)) for part in answers for each in _elements(part))
        return [(_value(each[NFTA_SET_ELEM_KEY]), _value(each[NFTA_SET_ELEM_DATA])) for each in elements]

    def rules(self, table: str, family: int = INET) -> list[bytes]:
        """The rules of a table, its sets and their elements in a fixed order, as the kernel encodes them."""
        name = attribute(NFTA_TABLE, table.encode() + b"\0")
        found = self._ask(NFT_MSG_GETRULE, name, family)
        for body in self._ask(NFT_MSG_GETSET, name, family):
            which = attribute(NFTA_SET, dict(attributes(body))[NFTA_SET])
            elements = self._ask(NFT_MSG_GETSETELEM, name + which, family)
            found += [body, *sorted(each for part in elements for each in _elements(part))]
        return found

    def _ask(self, kind: int, body: bytes = b"", family: int = INET, *, dump: bool = True) -> list[bytes]:
        """Send one request and collect the attributes of every answer to it; none where there is no such thing."""
        answers: list[bytes] = []
        with suppress(OSError):
            asked = struct.pack("=BBH", family, 0, 0) + body
            answers.extend(answer[4:] for answer in self._socket.ask(NFT << 8 | kind, asked, dump=dump))
        return answers


def _elements(body: bytes) -> list[bytes]:
    listed = dict(attributes(body)).get(NFTA_SET_ELEMENTS, b"")
    return [element for _, element in attributes(listed)]


def _value(data: bytes) -> bytes:
    return dict(attributes(data))[NFTA_DATA_VALUE]


def _digest(body: bytes, *kinds: int) -> str:
    """A digest of some of the attributes of an answer."""
    found = dict(attributes(body))
    return hashlib.sha256(b"".join(attribute(kind, found.get(kind, b"")) for kind in kinds)).hexdigest()[:16]


def _comment(userdata: bytes) -> str:
    """The comment in the user data of an object: a list of (kind, length, bytes)."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == NFTNL_UDATA_TABLE_COMMENT:
            return userdata[at + 2 : at + 2 + length].rstrip(b"\0").decode(errors="replace")
        at += 2 + length
    return ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
