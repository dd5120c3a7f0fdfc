"""What the planner does, one data file per behaviour: tests/unit/plan/*.toml, each named by the sentence it proves.

A file gives facts in and actions out, in a short-hand that is read here:

    was         apps that run as generation 1 (good): every container up, every network standing
    want        the revision: apps, or "unreadable"; absent: the same as was
    broken      state file → the app that it may hold
    forgotten   apps that History has no generation of, though their containers are there
    generation  more generations of an app: {app, state, images?, containers…}; as = "want" takes want's app
    instance    "app/name" → what is otherwise about it; absent = true: not there; "app/name+x" is one more of it
    network     "app/name" → what is otherwise about it; absent = true: not there; earlier = true: of an older agent
    volume      "app/name" → what the driver was asked for, and what is otherwise: asked, faults, driver
    hold, failure, newer, orphan, volumes, firewall   as in History and Observed
    rounds      the actions of each round of `preview`, one line each
    waiting, drift   what the first plan says of these (in full); resting: what still waits when all is done
    wake_at     of the first plan
    ports, hosts     what the last firewall and names that are written hold
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.observed import (
    Exit,
    Failure,
    FirewallNetwork,
    FirewallWant,
    Generation,
    History,
    Hold,
    Instance,
    InstanceId,
    NetworkState,
    NewerImage,
    Observed,
    PublishedPort,
    Receipt,
    Subject,
    VolumeState,
)
from holdfast.plan.actions import Action, Plan, StageGeneration, WriteFirewall, WriteNames
from holdfast.plan.decide import decide
from holdfast.plan.diff import mounted_files
from holdfast.plan.preview import preview
from holdfast.spec.model import (
    App,
    Attachment,
    Container,
    Mount,
    Network,
    Port,
    RestartPolicy,
    Spec,
    Volume,
)

CASES = sorted((Path(__file__).parent / "plan").glob("*.toml"))
NOW = 1000.0


@dataclass(frozen=True)
class Case:
    """The arguments of `preview`."""

    spec: Spec | None
    observed: Observed
    history: History
    now: float


def container(app: str, short: Mapping[str, Any]) -> Container:
    """A container from short-hand: networks = ["front"], ports = ["8080:80"], restart = "always", image as given."""
    fields = dict(short)
    if isinstance(fields.get("networks"), list):
        fields["networks"] = {key: {} for key in fields["networks"]}
    if "networks" in fields:
        fields["networks"] = {_qualified(app, key): Attachment(**each) for key, each in fields["networks"].items()}
    fields["ports"] = tuple(_port(each) for each in fields.get("ports", ()))
    fields["mounts"] = tuple(Mount(**each) for each in fields.get("mounts", ()))
    if "restart" in fields:
        fields["restart_policy"] = RestartPolicy(policy=fields.pop("restart"))
    return Container(**{"networks": {"none": Attachment()}, "image": "app:1"} | fields)


def app(name: str, short: Mapping[str, Any]) -> App:
    """An app from short-hand."""
    return App(
        name=name,
        path=f"{name}.toml",
        depends_on=tuple(short.get("depends_on", ())),
        containers={key: container(name, each) for key, each in short.get("containers", {}).items()},
        networks={key: Network(**each) for key, each in short.get("networks", {}).items()},
        volumes={key: Volume(**each) for key, each in short.get("volumes", {}).items()},
        files=dict(short.get("files", {})),
    )


def read_case(facts: Mapping[str, Any]) -> Case:
    """The world that a data file describes."""
    was = {name: app(name, short) for name, short in facts.get("was", {}).items()}
    want = _wanted(facts, was)
    generations = {name: (_generation(each, 1, "good"),) for name, each in was.items()}
    for more in facts.get("generation", ()):
        name = more["app"]
        made = (want or {})[name] if more.get("as") == "want" else app(name, more)
        known = generations.get(name, ())
        generations[name] = (*known, _generation(made, len(known) + 1, more["state"], more.get("images")))
    history = History(
        generations={name: each for name, each in generations.items() if name not in facts.get("forgotten", ())},
        holds={key: Hold(**each) for key, each in facts.get("hold", {}).items()},
        failures={Subject.parse(key): _failure(each, want or {}) for key, each in facts.get("failure", {}).items()},
        newer={key: NewerImage(**each, at=NOW) for key, each in facts.get("newer", {}).items()},
    )
    observed = Observed(
        at=NOW,
        instances=tuple(_instances(facts.get("instance", {}), was, generations)),
        networks=dict(_networks(facts.get("network", {}), was)),
        volumes={key: VolumeState(key, "managed") for key in facts.get("volumes", ())}
        | {key: VolumeState(key, **{"driver": "managed"} | each) for key, each in facts.get("volume", {}).items()},
        firewall=_firewall(facts.get("firewall")),
        orphans=tuple(Receipt(driver="x", **each) for each in facts.get("orphan", ())),
    )
    spec = None if want is None else Spec(apps=want, broken=facts.get("broken", {}))
    return Case(spec, observed, history, facts.get("now", NOW))


def lines(plan: Plan) -> list[str]:
    """A plan's actions as text."""
    return [line(action) for action in plan.actions]


