"""An agent that is killed at a chosen boundary: right after the n-th write or effect of one of its actions.

A boundary is a call of the store that writes, of a driver or of the runtime that acts, or the moment at which an
action is taken up. They are wrapped from the outside; the agent knows nothing of it. What comes right before one
boundary comes right after the one before it, so killing after each of them, and at the taking up, covers both.

The tests use `CrashingAgent`, which runs this file: a process that has everything imported and forks for each run,
so that a run costs what the agent does, and not what importing it does.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORE = (
    "put_instance", "drop_instance", "put_receipt", "drop_receipt", "put_generation", "forget_app", "hold", "release",
    "put_failure", "clear_failure", "put_intent", "drop_intent", "put_fact", "event",
)  # fmt: skip
RUNTIME = ("create", "start", "kill", "delete", "update", "set_oom_score_adj")
DRIVER = ("ensure", "remove", "refresh")
PASS = "pass"  # what is not part of any action


@dataclass(frozen=True, slots=True)
class Boundary:
    """The n-th boundary of an action (`StartInstance shop/web`), the first time that it is done in a run."""

    action: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.action}, after {self.number}: {self.what}"


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended: killed at the boundary, or with a status. boundaries: all that it came past."""

    killed: bool
    status: Mapping[str, Any]
    boundaries: tuple[Boundary, ...] = field(repr=False)


class CrashingAgent:
    """Converges once per call of `run`, in a process of its own."""

    def __init__(self, config: Path) -> None:
        self._home = config.parent
        self._log = (self._home / "agent.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def run(self, kill: Boundary | None = None, *, kill_after: float | None = None, timeout: float = 20) -> Run:
        """Converge, or be killed on the way: at a boundary, or after seconds. AssertionError when the agent fails."""
        from ground import patient  # the process below knows nothing of the tests

        assert self._process.stdin is not None and self._process.stdout is not None
        target = [kill.action, kill.number] if kill else None
        self._process.stdin.write(
            json.dumps({"kill": target, "after": kill_after, "timeout": patient(timeout)}) + "\n"
        )
        self._process.stdin.flush()
        code = int(self._process.stdout.readline() or "1")
        assert code in (0, -signal.SIGKILL), (self._home / "agent.log").read_text()[-4000:]
        lines = (self._home / "trace").read_text().splitlines()
        crossed = tuple(Boundary(action, int(number), what) for action, number, what in map(_split, lines))
        status = json.loads((self._home / "status.json").read_text()) if code == 0 else {}
        return Run(code != 0, status, crossed)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


def _split(line: str) -> list[str]:
    return line.split("\t")


# -- the process ---------------------------------------------------------------------------------------------


class Boundaries:
    """Counts the boundaries of each action, writes them down, and ends the process at one of them."""

    def __init__(self, trace: Path, kill: tuple[str, int] | None) -> None:
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._kill = kill
        self._lock = threading.Lock()
        self._here = threading.local()
        self._crossed: collections.Counter[str] = collections.Counter()
        self._over: set[str] = {""}

    def action(self, do: Callable[..., None]) -> Callable[..., None]:
        """Wrap what does an action in a lane's thread."""

        @functools.wraps(do)
        def wrapped(node: Any, action: Any) -> None:
            name = f"{action.verb} {action.subject}"
            self._here.action = "" if name in self._over else name
            self.cross("it is taken up")
            do(node, action)
            self._over.add(name)
            self._here.action = PASS

        return wrapped

    def after(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Wrap what writes or acts."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            self.cross(what)
            return result

        return wrapped

    def cross(self, what: str) -> None:
        action = getattr(self._here, "action", PASS)
        if not action:
            return
        with self._lock:
            number = self._crossed[action]
            self._crossed[action] += 1
            os.write(self._trace, f"{action}\t{number}\t{what}\n".encode())
            if (action, number) == self._kill:
                os.kill(os.getpid(), signal.SIGKILL)


def wrap_all(boundaries: Boundaries, drivers: Mapping[str, type]) -> None:
    """Put a boundary behind everything that writes or acts."""
    from holdfast.node.machine import Node
    from holdfast.runtime import names, netns
    from holdfast.runtime.conmon import Runtime
    from holdfast.runtime.content import ContentStore
    from holdfast.store import Store

    Node._do = boundaries.action(Node._do)  # type: ignore[method-assign]
    places: list[tuple[Any, str, tuple[str, ...]]] = [
        (Store, "store", STORE),
        (Runtime, "runtime", RUNTIME),
        (netns, "netns", ("ensure", "remove")),
        (names, "names", ("write_in_place",)),
        (ContentStore, "content", ("store_file", "prune")),
        *((driver, name, DRIVER) for name, driver in drivers.items()),
    ]
    for place, title, calls in places:
        for name in calls:
            if hasattr(place, name):
                setattr(place, name, boundaries.after(getattr(place, name), f"{title}.{name}"))


def serve(config: Path) -> None:
    """Fork for each line of stdin, and answer with how the child ended."""
    drivers = _drivers(config)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _converge(config, drivers, request)
        if request["after"] is not None:
            _kill_after(child, request["after"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _kill_after(child: int, seconds: float) -> None:
    handle = os.pidfd_open(child)
    if not select.select([handle], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(handle)


def _drivers(config: Path) -> dict[str, type]:
    """Load the plugins once, which imports them, and return the classes of their drivers."""
    import holdfast_plugins.network.messages  # noqa: F401
    from holdfast.config import load_config
    from holdfast.drivers import Host
    from holdfast.kinds import KINDS
    from holdfast.plugins import load_plugins

    loaded = load_config(config)
    plugins = load_plugins(Host(loaded.name, loaded.root, loaded.run_root, loaded.network.pool))
    return {
        f"{kind.name} {name}": type(each.driver)
        for kind in KINDS
        if kind.receipt
        for name, each in plugins.of_kind(kind).items()
    }


def _converge(config: Path, drivers: Mapping[str, type], request: Mapping[str, Any]) -> None:
    from holdfast.config import load_config
    from holdfast.daemon.once import apply_once

    home, code = config.parent, 1
    try:
        os.dup2(2, 1)
        kill = request["kill"]
        wrap_all(Boundaries(home / "trace", (kill[0], kill[1]) if kill else None), drivers)
        status = apply_once(load_config(config), request["timeout"])
        (home / "status.json").write_text(json.dumps(status))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
