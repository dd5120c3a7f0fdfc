"""Every question that may be put to a node, declared once; routes, client and offline answers follow from it.

    declaration ──▶ route            `api.routes` reads the arguments, calls the answer and writes the result
                ──▶ client method    `cli.client` sends the arguments and reads the result
                ──▶ offline answer   `node.answers` has those that need no agent; the others say that one is needed
                ──▶ test double      `tests/paper.py` echoes what nobody has given it an answer for

To add a question, declare it here and answer it in `node.answers`, or in `daemon.agent` if it needs the loop.

The signature says how a question travels:

    a parameter that the path names       a part of the path
    any other                             JSON in the body of a POST; else the query, lists by repeating the key
    one without a default                 must be there, and not be empty
    `Caller`                              filled in by the agent, which asks the kernel who is calling
    `Sink`                                the answer is an archive, written to it; the result comes at the end
    the result `Steps`                    a JSON line now and then; the last one is the result
    the result `Lines`                    a JSON line for each thing, an empty one when there is none for a while
    any other result                      one JSON value

A class that answers questions overrides their methods; what it does not override goes to its `ask`.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NewType, Protocol, TypeVar, cast, get_type_hints

API = 3  # counts up with each question, or parameter of one, that an older agent does not know
API_HEADER = "Holdfast-Api"  # of an answer: the API number of the agent; absent: 1
ROOT_HEADER = "Holdfast-Root"  # of a request: the root of the agent that is meant, percent-encoded

Json = Mapping[str, Any]
Lines = Iterator[Json | None]
Steps = Iterator[Json]
Caller = NewType("Caller", str)
NOBODY = Caller("")
F = TypeVar("F", bound=Callable[..., Any])

PLACE = re.compile(r"{(\w+):([^}]+)}")  # a parameter in a path: its name, and what it looks like
TARGET = "{target:[^/]+/[^/]+}"  # APP/NAME of a container, as a part of a path
ID = "{id:.+}"  # the name of anything else


class Sink(Protocol):
    """Where an archive goes."""

    def write(self, data: bytes, /) -> object:
        """Take all of data."""
        ...


@dataclass(frozen=True, eq=False)
class Question:
    """One question. names: its parameters in order; since: those that came later, each with the first `API`."""

    name: str
    method: str
    path: str
    names: tuple[str, ...]
    since: Mapping[str, int]
    declared: Callable[..., Any]

    def hints(self) -> dict[str, Any]:
        """The type of each parameter, and of `return`."""
        return get_type_hints(self.declared)


def question(method: str, path: str, **since: int) -> Callable[[F], F]:
    """Declare a method as a question with an HTTP method and path. since: parameters that came later → `API`."""

    def declare(declared: F) -> F:
        names = declared.__code__.co_varnames[1 : declared.__code__.co_argcount]
        made = Question(declared.__name__, method, path, names, since, declared)

        @wraps(declared)
        def asked(self: Questions, *words: Any, **more: Any) -> Any:
            return self.ask(made, {**dict(zip(names, words, strict=False)), **more})

        asked.question = made  # type: ignore[attr-defined]
        return cast(F, asked)

    return declare


class ImageQuestions:
    """Questions about images. ref: a name, or a digest or its beginning; NotFound for what is not here."""

    def ask(self, question: Question, given: dict[str, Any]) -> Any:
        """Answer a question that has no method of its own. given: the arguments that the caller gave."""
        raise NotImplementedError

    @question("GET", "/v1/images")
    def images(self) -> Sequence[Json]:
        """Return {"ref", "digest", "id", "size", "created", "used_by": […], …} of every image, for each of its names.

        An image without a name has the ref "". source: registry, load, import, build, commit, bundle or tag.
        """

    @question("GET", "/v1/images/inspect")
    def image(self, ref: str) -> Json:
        """Return one image in the shape of `docker image inspect`, with UsedBy, Names and History added."""

    @question("GET", "/v1/images/history")
    def image_history(self, ref: str) -> Sequence[Json]:
        """Return {"layer", "created", "created_by", "size", "comment"} of each step, newest first."""

    @question("GET", "/v1/images/outdated")
    def outdated(self) -> Sequence[Json]:
        """Ask the registries what they have now for the images that were staged (`node.newer.outdated`)."""

    @question("POST", "/v1/images/pull")
    def pull_image(self, ref: str) -> Steps:
        """Fetch an image: {"transfers": [`Transfer.json`]} now and then, {"image": …} at the end."""

    @question("POST", "/v1/images/push")
    def push_image(self, ref: str, to: str = "") -> Steps:
        """Send an image to a registry: {"transfers": …} now and then, {"pushed": {"ref", "digest"}} at the end."""

    @question("POST", "/v1/images/import")
    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        """Make an image of one layer from a tar archive of a root file system; changes as CMD, ENV, USER …"""

    @question("POST", "/v1/images/load")
    def load_image(self, path: str) -> Sequence[Json]:
        """Load the images of an OCI layout (directory or archive) or a docker-archive."""

    @question("POST", "/v1/bundles")
    def load_bundle(self, path: str) -> Steps:
        """Load the images of a bundle: {"transfers": …} now and then, {"images": [{"ref", "digest", "new"}]} at the
        end. The caller takes care of the state in it."""

    @question("POST", "/v1/images/tag")
    def tag_image(self, ref: str, name: str) -> Json:
        """Give an image one more name."""

    @question("DELETE", "/v1/images")
    def remove_image(self, ref: str) -> Json:
        """Forget a name, and delete what only it needs; Conflict if a container or a kept generation needs it."""

    @question("POST", "/v1/images/prune")
    def prune_images(self, all: bool = False) -> Json:
        """Delete unused images without a name, with all also named ones: {"images", "layers", "freed" (bytes)}."""

    @question("GET", "/v1/images/save")
    def save_images(self, ref: Sequence[str], format: str, out: Sink) -> Json:
        """Write images as one archive."""

    @question("GET", "/v1/images/export")
    def export_image(self, ref: str, out: Sink) -> Json:
        """Write the root file system of an image as a tar archive."""

    @question("POST", f"/v1/containers/{TARGET}/commit")
    def commit(
        self,
        target: str,
        name: str,
        changes: Sequence[str] = (),
        message: str = "",
        author: str = "",
        pause: bool = True,
    ) -> Json:
        """Make an image of a container's file system. pause: whether its processes are frozen meanwhile."""

    @question("GET", f"/v1/containers/{TARGET}/export")
    def export(self, target: str, out: Sink, pause: bool = True) -> Json:
        """Write the root file system of a container as a tar archive."""


