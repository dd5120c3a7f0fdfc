"""What images the generations that a plan stages need: which are pulled or built, and how much has to come.

`holdfast plan` prints it. What is here is not asked about. Registries are asked side by side, for a few seconds in
all, and no answer of theirs fails the plan.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from holdfast.errors import NotFound
from holdfast.grammar.images import archive_path, built
from holdfast.node.context import Context
from holdfast.observed import Json
from holdfast.plan.actions import Plan, StageGeneration

DEADLINE = 3.0  # seconds
MOST = 16  # registries' answers that are waited for at once


class Need(NamedTuple):
    """An image that is not here. verb: pull or build. why: what keeps it from being pulled; "" if nothing does."""

    image: str
    verb: str
    why: str = ""


def images_needed(context: Context, rounds: Sequence[Plan], blobs: Mapping[str, bytes]) -> dict[str, list[Json]]:
    """List for each app the images it needs that are not here: {"image", "verb", "size", "error"} of each.

    size: bytes that have to come, None where that is not known (`error` says why, if anything does).
    """
    staged = {action.app: action for plan in rounds for action in plan.actions if isinstance(action, StageGeneration)}
    needs = {app: list(dict.fromkeys(_needs(context, action, blobs))) for app, action in staged.items()}
    asked = [need.image for found in needs.values() for need in found if need.verb == "pull" and not need.why]
    sizes = _ask(context, list(dict.fromkeys(asked)))
    told: dict[str, list[Json]] = {}
    for app, found in needs.items():
        for image, verb, why in found:
            known = why or sizes.get(image, "")
            size, error = (known, "") if isinstance(known, int) else (None, known)
            told.setdefault(app, []).append({"image": image, "verb": verb, "size": size, "error": error})
    return told


def _needs(context: Context, action: StageGeneration, blobs: Mapping[str, bytes]) -> Iterator[Need]:
    app = action.spec
    images = [name for name, build in app.images.items() if build.push and name.startswith(f"{app.name}/")]
    for name, want in app.containers.items():
        reference = action.images.get(name) or want.image
        if reference is None or archive_path(reference):
            continue
        if (image := built(reference)) is not None:
            images.append(image)
        elif not _is_here(context, reference):
            yield _pull(context, reference, never=want.pull == "never")
    for image in dict.fromkeys(images):
        for kind, name in context.builder.missing(image, app.images, blobs):
            if kind == "build":
                yield Need(f"images.{name}", "build")
            elif not archive_path(name) and not _is_here(context, name):
                yield _pull(context, name, never=app.images[image].pull == "never")


def _pull(context: Context, reference: str, *, never: bool) -> Need:
    why = "this node is offline" if context.images.settings.offline else "pull is never" if never else ""
    return Need(reference, "pull", f"it is not here, and {why}" if why else "")


def _is_here(context: Context, reference: str) -> bool:
    try:
        context.images.resolve(reference)
    except NotFound:
        return False
    return True


def _ask(context: Context, references: Sequence[str]) -> dict[str, int | str]:
    """Ask for each reference how many bytes would have to come, or why that is not known."""
    if not references:
        return {}
    deadline = time.monotonic() + DEADLINE
    threads = ThreadPoolExecutor(min(len(references), MOST), "size")
    asked: dict[str, Future[int]] = {each: threads.submit(context.puller.size, each, deadline) for each in references}
    wait(asked.values(), DEADLINE)
    threads.shutdown(wait=False, cancel_futures=True)
    return {each: _answer(each, future) for each, future in asked.items()}


def _answer(reference: str, future: Future[int]) -> int | str:
    if not future.done() or future.cancelled():
        return "the registry has not answered yet"
    try:
        return future.result()
    except Exception as error:  # whatever it is, the plan stands without a size
        return str(error).removeprefix(f"pull {reference!r}: ")
