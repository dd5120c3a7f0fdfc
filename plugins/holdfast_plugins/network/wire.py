"""netlink(7): messages and their attributes as bytes, a socket that asks, and one that listens.

Shared by rtnetlink (`netlink`, `collisions`) and nfnetlink (`nftables`, `conntrack`, `monitor`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Container, Iterator

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
NESTED = 0x8000
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE = 270, 1, 33
NETLINK_NETFILTER = 12
LONGEST = 1 << 17  # bytes of a datagram
NEWS_BUFFER = 4 << 20  # bytes of news that may wait: a flush of ten thousand rules

_head = struct.Struct("=IHHII")
_attribute = struct.Struct("=HH")


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _attribute.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | NESTED, b"".join(inner))


def attributes(body: bytes, at: int = 0, wanted: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each attribute from a place on, or of those of some kinds: a link has some forty."""
    while at + 4 <= len(body):
        length, kind = _attribute.unpack_from(body, at)
        if wanted is None or kind in wanted:
            yield kind & 0x3FFF, body[at + 4 : at + length]
        at += max((length + 3) & ~3, 4)


def number(value: bytes | None) -> int:
    """A number in the machine's byte order; 0 if it is not there."""
    return int.from_bytes(value or b"", sys.byteorder)


def text(value: bytes | None) -> str:
    """A string that ends with a zero; "" if it is not there."""
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    """One request, still without its sequence number."""
    return _head.pack(_head.size + len(body), kind, flags, 0, 0) + body


def messages(datagram: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of each message in a datagram."""
    at = 0
    while at + _head.size <= len(datagram):
        length, kind, _, sequence, _ = _head.unpack_from(datagram, at)
        yield kind, sequence, datagram[at + _head.size : at + length]
        at += max((length + 3) & ~3, _head.size)


class Socket:
    """Asks the kernel, in the network namespace of the thread that opens it. Not for two threads at once."""

    def __init__(self, protocol: int) -> None:
        self._socket = _open(protocol)
        self._sequence = 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes, *, dump: bool = True) -> Iterator[bytes]:
        """Yield the body of each answer to a request: all of a list, or without dump the one. Raises OSError."""
        self._send(NLM_F_DUMP if dump else 0, message(kind, body))
        while True:
            for answer, sequence, content in messages(self._socket.recv(LONGEST)):
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", content)[0]
                    raise OSError(code, os.strerror(code))
                yield content
                if not dump:
                    return

    def do(self, *wanted: bytes) -> list[int]:
        """Send messages in one datagram; return for each the number of its error, 0 where it was done.

        The kernel works through all of them within the one system call: a crash of the agent can't part them.
        """
        before = self._sequence
        self._send(NLM_F_ACK, *wanted)
        codes: list[int] = []
        while len(codes) < len(wanted):
            for kind, sequence, body in messages(self._socket.recv(LONGEST)):
                if kind == NLMSG_ERROR and sequence > before:
                    codes.append(-struct.unpack_from("=i", body)[0])
        return codes

    def _send(self, more: int, *wanted: bytes) -> None:
        stamped = []
        for each in wanted:
            self._sequence += 1
            length, kind, flags, _, _ = _head.unpack_from(each)
            head = _head.pack(length, kind, flags | more | NLM_F_REQUEST, self._sequence, 0)
            stamped.append(head + each[_head.size :] + bytes(-length % 4))
        self._socket.send(b"".join(stamped))


class Group:
    """Hears a multicast group, in the network namespace of the thread that opens it."""

    def __init__(self, protocol: int, group: int) -> None:
        self._socket = _open(protocol)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, NEWS_BUFFER)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._socket.setblocking(False)

    def __del__(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[bytes]:
        """Yield each datagram that has come; b"" where the kernel had more than there was room for."""
        while True:
            try:
                yield self._socket.recv(LONGEST)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield b""


class News(Group):
    """Listens to a multicast group, in a thread of its own that works until `close`."""

    def __init__(self, protocol: int, group: int) -> None:
        super().__init__(protocol, group)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._end, select.POLLIN)
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Have work() done in the thread; it ends when `wait` returns False."""
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None) -> bool:
        """Wait for news, for so long at most (None: for ever); False once the thread is to end."""
        found = self._poll.poll(None if seconds is None else seconds * 1000)
        return all(ready != self._end for ready, _ in found)

    def close(self) -> None:
        """End the thread; what it is doing is waited for."""
        os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        os.close(self._end)


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    opened.bind((0, 0))
    return opened
