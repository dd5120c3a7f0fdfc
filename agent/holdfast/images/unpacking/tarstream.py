"""Read a plain tar archive in chunks, and give out its entries one after another, in bounded memory.

`worker` feeds it and hands the entries to `tree`; everything but the content of files goes to `recipe` on the way.
It reads ustar, v7, GNU (long names, old sparse) and pax (all three sparse forms) as described by pax(1), GNU tar's
manual ("Basic Tar Format", "PAX 1") and star(4). As with Docker and Podman, global pax headers are ignored, and
entries that can't have content have none, whatever their size says. Names are bytes. It imports little, because the
worker has to start fast.
"""

from __future__ import annotations

import binascii
from struct import Struct
from zlib import adler32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_HEADER = 8 << 20  # bytes of names, attributes and maps that precede one entry: they are held in memory
MAX_HEADERS = 64  # of them, likewise
LARGEST_NUMBER = 1 << 62
FILE, HARD, LINK, CHAR, BLOCKDEV, DIRECTORY, FIFO, SPARSE = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"S"
WITHOUT_CONTENT = frozenset((HARD, LINK, CHAR, BLOCKDEV, DIRECTORY, FIFO))
KINDS = WITHOUT_CONTENT | {FILE}
ALIASES = {b"\0": FILE, b"7": FILE, SPARSE: FILE}
XATTR, XATTR_BASE64 = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."

# name, mode, uid, gid, size, mtime, checksum, type, link, magic, devmajor, devminor
_fields = Struct("100s8s8s8s12s12s8sc100s8s64x8s8s167x").unpack_from

Piece = tuple[int, int]  # offset in the file, length: bytes


class Damaged(Exception):
    """The archive is no tar, is cut off, contradicts itself, or asks for what no file system has."""


class Entry:
    """One entry. size: bytes of content in the archive; sparse: where they belong in a file of realsize bytes.

    mtime: nanoseconds since the epoch. major, minor: of a device.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes] | None
    sparse: list[Piece] | None
    realsize: int


class _Pax:
    """What extended headers say of the entry that follows."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        self.map: list[int] = []  # GNU.sparse 0.0: offsets and lengths, by turns


