"""The agent's life: one slot that triggers fall into, one loop that makes passes, one socket that answers.

    a commit, a file event ─┐
    a process that ended ───┤
    an action that is done ─┼──▶ slot ──▶ pass ──▶ lanes
    a hold, a sync ─────────┤     ▲
    a timer ────────────────┘     └── wake_at of the last plan; the slow full pass

A trigger carries no more than a name: the pass reads the world anew. Passes are made in the main thread, where
signals arrive; answers are given in threads of their own (`api`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog

from holdfast import __version__
from holdfast.api import serving
from holdfast.config import Config, load_config
from holdfast.daemon.compose import acting_node, coming, need_root, reconciler_of, source_of
from holdfast.daemon.systemd import notify
from holdfast.errors import HoldfastError, NotFound, TryAgain
from holdfast.guard import described
from holdfast.node import Node
from holdfast.node.answers import Answers
from holdfast.node.installed import check_settings
from holdfast.observed import Hold
from holdfast.questions import NOBODY, Caller, Json, Lines
from holdfast.reconcile import Pass
from holdfast.source import Source, Watch

REST = 2.0  # after a long pass, rest that many times as long: in a burst, passes get a third of a core at most
SHORT, LONGEST_REST = 0.005, 0.1  # seconds: a pass that takes no longer needs no rest; the longest rest
SETTLED = 1.0  # seconds without a trigger after which everything is looked at, where passes were content with less
HOUSEKEEPING = 10.0  # seconds between looks at the size of logs
COLLECT = 60.0  # seconds between looks at how full the disk is
SHORTEST_BEAT, LONGEST_BEAT = 0.05, 1.0  # seconds: a reader who has gone is noticed at a beat
NO_ROOM = 1.0  # seconds between looks at a disk that was full
NO_SOURCE = 5.0  # seconds between looks at a source that can't be read

Trigger = Literal["look", "look deep", "reload", "end"]

log = structlog.get_logger("holdfast")


def run_agent(path: Path | None) -> int:
    """Run the agent until SIGTERM or SIGINT; containers run on. Returns the exit code."""
    config = load_config(path)
    need_root()
    with acting_node(config) as node:
        gc.freeze()  # modules, drivers, what the store holds: to go through it again would take a tenth of a second
        return Daemon(config, path, node).serve()


class Daemon(Answers):
    """A running agent: the loop that makes passes, and the answers that need it."""

    def __init__(self, config: Config, path: Path | None, node: Node) -> None:
        super().__init__(node.context)
        self._config, self._path, self._node = config, path, node
        self._reconciler = reconciler_of(config, node)
        self._last: Pass | None = None
        self._begun = self._done = 0  # the numbers of the last pass, and of the last deep one that is over
        self._slot: queue.SimpleQueue[Trigger] = queue.SimpleQueue()  # its put() may be called by a signal handler
        self._news, self._told = threading.Condition(), 0  # events, and passes that are done
        self._asking, self._asked_at = threading.Lock(), 0.0  # the source, for `sync`
        self._deep = True

    def serve(self) -> int:
        """Make passes until a signal ends the agent."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._slot.put("end"))
        signal.signal(signal.SIGHUP, lambda *_: self._slot.put("reload"))
        self._node.wake = self._wake
        self.context.store.listen(lambda _: self._tell())
        self._watch = self._watch_source(self._reconciler.source)
        try:
            with serving(self, self._config.socket, root=self._config.root, group=self._config.group):
                self.context.store.event("agent", "node", f"holdfast {__version__} runs as process {os.getpid()}")
                threading.Thread(target=self._collect, name="collect", daemon=True).start()
                self._passes()
        finally:
            notify("STOPPING=1")
            self._watch.close()
        return 0

    def _passes(self) -> None:
        """Make a pass whenever the slot is filled or a timer ends."""
        full_at = rotate_at = 0.0
        heard: set[Trigger] = set()  # if any, the pass follows from something known; else it looks at everything
        while "end" not in heard:
            if "reload" in heard:
                self._reload()
            began = time.monotonic()
            if began >= full_at or self._deep or "look deep" in heard:
                self._deep, full_at = True, began + self._config.full_pass_interval
            if began >= rotate_at or self.context.store.late:
                self._guarded("housekeeping", self._node.catch_up)
            if began >= rotate_at:
                rotate_at = began + HOUSEKEEPING
                self._guarded("housekeeping", self._node.rotate_logs)
            self._pass(light=bool(heard))
            took = time.monotonic() - began
            time.sleep(min(max(REST * (took - SHORT), 0.0), LONGEST_REST))
            wake_at = self._last.plan.wake_at if self._last else None
            timer = min(full_at, rotate_at) - time.monotonic()
            if self.context.store.late:
                timer = min(timer, NO_ROOM)
            if self._last and self._last.source["error"] and self._last.source["kind"] == "directory":
                timer = min(timer, NO_SOURCE)
            if self._node.skipped and not self._node.busy:  # else what is under way wakes us
                timer = min(timer, SETTLED)
            heard = self._wait(timer if wake_at is None else min(timer, wake_at - time.time()))

    def _collect(self) -> None:
        """Delete unused images when the disk is full, beside the passes: deleting many files takes a while."""
        while True:
            self._guarded("a look for unused images", self._node.collect_images)
            time.sleep(COLLECT)

    def _guarded(self, what: str, work: Callable[[], None]) -> bool:
        """Do work; report what it raises, which is a bug. What was interrupted is done again later."""
        try:
            work()
        except Exception as error:
            log.error("bug", what=what, exc_info=error)
            self.context.store.event("failed", "node", f"{what} failed: {described(error)}")
            return False
        return True

    def _pass(self, *, light: bool) -> None:
        """Make one pass."""
        self._begun += 1
        deep, self._deep = self._deep, False
        if not self._guarded("a pass", lambda: self._published(self._reconciler.run(deep=deep, light=light))):
            self._deep |= deep  # what was to be looked at still is
            time.sleep(1)
        if self._begun == 1:
            notify(f"READY=1\nMAINPID={os.getpid()}")
        self._done = self._begun if deep else self._done
        self._tell()

    def _published(self, made: Pass) -> None:
        before, self._last = self._last, made
        if self.context.plugins.hears("after_pass"):
            now = made.status.json()
            if before is None or {**before.status.json(), "at": 0} != {**now, "at": 0}:
                self.context.plugins.tell("after_pass", status=now)

    def _wait(self, seconds: float) -> set[Trigger]:
        """Wait for triggers; return all that came, none when none did in time."""
        heard: set[Trigger] = set()
        with contextlib.suppress(queue.Empty):
            heard.add(self._slot.get(timeout=max(seconds, 0.0)))
            while True:
                heard.add(self._slot.get_nowait())
        return heard

    # -- triggers --

    def _wake(self, what: str) -> None:
        """Make another pass soon; callable from any thread."""
        self._slot.put("look")

    def _watch_source(self, source: Source) -> Watch:
        """Watch the source; if that is impossible, the slow pass finds changes, and an event says so."""
        try:
            return source.watch(self._wake)
        except HoldfastError as error:
            self.context.store.event("failed", "node", f"{error}: changes are seen by the slow pass only")
            return Unwatched()

    def _reload(self) -> None:
        """Read agent.toml again, except for what needs a restart (`config.FIXED`)."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = load_config(self._path)
            check_settings(self.context, config)
            self._take_over(config)
        except HoldfastError as error:
            self.context.store.event("agent", "node", f"agent.toml is not taken over: {error}")
        notify("READY=1")

    def _take_over(self, config: Config) -> None:
        config, fixed = self._config.reloaded(config)
        source = self._reconciler.source
        if (config.state, config.debounce) != (self._config.state, self._config.debounce):
            source = source_of(config, self._node)
            self._watch.close()
            self._watch = self._watch_source(source)
        self._config, self._deep = config, True
        self.context.policies, self.context.bind_roots = config.cgroup.policy, config.policy.bind_roots
        self.context.images.settings = self.context.puller.skopeo.settings = config.images
        self.context.builder.builds = config.builds
        self._reconciler.reload(source, config)
        left = f"; {', '.join(fixed)} need a restart of the agent" if fixed else ""
        self.context.store.event("agent", "node", f"agent.toml is read again{left}")

    def _tell(self) -> None:
        """Wake those who wait for an event or a pass; from any thread."""
        with self._news:
            self._told += 1
            self._news.notify_all()

    # -- answers --

    def status(self) -> Json:
        """Return the status of the last pass."""
        if self._last is None:
            raise TryAgain("status: the agent has just started, its first pass is under way")
        agent = {
            "version": __version__,
            "pid": os.getpid(),
            "connect_timeout": self._config.images.connect_timeout,
        }
        return {**self._last.status.json(), "agent": agent, **coming(self.context)}

    def plan(self) -> Json:
        """Return a preview, made now."""
        return self._reconciler.preview_json()

    def sync(self, accept_rewrite: bool = False) -> Json:
        """Read the source, retry what failed, and return the status of the next pass."""
        with contextlib.suppress(TryAgain):  # the status says so
            self._refresh(accept_rewrite)
        self.context.store.retry_now()
        before = self._begun
        self._slot.put("look deep")
        with self._news:
            self._news.wait_for(lambda: self._done > before)
        return self.status()

    def _refresh(self, accept_rewrite: bool) -> None:
        """Read the source, once for all who ask for it at the same time."""
        wanted_at = time.monotonic()
        with self._asking:
            if self._asked_at > wanted_at and not accept_rewrite:
                return
            self._asked_at = time.monotonic()
            source = self._reconciler.source
            failed = source.state().failures
            source.refresh(accept_rewrite=accept_rewrite)
            if failed:
                self._watch.poke()  # it waits out a back-off that has no cause any more

    def events(self, after: int = 0, limit: int = 1000, follow: bool = False, beat: float = 1.0) -> Lines:
        """Yield what happened, and with follow what happens; None when nothing does for a beat."""
        quiet = follow  # the caller learns at once that the agent is there
        while True:
            told, found = self._told, self.context.store.events(after, limit)
            yield from found
            if quiet and not found:
                yield None
            if not follow:
                return
            after = max((int(event["seq"]) for event in found), default=after)
            quiet = not self._hears(told, min(max(beat, SHORTEST_BEAT), LONGEST_BEAT))

    def _hears(self, told: int, seconds: float) -> bool:
        """Wait until something is told after `told`; return whether it is in time."""
        with self._news:
            return self._news.wait_for(lambda: self._told != told, seconds)

    def stop(self, target: str, by: Caller = NOBODY) -> None:
        """Hold a container stopped."""
        self._hold(target, "stopped", by)

    def start(self, target: str, by: Caller = NOBODY) -> None:
        """Hold a container started, until it is."""
        self._hold(target, "started", by)

    def restart(self, target: str, by: Caller = NOBODY) -> None:
        """Hold a container restarted, until it is."""
        self._hold(target, "restarted", by)

    def _hold(self, target: str, kind: Literal["stopped", "started", "restarted"], by: Caller) -> None:
        """Record a hold, and make a pass."""
        self.instances_of(target)
        self.context.store.hold(target, Hold(kind, time.time(), by))
        self.context.store.event("held", target, f"{kind} by hand", by=by)
        self._wake(target)

    def release(self, target: str) -> None:
        """End a hold."""
        if not self.context.store.release(target):
            raise NotFound(f"release '{target}': nobody holds it")
        self.context.store.event("released", target, "given back to the commit")
        self._wake(target)


class Unwatched:
    """The watch of a source that can't be watched (`holdfast.source.Watch`)."""

    def poke(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
