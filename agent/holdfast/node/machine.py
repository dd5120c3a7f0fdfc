"""The machine behind three verbs: `observe` reads it, `apply` puts actions on its lanes, `close` leaves it alone.

Every action goes the same way: intent written, work done, outcome written, whoever waits woken. What fails is
remembered with the time of its next try; the catch-all that keeps one broken action from taking the agent down
stands here and nowhere else.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import assert_never

import structlog

from holdfast.errors import HoldfastError, Stopping, TryAgain, UnfitHost, WrongCall, WrongState
from holdfast.files import discard_tree
from holdfast.guard import described
from holdfast.identity import Record
from holdfast.node.claim import check_claim
from holdfast.node.context import Context
from holdfast.node.images import Collector
from holdfast.node.installed import migrate, remember
from holdfast.node.lanes import Lanes
from holdfast.node.logkeeper import LogKeeper
from holdfast.node.lookout import Lookout
from holdfast.node.newer import NewerWatch
from holdfast.node.observe import observe
from holdfast.node.oom import OomWatch
from holdfast.node.recover import recover, remove_volume
from holdfast.node.shutdown import shut_down
from holdfast.node.stage import stage_generation
from holdfast.node.start import start_instance
from holdfast.node.stop import remove_instance, remove_orphan, stop_instance, sweep
from holdfast.node.update import ensure_network, remove_network, update_instance, write_firewall, write_names
from holdfast.node.volumes import change_volume, save_volumes
from holdfast.node.watch import ExitWatch
from holdfast.observed import Failure, Instance, InstanceId, Json, Observed, Subject
from holdfast.plan.actions import (
    Action,
    EnsureNetwork,
    EnsureVolume,
    ForgetApp,
    MarkGood,
    Outcome,
    Plan,
    RemoveInstance,
    RemoveNetwork,
    RemoveOrphan,
    RemoveVolume,
    StageGeneration,
    StartInstance,
    StopInstance,
    UpdateInstance,
    WriteFirewall,
    WriteNames,
)
from holdfast.plan.reasons import counted
from holdfast.plan.restart import wait_before
from holdfast.plan.targets import current
from holdfast.runtime.conmon import reopen_log
from holdfast.runtime.logs import keep
from holdfast.spec.model import App, Container, RestartPolicy, Spec

PATIENCE = 5.0  # seconds that actions have to come to an end when the agent does; what is cut short is gone on with
LAST_WORDS = 2.0  # seconds that plugins have to hear the rest when the agent ends
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
RETRY = RestartPolicy(delay=1.0, factor=2.0, max_delay=300.0, jitter=0.2)
LONG = frozenset({"pulling"})  # events that come by the hundred: not in the log
WARNINGS = frozenset({"failed", "problem", "plugin"})
SHOWN = ("verb", "took")  # what the log has of an event besides its message

log = structlog.get_logger("holdfast")


class Node:
    """One host as one agent sees it. wake(what) is called, from any thread, when it is time for another look."""

    def __init__(self, context: Context, *, starts: int | None = None) -> None:
        self.context = context
        self.wake: Callable[[str], None] = lambda what: None
        context.store.listen(_journal)
        context.plugins.noticed = lambda plugin, error: context.store.event("plugin", plugin, error)
        self._files: Mapping[str, bytes] = {}  # of the newest revision: what may be staged at any time
        self._applied = False
        self.empty = False  # of everything on the host, when it was closed
        self._lanes = Lanes(self._do, lambda action: self.wake(action.subject), starts=starts)
        self._collector = Collector(context)
        self._exits = ExitWatch(lambda instance: self.wake(instance))
        self._lookout = Lookout(context, self._exits)
        self._newer: NewerWatch | None = None
        self._logs = LogKeeper(self._max_log_files)
        self._watches: list[Callable[[], None]] | None = None  # what ends those of drivers
        self._ooms = OomWatch(context.runtime, context.run_of, self._tell_oom)

    def check_claim(self, known: Record | None) -> None:
        """Raise Conflict where the name or the root belongs to another. known: whose the name was so far."""
        check_claim(self.context, known)

    def recover(self) -> None:
        """Make the places that the runtime needs, and note what a crash cut short: the first pass puts it right.

        What failed gets another try, for the agent, its settings or its host may have been mended meanwhile.
        """
        self.context.runtime.prepare()
        try:
            self.context.runtime.settle()
        except (HoldfastError, OSError) as error:  # every start tries it again
            self.context.store.event("failed", "node", f"{error}")
        try:
            self.context.builder.sweep()
        except (HoldfastError, OSError) as error:  # it is tried again before the next build
            self.context.store.event("failed", "node", f"clear up after builds: {error}")
        self.context.store.retry_now()
        migrate(self.context.store, self.context.plugins)
        remember(self.context)
        recover(self.context)

    def observe(self, *, spec: Spec | None) -> Observed:
        """Read the whole host, every cgroup too, and what the containers of spec lack. Changes nothing on it."""
        busy, over = self._lanes.look()
        found = observe(self.context, self._exits.watches, busy=busy, deep=True, wanted=_wanted(spec))
        return replace(found, over=over)

    def look(self, *, deep: bool, light: bool, spec: Spec | None) -> Observed:
        """Read the host for a pass. deep: every cgroup, too. light: the records will do where they are trusted."""
        busy, over = self._lanes.look()
        return replace(self._lookout.look(busy, _wanted(spec), deep=deep, light=light), over=over)

    def apply(self, plan: Plan, observed: Observed, spec: Spec | None) -> None:
        """Put what is planned on the lanes and return at once; what is under way already is left to itself."""
        if not self._applied:
            for instance in observed.instances:
                if instance.phase == "running":
                    self._watch_files(instance)
        self._applied = True
        self.context.mark_boot()
        self._newer = self._newer or NewerWatch(self.context, lambda what: self.wake(what))
        if self._watches is None:
            self._watches = self.context.plugins.watch(self._noticed)
        self._watch_over(observed)
        if spec is not None:
            self._files = spec.blobs
            for subject in outlived(self.context.store.history().failures, plan, self._lanes.busy):
                self.context.store.clear_failure(subject)
        self._forget_stops(plan, observed)
        self._lanes.put(plan.actions, observed.over)

    def _forget_stops(self, plan: Plan, observed: Observed) -> None:
        """Where a stop was cut short and is no longer wanted, the next one begins anew, with all of its time."""
        wanted = {action.instance for action in plan.actions if isinstance(action, StopInstance)}
        for instance in observed.instances:
            begun = instance.phase == "running" and instance.exit is not None and instance.exit.asked
            if begun and instance.id not in wanted and instance.key not in {*observed.busy, *plan.waiting}:
                known = self.context.store.instances.get(instance.id)
                if known is not None and known.exit == instance.exit:
                    self.context.store.exchange_instance(known, replace(known, exit=None))

    def catch_up(self) -> None:
        """Write down what the disk had no room for. Once that is possible, what failed meanwhile is tried at once."""
        store = self.context.store
        late = store.late
        if late and store.catch_up():
            store.event("agent", "node", f"the disk has room again: {counted(late, 'change')} written down")
            store.retry_now()
        if not late:
            store.keep_reserve()

    def in_force(self) -> dict[str, App]:
        """Each app as it is on this node now, or is about to be for the first time."""
        generations = self.context.store.history().generations
        return {name: (current(known) or known[-1]).app for name, known in generations.items()}

    def rotate_logs(self) -> None:
        """See to logs that nobody was told of: while no agent ran, and those of conmons without a limit."""
        for instance in list(self.context.store.instances.values()):
            if instance.phase == "running":
                kept = instance.want.logging
                bundle = self.context.host.instance(instance.id)
                try:
                    keep(
                        self.context.log_path(instance.key),
                        kept.max_size,
                        kept.max_files,
                        partial(reopen_log, bundle),
                    )
                except OSError as error:  # conmon goes on writing where it writes; the next look tries again
                    log.warning("log not rotated", container=instance.key, error=str(error))

    def collect_images(self) -> None:
        """Free what no image needs where the disk is full."""
        self._collector.collect()

    def shut_down(self, total: float, beat: Callable[[float], None]) -> list[str]:
        """Stop every container because the host goes down; see `node.shutdown`."""
        return shut_down(self.context, total, beat)

    @property
    def skipped(self) -> bool:
        """Whether the last look was content with the agent's records."""
        return self._lookout.skipped

    @property
    def busy(self) -> frozenset[Subject]:
        """The subjects that are being worked on."""
        return self._lanes.busy

    def close(self) -> None:
        """Finish what is in hand and stop watching. Containers run on."""
        if self._newer is not None:
            self._newer.close()
        for end in self._watches or ():
            with suppress(Exception):  # a driver's; the process ends anyhow
                end()
        self.context.ending.set()
        self.context.puller.close()
        self.context.builder.close()
        self._lanes.close(PATIENCE)
        self._exits.close()
        self._logs.close()
        self._ooms.close()
        self.context.plugins.wait_told(LAST_WORDS)
        self.context.plugins.noticed = lambda plugin, error: None
        self.empty = self.context.empty
        if self._applied:  # else the token is not ours: a command may end beside an agent that has just begun
            self.context.leave()

    def _noticed(self, subject: str, what: str) -> None:
        """A driver saw that something was altered."""
        self._lookout.distrust()
        if what:
            self.context.store.event("host", subject, what)
        self.wake(subject)

    def _watch_over(self, observed: Observed) -> None:
        for instance in observed.instances:
            if instance.phase == "running" and instance.id not in self._exits.watching:
                run = self.context.run_of(instance.id)
                if run is not None:
                    self._exits.add(instance.id, run)

    def _watch_files(self, instance: Instance) -> None:
        self._logs.add(self.context.log_path(instance.key).parent)
        self._ooms.add(instance.id)

    def _tell_oom(self, id: str, kills: int) -> None:
        instance = self.context.store.instances.get(InstanceId(id))
        if instance is not None:
            what = "a process in it was" if kills == 1 else f"{kills} processes in it were"
            told = f"{what} killed for want of memory (OOM); it runs on"
            self.context.store.event("oom", instance.key, told, instance=id, kills=kills)

    def _max_log_files(self, path: Path) -> int | None:
        for instance in list(self.context.store.instances.values()):
            if self.context.log_path(instance.key) == path:
                return instance.want.logging.max_files
        return None

    def _do(self, action: Action) -> None:
        """Intent, effect, outcome: in the thread of a lane."""
        store, began = self.context.store, time.monotonic()
        detail: Json = {}
        error, retry, least, code = "", True, 0.0, 0
        try:
            store.put_intent(action.subject, _intent(action))
            if _makes(action):
                store.need_room()
            detail = perform(self.context, action)
            if isinstance(action, MarkGood | ForgetApp):
                self.context.prune_content(self._files)
        except BaseException as failure:  # whatever it is, it is remembered and waits for its next try
            if any(isinstance(cause, Stopping) for cause in _leaves(failure)):
                return  # the intent stays: the next agent goes on with it
            error, retry, least, code = _account(failure)
            if not _expected(failure):
                log.exception("bug", action=action.verb, subject=action.subject)
        took = time.monotonic() - began
        outcome = Outcome(action, not error, took, time.time(), error, retry, detail)
        if error or isinstance(action, RemoveOrphan):
            self._lookout.distrust()
        self._settle(outcome, least, code)
        if outcome.ok and isinstance(action, StopInstance | RemoveInstance):
            store.catch_up(give_up=True)
        if isinstance(action, StartInstance) and outcome.ok:
            run = self.context.run_of(detail["instance"])
            if run is not None:
                self._exits.add(detail["instance"], run)
            if (instance := self.context.store.instances.get(detail["instance"])) is not None:
                self._watch_files(instance)

    def _settle(self, outcome: Outcome, least: float, code: int) -> None:
        """Write down what came of an action, and tell of it."""
        store, action = self.context.store, outcome.action
        if outcome.ok:
            failure = store.failure(action.subject)
            if failure is not None and failure.digest == action.tried:
                store.clear_failure(action.subject)
        else:
            self._remember(outcome, least, code)
        if isinstance(action, StageGeneration):
            number = int(outcome.detail.get("generation", 0))
            if self._newer is not None:
                self._newer.look()
            self.context.plugins.tell("after_stage", app=action.app, generation=number, error=outcome.error)
        if action.is_news or not outcome.ok:
            kind = action.past if outcome.ok else "failed"
            message = action.reason if outcome.ok else outcome.error
            facts = {"verb": action.verb, "reason": action.reason, "took": round(outcome.took, 4), **outcome.detail}
            store.event(kind, action.subject, message, **{**facts, "app": action.app})
        came: dict[str, object] = {"action": action.verb, "subject": action.subject, "reason": action.reason}
        came |= {"ok": outcome.ok, "error": outcome.error, "took": outcome.took}
        self.context.plugins.tell("after_outcome", outcome=came)
        store.drop_intent(action.subject)

    def _remember(self, outcome: Outcome, least: float, code: int) -> None:
        store, action = self.context.store, outcome.action
        earlier = store.failure(action.subject)
        count = earlier.count + 1 if earlier and earlier.digest == action.tried else 1
        wait = max(wait_before(RETRY, count + 1, action.subject), least)
        retry_at = outcome.at + wait if outcome.retry else None
        store.put_failure(action.subject, Failure(action.tried, outcome.error, count, outcome.at, retry_at, code))


