"""What runs in the process of an agent that is killed at a boundary (see `live.crashing_agent`).

A boundary is a call of the store that writes, of a driver or of the runtime that acts, or the moment at which an
action is taken up. They are wrapped from the outside; the agent knows nothing of it. What comes right before one
boundary comes right after the one before it, so killing after each of them, and at the taking up, covers both.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STORE = (
    "put_instance", "drop_instance", "put_receipt", "drop_receipt", "put_generation", "forget_app", "hold", "release",
    "put_failure", "clear_failure", "put_intent", "drop_intent", "put_fact", "event",
)  # fmt: skip
RUNTIME = ("create", "start", "kill", "delete", "update", "set_oom_score_adj")
DRIVER = ("ensure", "remove", "refresh")
PASS = "pass"  # what is not part of any action


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


def wrap_all(boundaries: Boundaries) -> None:
    """Put a boundary behind everything that writes or acts; drivers are wrapped when they are loaded."""
    from holdfast.guard import Guarded
    from holdfast.node.machine import Node
    from holdfast.runtime import names, netns
    from holdfast.runtime.conmon import Runtime
    from holdfast.runtime.content import ContentStore
    from holdfast.store import Store

    def wrap(place: Any, title: str, calls: Sequence[str]) -> None:
        for name in calls:
            if hasattr(place, name):
                setattr(place, name, boundaries.after(getattr(place, name), f"{title}.{name}"))

    load, loaded = Guarded.__init__, set[type]()

    @functools.wraps(load)
    def guard(self: Guarded, driver: Any, *rest: Any) -> None:
        load(self, driver, *rest)
        if type(driver) not in loaded:
            loaded.add(type(driver))
            wrap(type(driver), f"{self.kind.name} {self.name}", DRIVER)

    setattr(Guarded, "__init__", guard)  # noqa: B010
    Node._do = boundaries.action(Node._do)  # type: ignore[method-assign]
    wrap(Store, "store", STORE)
    wrap(Runtime, "runtime", RUNTIME)
    wrap(netns, "netns", ("ensure", "remove"))
    wrap(names, "names", ("write_in_place",))
    wrap(ContentStore, "content", ("store_file", "prune"))


def main(words: Sequence[str]) -> int:
    """Converge once by an agent.toml within seconds, or be killed at the boundary of an action that is named."""
    from holdfast.config import load_config
    from holdfast.daemon.once import apply_once

    config, timeout, *kill = words
    home = Path(config).parent
    wrap_all(Boundaries(home / "trace", (kill[0], int(kill[1])) if kill else None))
    status = apply_once(load_config(Path(config)), float(timeout))
    (home / "status.json").write_text(json.dumps(status))
    return 0
