"""StopInstance and RemoveInstance: ask a process to end, and remove everything that was made for it."""

from __future__ import annotations

import time
from dataclasses import replace

from holdfast import kinds
from holdfast.errors import HoldfastError, Stopping, TryAgain
from holdfast.files import discard_tree
from holdfast.node.context import Context, fallback_receipts
from holdfast.observed import Exit, Instance, InstanceId, Json, Receipt
from holdfast.plan.actions import StopInstance
from holdfast.runtime import apparmor, bounded, netns
from holdfast.runtime.oci import signal_number, stop_signal

AFTER_KILL = 30.0  # seconds: a process in uninterruptible sleep can outlive SIGKILL for a while


def stop_instance(context: Context, action: StopInstance) -> Json:
    """Send the stop signal, wait for the grace period, then send SIGKILL. Raises TryAgain if that does not end it.

    Raises Stopping if the agent ends meanwhile. The next agent then waits for the rest of the grace period and sends
    no second signal, which some programs understand as "end at once".
    """
    instance = context.store.instances.get(action.instance)
    run = context.run_of(action.instance)
    if instance is None or instance.phase != "running":
        return {}
    if run is None:
        unseen = Exit(None, at=time.time(), asked=True)
        context.store.change_instance(instance.id, phase="exited", pid=None, exit=unseen)
        return {}
    asked = instance.exit.at if instance.exit and instance.exit.asked else 0.0
    signal = action.signal or _image_signal(context, instance)
    kills = context.runtime.oom_kills(instance.id)
    if not asked:
        context.store.change_instance(instance.id, exit=Exit(None, asked=True))  # before the end can be seen
        context.runtime.kill(instance.id, signal)
        asked = time.time()
        context.store.change_instance(instance.id, exit=Exit(None, asked=True, at=asked))
    left = min(max(asked + action.grace - time.time(), 0.0), action.grace)
    ended = context.runtime.wait_exit(instance.id, run, left, unless=context.ending.fd)
    killed = ended is None and not context.ending.is_set
    if killed:
        context.runtime.kill(instance.id, "SIGKILL", all=True)
        ended = context.runtime.wait_exit(instance.id, run, AFTER_KILL, unless=context.ending.fd)
    if ended is None:
        if context.ending.is_set:
            raise Stopping(f"stop '{action.subject}': the agent ends")
        raise TryAgain(f"stop '{action.subject}': process {run.pid} outlives SIGKILL")
    ended = _stopped(ended, "SIGKILL" if killed else signal, oom=context.runtime.oom_kills(instance.id) > kills)
    context.store.change_instance(instance.id, phase="exited", pid=None, exit=ended)
    tell_exit(context, instance, ended)
    context.runtime.leave_root(instance.id)
    return {"instance": instance.id, "exit_code": ended.code, "killed": killed}


def _stopped(ended: Exit, sent: str, *, oom: bool) -> Exit:
    """The end that we asked for: by the signal that was sent last, unless the kernel killed it first."""
    number = signal_number(sent)
    if ended.code == 128 + number:
        return replace(ended, asked=True, oom=False, signal=number)
    killed = ended.oom and oom
    return replace(ended, asked=True, oom=killed, signal=ended.signal if killed else None)


def tell_exit(context: Context, instance: Instance, ended: Exit) -> None:
    """Report the end of a process to the event log and to plugins."""
    fields = {"code": ended.code, "signal": ended.signal, "oom": ended.oom, "asked": ended.asked, "at": ended.at}
    more = {**fields, "instance": instance.id, "at_exit": ended.at}
    context.store.event("exited", instance.key, f"it {ended}", **more)
    about = {"app": instance.app, "container": instance.container, "instance": instance.id}
    context.plugins.tell("after_exit", **about, exit=fields)


def _image_signal(context: Context, instance: Instance) -> str:
    """The signal that asks it to end. Without the image, or if it names none, there is still a signal."""
    try:
        config = context.base(instance.image).config
        signal_number(stop_signal(instance.want, config))
    except (HoldfastError, OSError):
        config = {}
    return stop_signal(instance.want, config)


def remove_instance(context: Context, instance: Instance) -> None:
    """Take away an instance and all that was made for it, last thing first; the record goes last.

    Every failure is reported and none keeps the rest from being removed; the record then stays for another try.
    """
    context.runtime.delete(instance.id, force=True)
    bounded.remove(context.host.files(instance.id))
    known = context.store.owned(instance.id)
    seen = {(receipt.kind, receipt.id) for receipt in known}
    left = [each for each in fallback_receipts(context, instance) if (each.kind, each.id) not in seen]
    failures: list[Exception] = []
    for receipt in reversed([*left, *known]):
        try:
            if receipt.kind != "run":
                remove_thing(context, receipt)
            context.store.drop_receipt(receipt)
        except Exception as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"remove '{instance.key}'", failures)
    discard_tree(context.host.instance(instance.id))
    context.store.drop_instance(instance.id)
    context.limits.pop(instance.id, None)
    context.policy_digests.pop(instance.id, None)


def remove_thing(context: Context, receipt: Receipt) -> None:
    """Let the driver that made a thing remove it."""
    match receipt.kind:
        case "netns":
            netns.remove(context.host, receipt)
        case "run":
            context.runtime.delete(receipt.id, force=True)
        case _ if kind := kinds.kind_of(receipt):
            context.plugins.driver(kind, receipt.driver).remove(receipt)


def release_mount(context: Context, receipt: Receipt) -> None:
    """Let the driver of a mount release what only the start needed."""
    driver = context.plugins.of_kind(kinds.MOUNT).get(receipt.driver)
    if driver is None or not hasattr(driver, "release"):
        return
    try:
        driver.release(receipt)
    except Exception as error:  # it is tried again when the instance goes
        context.store.event("failed", receipt.owner, f"let go of mount '{receipt.id}': {error}")


def remove_orphan(context: Context, receipt: Receipt) -> None:
    """Remove a thing without a receipt, unless it has one by now; a table is recognised by its content alone."""
    known = context.store.receipt(receipt.kind, receipt.id) or InstanceId(receipt.owner) in context.store.instances
    if known and receipt.kind != "firewall":
        return
    if receipt.kind == "rootfs":  # it goes last: until then somebody can tell that something is left
        bounded.remove(context.host.files(receipt.owner))
    remove_thing(context, receipt)
    if receipt.kind == "rootfs":  # nothing is mounted in its run folder any more
        discard_tree(context.host.instance(receipt.owner))


def sweep(context: Context) -> None:
    """Remove the agent's own cgroup and AppArmor profile when no container is left."""
    if not context.store.instances:
        context.runtime.remove_parent_cgroup()
        apparmor.remove(context.apparmor_profile)