def _wanted(spec: Spec | None) -> list[Container]:
    return [want for app in spec.apps.values() for want in app.containers.values()] if spec else []


def _journal(event: Json) -> None:
    """Log what the event log has: exits, holds, errors of the source, actions."""
    if event["kind"] in LONG:
        return
    say = log.warning if event["kind"] in WARNINGS else log.info
    say(
        f"{event['kind']} {event['subject']}: {event['message']}",
        **{key: event[key] for key in SHOWN if key in event},
    )


def perform(context: Context, action: Action) -> Json:
    """Do one action and return what is worth telling about it."""
    match action:
        case StageGeneration():
            return stage_generation(context, action)
        case EnsureNetwork():
            return ensure_network(context, action)
        case RemoveNetwork():
            return remove_network(context, action)
        case StartInstance():
            return start_instance(context, action)
        case StopInstance():
            return stop_instance(context, action)
        case UpdateInstance():
            return update_instance(context, action)
        case RemoveInstance(instance=id):
            instance = context.store.instances.get(id)
            if instance is not None:
                save_volumes(context, instance)
                remove_instance(context, instance)
            sweep(context)
        case EnsureVolume():
            return change_volume(context, action)
        case RemoveVolume(volume=volume):
            remove_volume(context, volume)
        case MarkGood(generation=number):
            context.store.mark_generation(action.app, number, "good")
        case ForgetApp(app=app):
            discard_tree(context.host.root / "logs" / app)
            context.store.forget_app(app)
        case WriteFirewall():
            return write_firewall(context, action)
        case WriteNames():
            return write_names(context, action)
        case RemoveOrphan(receipt=receipt):
            remove_orphan(context, receipt)
            sweep(context)
        case _:
            assert_never(action)
    return {}


