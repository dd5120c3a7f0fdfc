"""The agent's life: one slot that triggers fall into, one loop that makes passes, one socket that answers.

    a commit, a file event ─┐
    a process that ended ───┤
    an action that is done ─┼──▶ slot ──▶ pass ──▶ lanes
    a hold, a sync ─────────┤     ▲
    a timer ────────────────┘     └── wake_at of the last plan; the slow full pass

A trigger carries no more than a name, and the latest wins: the pass reads the world anew. asyncio lives here and in
`api`; everything that blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import structlog

from holdfast import __version__
from holdfast.api import Agent, serving
from holdfast.config import Config, load_config
from holdfast.drivers import Host
from holdfast.errors import Conflict, HoldfastError, NoAgent, NotFound, NotPermitted, TryAgain
from holdfast.guard import described
from holdfast.identity import hold_name, make_id, read_id, same_root
from holdfast.images.builds.build import Builder
from holdfast.images.builds.outside import Outside
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfers, moving, stranded
from holdfast.images.kept.store import ImageStore
from holdfast.node import Context, Node
from holdfast.node.answers import Answers
from holdfast.node.builds import BuildServices
from holdfast.node.claim import record_of
from holdfast.node.installed import expect
from holdfast.observed import Hold
from holdfast.plugins import load_plugins
from holdfast.questions import NOBODY, Caller, Json, Question
from holdfast.reconcile import SOURCE_FACT, Pass, Reconciler
from holdfast.runtime.binaries import find_conmon, find_runtime
from holdfast.runtime.conmon import Runtime, become_subreaper
from holdfast.runtime.content import ContentStore
from holdfast.runtime.delegation import place_of
from holdfast.source import EARLIER, Source, Watch, make_source
from holdfast.store import Store

REST = 2.0  # after a long pass, rest that many times as long: in a burst, passes get a third of a core at most
SHORT, LONGEST_REST = 0.005, 0.1  # seconds: a pass that takes no longer needs no rest; nobody waits longer than that
FILES = 65_536  # open at once, as in holdfast.service
HOUSEKEEPING = 10.0  # seconds between looks at the size of logs
BEAT = 0.1  # seconds between looks at what is being pulled
COLLECT = 60.0  # seconds between looks at how full the disk is
AGENT_ENDS = 10.0  # seconds that a shutdown waits for an agent to end
LAST_KILLS = 45.0  # seconds that what outlives SIGKILL for a while may take
ANSWERS = 64  # that are given at a time
NO_ROOM = 1.0  # seconds between looks at a disk that was full
NO_SOURCE = 5.0  # seconds between looks at a source that can't be read
STORE = "state.db"
log = structlog.get_logger("holdfast")


# -- ways in -------------------------------------------------------------------------------------------------


def run_agent(path: Path | None) -> int:
    """Run the agent until SIGTERM or SIGINT; containers run on. Returns the exit code."""
    config = load_config(path)
    _need_root()
    with _acting_node(config) as node:
        gc.freeze()  # modules, drivers, what the store holds: to go through it again would take a tenth of a second
        return asyncio.run(Daemon(config, path, node).serve())


def apply_once(
    config: Config, timeout: float, show: Callable[[Json], None] = lambda status: None, patience: float | None = None
) -> Json:
    """Converge without an agent, for at most timeout seconds; returns the last status.

    show: called ten times a second with what there is to show of the status. The time that images are on their way
    does not count. patience: seconds to wait for a registry that does not answer (default: connect_timeout).
    """
    _need_root()
    began, patience = time.time(), config.images.connect_timeout if patience is None else patience
    deadline, slot = time.monotonic() + timeout, threading.Event()
    with _acting_node(config) as node:
        node.wake = lambda _: slot.set()
        source = _source_of(config, node)
        with contextlib.suppress(HoldfastError):  # the status says why; what is here is converged to
            source.refresh()
        reconciler = Reconciler(node, source, config, node.context.plugins.names(), node.in_force)
        while True:
            slot.clear()
            made = reconciler.run(deep=True)
            left = deadline - time.monotonic()
            until = made.plan.wake_at - time.time() if made.plan.wake_at is not None else left
            at_rest = made.plan.empty and not made.observed.busy and not node.busy
            waits = any(app.state == "waiting" for app in made.status.apps.values())  # for the end of a job, say
            hopeless = until >= left and not waits
            lasting = any(app.exit_code not in (None, TryAgain.exit_code) for app in made.status.apps.values())
            coming = _coming(node.context)
            if (
                left <= 0
                or (at_rest and (made.status.converged or hopeless or (lasting and not waits)))
                or stranded(coming, began, patience)
            ):
                return {**made.status.json(), **coming}
            rest = max(min(until, left), 0.001)
            while not slot.wait(min(rest, BEAT)) and rest > 0 and not stranded(coming, began, patience):
                coming = _coming(node.context)
                show({**coming, "blockers": made.status.blockers})
                rest -= BEAT
                deadline += BEAT if moving(coming) else 0.0


def _source_of(config: Config, node: Node) -> Source:
    """Where the state comes from, with what is remembered of it."""
    store = node.context.store
    known = store.fact(SOURCE_FACT) or (EARLIER if store.fact("revision") and store.used else None)
    return make_source(config.state, config.root, debounce=config.debounce, known=known)


def _coming(context: Context) -> dict[str, list[Json]]:
    """The part of a status that changes between passes: the images on their way."""
    return {
        "transfers": one_each(context.transfers.look()),
        "builds": context.builder.look(),
        "unanswered": context.transfers.unanswered(),
    }


def one_each(transfers: Sequence[Json]) -> list[Json]:
    """Of several transfers of one reference, which share their layers, the one that has come farthest."""
    found: dict[str, Json] = {}
    for each in transfers:
        best = found.get(each["ref"])
        if best is None or (each["state"] == "pulling", each["done"]) > (best["state"] == "pulling", best["done"]):
            found[each["ref"]] = each
    return list(found.values())


def shut_down(config: Config) -> list[str]:
    """Stop all containers because the host goes down; returns a line for each that could not be stopped.

    Waits a moment for an agent that is just ending.
    """
    _need_root()
    deadline = time.monotonic() + config.shutdown_timeout
    with _only_agent(config, AGENT_ENDS), _node_of(config) as node:
        return node.shut_down(max(deadline - time.monotonic(), 1.0), _beat)


def _beat(left: float) -> None:
    """Have systemd wait for what is left of the time (sd_notify(3)), and for the last kills."""
    _notify(f"EXTEND_TIMEOUT_USEC={int((left + LAST_KILLS) * 1e6)}")


@contextmanager
def open_node(config: Config, *, makes: bool = False) -> Iterator[Offline]:
    """Answer for a node whose agent does not run: from what it keeps, and from the host itself.

    makes: whether something may be put into a root that no agent has used yet. Otherwise an empty one that lasts as
    long as the question stands in for it.
    """
    with ExitStack() as stack:
        used, why = config, refused(config)
        if not makes and _unused(config.root):
            empty = stack.enter_context(TemporaryDirectory(prefix="holdfast-"))
            used = config.model_copy(update={"root": Path(empty)})
        node = stack.enter_context(_node_of(used))
        node.context.records_exits = False
        yield Offline(used, node, why)


def _unused(root: Path) -> bool:
    try:
        return not (root / STORE).exists()
    except PermissionError:
        return False  # whoever opens it says so


def refused(config: Config) -> str:
    """Why an agent of these settings would not start: its name is another root's."""
    try:
        return record_of(_host_of(config))
    except PermissionError:  # only root may look
        return ""


