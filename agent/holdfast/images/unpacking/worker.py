"""Unpack one layer in a process of its own: a compressed stream on a descriptor → files, digests, a recipe.

`unpack` starts it with only the descriptors it needs, and hears from it on one of them: see `main`. It
locks itself up before it looks at more than the first bytes of the stream: as root, with the layer's folder as its
root directory and few capabilities; always with bounded memory. It ends when its parent does.

There are two threads. One reads, hashes and decompresses, mostly in C code that runs without the interpreter's lock;
the other reads headers and makes files. It imports little and nothing of the site's, because starting takes as long
as unpacking a small layer.
"""

from __future__ import annotations

import _thread
import errno
import gc
import os
import sys
import time
import zlib
from _hashlib import openssl_sha256 as sha256  # hashlib would load all that there is
from _queue import SimpleQueue

from holdfast.images.unpacking.recipe import Writer
from holdfast.images.unpacking.tarstream import Damaged, TarStream, shown
from holdfast.images.unpacking.tree import HOST, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    class Unpacker(Protocol):
        """As bz2.BZ2Decompressor."""

        @property
        def eof(self) -> bool: ...
        @property
        def needs_input(self) -> bool: ...
        @property
        def unused_data(self) -> bytes: ...
        def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


GZIP, BZIP2, XZ, ZSTD, ZSTD_SKIPPED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
READ = 1 << 20
CHUNK = 1 << 18  # bytes of the plain archive that are handed over at once: they stay in the processor's cache
AHEAD = 8  # chunks
PIPE = 1 << 20
MEMORY = 1 << 30  # address space
WINDOW = 27  # binary logarithm of the bytes that zstd may look back
BEAT = 0.1  # seconds between two reports
F_SETPIPE_SZ = 1031
PR_SET_NO_NEW_PRIVS = 38
KINDS = dict.fromkeys((errno.EPERM, errno.EACCES), "denied") | dict.fromkeys(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNRESET), "again"
)  # of error messages, by the kernel's
_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SYS_ADMIN, _MKNOD, _SETFCAP = 0, 1, 3, 4, 21, 27, 31


def main() -> None:
    """Unpack, and say on the descriptor control what became of it, in messages of fields that are parted by NUL:

    `progress` bytes; at the end one of `done` diff-id size digest compressed files newest, `short` bytes digest, or
    `damaged`, `host`, `again` or `denied` with a text. A bug writes its traceback there.

    Arguments: sys.path, descriptors control, stream, recipe and folder, most bytes and entries, the size of
    the compressed stream (-1: any), how many milliseconds without a byte are tolerated (0: any).
    """
    gc.disable()
    control, *numbers = map(int, sys.argv[2:])
    try:
        message = ["done", *map(str, _unpack(control, *numbers))]
    except BaseException as error:
        message = _explain(error)
    if not message:
        os._exit(1)
    os.write(control, "\0".join(message).encode("utf-8", "replace"))
    os._exit(0)  # whatever the other thread waits for


def _explain(error: BaseException) -> list[str]:
    if isinstance(error, _Short):
        return ["short", *map(str, error.args)]
    if isinstance(error, Damaged):
        return ["damaged", str(error)]
    if isinstance(error, _Silence):
        return ["again", str(error)]
    if isinstance(error, MemoryError):
        return ["damaged", f"takes more than {MEMORY >> 20} MiB of memory to unpack"]
    if isinstance(error, OSError) and error.errno:
        return [KINDS.get(error.errno, "host"), str(error.strerror)]
    sys.excepthook(type(error), error, error.__traceback__)  # what is written there, the parent reads
    return []