def _intent(action: Action) -> Json:
    """What is written down of an action before it begins, for `recover`."""
    intent = {"verb": action.verb, "reason": action.reason}
    return intent | {"instance": action.instance} if isinstance(action, RemoveInstance) else intent


def _makes(action: Action) -> bool:
    """Whether an action makes something, which has to be on record before; a restart of what is known may go on."""
    match action:
        case StageGeneration() | EnsureNetwork():
            return True
        case UpdateInstance(changes=changes):
            return bool(changes)  # else it puts right what was altered by hand
        case StartInstance(instance=known):
            return known is None
        case _:
            return False


def outlived(failures: Iterable[Subject], plan: Plan, busy: frozenset[Subject]) -> set[Subject]:
    """The subjects of failures that nothing is tried for any more: no plan means or awaits them, no lane has them."""
    return set(failures) - {action.subject for action in plan.actions} - plan.waiting.keys() - busy


def _account(failure: BaseException) -> tuple[str, bool, float, int]:
    """A failure in one line, whether trying again can help, the least time (seconds) before that, and its exit code.

    What somebody has to do something about comes before what passes by itself; a name that a commit gives, and that
    leads nowhere, is a fault of the commit.
    """
    causes = _leaves(failure)
    lines = dict.fromkeys(_line(cause) for cause in causes)
    ours = [cause for cause in causes if isinstance(cause, HoldfastError)]
    least = max((cause.wait for cause in ours), default=0.0)
    codes = [WrongState.exit_code if isinstance(cause, WrongCall) else cause.exit_code for cause in ours]
    code = next((code for code in codes if code != TryAgain.exit_code), TryAgain.exit_code)
    return "; ".join(lines), any(_may_pass(cause) for cause in causes), least, code


def _leaves(failure: BaseException) -> list[BaseException]:
    if isinstance(failure, BaseExceptionGroup):
        return [leaf for each in failure.exceptions for leaf in _leaves(each)]
    if isinstance(failure, OSError) and failure.errno in NO_ROOM:
        where = f" '{failure.filename}'" if failure.filename else ""
        return [UnfitHost(f"write{where}: {(failure.strerror or '').lower()} (free some space there)")]
    return [failure]


def _line(cause: BaseException) -> str:
    text = str(cause) if isinstance(cause, OSError) else described(cause)
    notes = ", ".join(reversed(getattr(cause, "__notes__", ())))
    return f"{notes}: {text}" if notes else text


def _may_pass(cause: BaseException) -> bool:
    return cause.retry if isinstance(cause, HoldfastError) else True


def _expected(failure: BaseException) -> bool:
    return all(isinstance(cause, HoldfastError) for cause in _leaves(failure))
