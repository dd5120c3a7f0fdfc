"""Intents that a crash left → undone or finished, before the first pass; called by `machine` when an agent starts.

Most actions need nothing here: the next look finds what they left, and the plan goes on from there. These are the
ones whose traces no look can tell.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast import kinds
from holdfast.errors import HoldfastError, UnfitHost
from holdfast.guard import described, found_by
from holdfast.node.context import Context
from holdfast.node.start import attach_again
from holdfast.node.stop import release_mount, remove_instance, remove_thing, sweep
from holdfast.node.volumes import save_volumes
from holdfast.observed import InstanceId, Json, Receipt, Subject
from holdfast.runtime import cgroup


def recover(context: Context) -> None:
    """Go through the intents that are left. What fails is told, and keeps no agent from starting."""
    for subject, intent in context.store.intents().items():
        try:
            settle(context, subject, intent)
        except Exception as error:  # a driver's mistake, too
            context.store.event("failed", subject, described(error), verb=intent["verb"])
        goes_on = intent["verb"] == "StopInstance"  # the plan asks for it again, and the record says since when
        what = "goes on with what is left of its time" if goes_on else "is finished or undone now"
        context.store.event("interrupted", subject, f"{intent['verb']} was cut short; it {what}")
        context.store.drop_intent(subject)
    _lease_addresses(context)
    for driver in context.plugins.of_kind(kinds.MOUNT).values():
        if hasattr(driver, "release"):  # no start is under way
            for receipt in found_by(driver) or ():
                release_mount(context, receipt)


def _lease_addresses(context: Context) -> None:
    """Tell the drivers whose address each container has: older agents named the instance alone.

    After a reboot nothing is attached any more; the next start of an instance tells it.
    """
    if context.store.fact("leases") is not None:
        return
    for instance in context.store.instances.values() if context.same_boot() else ():
        try:
            attach_again(context, instance)
        except Exception as error:  # its next start, or the look that finds its link gone, tries again
            context.store.event("failed", instance.key, described(error), verb="AttachAgain")
    context.store.put_fact("leases", "app/container/slot")


def settle(context: Context, subject: Subject, intent: Json) -> None:
    """Undo or finish one action."""
    match intent["verb"]:
        case "StartInstance":
            _undo_restart(context, subject)
        case "Pause":
            cgroup.thaw(context.runtime.cgroup(intent["instance"]))
        case "RemoveInstance":
            instance = context.store.instances.get(InstanceId(intent.get("instance", "")))
            if instance is not None:  # its root file system may be half deleted: it must not run again
                save_volumes(context, instance)
                remove_instance(context, instance)
                sweep(context)
        case "RemoveVolume":
            _finish_removal(context, f"{subject.app}/{subject.name}")


def _undo_restart(context: Context, key: str) -> None:
    """End what may run already of an instance whose record still says that it ended."""
    for instance in context.store.instances.values():
        if instance.key == key and instance.phase == "exited":
            context.runtime.delete(instance.id, force=True)


def _finish_removal(context: Context, volume: str) -> None:
    """Go on deleting a volume that its driver no longer shows; one that is still whole is the plan's to decide on."""
    receipt = context.store.receipt("volume", volume)
    if receipt is None:
        return
    driver = context.plugins.driver(kinds.VOLUME, receipt.driver)
    if volume not in {each.id for each in driver.observe()}:
        remove_volume(context, volume)


def remove_volume(context: Context, volume: str, *, check: Callable[[], None] = lambda: None) -> None:
    """Delete a volume and its data, whoever asks for it; a crash on the way is recovered from.

    check: raises what speaks against it, while no start can take the volume up. Raises UnfitHost for a driver that
    fails, or says that it is done and still shows the volume.
    """
    subject = f"volume {volume}"
    with context.volume_lock(volume):
        check()
        receipt = context.store.receipt("volume", volume)
        context.store.put_intent(subject, {"verb": "RemoveVolume", "reason": "its data is being deleted"})
        drivers = (
            [receipt.driver]
            if receipt
            else [name for name in context.plugins.of_kind(kinds.VOLUME) if _shows(context, name, volume)]
        )
        try:
            for name in drivers:
                _remove(context, receipt or Receipt("volume", name, volume))
        except HoldfastError:
            if any(_shows(context, name, volume) for name in drivers):
                context.store.drop_intent(subject)  # it is still whole: whoever asked for this may ask again
            raise
        context.store.drop_receipt(receipt or Receipt("volume", "", volume))
        context.store.drop_intent(subject)


def _remove(context: Context, receipt: Receipt) -> None:
    title = f"remove volume '{receipt.id}': volume driver '{receipt.driver}'"
    try:
        remove_thing(context, receipt)
    except HoldfastError:
        raise
    except Exception as error:
        raise UnfitHost(f"{title}: {type(error).__name__}: {error}") from error
    if _shows(context, receipt.driver, receipt.id):
        raise UnfitHost(f"{title} removed nothing: it still shows the volume")


def _shows(context: Context, driver: str, volume: str) -> bool:
    known = context.plugins.of_kind(kinds.VOLUME).get(driver)
    return known is not None and any(each.id == volume for each in found_by(known) or ())