class Offline(Answers):
    """Answers what can be asked without an agent."""

    def __init__(self, config: Config, node: Node, refused: str = "") -> None:
        """refused: why an agent would not start."""
        super().__init__(node.context)
        self._refused = refused
        source = _source_of(config, node)
        self._reconciler = Reconciler(node, source, config, node.context.plugins.names(), node.in_force)
        self._node = node

    def ask(self, question: Question, given: dict[str, Any]) -> Any:
        """Refuse what only an agent can do."""
        raise NoAgent(f"{question.name}: no agent runs (start it with 'holdfast agent')")

    def status(self) -> Json:
        """How the node stands, read now."""
        spec = self._reconciler.wanted()
        observed = self._node.observe(deep=True, spec=spec)
        plans = self._reconciler.preview()
        made = self._reconciler.seen(spec, observed, self.context.store.history(), plans[0])
        note = "the agent does not run: nothing is being put right"
        return {**made.status.json(), "agent": {"note": f"{note}; {self._refused}" if self._refused else note}}

    def plan(self) -> Json:
        """What an agent would do. Raises Conflict where it would not start."""
        if self._refused:
            raise Conflict(f"plan: {self._refused} (another name in agent.toml)")
        return self._reconciler.preview_json()


def _raise_file_limit() -> None:
    """Make room for two descriptors a container: a login shell's soft limit of 1,024 would end at 500 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))


def _need_root() -> None:
    if os.geteuid() != 0:
        raise NotPermitted("run the agent: needs root (sudo holdfast agent)")


@contextmanager
def _only_agent(config: Config, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock that keeps a second agent from the same root. patience: seconds to wait for another's end."""
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # what state files say may be secret
    file = os.open(config.root / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            _lock(file, patience)
        except (BlockingIOError, TimeoutError):
            raise same_root(config.root, os.pread(file, 32, 0).decode(errors="replace")) from None
        pid = str(os.getpid()).encode()
        with contextlib.suppress(OSError):  # on a full disk: the lock is what counts
            os.pwrite(file, pid, 0)
            os.ftruncate(file, len(pid))
        yield
    finally:
        os.close(file)


def _lock(file: int, patience: float) -> None:
    """Lock a file. Raises BlockingIOError, or TimeoutError after so many seconds (in the main thread)."""
    if not patience:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _acting_node(config: Config) -> Iterator[Node]:
    """A node that may act: its name and its root are this process's alone, and what a crash left is settled."""
    with hold_name(config.name, config.root) as name, _only_agent(config):
        id = make_id(config.root)
        with _node_of(config) as node:
            node.check_claim(name.known)
            name.bind(config.root, id, config.run_root)
            become_subreaper()
            _raise_file_limit()
            node.recover()
            yield node
        if node.empty:
            name.forget()


def _host_of(config: Config) -> Host:
    place = place_of(config.name)
    return Host(
        config.name, config.root, config.run_root, config.network.pool, read_id(config.root), cgroup_root=place
    )


@contextmanager
def _node_of(config: Config) -> Iterator[Node]:
    """A node with everything it works with."""
    host = _host_of(config)
    runtime, conmon = find_runtime(config.runtime), find_conmon()
    try:
        store, transfers = Store(config.root / STORE), Transfers()
        images = ImageStore(config.root / "images", config.images)
        told = partial(store.event, app="", container="")  # a reference is the name of neither
        puller = Puller(images, config.images, transfers, told)
        context = Context(
            host=host,
            store=store,
            plugins=load_plugins(host),
            images=images,
            puller=puller,
            builder=Builder(images, config.images, host, store.event, Outside(images, puller), config.builds),
            transfers=transfers,
            content=ContentStore(config.root / "content"),
            runtime=Runtime(host, runtime, conmon.path),
            firewall=config.network.firewall,
            policies=config.cgroup.policy,
            bind_roots=config.policy.bind_roots,
        )
        context.builder.outside = BuildServices(context)
    except PermissionError as error:
        raise NotPermitted(f"open '{config.root}': {error.strerror} (needs root)") from error
    expect(context)
    node = Node(context, starts=config.limits.start_concurrency)
    try:
        yield node
    finally:
        node.close()
        store.close()


# -- the agent -----------------------------------------------------------------------------------------------


class Daemon(Answers, Agent):
    """A running agent: the loop, and the answers that need it."""

    def __init__(self, config: Config, path: Path | None, node: Node) -> None:
        super().__init__(node.context)
        self._config, self._path, self._node = config, path, node
        source = _source_of(config, node)
        self._reconciler = Reconciler(node, source, config, node.context.plugins.names(), node.in_force)
        self._last: Pass | None = None
        self._begun = self._done = 0  # passes
        self._passer = ThreadPoolExecutor(1, "pass")  # of its own: answers that block must not hold up a pass
        self._asking, self._asked_at = asyncio.Lock(), 0.0  # of the source, by whoever syncs
        self._deep = True

    async def serve(self) -> int:
        """Make passes until told to end."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(Answering(ANSWERS, "answer"))
        self._slot, self._stop, self._change = asyncio.Event(), asyncio.Event(), asyncio.Condition()
        self._reloading = asyncio.Lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end)
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._loop.create_task(self._reload()))
        self._node.wake = self._wake
        self.context.store.listen(lambda _: self._from_thread(self._tell))
        self._watch = await asyncio.to_thread(self._watch_source, self._reconciler.source)
        try:
            async with serving(self, self._config.socket, root=self._config.root, group=self._config.group):
                self.context.store.event("agent", "node", f"holdfast {__version__} runs as process {os.getpid()}")
                collecting = self._loop.create_task(self._collect())
                await self._passes()
                collecting.cancel()  # what it does in its thread is safe to be cut off
        finally:
            _notify("STOPPING=1")
            await self._loop.run_in_executor(self._passer, self._watch.close)
        return 0

    async def _passes(self) -> None:
        """The loop: one slot, the latest wins."""
        full_at = rotate_at = 0.0
        while not self._stop.is_set():
            self._slot.clear()
            began = time.monotonic()
            if began >= full_at or self._deep:
                self._deep, full_at = True, began + self._config.full_pass_interval
            if began >= rotate_at or self.context.store.late:
                await self._tidy(self._node.catch_up)
            if began >= rotate_at:
                rotate_at = began + HOUSEKEEPING
                await self._tidy(self._node.rotate_logs)
            await self._pass()
            took = time.monotonic() - began
            await asyncio.sleep(min(max(REST * (took - SHORT), 0.0), LONGEST_REST))
            wake_at = self._last.plan.wake_at if self._last else None
            timer = min(full_at, rotate_at) - time.monotonic()
            if self.context.store.late:
                timer = min(timer, NO_ROOM)
            if self._last and self._last.source["error"] and self._last.source["kind"] == "directory":
                timer = min(timer, NO_SOURCE)
            await self._wait(timer if wake_at is None else min(timer, wake_at - time.time()))

    async def _tidy(self, work: Callable[[], None]) -> None:
        """Do some housekeeping, in the thread of the passes."""
        try:
            await self._loop.run_in_executor(self._passer, work)
        except Exception as error:
            self._report("housekeeping", error)

    async def _collect(self) -> None:
        """Look now and then whether images have to go, beside the passes: deleting many files takes a while."""
        while True:
            try:
                await asyncio.to_thread(self._node.collect_images)
            except Exception as error:
                self._report("a look for unused images", error)
            await asyncio.sleep(COLLECT)

    def _report(self, what: str, error: Exception) -> None:
        """Tell of a bug; what broke off is done again later."""
        log.error("bug", what=what, exc_info=error)
        self.context.store.event("failed", "node", f"{what} failed: {described(error)}")

    async def _pass(self) -> None:
        """One pass, in a thread. What it raises is a bug: reported, and the next pass tries again."""
        self._begun += 1
        number, deep, self._deep = self._begun, self._deep, False
        try:
            self._published(await self._loop.run_in_executor(self._passer, partial(self._reconciler.run, deep=deep)))
        except Exception as error:
            self._deep |= deep  # what was to be looked at still is
            self._report("a pass", error)
            await asyncio.sleep(1)
        self._done = number
        if number == 1:
            _notify(f"READY=1\nMAINPID={os.getpid()}")
        await self._told()

    def _published(self, made: Pass) -> None:
        before, self._last = self._last, made
        if self.context.plugins.hears("after_pass"):
            now = made.status.json()
            if before is None or {**before.status.json(), "at": 0} != {**now, "at": 0}:
                self.context.plugins.tell("after_pass", status=now)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._slot.wait(), max(seconds, 0.0))

    # -- triggers --

    def _wake(self, what: str) -> None:
        """Have another look soon; from any thread."""
        self._from_thread(self._slot.set)

    def _watch_source(self, source: Source) -> Watch:
        """Have the source watched; where that can't be, the slow pass sees what changed, and an event says so."""
        try:
            return source.watch(self._wake)
        except HoldfastError as error:
            self.context.store.event("failed", "node", f"{error}: changes are seen by the slow pass only")
            return Unwatched()

    def _from_thread(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(call)

    def _end(self) -> None:
        self._stop.set()
        self._slot.set()

    async def _reload(self) -> None:
        """Read agent.toml again. What objects on the host are named after needs a restart, and is left as it was."""
        _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        async with self._reloading:
            try:
                await self._take_over(await asyncio.to_thread(load_config, self._path))
            except HoldfastError as error:
                self.context.store.event("agent", "node", f"agent.toml is not taken over: {error}")
        _notify("READY=1")

    async def _take_over(self, config: Config) -> None:
        config, fixed = self._config.reloaded(config)
        source = self._reconciler.source
        if (config.state, config.debounce) != (self._config.state, self._config.debounce):
            source = _source_of(config, self._node)
            await asyncio.to_thread(self._watch.close)
            self._watch = await asyncio.to_thread(self._watch_source, source)
        self._config, self._deep = config, True
        self.context.policies, self.context.bind_roots = config.cgroup.policy, config.policy.bind_roots
        self.context.images.settings = self.context.puller.settings = self.context.builder.settings = config.images
        self.context.builder.builds = config.builds
        await asyncio.to_thread(self._reconciler.reload, source, config)
        left = f"; {', '.join(fixed)} need a restart of the agent" if fixed else ""
        self.context.store.event("agent", "node", f"agent.toml is read again{left}")
        self._slot.set()

    def _tell(self) -> None:
        self._loop.create_task(self._told())

    async def _told(self) -> None:
        async with self._change:
            self._change.notify_all()

    # -- answers --

    def status(self) -> Json:
        """How the node stood at the last pass."""
        if self._last is None:
            raise TryAgain("status: the agent has just started, its first pass is under way")
        agent = {
            "version": __version__,
            "pid": os.getpid(),
            "connect_timeout": self._config.images.connect_timeout,
        }
        return {**self._last.status.json(), "agent": agent, **_coming(self.context)}

    def plan(self) -> Json:
        """A preview, made now."""
        return self._reconciler.preview_json()

    async def wait_sync(self, accept_rewrite: bool) -> Json:
        """Ask the source, try at once what waits for its next try, and return the status of the pass that follows."""
        with contextlib.suppress(TryAgain):  # the status says so
            await self._refresh(accept_rewrite)
        await asyncio.to_thread(self.context.store.retry_now)
        self._deep = True
        before = self._begun
        self._slot.set()
        async with self._change:
            await self._change.wait_for(lambda: self._done > before)
        return self.status()

    async def _refresh(self, accept_rewrite: bool) -> None:
        """Ask the source, once for all who want that meanwhile: a remote that hangs takes one thread."""
        wanted_at = time.monotonic()
        async with self._asking:
            if self._asked_at > wanted_at and not accept_rewrite:
                return
            self._asked_at = time.monotonic()
            source = self._reconciler.source
            failed = source.state().failures
            await asyncio.to_thread(source.refresh, accept_rewrite=accept_rewrite)
            if failed:
                self._watch.poke()  # it waits out a back-off that has no cause any more

    async def wait_events(self, after: int) -> None:
        """Return when there is an event above `after`."""
        async with self._change:
            await self._change.wait_for(lambda: bool(self.context.store.events(after, 1)))

    def stop(self, target: str, by: Caller = NOBODY) -> None:
        self._hold(target, "stopped", by)

    def start(self, target: str, by: Caller = NOBODY) -> None:
        self._hold(target, "started", by)

    def restart(self, target: str, by: Caller = NOBODY) -> None:
        self._hold(target, "restarted", by)

    def _hold(self, target: str, kind: Literal["stopped", "started", "restarted"], by: Caller) -> None:
        """Record what a person asks for."""
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


class Answering(ThreadPoolExecutor):
    """The threads that answers are made in. An agent that ends does not wait for them."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


class Unwatched:
    """The watch of a source that can't be watched (`holdfast.source.Watch`)."""

    def poke(self) -> None:
        """There is nothing to look with."""

    def close(self) -> None:
        """There is nothing to end."""


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without it, nobody."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as channel:  # it may not listen
            channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            channel.sendall(state.encode())