class TarStream:
    """The entries of an archive.

    fetch returns the next chunk, b"" at the end. keep is given every byte that is no content, in order. After `next`,
    the entry's content has to be taken whole, by `take`, or by `keep_content` when nothing on disk will hold it.
    Raises Damaged. ended: whether the end-of-archive mark has been seen.
    """

    def __init__(self, fetch: Callable[[], bytes], keep: Callable[[bytes | memoryview], None]) -> None:
        self.ended = False
        self._fetch = fetch
        self._keep = keep
        self._buffer = b""
        self._view = memoryview(b"")
        self._mark = 0  # from here on, up to _position, keep has not been told
        self._position = 0
        self._left = 0  # of the entry's content
        self._padding = 0
        self._numbers: dict[bytes, int] = {}

    def next(self) -> Entry | None:
        """Read the next entry; None after the last one, when everything has been read to the end."""
        pax: _Pax | None = None
        longname = longlink = b""
        headers = room = 0
        if self._padding:
            self._skip(self._padding)
            self._padding = 0
        while True:
            position = self._position
            if len(self._buffer) - position < BLOCK:
                if not self._fill(BLOCK):
                    self._finish(at_mark=False, pending=headers > 0)
                    return None
                position = self._position
            buffer = self._buffer
            if not buffer[position] and buffer[position : position + BLOCK] == ZEROS:
                self._finish(at_mark=True, pending=headers > 0)
                return None
            fields = _fields(buffer, position)
            self._check(position, fields[6])
            self._position = position + BLOCK
            kind = fields[7]
            if kind in b"xgXLK":
                headers += 1
                size = self._number(fields[4])
                room += size
                if room > MAX_HEADER or headers > MAX_HEADERS:
                    raise Damaged(
                        f"headers of {room} bytes before one entry (at most {MAX_HEADER}, in {MAX_HEADERS})"
                    )
                data = self._read_padded(size)
                if kind == b"L":
                    longname = data.partition(b"\0")[0]
                elif kind == b"K":
                    longlink = data.partition(b"\0")[0]
                elif kind != b"g":
                    pax = pax or _Pax()
                    _parse_pax(data, pax)
                continue
            return self._entry(fields, position, longname, longlink, pax)

    def take(self, most: int) -> memoryview:
        """Read some of the content that is left: at least a byte, at most that many."""
        position = self._position
        if position == len(self._buffer):
            if not self._fill(1):
                raise Damaged("ends in the middle of a file")
            position = self._position
        end = min(position + min(most, self._left), len(self._buffer))
        self._left -= end - position
        self._position = self._mark = end
        return self._view[position:end]

    def content(self) -> None:
        """Say that what follows is content, which `take` gives out and a file will hold."""
        if self._mark < self._position:
            self._keep(self._view[self._mark : self._position])
        self._mark = self._position

    def keep_content(self) -> None:
        """Pass over the content, which nothing on disk will hold."""
        self._skip(self._left)
        self._left = 0

    def _entry(
        self, fields: tuple[bytes, ...], position: int, longname: bytes, longlink: bytes, pax: _Pax | None
    ) -> Entry:
        name, mode, uid, gid, size, mtime, _, kind, link, magic, major, minor = fields
        number = self._number
        entry = Entry()
        entry.name = longname or self._name(name, magic, position)
        entry.link = longlink or link.partition(b"\0")[0]
        entry.mode = number(mode)
        entry.uid = number(uid)
        entry.gid = number(gid)
        entry.size = number(size)
        entry.mtime = number(mtime, signed=True) * 1_000_000_000
        entry.sparse = entry.xattrs = None
        entry.realsize = 0
        if kind not in KINDS:
            if kind not in ALIASES:
                raise Damaged(f"{shown(entry.name)}: entry of unknown type {kind!r}")
            if kind == SPARSE:
                self._old_sparse(entry, position)
            kind = ALIASES[kind]
        if pax is not None:
            _apply(pax, entry)  # before the name is looked at: the header's own may be cut off just behind a slash
        if kind == FILE and entry.name[-1:] == b"/":
            kind = DIRECTORY  # as before POSIX
        entry.kind = kind
        entry.major = number(major) if kind in (CHAR, BLOCKDEV) else 0
        entry.minor = number(minor) if kind in (CHAR, BLOCKDEV) else 0
        if abs(entry.mtime) >= 1 << 63:
            raise Damaged(f"{shown(entry.name)}: a time of {entry.mtime // 1_000_000_000} seconds")
        if kind in WITHOUT_CONTENT:
            entry.size = 0
            entry.sparse = None
        self._left = entry.size
        self._padding = -entry.size % BLOCK
        if pax is not None and kind == FILE:
            self._pax_sparse(entry, pax)
        if entry.sparse is None:
            entry.realsize = entry.size
        else:
            _check_map(entry, self._left)
        return entry

    def _name(self, name: bytes, magic: bytes, position: int) -> bytes:
        name = name.partition(b"\0")[0]
        if magic[:6] == b"ustar\0" and self._buffer[position + 345]:
            end = position + (476 if self._buffer[position + 508 : position + 512] == b"tar\0" else 500)
            return self._buffer[position + 345 : end].partition(b"\0")[0] + b"/" + name
        return name

    def _check(self, position: int, field: bytes) -> None:
        """Compare the sum of the header's bytes, its own field taken as blanks; Adler-32 holds it, modulo 65521."""
        try:
            claimed = int(field.strip(b"\0 ") or b"0", 8)
        except ValueError:
            claimed = -1
        header = self._view[position : position + BLOCK]
        if (adler32(header) & 0xFFFF) != (claimed + 1 + sum(field) - 256) % 65521:
            signed = (
                sum(byte - 256 if byte > 127 else byte for byte in bytes(header[:148]) + bytes(header[156:])) + 256
            )
            if claimed != signed:  # as some old programs have it
                raise Damaged("a header's checksum is wrong (expected a tar archive)")

    def _number(self, field: bytes, *, signed: bool = False) -> int:
        value = self._numbers.get(field)
        if value is None:
            if len(self._numbers) > 10_000:
                self._numbers.clear()
            value = self._numbers[field] = _number(field)
        if value < 0 and not signed:
            raise Damaged(f"a header has the number {value}")
        return value

    def _fill(self, size: int) -> bool:
        """Have at least size bytes from the position on; say whether there are so many."""
        while len(self._buffer) - self._position < size:
            chunk = self._fetch()
            if not chunk:
                return False
            if self._mark < self._position:
                self._keep(self._view[self._mark : self._position])
            rest = self._buffer[self._position :]
            self._buffer = rest + chunk if rest else chunk
            self._view = memoryview(self._buffer)
            self._mark = self._position = 0
        return True

    def _skip(self, size: int) -> None:
        while size > len(self._buffer) - self._position:
            size -= len(self._buffer) - self._position
            self._position = len(self._buffer)
            if not self._fill(1):
                raise Damaged("ends in the middle of an entry")
        self._position += size

    def _read_padded(self, size: int) -> bytes:
        parts = []
        left = size
        while left:
            if self._position == len(self._buffer) and not self._fill(1):
                raise Damaged("ends in the middle of a header")
            part = self._buffer[self._position : self._position + left]
            self._position += len(part)
            left -= len(part)
            parts.append(part)
        self._skip(-size % BLOCK)
        return b"".join(parts)

    def _finish(self, *, at_mark: bool, pending: bool) -> None:
        """Read what follows the end: it counts for the digest, and for the recipe."""
        if at_mark:
            enough = self._fill(2 * BLOCK)
            if enough and self._buffer[self._position + BLOCK : self._position + 2 * BLOCK] != ZEROS:
                raise Damaged("a block of zeros among the entries (damaged archive)")
        elif len(self._buffer) > self._position:
            raise Damaged("ends in the middle of a header (expected a tar archive)")
        if pending:
            raise Damaged("ends with a header that belongs to nothing")
        self.ended = at_mark
        self._position = len(self._buffer)
        while self._fill(1):
            self._position = len(self._buffer)
        self.content()

    def _old_sparse(self, entry: Entry, position: int) -> None:
        """Read GNU's own map: pieces in the header itself and in blocks that follow it."""
        numbers: list[int] = []
        header = self._buffer[position : position + BLOCK]
        entry.realsize = _number(header[483:495])
        _add_pieces(header[386:482], numbers)
        more = header[482]
        while more:
            if len(numbers) * 12 > MAX_HEADER:
                raise Damaged(f"{shown(entry.name)}: more than {MAX_HEADER} bytes of sparse map")
            block = self._read_padded(BLOCK)
            _add_pieces(block[:504], numbers)
            more = block[504]
        entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))

    def _pax_sparse(self, entry: Entry, pax: _Pax) -> None:
        records = pax.records
        numbers = pax.map
        if records.get(b"GNU.sparse.major") == b"1" and records.get(b"GNU.sparse.minor") == b"0":
            numbers = self._leading_map(entry)
        elif b"GNU.sparse.map" in records:
            numbers = [_decimal(number) for number in records[b"GNU.sparse.map"].split(b",")]
        elif not numbers and b"GNU.sparse.size" not in records:
            return
        if len(numbers) % 2:
            raise Damaged(f"{shown(entry.name)}: an odd sparse map")
        size = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
        entry.realsize = _decimal(size) if size else entry.size
        entry.sparse = list(zip(numbers[::2], numbers[1::2], strict=True))

    def _leading_map(self, entry: Entry) -> list[int]:
        """Read a map of version 1.0: decimal numbers, one a line, before the content; first how many pairs."""
        numbers: list[int] = []
        want, text, taken = 1, b"", 0
        while len(numbers) < want:
            if taken + BLOCK > min(self._left, MAX_HEADER):
                raise Damaged(f"{shown(entry.name)}: a sparse map that does not end")
            *lines, text = (text + self._read_padded(BLOCK)).split(b"\n")
            taken += BLOCK
            for line in lines:
                if len(numbers) < want:
                    numbers.append(_decimal(line))
                    want = 1 + 2 * numbers[0]
        self._left -= taken
        return numbers[1:]


