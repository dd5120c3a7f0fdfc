"""Asks registries, every so often, whether they have newer images; `holdfast image outdated` asks at once.

What is found is kept in the store as part of History, also when it is what runs: another commit of the app is then
staged with it, and not with what the name stood for before. The planner decides what follows from it, an event tells
of it once. One thread, which sleeps until the next container's time has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from holdfast.errors import HoldfastError, Stopping
from holdfast.images.formats.references import parse
from holdfast.images.formats.versions import newest
from holdfast.images.kept.image import Name
from holdfast.node.context import ROOTFS, Context
from holdfast.observed import Json, NewerImage
from holdfast.spec.forms import not_of_a_registry
from holdfast.spec.model import Container

RETRY = 60.0  # seconds, at the least, before a registry that did not answer is asked again
IDLE = 3600.0

log = structlog.get_logger("holdfast")


@dataclass(frozen=True, slots=True)
class Held:
    """A container of the newest generation of its app. digest: of the image that was staged for it."""

    key: str
    want: Container
    digest: str

    @property
    def of_a_registry(self) -> bool:
        """Whether a registry can have something newer."""
        image = self.want.image
        return bool(image) and not not_of_a_registry(image or "") and not self.digest.startswith(ROOTFS)

    @property
    def interval(self) -> float:
        """How often a registry is asked for it (seconds)."""
        return self.want.update_image.interval if self.want.update_image else IDLE

    @property
    def question(self) -> tuple[str, str]:
        """What a registry is asked for it: the image, and which newer tags count."""
        update = self.want.update_image
        return self.want.image or "", repr(update.tag_pattern) if update else ""


def held(context: Context) -> Iterator[Held]:
    """List every container of the newest generations."""
    for app, known in sorted(context.store.history().generations.items()):
        for name, want in known[-1].app.containers.items():
            yield Held(f"{app}/{name}", want, known[-1].images.get(name, ""))


def ask(context: Context, each: Held) -> NewerImage:
    """Ask what the registry has for a container now, newer or not. Raises as `Puller.resolve`."""
    image = each.want.image or ""
    update = each.want.update_image
    asked = image
    if update and update.tag_pattern:
        name, _, tag = image.rpartition(":")
        asked = f"{name}:{newest(tag, context.puller.tags(image), update.tag_pattern)}"
    digest = _known(context, asked).get(context.puller.head(asked), "")
    if not digest:
        remote = context.puller.resolve(asked)
        digest = remote.digest
        context.resolved[asked] = (remote.top_digest, digest)
    return NewerImage(image, f"{asked}@{digest}", digest, time.time())


def _known(context: Context, asked: str) -> dict[str, str]:
    """Look up what a reference led to: the digest that a registry tells → that of the image for this host."""
    found = dict([context.resolved[asked]]) if asked in context.resolved else {}
    name = context.images.names().get(parse(asked).name)
    if name is not None and name.source == "registry":
        found[name.top or name.digest] = name.digest
    return found


def outdated(context: Context) -> Sequence[Json]:
    """Ask for every container at once.

    {"target", "image", "digest" (of what was staged), "newer", "newer_digest", "policy", "error"} of each; newer is
    "" where there is nothing newer, error says why a registry could not tell. What none can have is left out.
    """
    names = context.images.names()
    return [_answer(context, each) for each in held(context) if each.of_a_registry and not _brought(each, names)]


def _brought(each: Held, names: Mapping[str, Name]) -> bool:
    """Check whether the image was not pulled but loaded, imported or built, so no registry is asked."""
    known = names.get(parse(each.want.image or "").name)
    return each.want.update_image is None and known is not None and known.source not in ("registry", "tag")


def _answer(context: Context, each: Held) -> Json:
    answer = {
        "target": each.key,
        "image": each.want.image,
        "digest": each.digest,
        "newer": "",
        "newer_digest": "",
        "policy": each.want.update_image.policy if each.want.update_image else "",
        "error": "",
    }
    if "@" in (each.want.image or ""):
        return answer
    try:
        found = ask(context, each)
    except HoldfastError as error:
        return answer | {"error": str(error)}
    if each.want.update_image:
        note(context, each, found)
    if found.digest == each.digest:
        return answer
    return answer | {"newer": found.reference.partition("@")[0], "newer_digest": found.digest}


def note(context: Context, each: Held, found: NewerImage) -> bool:
    """Keep what was found, and tell of it once where it is news. Returns whether it is."""
    known = context.store.history().newer.get(each.key)
    if known and (known.image, known.digest) == (found.image, found.digest):
        return False
    context.store.put_newer(each.key, found)
    if found.digest == each.digest:
        return False
    follows = "it is staged" if each.want.update_image and each.want.update_image.policy == "apply" else "told only"
    message = f"the registry has {found.reference}, newer than {each.digest[7:19]} ({follows})"
    context.store.event("outdated", each.key, message, image=found.image, reference=found.reference)
    return True


class NewerWatch:
    """The thread that asks, while the agent runs. wake(what) is called when there is something newer."""

    def __init__(self, context: Context, wake: Callable[[str], None]) -> None:
        self._context, self._wake = context, wake
        self._due: dict[str, tuple[Container, float]] = {}  # container → what it was asked for, when it is next
        self._failed: dict[str, int] = {}  # the kind of what went wrong the last time
        self._look = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="newer images", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Look again: there may be other containers now."""
        self._look.set()

    def close(self) -> None:
        """End the thread; a registry that is being asked is not waited for long."""
        self._over.set()
        self._look.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._over.is_set():
            self._look.clear()
            try:
                wait = self._round(time.time())
            except Exception:  # the edge of a thread: the next round tries again
                log.exception("bug", thread="newer images")
                wait = RETRY
            self._look.wait(wait)

    def _round(self, now: float) -> float:
        """Ask for everything whose time has come; return the seconds until the next."""
        offline = self._context.images.settings.offline
        every = () if offline else held(self._context)
        asked = {each.key: each for each in every if each.want.update_image and each.of_a_registry}
        for key in self._context.store.history().newer.keys() - asked.keys():
            self._context.store.put_newer(key, None)
        self._due = {key: value for key, value in self._due.items() if key in asked}
        together: dict[tuple[str, str], list[Held]] = {}  # what is asked for several containers is asked once
        for key, each in asked.items():
            # The first question waits: staging has just asked, and restarts must not ask more.
            before, at = self._due.get(key, (None, now + min(each.interval, RETRY)))
            self._due[key] = (each.want, now if before is not None and before != each.want else at)
            together.setdefault(each.question, []).append(each)
        for alike in together.values():
            if self._over.is_set():
                break
            if any(self._due[each.key][1] <= now for each in alike):
                wait = self._ask(alike)
                for each in alike:
                    self._due[each.key] = (each.want, now + max(wait, each.interval))
        return max(min((at for _, at in self._due.values()), default=now + IDLE) - time.time(), 0.1)

    def _ask(self, alike: Sequence[Held]) -> float:
        """Ask once for containers of one image; return the seconds until that may be done again, at the least."""
        try:
            found = ask(self._context, alike[0])
        except Stopping:
            return 0.0
        except HoldfastError as error:
            for each in alike:
                if self._failed.get(each.key) != error.exit_code:
                    self._failed[each.key] = error.exit_code
                    self._context.store.event("failed", each.key, f"{error} (asked for a newer image)")
            return error.wait
        for each in alike:
            self._failed.pop(each.key, None)
            if note(self._context, each, found):
                self._wake(each.key)
        return 0.0
