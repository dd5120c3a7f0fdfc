"""A node on paper: Specs, worlds and an agent that answers from values, for tests of what the operator sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.api import serving
from holdfast.errors import Conflict, NotFound
from holdfast.node.answers import Answers
from holdfast.observed import Exit, Generation, History, Hold, Instance, InstanceId, Observed
from holdfast.plan.actions import Plan
from holdfast.questions import NOBODY, Caller, Json, Lines, Question, Questions, Sink, Steps
from holdfast.spec.model import App, Container, Port, RestartPolicy, Spec
from holdfast.status import make_status, plan_json

NOW = 1_000_000.0
Run = Callable[..., int]  # a command with its words; returns the exit code
LIMITS = {"memory": None, "memory_swap": None, "cpus": None, "pids": 2048}


def container(image: str = "app:1", *, restart: str = "no", **fields: Any) -> Container:
    policy = RestartPolicy.model_validate({"policy": restart, "jitter": 0.0})
    return Container(image=image, restart_policy=policy, **fields)


def app(name: str = "shop", **containers: Container) -> App:
    return App(name=name, path=f"{name}.toml", containers=containers)


def spec(*apps: App) -> Spec:
    return Spec(apps={each.name: each for each in apps})


def instance(of: App, name: str, **fields: Any) -> Instance:
    given: dict[str, Any] = {"phase": "running", "pid": 4242, "created_at": NOW - 60, "started_at": NOW - 60}
    return Instance(
        id=InstanceId(f"{of.name}-{name}-1"),
        app=of.name,
        container=name,
        generation=1,
        want=of.containers[name],
        image="sha256:1",
        **(given | fields),
    )


def ended(code: int | None, *, signal: int | None = None, oom: bool = False, at: float = NOW - 1) -> dict[str, Any]:
    """The fields of an instance whose process is gone."""
    return {"phase": "exited", "pid": None, "exit": Exit(code, signal, oom, at)}


def good(of: App, number: int = 1) -> Generation:
    return Generation(app=of, number=number, state="good", revision="c0ffee1234567890")


def history(*generations: Generation, **fields: Any) -> History:
    kept: dict[str, tuple[Generation, ...]] = {}
    for each in generations:
        kept[each.app.name] = (*kept.get(each.app.name, ()), each)
    return History(generations=kept, **fields)


SHOP = App(
    name="shop",
    path="shop.toml",
    containers={
        "web": container("shop/web:1.27", restart="always", ports=(Port(host_port=8080, container_port=80),)),
        "api": container("shop/api:3", restart="always"),
    },
)
BACK = app("back", db=container("postgres:17", restart="always"), web=container("pgweb:1"))
SOURCE = {
    "kind": "git",
    "url": "/srv/state.git",
    "revision": "c0ffee1234567890",
    "author": "Ann",
    "message": "Add the shop",
    "committed_at": NOW - 180,
    "error": "",
    "next_try_at": None,
}


class Echo(Questions):
    """Answers every question with its name and arguments, in the shape that the question promises."""

    def ask(self, question: Question, given: dict[str, Any]) -> Any:
        out = given.pop("out", None)
        told = {"asked": question.name, **given}
        match question.hints()["return"]:
            case _ if out is not None:
                out.write(question.name.encode())
                return told
            case result if result == Steps:
                return iter([{"transfers": []}, told])
            case result if result == Lines:
                return iter([{"seq": 1, **told}])
            case result if result is type(None):
                self.told = told
                return None
            case result if result == Json:
                return told
        return [told]


class PaperAgent(Echo):
    """Answers from values that a test sets; a hold changes them as the agent would."""

    def __init__(self, logs: Path | None = None) -> None:
        self.holds: dict[str, Hold] = {}
        self.log = [{"seq": 1, "at": NOW, "kind": "start", "subject": "shop/web", "message": "started"}]
        self.log_path = logs
        self.news = threading.Event()
        self.plan_now: tuple[Plan, ...] = (Plan(),)
        self.problems: tuple[str, ...] = ()
        self.hints: tuple[str, ...] = ()
        self.forgotten: list[str] = []

    def status(self) -> Json:
        running = [
            instance(SHOP, "web", addresses={"bridge": "10.209.0.2"}),
            instance(BACK, "db"),
            instance(BACK, "web"),
        ]
        if "shop/web" in self.holds:
            running[0] = instance(SHOP, "web", **ended(0))
        observed = Observed(at=NOW, instances=(*running, instance(SHOP, "api")))
        status = make_status(
            spec=spec(SHOP, BACK),
            observed=observed,
            history=history(good(SHOP, 3), good(BACK), holds=self.holds),
            plan=Plan(),
            source=SOURCE,
            node="edge-1",
        )
        return {**status.json(), "agent": {"version": "0", "pid": 1, "connect_timeout": 60.0}}

    def plan(self) -> Json:
        return plan_json(self.plan_now, self.problems, hints=self.hints)

    def sync(self, accept_rewrite: bool = False) -> Json:
        return self.status()

    def events(self, after: int = 0, limit: int = 1000, follow: bool = False, beat: float = 1.0) -> Lines:
        while True:
            found = [event for event in self.log if int(str(event["seq"])) > after][-limit:]
            yield from found
            if not follow:
                return
            if not found:
                yield None
            after = max((int(str(event["seq"])) for event in found), default=after)
            self.news.wait(min(beat, 0.05))

    def stop(self, target: str, by: Caller = NOBODY) -> None:
        self._known(target)
        self.holds[target] = Hold("stopped", NOW, by)

    def release(self, target: str) -> None:
        self._known(target)
        self.holds.pop(target, None)

    def inspect(self, target: str) -> Json:
        self._known(target)
        return {"target": target, "want": {"image": "shop/web:1.27", "init": False}, "instances": [{"id": "x"}]}

    def logs_of(self, target: str) -> Json:
        self._known(target)
        return {"paths": [str(self.log_path)]}

    logs = Answers.logs

    def stats(self) -> Sequence[Json]:
        return [
            {
                "target": "shop/web",
                "instance": "x",
                "memory": 1 << 20,
                "memory_limit": 8 << 20,
                "limits": {"asked": {**LIMITS, "memory": 16 << 20}, "observed": {**LIMITS, "memory": 8 << 20}},
                "cpu": 1.0,
                "pids": 2,
            }
        ]

    def volumes(self) -> Sequence[Json]:
        return [
            {"id": "shop/data", "driver": "managed", "path": "/v/shop/data", "used_by": ["shop/web"], "orphan": False}
        ]

    def volume(self, id: str) -> Json:
        return self.volumes()[0]

    def remove_volume(self, id: str, force: bool = False) -> None:
        if id not in {each["id"] for each in self.volumes()}:
            raise NotFound(f"volume '{id}': there is no such volume (see 'holdfast volume list')")
        if not force:
            raise Conflict(f"remove volume '{id}': shop/web has it mounted (stop that first)")

    def networks(self) -> Sequence[Json]:
        return [{"id": "bridge", "driver": "bridge", "subnet": "10.209.0.0/24", "gateway": "10.209.0.1"}]

    def network(self, id: str) -> Json:
        return {**self.networks()[0], "id": id}

    def images(self) -> Sequence[Json]:
        return []

    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        return {"ref": ref, "digest": "sha256:abc"}

    def remove_image(self, ref: str) -> Json:
        raise NotFound(f"image '{ref}': no such image")

    def image(self, ref: str) -> Json:
        return {"Id": "sha256:abc", "RepoTags": [ref]}

    def image_history(self, ref: str) -> Sequence[Json]:
        return [{"layer": "", "created": NOW, "created_by": "CMD", "size": 0, "comment": ref}]

    def outdated(self) -> Sequence[Json]:
        return []

    def pull_image(self, ref: str) -> Steps:
        yield {"transfers": []}
        if ref == "gone:1":
            raise NotFound(f"pull '{ref}': the registry has no such image")
        yield {"image": {"ref": ref, "digest": "sha256:abc"}}

    def push_image(self, ref: str, to: str = "") -> Steps:
        yield {"pushed": {"ref": to or ref, "digest": "sha256:abc"}}

    def prune_images(self, all: bool = False) -> Json:
        return {"images": ["sha256:abc"] * all, "layers": [], "freed": 0}

    def save_images(self, ref: Sequence[str], format: str, out: Sink) -> Json:
        out.write(b"tar" * 1_000_000)
        if "gone:1" in ref:
            raise NotFound("find image 'gone:1': no such image here")
        out.write(format.encode())
        return {"images": list(ref)}

    def export(self, target: str, out: Sink, pause: bool = True) -> Json:
        out.write(target.encode())
        return {"target": target, "pause": pause}

    def commit(
        self,
        target: str,
        name: str,
        changes: Sequence[str] = (),
        message: str = "",
        author: str = "",
        pause: bool = True,
    ) -> Json:
        return {"ref": name, "digest": "sha256:abc"}

    def usage(self) -> Json:
        return {"kinds": [], "images": [], "containers": [], "volumes": []}

    def prune(self, all: bool = False, volumes: bool = False) -> Json:
        return {"images": [], "volumes": ["shop/old"] * volumes, "freed": int(all), "kinds": {}}

    def plugins(self) -> Sequence[Json]:
        return [{"name": "odd", "version": "1", "state": "failed", "error": "no module named 'odd'", "drivers": []}]

    def forget_plugin(self, name: str) -> None:
        if name != "gone":
            raise NotFound(f"plugin '{name}': containers do not depend on one of that name")
        self.forgotten.append(name)

    def _known(self, target: str) -> None:
        if target not in ("shop/web", "shop/api", "back/db", "back/web"):
            raise NotFound(f"container '{target}': no such container")


@contextmanager
def served(agent: Questions, path: Path) -> Iterator[None]:
    """Serve an agent on a socket."""
    with serving(agent, path, root=path.parent):
        yield