def shown(name: bytes) -> str:
    """Quote a name of the archive for an error: on one line, whatever its bytes are."""
    return repr(name[:255].decode("utf-8", "surrogateescape"))


def _number(field: bytes) -> int:
    """Read a header's number: octal text, or base 256 with the first bit set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if abs(value) > LARGEST_NUMBER:
            raise Damaged(f"a header has the number {value}")
        return value
    try:
        return int(field.strip(b"\0 ").partition(b"\0")[0] or b"0", 8)
    except ValueError:
        raise Damaged(f"a header has {field!r} for a number (expected a tar archive)") from None


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise Damaged(f"a header has {text[:40]!r} for a number")
    return int(text)


def _add_pieces(raw: bytes, numbers: list[int]) -> None:
    for at in range(0, len(raw) - 23, 24):
        if not raw[at]:
            return
        numbers += (_number(raw[at : at + 12]), _number(raw[at + 12 : at + 24]))


def _check_map(entry: Entry, stored: int) -> None:
    end = total = 0
    for offset, length in entry.sparse or ():
        if offset < end or length < 0:
            raise Damaged(f"{shown(entry.name)}: a sparse map whose pieces overlap")
        end = offset + length
        total += length
    if not 0 <= end <= entry.realsize or total != stored:
        raise Damaged(f"{shown(entry.name)}: a sparse map that does not fit its content")


def _parse_pax(data: bytes, pax: _Pax) -> None:
    """Records `LENGTH KEY=VALUE\\n`; LENGTH counts itself."""
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 20)
        end = position + (_decimal(data[position:space]) if space > position else 0)
        if not space < end - 1 < len(data) or space < 0 or data[end - 1] != 10:
            raise Damaged("a pax header that is none")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise Damaged("a pax header that is none")
        position = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (len(pax.map) % 2 == 0) != (key == b"GNU.sparse.offset"):
                raise Damaged("a sparse map that is none")
            pax.map.append(_decimal(value))
        elif value:
            pax.records[key] = value
        else:
            pax.records.pop(key, None)


def _apply(pax: _Pax, entry: Entry) -> None:
    xattrs: dict[bytes, bytes] = {}
    for key, value in pax.records.items():
        if key == b"GNU.sparse.name" or (key == b"path" and b"GNU.sparse.name" not in pax.records):
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key in (b"size", b"uid", b"gid"):
            setattr(entry, key.decode(), _decimal(value))
        elif key == b"mtime":
            entry.mtime = _moment(value)
        elif key.startswith(XATTR):
            xattrs[key[len(XATTR) :]] = value
        elif key.startswith(XATTR_BASE64):
            name = _unquoted(key[len(XATTR_BASE64) :])
            if XATTR + name not in pax.records:
                try:
                    xattrs[name] = binascii.a2b_base64(value + b"=" * (-len(value) % 4))
                except ValueError as error:
                    raise Damaged(f"{shown(entry.name)}: attribute {shown(name)}: {error}") from None
    if xattrs:
        entry.xattrs = xattrs


def _moment(text: bytes) -> int:
    """Turn seconds with a fraction, as text, into nanoseconds."""
    negative = text.startswith(b"-")
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    if fraction and not fraction.isdigit():
        raise Damaged(f"a header has the time {text[:40]!r}")
    moment = _decimal(whole) * 1_000_000_000 + int((fraction + b"000000000")[:9])
    return -moment if negative else moment


def _unquoted(name: bytes) -> bytes:
    head, *rest = name.split(b"%")
    parts = [head]
    for part in rest:
        try:
            parts += (binascii.a2b_hex(part[:2]), part[2:])
        except ValueError:
            parts += (b"%", part)
    return b"".join(parts)
