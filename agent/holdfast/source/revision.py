"""The types of this package, and the rules that both kinds of sources share: which names are read, and how much.

A directory and a git repository that hold the same files give revisions with the same `files`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

from holdfast.errors import WrongState

#: Folder of a state directory ("" for itself) → where the file system is mounted that it lies on, and which that is.
LiesOn = Mapping[str, tuple[str, str]]

MAX_BYTES = 64 << 20
MAX_FILES = 100_000
MAX_VISITS = 2 * MAX_FILES  # files, folders and links
MAX_DEPTH = 100  # folders within each other: git and the kernel would allow thousands

# What editors and copying programs leave beside the file they are about to replace (vim, emacs, gedit, NFS), what
# belongs to git, Kubernetes' atomic writer (`..data`), and hidden TOML files: no app can be called like that.
NOISE = re.compile(
    r"\.git|\.\..*|\..*\.toml|\.#.*|#.*#|.*~|4913|.*\.sw[a-z]|\.goutputstream-.*|\.nfs[0-9a-f]+|.*\.toml\.tmp", re.S
)


LFS = b"version https://git-lfs.github.com/spec/"
LFS_LONGEST = 1024  # bytes, of a pointer file
NO_LFS = "a git LFS pointer, and LFS is not supported (commit the file itself)"


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file only says where git LFS keeps the real one."""
    return len(data) < LFS_LONGEST and data.startswith(LFS)


@lru_cache(maxsize=16384)
def is_noise(name: str) -> bool:
    """Whether a file or folder of this name is left out of every revision."""
    return NOISE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Revision:
    """One commit, or one snapshot of a directory: it never changes.

    files: POSIX path relative to the state directory → content; regular files, and links to files that stay inside.
    left_out: path → why it is not in files (a submodule, a git LFS pointer, a link that leads out), in words.
    id: the commit's hash, or `dir:` and the start of a digest of files. message: its first line.
    at: when it was committed, seconds since the epoch; None for a directory. url: without any password.
    executable: those of files that are programs (git's mode 100755; any of the x bits in a directory).
    ignored: the files and folders whose names are those of editors' and others' temporary files (`NOISE`).
    lies_on: the mounts that a directory's state files were read from (`source.mounts`).
    """

    id: str
    files: Mapping[str, bytes]
    left_out: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    message: str = ""
    at: float | None = None
    url: str = ""
    branch: str = ""
    executable: frozenset[str] = frozenset()
    lies_on: LiesOn = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What the operator reads about a source; JSON-able. Times are seconds since the epoch.

    url: where it reads from, without any password (a directory's path for kind directory). path: the folder in
    the repository. error: one line, "" while all is well. failures: in a row.
    """

    kind: Literal["directory", "git"]
    url: str
    branch: str = ""
    path: str = ""
    revision: str = ""
    author: str = ""
    message: str = ""
    committed_at: float | None = None
    fetched_at: float | None = None
    error: str = ""
    failures: int = 0
    next_try_at: float | None = None


class Watch(Protocol):
    """A running watch: threads of its own that call `wake` with a reason."""

    def poke(self) -> None:
        """Look now, instead of at the next event or poll."""

    def close(self) -> None:
        """End the watch and wait for its threads; wake is not called afterwards. Idempotent."""


class Source(Protocol):
    """Where revisions come from. Every method is thread-safe; current and refresh block."""

    def current(self, *, light: bool = False) -> Revision:
        """Read the newest revision that is here, without touching the network.

        light: to look where the watch has noticed something is enough. The same object is returned as long as
        nothing changed. Raises TryAgain (nothing readable just now: what
        runs stays), UnfitHost, WrongState (it is too large).
        """
        ...

    def refresh(self, *, accept_rewrite: bool = False) -> None:
        """Bring the newest revision here; for a directory, nothing.

        accept_rewrite: take a branch whose history was rewritten. Raises TryAgain (remote down or closed to us,
        branch gone, history rewritten), WrongState (folder gone, too large), UnfitHost (no git, disk full); what
        `current` returns is then as before, and state().error says the same.
        """

    def newest(self) -> Revision:
        """Read the newest revision that there is, for a preview: `current` goes on as before.

        Raises as refresh and current do.
        """
        ...

    def watch(self, wake: Callable[[str], None]) -> Watch:
        """Call wake(reason), from a thread of the watch, whenever `current` may have something new."""
        ...

    def state(self) -> SourceState:
        """Say what is known, at once, without reading anything."""
        ...


def check_visits(where: str, visited: int) -> None:
    """Raise WrongState when links to folders make a small tree look like a huge one."""
    if visited > MAX_VISITS:
        raise WrongState(f"read '{where}': holds more than {MAX_VISITS} entries, links to folders followed")


def check_size(where: str, bytes: int, files: int) -> None:
    """Raise WrongState when a tree is more than an agent should hold in memory."""
    if bytes > MAX_BYTES:
        raise WrongState(f"read '{where}': holds {bytes >> 20} MiB of files (at most {MAX_BYTES >> 20} MiB)")
    if files > MAX_FILES:
        raise WrongState(f"read '{where}': holds {files} files (at most {MAX_FILES})")
