"""All errors that holdfast raises on purpose, as one tree, divided by what the reader has to do.

    HoldfastError
    ├── WrongCall        correct the command       (exit 64, EX_USAGE)
    │   └── NotFound     name something that exists
    ├── WrongState       commit a correction       (exit 65, EX_DATAERR)
    ├── WrongConfig      correct agent.toml        (exit 78, EX_CONFIG)
    ├── UnfitHost        repair this host          (exit 69, EX_UNAVAILABLE)
    │   └── NotPermitted become root, or a member  (exit 77, EX_NOPERM)
    ├── Conflict         free what is taken        (exit 73, EX_CANTCREAT)
    ├── NoAgent          start the agent           (exit 69, EX_UNAVAILABLE)
    │   └── OlderAgent   restart the agent
    └── TryAgain         nothing: it is retried    (exit 75, EX_TEMPFAIL)
        ├── Unreachable  nothing, unless it lasts
        ├── Throttled    nothing
        └── Stopping     nothing: the next agent does it

The class has the exit code (sysexits.h). `retry` says whether trying the same thing later can help without a change
in git: if so, a lane tries again after a delay, otherwise at the next change. `wait` is the shortest delay in
seconds: a registry that refuses us is not asked again every second.

Messages are lower case, without a full stop: operation 'operand': cause (what would be right).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class HoldfastError(Exception):
    """The base of all these errors. Printed as one line, never with a traceback."""

    exit_code: ClassVar[int] = 1
    retry: bool = False
    wait: float = 0.0  # seconds


class WrongCall(HoldfastError):
    """The command or API call is wrong."""

    exit_code = 64


class NotFound(WrongCall):
    """The call names something that does not exist."""


class WrongState(HoldfastError):
    """The committed state asks for something impossible; only another commit helps."""

    exit_code = 65


class WrongConfig(HoldfastError):
    """The agent's own settings (agent.toml) are wrong."""

    exit_code = 78


class UnfitHost(HoldfastError):
    """This host lacks a program, a kernel feature or a file that is needed."""

    exit_code = 69
    retry = True


class NotPermitted(UnfitHost):
    """The caller lacks a privilege."""

    exit_code = 77
    retry = False


class Conflict(HoldfastError):
    """A port, address or name that is asked for is taken."""

    exit_code = 73
    retry = True


class NoAgent(HoldfastError):
    """No agent answers on the socket that agent.toml names."""

    exit_code = 69


class OlderAgent(NoAgent):
    """The running agent is older than the command and lacks what the command needs."""


class TryAgain(HoldfastError):
    """A temporary failure: remote down, lock held, resource busy."""

    exit_code = 75
    retry = True


class Unreachable(TryAgain):
    """A remote host does not answer: no name, no route, no listener, or a timeout."""


class Throttled(TryAgain):
    """A remote host asks for a pause (HTTP 429)."""


class Stopping(TryAgain):
    """The agent is ending: the work was interrupted and has not failed."""


class NotExecutable(HoldfastError):
    """A program inside a container can't be run: no permission, a directory, an unknown format."""

    exit_code = 126


class NoProgram(HoldfastError):
    """A program does not exist inside the container."""

    exit_code = 127


def reason(error: OSError) -> str:
    """Say why the kernel refused something, as messages have it."""
    return (error.strerror or str(error)).lower()


@contextmanager
def explained(operation: str, kind: type[HoldfastError] = UnfitHost, right: str = "") -> Iterator[None]:
    """Raise what the kernel refuses within a with block as an error of this kind: operation: reason (right)."""
    try:
        yield
    except OSError as error:
        raise kind(f"{operation}: {reason(error)}{right and f' ({right})'}") from error
