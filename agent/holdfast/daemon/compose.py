"""Put a node together from its parts, and make sure that no other process acts on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from holdfast.config import Config
from holdfast.drivers import Host
from holdfast.errors import NotPermitted
from holdfast.identity import hold_name, make_id, read_id, same_root
from holdfast.images.builds.build import Builder
from holdfast.images.builds.outside import Outside
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfers
from holdfast.images.kept.store import ImageStore
from holdfast.node import Context, Node
from holdfast.node.builds import BuildServices
from holdfast.node.claim import record_of
from holdfast.node.installed import check_settings, expect
from holdfast.plugins import load_plugins
from holdfast.questions import Json
from holdfast.reconcile import SOURCE_FACT, Reconciler
from holdfast.runtime.binaries import find_conmon, find_runtime
from holdfast.runtime.conmon import Runtime, become_subreaper
from holdfast.runtime.content import ContentStore
from holdfast.runtime.delegation import place_of
from holdfast.source import EARLIER, Source, make_source
from holdfast.store import Store

FILES = 65_536  # open at once, as in holdfast.service
STORE = "state.db"


def need_root() -> None:
    if os.geteuid() != 0:
        raise NotPermitted("run the agent: needs root (sudo holdfast agent)")


@contextmanager
def acting_node(config: Config) -> Iterator[Node]:
    """A node that may act: its name and its root are this process's alone, and what a crash left is settled."""
    with hold_name(config.name, config.root) as name, only_agent(config):
        id = make_id(config.root)
        with node_of(config) as node:
            check_settings(node.context, config)
            node.check_claim(name.known)
            name.bind(config.root, id, config.run_root)
            become_subreaper()
            _raise_file_limit()
            node.recover()
            yield node
        if node.empty:
            name.forget()


@contextmanager
def only_agent(config: Config, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock that keeps a second agent from the same root. patience: seconds to wait for another's end."""
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # what state files say may be secret
    file = os.open(config.root / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise same_root(config.root, os.pread(file, 32, 0).decode(errors="replace")) from None
                time.sleep(0.05)
        pid = str(os.getpid()).encode()
        with contextlib.suppress(OSError):  # on a full disk: the lock is what counts
            os.pwrite(file, pid, 0)
            os.ftruncate(file, len(pid))
        yield
    finally:
        os.close(file)


def host_of(config: Config) -> Host:
    id, place = read_id(config.root), place_of(config.name)
    return Host(config.name, config.root, config.run_root, config.network.pool, id, cgroup_root=place)


def refused(config: Config) -> str:
    """Why an agent of these settings would not start: its name is another root's."""
    try:
        return record_of(host_of(config))
    except PermissionError:  # only root may look
        return ""


@contextmanager
def node_of(config: Config) -> Iterator[Node]:
    """A node with everything it works with."""
    host = host_of(config)
    runtime, conmon = find_runtime(config.runtime), find_conmon()
    try:
        store, transfers = Store(config.root / STORE), Transfers()
        images = ImageStore(config.root / "images", config.images)
        told = partial(store.event, app="", container="")  # the subject is a reference
        puller = Puller(images, config.images, transfers, told)
        context = Context(
            host=host,
            store=store,
            plugins=load_plugins(host, settings=config.plugins),
            images=images,
            puller=puller,
            builder=Builder(images, host, store.event, Outside(images, puller), config.builds),
            transfers=transfers,
            content=ContentStore(config.root / "content"),
            runtime=Runtime(host, runtime, conmon.path),
            storage_driver=config.storage.driver,
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


def reconciler_of(config: Config, node: Node) -> Reconciler:
    """What makes the passes of a node."""
    return Reconciler(node, source_of(config, node), config, node.context.plugins.names(), node.in_force)


def source_of(config: Config, node: Node) -> Source:
    """Where the state comes from, with what is remembered of it."""
    store = node.context.store
    known = store.fact(SOURCE_FACT) or (EARLIER if store.fact("revision") and store.used else None)
    return make_source(config.state, config.root, debounce=config.debounce, known=known)


def coming(context: Context) -> dict[str, list[Json]]:
    """The part of a status that changes between passes: images being pulled or built."""
    return {
        "transfers": one_each(context.transfers.look()),
        "builds": context.builder.look(),
        "unanswered": context.transfers.unanswered(),
    }


def one_each(transfers: Sequence[Json]) -> list[Json]:
    """Of several transfers of one reference, which share their layers, keep the most advanced one."""
    found: dict[str, Json] = {}
    for each in transfers:
        best = found.get(each["ref"])
        if best is None or (each["state"] == "pulling", each["done"]) > (best["state"] == "pulling", best["done"]):
            found[each["ref"]] = each
    return list(found.values())


def _raise_file_limit() -> None:
    """Make room for two descriptors a container: a login shell's soft limit of 1,024 would end at 500 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
