"""A thread that hears what anybody changes in the rule set, and has it looked at when our own table is concerned.

The kernel tells every change to a multicast group (nft monitor shows it). Most of it is about the tables of others:
that costs a search for our table's name, and nothing more. Who changes our table over and over is answered more and
more rarely, so that two programs that undo each other's work don't take the processor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE = 270, 1, 33
NFT_MSG_NEWGEN = 10 << 8 | 15
NFTA_TABLE_NAME, NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME = 1, 2, 3
BUFFER = 4 << 20  # bytes of changes that may wait: a flush of ten thousand rules
AUTHOR = 0.005  # seconds to wait for the name of who made a change
SHORTEST, LONGEST = 0.05, 10.0  # seconds between two answers, while somebody goes on changing the table


class Monitor:
    """Calls altered(who) in a thread of its own after a change of table inet NAME; who: a process in words, or "".

    altered returns whether it had to put anything right.
    """

    def __init__(self, table: str, altered: Callable[[str], bool]) -> None:
        name = table.encode() + b"\0"
        self._mark = struct.pack("=HH", 4 + len(name), NFTA_TABLE_NAME) + name
        self._altered = altered
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        self._socket.setblocking(False)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._who = ""
        self._thread = threading.Thread(target=self._run, name=f"monitor table {table}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; an answer that is being given is waited for."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._end)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        due, pause, answered = False, SHORTEST, -LONGEST
        while True:
            rest = max(answered + pause - time.monotonic(), 0.0) if due else None
            events = poll.poll(None if rest is None else rest * 1000)
            if any(descriptor == self._end for descriptor, _ in events):
                return
            if self._hear():
                due = True
                if not self._who and poll.poll(AUTHOR * 1000):  # who it was comes last, in a message of its own
                    self._hear()
            now = time.monotonic()
            if not due or now < answered + pause:
                continue
            due, who, self._who = False, self._who, ""
            if self._altered(who):
                pause = min(pause * 2, LONGEST) if now - answered < LONGEST else SHORTEST
                answered = time.monotonic()

    def _hear(self) -> bool:
        """Read what has come; whether our table was in it."""
        ours = False
        while True:
            try:
                heard = self._socket.recv(1 << 17)
            except BlockingIOError:
                return ours
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                ours, self._who = True, ""  # more than there was room for: our table may have been in it
                continue
            if self._mark in heard:
                ours = True
            self._who = _author(heard) or self._who


def _author(heard: bytes) -> str:
    """Who made the change, as the message at its end says; "" when that is not in here."""
    at = 0
    while at + 20 <= len(heard):
        length, kind = struct.unpack_from("=IH", heard, at)
        if kind == NFT_MSG_NEWGEN:
            found = _attributes(heard[at + 20 : at + length])
            name = found.get(NFTA_GEN_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace")
            number = int.from_bytes(found.get(NFTA_GEN_PROC_PID, b""), "big")
            return f"'{name}' (process {number})" if name else ""
        at += max((length + 3) & ~3, 16)
    return ""


def _attributes(body: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        found[kind & 0x3FFF] = body[at + 4 : at + length]
        at += max((length + 3) & ~3, 4)
    return found
