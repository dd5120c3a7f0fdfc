"""Every deliberate error, as one tree, split by what the reader has to do about it.

    HoldfastError
    ├── WrongCall        call it differently       (exit 64, EX_USAGE)
    │   └── NotFound     name something that is there
    ├── WrongState       commit a correction       (exit 65, EX_DATAERR)
    ├── WrongConfig      correct agent.toml        (exit 78, EX_CONFIG)
    ├── UnfitHost        mend this host            (exit 69, EX_UNAVAILABLE)
    │   └── NotPermitted become root, or a member  (exit 77, EX_NOPERM)
    ├── Conflict         free what is taken        (exit 73, EX_CANTCREAT)
    ├── NoAgent          start the agent           (exit 69, EX_UNAVAILABLE)
    │   └── OlderAgent   restart the agent
    └── TryAgain         nothing: it is retried    (exit 75, EX_TEMPFAIL)
        ├── Unreachable  nothing, unless it lasts
        ├── Throttled    nothing
        └── Stopping     nothing: the next agent does it

The class owns its exit code (sysexits.h). `retry` says whether trying the same thing later can help without
anybody changing anything in git: a lane backs off where it can, and quarantines where it can't. `wait`, where an
error carries one, is the least time before that: a registry that refuses us is not asked again every second.

Messages are lower case, without a full stop: operation 'operand': cause (what would be right).
"""

from __future__ import annotations

from typing import ClassVar


class HoldfastError(Exception):
    """The root of all errors that holdfast raises on purpose; printed as one line, never as a traceback."""

    exit_code: ClassVar[int] = 1
    retry: bool = False
    wait: float = 0.0  # seconds


class WrongCall(HoldfastError):
    """The command or API call can't be carried out as it was written."""

    exit_code = 64


class NotFound(WrongCall):
    """The call names something that does not exist."""


class WrongState(HoldfastError):
    """The committed state asks for something that can't be; only another commit helps."""

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
    """Something that is asked for (port, address, name) is taken by something else."""

    exit_code = 73
    retry = True


class NoAgent(HoldfastError):
    """No agent answers on the socket that agent.toml names."""

    exit_code = 69


class OlderAgent(NoAgent):
    """The agent that runs is of an earlier version than the command, and can't do what it needs."""


class TryAgain(HoldfastError):
    """A passing fault: remote down, lock held, resource busy."""

    exit_code = 75
    retry = True


class Unreachable(TryAgain):
    """A host that is asked does not answer: no name, no route, nobody listens, or silence."""


class Throttled(TryAgain):
    """A host that is asked wants to be left alone for a while (HTTP 429)."""


class Stopping(TryAgain):
    """The agent ends: what it was doing is cut short, and has not failed."""


class NotExecutable(HoldfastError):
    """A program inside a container can't be run: no permission, a directory, an unknown format."""

    exit_code = 126


class NoProgram(HoldfastError):
    """A program is not there inside a container."""

    exit_code = 127