def _unpack(
    control: int, stream: int, recipe: int, root: int, most: int, entries: int, compressed: int, silence: int
) -> tuple[object, ...]:
    source = _Source(stream, control, compressed, silence)
    head = source.peek()
    plain = _decompressor(head)  # imports what it needs
    _lock_up(root)
    _thread.start_new_thread(_die_with_parent, (control,))
    chunks = _Ahead(source, plain, most)
    writer = Writer(recipe)
    archive = TarStream(chunks.get, writer.literal)
    tree = Tree(root, archive, writer, entries)
    apparent = 0
    while (entry := archive.next()) is not None:
        try:
            apparent += entry.realsize
            if apparent > most:
                raise Damaged(f"comes to more than {most} bytes")
            tree.add(entry)
        except Damaged as error:
            name = shown(entry.name)
            raise Damaged(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
        except OSError as error:  # what the kernel does not take is the archive's fault, but for a host that is unfit
            if error.errno in HOST or error.errno in (errno.EPERM, errno.EACCES):
                raise OSError(error.errno, f"{shown(entry.name)}: {error.strerror}") from error
            raise Damaged(f"{shown(entry.name)}: {error.strerror or error}") from error
        except (ValueError, OverflowError) as error:
            raise Damaged(f"{shown(entry.name)}: {error}") from error
    if not archive.ended and (head.startswith(ZSTD) or not source.size):
        raise Damaged("ends too early (expected a tar archive)")
    tree.finish()
    writer.finish(chunks.size)
    source.report()
    return chunks.diff_id(), chunks.size, source.digest(), source.size, tree.files, tree.newest


class _Silence(Exception):
    """Nothing comes any more. No OSError, which an entry that is being made would be blamed for."""


class _Short(Exception):
    """The stream ends before its size: how many bytes came, and their digest."""


class _Source:
    """The compressed stream: hashed and counted while it is read, its size held against what it should be."""

    def __init__(self, stream: int, control: int, most: int, silence: int) -> None:
        self.size = 0
        self._stream = stream
        self._control = control
        self._most = most
        self._hash = sha256()
        self._head: list[bytes] = []
        self._reported = time.monotonic()
        self._poll: Any = None
        self._silence = silence
        try:
            import fcntl

            fcntl.fcntl(stream, F_SETPIPE_SZ, PIPE)
        except OSError:
            pass  # no pipe, or too many of that size
        if silence:
            import select

            self._poll = select.poll()
            self._poll.register(stream, select.POLLIN)

    def peek(self) -> bytes:
        """Look at the first bytes, which are still to be read."""
        while sum(map(len, self._head)) < 8 and (data := self._next()):
            self._head.append(data)
        return b"".join(self._head)[:8]

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def report(self) -> None:
        os.write(self._control, b"progress\0%d" % self.size)

    def blocks(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    def read(self, _: int = -1) -> bytes:
        return self._head.pop(0) if self._head else self._next()

    def _next(self) -> bytes:
        if self._poll is not None and not self._poll.poll(min(self._silence, 2**31 - 1)):
            raise _Silence(f"not a byte came for {self._silence / 1000:g} s")
        data = os.read(self._stream, READ)
        if not data and self.size < self._most:
            raise _Short(self.size, self.digest())
        self._hash.update(data)
        self.size += len(data)
        if 0 <= self._most < self.size:
            raise Damaged(f"more than {self._most} bytes come (expected {self._most})")
        if (now := time.monotonic()) - self._reported > BEAT:
            self._reported = now
            self.report()
        return data


class _Ahead:
    """The plain archive in chunks, made by a thread of its own: hashed, counted, cut at blocks of 512 bytes."""

    def __init__(self, source: _Source, plain: Callable[[_Source], Iterator[bytes]], most: int) -> None:
        self.size = 0
        self._hash = sha256()
        self._most = most
        self._ready: SimpleQueue[bytes | BaseException] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(AHEAD):
            self._room.put(None)
        _thread.start_new_thread(self._run, (source, plain))

    def get(self) -> bytes:
        """Take the next chunk; b"" at the end, and ever after."""
        chunk = self._ready.get()
        self._room.put(None)
        if isinstance(chunk, bytes):
            if not chunk:
                self._ready.put(b"")
            return chunk
        raise chunk

    def diff_id(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def _run(self, source: _Source, plain: Callable[[_Source], Iterator[bytes]]) -> None:
        end: bytes | BaseException = b""
        try:
            rest = b""
            for data in plain(source):
                self._hash.update(data)
                self.size += len(data)
                if self.size > self._most:
                    raise Damaged(f"comes to more than {self._most} bytes")
                chunk = rest + data if rest else data
                cut = len(chunk) & ~511
                rest = chunk[cut:]
                if cut:
                    self._room.get()
                    self._ready.put(chunk if cut == len(chunk) else chunk[:cut])
            if rest:
                self._ready.put(rest)
        except BaseException as error:
            end = error
        self._ready.put(end)


def _decompressor(head: bytes) -> Callable[[_Source], Iterator[bytes]]:
    """Choose what makes the plain archive of a stream that begins so. Nothing can be imported later."""
    if head.startswith(GZIP):
        return _gzip()
    if head.startswith(ZSTD) or (head[:1] in b"PQRSTUVWXYZ[\\]^_" and head[1:4] == ZSTD_SKIPPED):
        return _zstd()
    if head.startswith(XZ):
        import lzma

        return _inflater(lambda: lzma.LZMADecompressor(memlimit=MEMORY // 2), lzma.LZMAError)
    if head.startswith(BZIP2):
        import bz2

        return _inflater(bz2.BZ2Decompressor)
    return _Source.blocks


def _gzip() -> Callable[[_Source], Iterator[bytes]]:
    try:
        from isal import igzip_lib
    except ImportError:  # a machine that isal is not made for
        return _inflater(_Zlib)
    return _inflater(lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), igzip_lib.IsalError)  # type: ignore[arg-type]


def _zstd() -> Callable[[_Source], Iterator[bytes]]:
    """Decompress zstd: by Python from 3.14 on, before by Debian's python3-zstandard or PyPI's zstandard."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW)

        def read(source: _Source) -> Iterator[bytes]:
            reader = unpacker.stream_reader(source, read_across_frames=True)  # type: ignore[arg-type]
            while True:
                try:
                    data = reader.read(CHUNK)
                except zstandard.ZstdError as error:
                    raise Damaged(f"decompress: {error}") from error
                if not data:
                    return
                yield data

        return read
    options = {zstd.DecompressionParameter.window_log_max: WINDOW}
    return _inflater(lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError)


def _inflater(make: Callable[[], Unpacker], *errors: type[Exception]) -> Callable[[_Source], Iterator[bytes]]:
    """Decompress one stream after another, as gzip(1) does."""

    caught: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error, *errors)

    def inflate(source: _Source) -> Iterator[bytes]:
        unpacker: Unpacker | None = None
        for data in source.blocks():
            while True:
                if unpacker is None:
                    if not data:
                        break
                    unpacker = make()
                try:
                    plain = unpacker.decompress(data, CHUNK)
                except caught as error:
                    raise Damaged(f"decompress: {error}") from error
                if plain:
                    yield plain
                data = b""
                if unpacker.eof:
                    data, unpacker = unpacker.unused_data, None
                elif unpacker.needs_input:
                    break
        if unpacker is not None:
            raise Damaged("decompress: the stream ends too early")

    return inflate


class _Zlib:
    """zlib's decompressor of gzip, as an Unpacker."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)
        self.eof, self.needs_input, self.unused_data = False, True, b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        plain = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._inner.eof, self._inner.unused_data
        self.needs_input = not self._inner.unconsumed_tail and len(plain) < max_length
        return plain


def _lock_up(root: int) -> None:
    """Leave nothing within reach but the folder."""
    import ctypes
    import resource

    os.umask(0)
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    try:
        with open("/proc/self/oom_score_adj", "wb", 0) as file:  # noqa: PTH123 (pathlib takes long to import)
            file.write(b"600")  # rather than the agent
    except OSError:
        pass
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    os.fchdir(root)
    if os.geteuid():
        return
    os.chroot(".")
    kept = (_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SYS_ADMIN, _MKNOD, _SETFCAP)
    mask = sum(1 << capability for capability in kept)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process: capset(2)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for numbers from 32 on
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    have = data[1] & mask
    data[:] = [have, have, 0, 0, 0, 0]
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _die_with_parent(control: int) -> None:
    """End when the process that started us closes the other end, at the latest by its own end."""
    while os.read(control, 1):
        pass
    os._exit(1)
