"""What a shutdown of the host ends, in which order, and what the next boot makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from holdfast.observed import Exit, Failure, Generation, History, Instance, InstanceId, Observed, Subject
from holdfast.plan.restart import verdict
from holdfast.plan.shutdown import count_waves, next_stops
from holdfast.spec import NodeFacts, load
from holdfast.spec.model import App, Container, RestartPolicy

NOW = 1000.0


def running(app: str, name: str, **want: Any) -> Instance:
    return Instance(
        id=InstanceId(f"{app}-{name}"), app=app, container=name, generation=1, image="i", phase="running", pid=7,
        want=Container(image="i", **want),
    )  # fmt: skip


def world(*instances: Instance, apps: Mapping[str, tuple[str, ...]] | None = None) -> tuple[Observed, History]:
    """The host with these instances. apps: what each app depends on."""
    made: dict[str, tuple[Generation, ...]] = {}
    for name in {each.app for each in instances}:
        containers = {each.container: each.want for each in instances if each.app == name}
        app = App(name=name, path=f"{name}.toml", depends_on=(apps or {}).get(name, ()), containers=containers)
        made[name] = (Generation(app=app, number=1, state="good"),)
    return Observed(at=NOW, instances=instances), History(generations=made)


def stopped(observed: Observed, history: History) -> set[str]:
    return {each.subject for each in next_stops(observed, history, NOW)}


def test_dependents_end_before_what_they_depend_on() -> None:
    db, web = running("shop", "db"), running("shop", "web", depends_on={"db": "started"})
    assert stopped(*world(db, web)) == {"shop/web"}
    assert count_waves(*world(db, web), NOW) == 2


def test_an_app_ends_before_the_apps_it_depends_on() -> None:
    db, web = running("base", "db"), running("shop", "web")
    assert stopped(*world(db, web, apps={"shop": ("base",)})) == {"shop/web"}


def test_containers_that_need_nobody_end_side_by_side() -> None:
    assert stopped(*world(running("a", "x"), running("b", "y"))) == {"a/x", "b/y"}


def test_a_shutdown_does_not_wait_for_the_next_try_of_a_stop_that_failed() -> None:
    observed, history = world(running("a", "x"))
    (action,) = next_stops(observed, history, NOW)
    failed = Failure(action.tried, "it outlives SIGKILL", 3, NOW, NOW + 300, 75)
    assert next_stops(observed, History(history.generations, failures={Subject.parse("a/x"): failed}), NOW) == (
        action,
    )


@pytest.mark.parametrize(("once", "kind"), [(False, "again"), (True, "failed")])
@pytest.mark.parametrize("ended", [Exit(143, 15, asked=True, host_went_down=True), None])
def test_what_ran_when_the_host_went_down_runs_again_unless_restart_no_was_written(
    ended: Exit | None, once: bool, kind: str
) -> None:
    web = Instance(
        id=InstanceId("i"), app="shop", container="web", generation=1, image="i", want=Container(image="i"),
        phase="exited" if ended else "lost", exit=ended,
    )  # fmt: skip
    assert verdict(web, RestartPolicy(policy="no", once=once)).kind == kind
    assert verdict(web, RestartPolicy(policy="on-failure")).kind == "again"


@pytest.mark.parametrize(
    ("written", "once"),
    [
        ("", False),
        ('restart = "no"', True),
        ('restart_policy = { policy = "no" }', True),
        ('restart = "always"', False),
    ],
)
def test_only_a_written_restart_no_means_once(written: str, once: bool) -> None:
    text = f'[containers.web]\nimage = "web:1"\n{written}\n'
    spec = load({"shop.toml": text.encode()}, NodeFacts(name="node"))
    assert spec.problems == ()
    assert spec.apps["shop"].containers["web"].restart_policy.once is once