def line(action: Action) -> str:
    return f"{action.verb} {action.subject}: {action.reason}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_facts_in_actions_out(path: Path) -> None:
    facts = tomllib.loads(path.read_text(encoding="utf-8"))
    case = read_case(facts)
    plans = preview(case.spec, case.observed, case.history, case.now, rounds=30)
    assert [lines(plan) for plan in plans if not plan.empty] == facts["rounds"]
    assert plans[-1].empty
    for key, found in (
        ("waiting", dict(plans[0].waiting)),
        ("drift", dict(plans[0].drift)),
        ("resting", dict(plans[-1].waiting)),
        ("wake_at", plans[0].wake_at),
        ("ports", _written_ports(plans)),
        ("hosts", _written_hosts(plans)),
    ):
        if key in facts:
            assert found == facts[key], key


def test_what_is_staged_is_of_the_revision_that_asked_for_it() -> None:
    want = Spec(apps={"shop": app("shop", {})}, blobs={"digest": b"content"}, revision="git:1234")
    [stage] = decide(want, Observed(at=NOW), History(), NOW).actions
    assert isinstance(stage, StageGeneration)
    assert (stage.revision, stage.files) == ("git:1234", {"digest": b"content"})


def _wanted(facts: Mapping[str, Any], was: Mapping[str, App]) -> dict[str, App] | None:
    match facts.get("want"):
        case None:
            return dict(was)
        case "unreadable":
            return None
        case Mapping() as apps:
            return {name: app(name, short) for name, short in apps.items()}
        case other:
            raise AssertionError(f"want {other!r}")


def _generation(made: App, number: int, state: Any, images: Mapping[str, str] | None = None) -> Generation:
    found = {name: f"of {each.image}" for name, each in made.containers.items()}
    return Generation(app=made, number=number, state=state, images={**found, **(images or {})})


def _instances(
    otherwise: Mapping[str, Any], was: Mapping[str, App], generations: Mapping[str, tuple[Generation, ...]]
) -> Iterator[Instance]:
    keys = {f"{name}/{each}": None for name, made in was.items() for each in made.containers} | dict(otherwise)
    for full in keys:
        facts = dict(otherwise.get(full, {}))
        if facts.pop("absent", False):
            continue
        owner, _, name = full.partition("+")[0].partition("/")
        number = facts.pop("generation", 1)
        made = generations[owner][number - 1]
        want = made.app.containers[name]
        if "exit" in facts:
            facts["exit"] = Exit(**facts["exit"])
        standing = Instance(
            id=InstanceId(full),
            app=owner,
            container=name,
            generation=number,
            want=want,
            image=made.images[name],
            files=mounted_files(made.app, want),
            phase="running",
            created_at=100.0,
            started_at=100.0,
        )
        facts = {key: tuple(each) if isinstance(each, list) else each for key, each in facts.items()}
        yield replace(standing, **facts)


def _networks(otherwise: Mapping[str, Any], was: Mapping[str, App]) -> Iterator[tuple[str, NetworkState]]:
    used = {key: None for made in was.values() for each in made.containers.values() for key in each.networks}
    for key in used | dict(otherwise):
        facts = dict(otherwise.get(key, {}))
        if key in ("none", "host") or facts.pop("absent", False):
            continue
        owner, _, name = key.rpartition("/")
        defined = was[owner].networks.get(name, Network()) if owner in was else Network()
        made = defined.digest
        data = ({} if facts.get("earlier") else {"joined": 1}) | facts.get("data", {})
        yield key, NetworkState(key, "bridge", made, data, tuple(facts.get("faults", ())))


def _failure(short: Mapping[str, Any], want: Mapping[str, App]) -> Failure:
    facts: dict[str, Any] = {"error": "it failed", "count": 1, "at": NOW} | dict(short)
    tried = facts.pop("tried")
    kind, _, rest = tried.partition(" ")
    name, *images = rest.split(" ")
    digest = " ".join((want[name].digest, *images)) if kind == "want" else tried
    retry_at = facts.pop("retry_at")
    return Failure(digest=digest, retry_at=None if retry_at == "never" else retry_at, **facts)


def _firewall(short: Mapping[str, Any] | None) -> FirewallWant | None:
    if short is None:
        return None
    return FirewallWant(
        tuple(FirewallNetwork(**each) for each in short.get("networks", ())),
        tuple(PublishedPort(**each) for each in short.get("ports", ())),
    )


def _written_ports(plans: tuple[Plan, ...]) -> list[str]:
    wants = [each.want for plan in plans for each in plan.actions if isinstance(each, WriteFirewall)]
    return [
        f"{port.protocol} {port.host_ip or '*'}:{port.host_port} → {port.address}:{port.container_port}"
        for port in (wants[-1].ports if wants else ())
    ]


def _written_hosts(plans: tuple[Plan, ...]) -> dict[str, list[str]]:
    written = [each.hosts for plan in plans for each in plan.actions if isinstance(each, WriteNames)]
    return {
        str(id): [f"{address} {' '.join(names)}" for address, names in page.lines]
        for hosts in written
        for id, page in hosts.items()
    }


def _port(text: str) -> Port:
    *ip, host, inner = text.split(":")
    inner, _, protocol = inner.partition("/")
    return Port(
        host_ip=ip[0] if ip else "",
        host_port=int(host),
        container_port=int(inner),
        protocol="udp" if protocol == "udp" else "tcp",
    )


def _qualified(app: str, network: str) -> str:
    return network if network in ("none", "host", "bridge") or "/" in network else f"{app}/{network}"