class Questions(ImageQuestions):
    """Every question. A target is `app/container`; NotFound is raised for one that is not there."""

    @question("GET", "/v1/status")
    def status(self) -> Json:
        """Return `Status.json()` of the last pass."""

    @question("GET", "/v1/plan")
    def plan(self) -> Json:
        """Return `plan_json` of a preview made now; changes nothing."""

    @question("POST", "/v1/sync")
    def sync(self, accept_rewrite: bool = False) -> Json:
        """Read the source, make a pass, and return the status after it."""

    @question("GET", "/v1/events")
    def events(self, after: int = 0, limit: int = 1000, follow: bool = False, beat: float = 1.0) -> Lines:
        """Yield the events with a seq above `after`, oldest first, the newest `limit` of them.

        An event is {"seq", "at" (epoch seconds), "kind", "subject", "message", …}. follow: go on as they happen, and
        yield None each `beat` seconds (0.05 to 1) while there are none.
        """

    @question("POST", f"/v1/containers/{TARGET}/stop")
    def stop(self, target: str, by: Caller = NOBODY) -> None:
        """Stop a container, and keep it stopped until it is started or released."""

    @question("POST", f"/v1/containers/{TARGET}/start")
    def start(self, target: str, by: Caller = NOBODY) -> None:
        """Start a container that does not run, once."""

    @question("POST", f"/v1/containers/{TARGET}/restart")
    def restart(self, target: str, by: Caller = NOBODY) -> None:
        """Stop a container and start it again, once."""

    @question("POST", f"/v1/containers/{TARGET}/release")
    def release(self, target: str) -> None:
        """End a hold: the commit decides again."""

    @question("GET", f"/v1/containers/{TARGET}")
    def inspect(self, target: str) -> Json:
        """Return all that is known of a container: what is wanted, instances, receipts, paths."""

    @question("GET", f"/v1/containers/{TARGET}/files")
    def logs_of(self, target: str) -> Json:
        """Return {"paths": the log files of a container, oldest first} (see `runtime.logs`)."""

    @question("GET", "/v1/logs")
    def logs(
        self,
        target: Sequence[str],
        tail: int | None = None,
        since: float | None = None,
        until: float | None = None,
        follow: bool = False,
    ) -> Lines:
        """Yield the output of containers, merged by time, as `LogLine.json`. tail: the last lines of each only."""

    @question("POST", f"/v1/containers/{TARGET}/exec", detach=2)
    def exec_of(
        self,
        target: str,
        command: Sequence[str],
        user: str = "",
        env: Sequence[str] = (),
        workdir: str = "",
        tty: bool = False,
        detach: bool = False,
    ) -> Json:
        """Return {"argv": what runs a command in the container's newest running instance}. env: KEY=VALUE."""

    @question("GET", "/v1/stats")
    def stats(self) -> Sequence[Json]:
        """Return {"target", "instance", "memory", "memory_limit", "limits", "cpu" (seconds), "pids"} of what runs.

        limits: `status.actual.LimitsStatus`.
        """

    @question("GET", "/v1/volumes")
    def volumes(self) -> Sequence[Json]:
        """Return {"id", "driver", "path", "used_by": […], "orphan": bool} of every volume."""

    @question("GET", f"/v1/volumes/{ID}")
    def volume(self, id: str) -> Json:
        """Return one volume."""

    @question("DELETE", f"/v1/volumes/{ID}")
    def remove_volume(self, id: str, force: bool = False) -> None:
        """Delete a volume and its data; Conflict if a container has it mounted, or (without force) declares it."""

    @question("POST", "/v1/volumes/prune")
    def prune_volumes(self) -> Sequence[str]:
        """Delete every volume that no app declares; return their ids."""

    @question("GET", "/v1/networks")
    def networks(self) -> Sequence[Json]:
        """Return {"id", "driver", "subnet", "gateway", "interface", "internal", "endpoints": […]} of each one."""

    @question("GET", f"/v1/networks/{ID}")
    def network(self, id: str) -> Json:
        """Return one network."""

    @question("GET", "/v1/usage")
    def usage(self) -> Json:
        """Return what uses the disk, and what of it can be deleted (`node.usage.usage`)."""

    @question("POST", "/v1/prune")
    def prune(self, all: bool = False, volumes: bool = False) -> Json:
        """Delete what nobody needs: {"images", "volumes", "freed" (bytes), "kinds"}."""

    @question("GET", "/v1/plugins")
    def plugins(self) -> Sequence[Json]:
        """Return `plugins.PluginState` of every plugin, and of each driver that is missing."""

    @question("POST", "/v1/plugins/{name:.+}/forget")
    def forget_plugin(self, name: str) -> None:
        """Start containers without a plugin that adjusted them and is not installed any more."""


def question_of(declared: Callable[..., Any]) -> Question:
    """The question that a method of `Questions` declares."""
    return cast(Question, declared.question)  # type: ignore[attr-defined]


QUESTIONS = tuple(
    question_of(each)
    for kind in (Questions, ImageQuestions)
    for each in vars(kind).values()
    if hasattr(each, "question")
)
