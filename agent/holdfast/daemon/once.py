"""Act on a node once: converge without an agent, or stop all containers because the host goes down."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from holdfast.config import Config
from holdfast.convergence import Wait
from holdfast.daemon.compose import acting_node, coming, need_root, node_of, only_agent, reconciler_of
from holdfast.daemon.systemd import notify
from holdfast.errors import HoldfastError
from holdfast.questions import Json

BEAT = 0.1  # seconds between looks at what is being pulled
AGENT_ENDS = 10.0  # seconds that a shutdown waits for an agent to end
LAST_KILLS = 45.0  # seconds that what outlives SIGKILL for a while may take


def apply_once(
    config: Config, timeout: float, show: Callable[[Json], None] = lambda status: None, patience: float | None = None
) -> Json:
    """Converge without an agent for at most timeout seconds (see `convergence`); return the last status.

    show: called with the status ten times a second. patience: seconds to wait for a registry that does not answer
    (default: connect_timeout).
    """
    need_root()
    wait = Wait(timeout, config.images.connect_timeout if patience is None else patience)
    slot = threading.Event()
    with acting_node(config) as node:
        node.wake = lambda _: slot.set()
        reconciler = reconciler_of(config, node)
        with contextlib.suppress(HoldfastError):  # the status says why; what is here is converged to
            reconciler.source.refresh()
        node.context.store.retry_now()
        while True:
            slot.clear()
            made = reconciler.run(deep=True)
            due = made.plan.wake_at
            while True:
                status = {**made.status.json(), **coming(node.context)}
                if wait.is_over(status):
                    return status
                show(status)
                if slot.wait(BEAT) or (due is not None and time.time() >= due):
                    break


def shut_down(config: Config) -> list[str]:
    """Stop all containers because the host goes down; returns a line for each that could not be stopped.

    Waits a moment for an agent that is just ending.
    """
    need_root()
    deadline = time.monotonic() + config.shutdown_timeout
    with only_agent(config, AGENT_ENDS), node_of(config) as node:
        return node.shut_down(max(deadline - time.monotonic(), 1.0), _beat)


def _beat(left: float) -> None:
    """Have systemd wait for what is left of the time (sd_notify(3)), and for the last kills."""
    notify(f"EXTEND_TIMEOUT_USEC={int((left + LAST_KILLS) * 1e6)}")
