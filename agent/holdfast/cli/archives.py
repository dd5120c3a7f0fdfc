"""Read and write archives: whole files, standard input and output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from holdfast.errors import HoldfastError, UnfitHost, WrongCall

COPY = 1 << 20  # bytes at a time


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """Give a path that the agent can open: standard input (-) is copied to a file first."""
    if str(path) != "-":
        yield path
        return
    import shutil
    import tempfile

    if sys.stdin.isatty():
        raise WrongCall("read standard input: it is a terminal (name a file, or use a pipe)")
    with tempfile.NamedTemporaryFile(prefix="holdfast-", dir="/var/tmp") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, COPY)
        copy.flush()
        try:
            yield Path(copy.name)
        except HoldfastError as error:
            raise type(error)(str(error).replace(copy.name, "standard input")) from error


def written(output: Path | None, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, whole or not at all; None is standard output, unless that is a terminal."""
    if output is None:
        if sys.stdout.isatty():
            raise WrongCall("write an archive to standard output: it is a terminal (use -o FILE)")
        sys.stdout.flush()
        write(cast(IO[bytes], sys.stdout.buffer))
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():  # a device or a fifo is written to, not replaced
        with output.open("wb") as out:
            write(out)
        return
    temporary = output.with_name(f".{output.name}.{os.urandom(4).hex()}.partial")
    try:
        with temporary.open("xb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(output)
    except OSError as error:
        raise UnfitHost(f"write '{output}': {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
