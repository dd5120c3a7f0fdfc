"""List and delete tracked IPv4 flows by nfnetlink. Called by `flows` and `bridge`.

The kernel filters flows since Linux 5.9; older ones send everything, so answers are filtered again. A flow is deleted
by its own tuple and id, never by a pattern: kernels that do not know the pattern would delete all flows of the host.
Without nf_conntrack_netlink nothing is listed or deleted, and `findings` says what follows.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from holdfast.errors import NotPermitted, UnfitHost
from holdfast.observed import Finding
from holdfast_plugins.network.wire import NETLINK_NETFILTER, Socket, attribute, attributes, message, nested

CTNETLINK = 1
IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_GET_STATS = 1, 2, 5
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 2, 12, 18, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC, CTA_IP_DST = 1, 2
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
BY_SOURCE, BY_PROTOCOL, BY_DESTINATION_PORT = 1 << 0, 1 << 3, 1 << 5
FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)  # struct nfgenmsg
BATCH = 256  # deletions in one datagram
AGAIN = 60.0  # seconds after which a kernel that lacks it is asked again: the module may be loaded by then
UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)
LACKING = Finding(
    "flows",
    "this kernel lacks nf_conntrack_netlink, so flows can't be deleted: a UDP sender that does not pause may go on to"
    " reach a container that was replaced, or the next one that has its address",
    "modprobe nf_conntrack_netlink, or a kernel that has it",
)
UDP = "udp"
NUMBERS = {"tcp": socket.IPPROTO_TCP, UDP: socket.IPPROTO_UDP}
NAMES = {number: name for name, number in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Flow:
    """One tracked flow: where its sender sends (to, port), and who answers (answered_by, answering_port).

    Both are the same unless the destination was translated. key: identifies exactly this flow.
    """

    protocol: str
    source: str
    to: str
    port: int
    answered_by: str
    answering_port: int
    key: bytes

    @property
    def translated(self) -> bool:
        return (self.to, self.port) != (self.answered_by, self.answering_port)


class Conntrack:
    """One socket, opened when it is needed. Thread-safe. A kernel that can't list flows (`findings`) has none."""

    def __init__(self, subsystem: int = CTNETLINK) -> None:
        """subsystem: of nfnetlink."""
        self._subsystem = subsystem
        self._able: bool | None = None
        self._asked_at = 0.0
        self._lock = threading.Lock()

    def findings(self) -> list[Finding]:
        """Report what this kernel lacks. It is asked once, and again now and then if it lacks something."""
        with self._lock:
            return [] if self._can() else [LACKING]

    def to_port(self, protocol: str, port: int | None) -> list[Flow]:
        """The flows of a protocol, to one port or to any. Raises UnfitHost."""
        inner = attribute(CTA_PROTO_NUM, bytes((NUMBERS[protocol],)))
        flags = BY_PROTOCOL
        if port is not None:
            inner += attribute(CTA_PROTO_DST_PORT, struct.pack(">H", port))
            flags |= BY_DESTINATION_PORT
        body = nested(CTA_TUPLE_ORIG, nested(CTA_TUPLE_PROTO, inner)) + _filter(original=flags)
        flows = self._dump(body)
        return [each for each in flows if each.protocol == protocol and port in (None, each.port)]

    def of_address(self, address: str) -> list[Flow]:
        """The flows that an address began or answers. Raises UnfitHost."""
        source = nested(CTA_TUPLE_IP, attribute(CTA_IP_SRC, socket.inet_aton(address)))
        began = self._dump(nested(CTA_TUPLE_ORIG, source) + _filter(original=BY_SOURCE))
        answers = self._dump(nested(CTA_TUPLE_REPLY, source) + _filter(reply=BY_SOURCE))
        return [each for each in (*began, *answers) if address in (each.source, each.answered_by)]

    def all(self) -> list[Flow]:
        """Every flow. Raises UnfitHost."""
        return self._dump(b"")

    def delete(self, flows: Iterable[Flow]) -> None:
        """Delete flows; one that is gone already is no error."""
        keys = [each.key for each in flows]
        with self._lock:
            for start in range(0, len(keys), BATCH):
                refused = self._do(IPCTNL_MSG_CT_DELETE, keys[start : start + BATCH]) - {0, errno.ENOENT}
                if refused:
                    raise _unfit("delete a flow", min(refused))

    def _can(self) -> bool:
        """Whether the kernel answers. It is asked for statistics, because a list may be refused for other reasons."""
        now = time.monotonic()
        if self._able is None or (not self._able and now > self._asked_at + AGAIN):
            self._asked_at = now
            try:
                (code,) = self._do(IPCTNL_MSG_CT_GET_STATS, [b""])
            except UnfitHost as error:
                code = getattr(error.__cause__, "errno", None) or 0
            self._able = code not in UNSUPPORTED
        return self._able

    def _dump(self, body: bytes) -> list[Flow]:
        with self._lock:
            if not self._can():
                return []
            try:
                answers = list(self._socket.ask(self._subsystem << 8 | IPCTNL_MSG_CT_GET, FAMILY + body))
            except OSError as error:
                raise _unfit("list flows", error.errno or 0) from error
            return [flow for answer in answers if (flow := _flow(answer[4:])) is not None]

    def _do(self, kind: int, bodies: Iterable[bytes]) -> set[int]:
        """Send requests; return the numbers of the errors that they met, and 0 for those that were done."""
        try:
            return set(self._socket.do(*(message(self._subsystem << 8 | kind, FAMILY + body) for body in bodies)))
        except OSError as error:
            raise _unfit("ask for flows", error.errno or 0) from error

    @cached_property
    def _socket(self) -> Socket:
        return Socket(NETLINK_NETFILTER)


def _unfit(what: str, code: int) -> UnfitHost:
    if code in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"{what}: not permitted (root with CAP_NET_ADMIN)")
    return UnfitHost(f"{what}: {os.strerror(code).lower()} (a kernel with nf_conntrack_netlink)")


def _flow(body: bytes) -> Flow | None:
    """Read one flow; None if it lacks addresses."""
    found = dict(attributes(body))
    original, reply = found.get(CTA_TUPLE_ORIG), found.get(CTA_TUPLE_REPLY)
    if original is None or reply is None:
        return None
    protocol, source, to, _, port = _tuple(original)
    _, answered_by, _, answering_port, _ = _tuple(reply)
    key = nested(CTA_TUPLE_ORIG, original)
    key += b"".join(attribute(kind, found[kind]) for kind in (CTA_ZONE, CTA_ID) if kind in found)
    return Flow(protocol, source, to, port, answered_by, answering_port, key)


def _tuple(body: bytes) -> tuple[str, str, str, int, int]:
    """(protocol, source, destination, source port, destination port) of one direction."""
    parts = dict(attributes(body))
    ip, proto = dict(attributes(parts.get(CTA_TUPLE_IP, b""))), dict(attributes(parts.get(CTA_TUPLE_PROTO, b"")))
    number = proto.get(CTA_PROTO_NUM, b"\0")[0]
    source, to = (socket.inet_ntoa(ip[key]) if key in ip else "" for key in (CTA_IP_SRC, CTA_IP_DST))
    begins, ends = (int.from_bytes(proto.get(key, b""), "big") for key in (CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT))
    return NAMES.get(number, str(number)), source, to, begins, ends


def _filter(*, original: int = 0, reply: int = 0) -> bytes:
    flags = attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", original))
    return nested(CTA_FILTER, flags + attribute(CTA_FILTER_REPLY_FLAGS, struct.pack("=I", reply)))
