"""Which generation each app is held at (rules 1 and 2 of `decide`), and what is staged to get there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from holdfast.observed import Generation, History, Subject
from holdfast.plan.actions import StageGeneration
from holdfast.plan.builds import missing_network
from holdfast.plan.draft import PlanDraft
from holdfast.spec.model import App, Container, Spec

MOUNT_LOOK = 2.0  # seconds until mounts that a container waits for are looked for again


def targets(spec: Spec | None, draft: PlanDraft) -> Iterator[tuple[str, Generation]]:
    """Each app that is to be held, with the generation; what has to be staged first is offered."""
    history = draft.history
    if spec is None:
        yield from _current_of(draft.known_apps, draft)
        return
    stuck = set(spec.broken.values()) - spec.apps.keys()
    held, fresh = dict(_current_of(stuck, draft)), dict[str, Generation]()
    for name in stuck:
        draft.waiting[Subject("app", name)] = "its state file does not load; it stays as it is"
    resting = draft.memory.apps
    for name, app in spec.apps.items():
        if name in resting:
            held[name] = resting[name].generation
            continue
        found = _staged(app, history) or current(history.generations.get(name, ()))
        newer = _newer_images(app, history)
        if obstacle := missing_network(app, draft):
            draft.waiting[Subject("app", name)] = obstacle
        elif found is None or found.app.digest != app.digest:
            if lacking := lacking_mounts(app.containers, draft):
                draft.waiting[Subject("app", name)] = f"waits to be staged: {lacking}"
            else:
                draft.offer(_stage(spec, app, newer, _stage_reason(found)))
        elif moved := {key: new for key, new in newer.items() if not new.endswith(found.images.get(key, "none"))}:
            draft.offer(_stage(spec, app, newer, _moved_reason(found, moved)))
        if found is None:
            draft.without_generation.add(name)
        else:
            (fresh if found.state == "staged" else held)[name] = found
    yield from held.items()
    for name, generation in fresh.items():
        if taken := _taken_port(generation.app, held.values()):
            draft.waiting[Subject("app", name)] = taken
            yield from _current_of([name], draft)
        else:
            yield name, generation


def _stage(spec: Spec, app: App, images: Mapping[str, str], reason: str) -> StageGeneration:
    return StageGeneration(
        app=app.name, reason=reason, spec=app, images=images, revision=spec.revision, files=spec.blobs
    )


def _taken_port(app: App, held: Iterable[Generation]) -> str:
    """Why an app may not come up beside the generations that others are held at, "" if it may.

    Within a revision no port is asked for twice; an app that is held at an older one may have what this one gives
    to another.
    """
    asked = [port for want in app.containers.values() for port in want.ports]
    for other in held if asked else ():
        for name, container in other.app.containers.items():
            for theirs in container.ports:
                for mine in asked:
                    if mine.overlaps(theirs):
                        return f"publish '{mine}': {other.app.name}/{name} still has '{theirs}'"
    return ""


def _current_of(names: Iterable[str], draft: PlanDraft) -> Iterator[tuple[str, Generation]]:
    for name in sorted(names):
        found = current(draft.history.generations.get(name, ()))
        if found is None:
            draft.without_generation.add(name)
        else:
            yield name, found


def _staged(app: App, history: History) -> Generation | None:
    """The generation made of exactly this app, if it is the newest or the one in force."""
    known = history.generations.get(app.name, ())
    for generation in (*known[-1:], current(known)):
        if generation is not None and generation.app.digest == app.digest:
            return generation
    return None


def current(known: tuple[Generation, ...]) -> Generation | None:
    """The generation in force: the newest that anything was started by."""
    return next((each for each in reversed(known) if each.state != "staged"), None)


def _newer_images(app: App, history: History) -> dict[str, str]:
    """Container → what its registry has by now, where the state says that this is to be run."""
    found = {}
    for name, want in app.containers.items():
        newer = history.newer.get(f"{app.name}/{name}")
        if newer and want.update_image and want.update_image.policy == "apply" and newer.image == want.image:
            found[name] = newer.reference
    return found


def _moved_reason(current: Generation, moved: Mapping[str, str]) -> str:
    return "; ".join(
        f"the image of {name} is {reference} by now, not {current.images.get(name, '')[7:19]}"
        for name, reference in moved.items()
    )


def _stage_reason(current: Generation | None) -> str:
    return "the app is new" if current is None else f"its state differs from generation {current.number}"


def lacking_mounts(containers: Mapping[str, Container], draft: PlanDraft) -> str:
    """What some container has to mount and can't by now, "" if nothing. Nobody tells of a mount: it is looked for."""
    for name, want in containers.items():
        for mount in want.mounts:
            if reason := draft.observed.lacks(mount):
                draft.wakes.append(draft.now + MOUNT_LOOK)
                return f"{name}: {reason}"
    return ""
