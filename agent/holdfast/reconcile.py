"""Make one pass: read what is asked for, read what is there, decide, hand over. The file to read first.

    source ──▶ Revision ──load──▶ Spec ─┐
    node ──observe──▶ Observed ─────────┼──decide──▶ Plan ──apply──▶ the node's lanes
    store ──▶ History ──────────────────┘                  └──make_status──▶ Status

A pass waits for nothing and assumes nothing: it can be made at any time, any number of times, and after any crash.
`daemon` makes one whenever something may have changed, and now and then one that reads everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from pydantic import BaseModel

from holdfast.config import Config
from holdfast.errors import HoldfastError
from holdfast.node import Node, installed
from holdfast.node.needs import images_needed
from holdfast.observed import History, Json, Observed
from holdfast.plan import Plan, decide, preview
from holdfast.plan.memory import Memory
from holdfast.plan.reasons import left_alone
from holdfast.source import Revision, Source, known_of
from holdfast.spec import App, Cache, NodeFacts, Spec, load
from holdfast.status import Status, make_status, plan_json

SOURCE_FACT = "source"  # in the store: what is remembered of the revision in force (`known_of`)


@dataclass(frozen=True)
class Pass:
    """What one pass saw and decided. Its status is made only when it is asked for, which is rare."""

    spec: Spec | None
    observed: Observed
    history: History
    plan: Plan
    source: Json
    node: str
    plugins: tuple[Json, ...]
    trouble: str = ""

    @cached_property
    def status(self) -> Status:
        """The status of the node at this pass."""
        return make_status(
            spec=self.spec,
            observed=self.observed,
            history=self.history,
            plan=self.plan,
            source=self.source,
            node=self.node,
            plugins=self.plugins,
            trouble=self.trouble,
        )


class Reconciler:
    """Makes passes. Keeps the spec of the newest readable revision and of its files, so that they are read once."""

    def __init__(
        self,
        node: Node,
        source: Source,
        config: Config,
        drivers: Mapping[str, Mapping[str, type[BaseModel] | None]] | None = None,
        in_force: Callable[[], Mapping[str, App]] = dict,
    ) -> None:
        """drivers: what state files may name, by kind (`NodeFacts`). in_force: says what the node has (`load`)."""
        self.node, self.source, self.config = node, source, config
        self._drivers, self._in_force = drivers, in_force
        self._cache = Cache()
        self._memory = Memory()
        self._revision: Revision | None = None
        self._spec: Spec | None = None
        self._error = ""
        self._told = ""  # of the source's errors, the last one that there is an event of
        self._reading = threading.Lock()  # passes, previews and a reload meet here

    def run(self, *, deep: bool = False, light: bool = False) -> Pass:
        """Make one pass. deep: also read every cgroup. light: trust the records where that is safe (`Node.look`).

        The lanes of the node carry out what it decides.
        """
        light = light and not deep  # whoever asks for a deep pass has just changed something, perhaps
        spec = self.wanted(light=light)
        self._announce()
        self._announce_error()
        observed = self.node.look(deep=deep, light=light, spec=spec)
        history = self.node.context.store.history()
        plan = decide(spec, observed, history, time.time(), self._memory)
        self.node.apply(plan, observed, spec)
        return self.seen(spec, observed, history, plan)

    def preview(self) -> Sequence[Plan]:
        """Return every plan until there is nothing left to do. Reads the newest commit and changes nothing."""
        spec = self._newest()
        return self._preview(spec, self.node.observe(spec=spec))

    def preview_json(self) -> Json:
        """Return what `holdfast plan --json` prints."""
        spec = self._newest()
        observed = self.node.observe(spec=spec)
        plans = self._preview(spec, observed)
        images = images_needed(self.node.context, plans, spec.blobs if spec else {})
        problems = (*(spec.problems if spec else ()), *([self._error] if self._error else []))
        hints = spec.hints if spec else ()
        return plan_json(plans, problems, left_alone(observed), observed.findings, images, hints)

    def _preview(self, spec: Spec | None, observed: Observed) -> Sequence[Plan]:
        return preview(spec, observed, self.node.context.store.history(), time.time())

    def wanted(self, *, light: bool = False) -> Spec | None:
        """Return what the newest readable revision asks for. If the source can't be read, the last answer stays."""
        with self._reading:
            try:
                revision = self.source.current(light=light)
            except HoldfastError as error:
                self._error = str(error)
                return self._spec
            self._error = ""
            if revision is not self._revision:
                self._accept(revision)
            return self._spec

    def _newest(self) -> Spec | None:
        """Return what the newest revision asks for, or what is in force if that can't be read or would be refused."""
        wanted = self.wanted()
        try:
            revision = self.source.newest()
        except HoldfastError:
            return wanted
        if revision is self._revision or (self._revision and revision.id == self._revision.id):
            return wanted
        return self._judged(self._load(revision, Cache()))

    def reload(self, source: Source, config: Config) -> None:
        """Use other settings, and read everything again."""
        with self._reading:
            self.source, self.config = source, config
            self._cache, self._revision = Cache(), None

    def seen(self, spec: Spec | None, observed: Observed, history: History, plan: Plan) -> Pass:
        """Make the record of a pass."""
        state = asdict(self.source.state())
        state["error"] = state["error"] or self._error
        plugins = installed.states(self.node.context, observed.missing)
        failed = tuple(asdict(each) for each in plugins if each.state != "ok")
        return Pass(
            spec, observed, history, plan, state, self.config.node.name, failed, self.node.context.store.lacks
        )

    def _accept(self, revision: Revision) -> None:
        """Read the files of a new revision. One that is refused (on_invalid) changes only the status."""
        spec = self._load(revision, self._cache)
        self._revision = revision
        self._spec = self._judged(spec)

    def _load(self, revision: Revision, cache: Cache) -> Spec:
        spec = load(
            revision.files,
            self._facts(),
            cache=cache,
            executable=revision.executable,
            left_out=revision.left_out,
            ignored=revision.ignored,
            in_force=self._in_force(),
        )
        return replace(spec, revision=revision.id)

    def _facts(self) -> NodeFacts:
        return replace(self.config.facts(), drivers=self._drivers)

    def _judged(self, spec: Spec) -> Spec:
        """Return the spec, or the one in force if it has a problem and on_invalid is "reject-revision"."""
        if not spec.problems or self.config.on_invalid != "reject-revision":
            return spec
        return replace(self._spec, problems=spec.problems) if self._spec else _nothing_of(spec)

    def _announce(self) -> None:
        """Write an event for a revision once, when a pass acts on it; a preview leaves no trace."""
        revision, store = self._revision, self.node.context.store
        if revision is not None:
            store.put_fact(SOURCE_FACT, known_of(revision))
        if revision is None or store.fact("revision") == revision.id:
            return
        store.put_fact("revision", revision.id)
        about = f" by {revision.author}: {revision.message}" if revision.author else ""
        store.event("revision", "node", f"{revision.id[:16]}{about}", revision=revision.id)
        for problem in self._spec.problems if self._spec else ():
            store.event("problem", "node", str(problem))
        for hint in self._spec.hints if self._spec else ():
            store.event("hint", "node", hint)

    def _announce_error(self) -> None:
        """Write an event once when the source can't be read, and when it can be read again."""
        error = self.source.state().error or self._error
        if error == self._told:
            return
        self._told = error
        if error:
            self.node.context.store.event("failed", "source", error)
        else:
            self.node.context.store.event("source", "source", "it can be read again")


def _nothing_of(spec: Spec) -> Spec:
    """The spec of a revision that is refused before any was accepted: each app stays at its generation."""
    names = {app.path: name for name, app in spec.apps.items()}
    return Spec(broken={**names, **spec.broken}, problems=spec.problems)
