"""A thread that hears every change to the rule set, and has our table checked when the change is about it.

The kernel reports each change to a multicast group (nft monitor shows it). Most changes are about tables of others:
they cost a search for our table's name. If somebody changes our table again and again, the answers come more and more
rarely, so that two programs that undo each other's work do not use up the processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from holdfast_plugins.network import wire

NFNLGRP_NFTABLES = 7
NFT_MSG_NEWGEN = 10 << 8 | 15
NFTA_TABLE_NAME, NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME = 1, 2, 3
AUTHOR = 0.005  # seconds to wait for the name of who made a change
SHORTEST, LONGEST = 0.05, 10.0  # seconds between two answers, while somebody goes on changing the table


class Monitor:
    """Calls altered(who) in a thread of its own after a change of table inet NAME. who: the process, or "".

    altered returns whether it had to repair anything.
    """

    def __init__(self, table: str, altered: Callable[[str], bool]) -> None:
        self._mark = wire.attribute(NFTA_TABLE_NAME, table.encode() + b"\0")
        self._altered = altered
        self._who = ""
        self._news = wire.News(wire.NETLINK_NETFILTER, NFNLGRP_NFTABLES)
        self._news.start(self._run, f"monitor table {table}")
        self.close = self._news.close

    def _run(self) -> None:
        due, pause, answered = False, SHORTEST, -LONGEST
        while True:
            rest = max(answered + pause - time.monotonic(), 0.0) if due else None
            if not self._news.wait(rest):
                return
            if self._hear():
                due = True
                if not self._who and self._news.wait(AUTHOR):  # the author comes last, in a message of its own
                    self._hear()
            now = time.monotonic()
            if not due or now < answered + pause:
                continue
            due, who, self._who = False, self._who, ""
            if self._altered(who):
                pause = min(pause * 2, LONGEST) if now - answered < LONGEST else SHORTEST
                answered = time.monotonic()

    def _hear(self) -> bool:
        """Read what has come; return whether our table was in it."""
        ours = False
        for heard in self._news.read():
            ours = ours or not heard or self._mark in heard  # of what was lost, any may have been about our table
            self._who = (_author(heard) or self._who) if heard else ""
        return ours


def _author(heard: bytes) -> str:
    """Who made the change, from the message at its end; "" when that is not in here."""
    for kind, _, body in wire.messages(heard):
        if kind == NFT_MSG_NEWGEN:
            found = dict(wire.attributes(body, 4))
            name = wire.text(found.get(NFTA_GEN_PROC_NAME))
            number = int.from_bytes(found.get(NFTA_GEN_PROC_PID, b""), "big")
            return f"'{name}' (process {number})" if name else ""
    return ""
