"""Read files of a running container as its own processes see them, mounts included.

The kernel resolves every path below the container's root (openat2(2), RESOLVE_IN_ROOT): no link leads out, and only
regular files are opened. Called by the node for `exec`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from holdfast.errors import NoProgram, NotExecutable, WrongState
from holdfast.files import IN_ROOT, NO_MAGICLINKS, held, openat2
from holdfast.runtime.binaries import foreign_formats
from holdfast.runtime.executables import HEAD, Candidate, judge
from holdfast.runtime.users import User

LARGEST_READ = 8 << 20  # bytes of a file that the agent reads


class Inside:
    """The root directory of a container, by the process that runs in it."""

    def __init__(self, root: int) -> None:
        self._root = root

    def mode(self, path: str) -> int | None:
        """The st_mode of what is at a path, None if nothing is."""
        found = self._stat(path)
        return found.st_mode if found else None

    def read_file(self, path: str, size: int = LARGEST_READ) -> bytes | None:
        """The beginning of a regular file, None if there is none. Raises WrongState if it would fill memory."""
        with suppress(FileNotFoundError), self._open(path) as handle:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return None
            with open(f"/proc/self/fd/{handle}", "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                data = file.read(size + 1)
            if len(data) > LARGEST_READ:
                raise WrongState(f"read '{path}' of the container: more than {LARGEST_READ} bytes")
            return data[:size]
        return None

    def check_program(self, program: str, path: str, cwd: str, user: User) -> None:
        """Raise NoProgram or NotExecutable where execvp(3) would fail for a user; path: the PATH that it has."""
        if not stat.S_ISDIR(self.mode(cwd) or 0):
            raise NotExecutable(f"exec '{program}': working directory '{cwd}': no such directory")
        verdict = judge(program, path, cwd, lambda name: self._look(name, user), any_format=foreign_formats())
        if verdict.obstacle:
            kind = NoProgram if verdict.missing else NotExecutable
            raise kind(f"exec '{program}': {verdict.obstacle}")

    def _look(self, path: str, user: User) -> Candidate:
        """What a path leads to; its mode says whether the user may execute it."""
        found, mode = self._stat(path), 0
        if found is not None:
            mode = found.st_mode & ~0o111
            mode |= 0o111 if _may_execute(found, user) or self._has_acl(path) else 0
        return Candidate(path, mode, where="the container", head=lambda: self.read_file(path, HEAD) or b"")

    def _has_acl(self, path: str) -> bool:
        """Whether more than the mode bits decide (acl(5))."""
        with suppress(OSError), self._open(path) as handle:
            return bool(os.getxattr(f"/proc/self/fd/{handle}", "system.posix_acl_access"))
        return False

    def _stat(self, path: str) -> os.stat_result | None:
        with suppress(FileNotFoundError), self._open(path) as handle:
            return os.fstat(handle)
        return None

    @contextmanager
    def _open(self, path: str) -> Iterator[int]:
        """Open what is at a path (O_PATH). Raises FileNotFoundError if nothing is."""
        try:
            handle = openat2(path or ".", os.O_PATH | os.O_CLOEXEC, IN_ROOT | NO_MAGICLINKS, dir_fd=self._root)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
            raise
        with held(handle):
            yield handle


@contextmanager
def inside(pid: int) -> Iterator[Inside]:
    """Open the root of the container in which a process runs."""
    with held(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        yield Inside(root)


def _may_execute(found: os.stat_result, user: User) -> bool:
    """By the mode bits alone."""
    in_group = found.st_gid in (user.gid, *user.groups)
    own = 0o111 if user.uid == 0 else 0o100 if user.uid == found.st_uid else 0o010 if in_group else 0o001
    return bool(found.st_mode & own)
