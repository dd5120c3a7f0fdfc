"""plan, apply, sync, status: what was asked for, what will happen, how it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.bars import Show, amount, bars
from holdfast.cli.check import counted
from holdfast.cli.client import Client
from holdfast.cli.command import agent_client, client, command, json_option, log_to_stderr, reach, settings
from holdfast.cli.since import Seconds
from holdfast.convergence import Wait, obstacle
from holdfast.errors import HoldfastError, NoAgent, TryAgain

Json = Mapping[str, Any]
CHANGES = 2
BEAT = 0.1  # seconds between looks at a node that converges
WAIT = "How long to wait at most; what it takes to pull and build images does not count."
CONNECT = "How long to wait for a registry that does not answer (default: connect_timeout of agent.toml, 60s)."
PATIENCE = 300.0  # seconds that apply and sync --wait wait by default


@command("plan")
@json_option()
def plan(json_: bool) -> int:
    """Show what the agent would do now, and why. Touches nothing.

    Exits 0 when there is nothing to do, 2 when there are changes or something waits for its next try, 1 on any
    error, in a state file too.
    """
    try:
        with reach() as node:
            found = node.plan()
    except HoldfastError as error:
        render.echo(f"holdfast: {error}", err=True)
        return 1
    if json_:
        render.as_json(found)
    else:
        show_plan(found)
    if found["problems"]:
        return 1
    return 0 if found["empty"] and not found["waiting"] else CHANGES


def show_plan(found: Json) -> None:
    for app, steps in found["apps"].items():
        render.echo(render.paint(app or "the node", None, bold=True))
        for step in steps:
            show_step(step)
            if "StageGeneration" in step["actions"]:
                for need in found["images"].get(app, ()):
                    render.note(needed(need), indent=6)
    for title, colour in (("waiting", render.BUSY), ("drift", render.BUSY), ("foreign", render.QUIET)):
        if lines := found[title]:
            render.echo(render.paint(title, colour))
            for subject, why in lines.items():
                render.note(f"{subject}: {why}", indent=2, colour=None)
    for title, lines in (("state files", found["problems"]), ("this host", map(finding, found["findings"]))):
        for number, line in enumerate(lines):
            if number == 0:
                render.echo(render.paint(title, render.BAD))
            render.note(line, indent=2, colour=None)
    for line in found["hints"]:
        render.note(line, indent=2)
    if found["empty"]:
        render.echo("nothing to do now" if found["waiting"] else "nothing to do")
    else:
        render.echo(f"\n{counted(sum(len(steps) for steps in found['apps'].values()), 'change')}")


def needed(need: Json) -> str:
    """An image that is to be pulled or built, and how much has to come."""
    if need["verb"] == "build":
        return f"build {need['image']}"
    size = "size unknown" if need["size"] is None else render.size(need["size"])
    return f"pull {need['image']}  {size}" + (f": {need['error']}" if need["error"] else "")


def finding(found: Json) -> str:
    """What others did to the host, in one line."""
    return f"{found['subject']}: {found['text']}" + (f" ({found['remedy']})" if found["remedy"] else "")


MARKS = {
    "start": ("+", render.GOOD),
    "create": ("+", render.GOOD),
    "stage": ("·", render.QUIET),
    "stop": ("-", render.BAD),
    "remove": ("-", render.BAD),
    "delete": ("-", render.BAD),
    "forget": ("-", render.BAD),
}


def show_step(step: Json) -> None:
    """One line: a mark, verb and object, and the reason in the colour of remarks."""
    mark, colour = MARKS.get(step["verb"].split()[0], ("~", render.BUSY))
    told = f"{step['verb']} {step['object']}".strip()
    reasons = step["changes"] or [step["reason"]]
    head = f"  {mark} {told}"
    if len(reasons) == 1 and len(head) + len(reasons[0]) + 2 <= (render.width() or 10_000):
        render.echo(render.paint(head, colour) + "  " + render.paint(reasons[0], render.QUIET))
        return
    render.echo(render.paint(head, colour))
    for reason in reasons:
        render.note(reason, indent=6)


@command("sync")
@click.option("--accept-rewrite", is_flag=True, help="Take a branch whose history was rewritten as it is now.")
@click.option("--wait", is_flag=True, help="Wait until the node is converged; exit 0 only if it is.")
@click.option("--timeout", type=Seconds(), default=PATIENCE, show_default="5m", help=WAIT)
@click.option("--connect-timeout", type=Seconds(), default=None, help=CONNECT)
def sync(accept_rewrite: bool, wait: bool, timeout: float, connect_timeout: float | None) -> None:
    """Read the source and make a pass now."""
    agent, waiting = client(), Wait(timeout, connect_timeout)
    status = agent.sync(accept_rewrite)
    if wait:
        with bars() as show:
            status = converge(agent, waiting, show)
    render.echo(headline(status))
    if status["source"].get("error"):
        raise TryAgain(f"sync: {status['source']['error']}")
    if wait and not status["converged"]:
        raise unconverged("sync", status, waiting)


@command("apply")
@click.option("--timeout", type=Seconds(), default=PATIENCE, show_default="5m", help=WAIT)
@click.option("--connect-timeout", type=Seconds(), default=None, help=CONNECT)
@json_option()
def apply(timeout: float, connect_timeout: float | None, json_: bool) -> None:
    """Converge once and exit, agent or none.

    Exits 0 only when the node is converged.
    """
    agent, wait = agent_client(), Wait(timeout, connect_timeout)
    with bars() as show:
        if agent.listens():
            agent.sync(False)
            status = converge(agent, wait, show)
        else:
            from holdfast.daemon.once import apply_once

            log_to_stderr()
            status = apply_once(settings(), timeout, show, connect_timeout)
    if json_:
        render.as_json(status)
    elif status["converged"]:
        render.echo(headline(status))
    if not status["converged"]:
        raise unconverged("apply", status, wait)


def unconverged(verb: str, status: Json, wait: Wait) -> HoldfastError:
    """The error that says what keeps the node from its state."""
    lines = "".join(f"\n  {line}" for line in (*status["blockers"], *silent(status)))
    return obstacle(status)(f"{verb}: not converged after {render.span(time.time() - wait.began)}{lines}")


def silent(status: Json) -> list[str]:
    """A line for each registry that is being asked and has not answered for a while."""
    now = time.time()
    return [
        f"image '{each['ref']}': the registry has not answered for {render.span(now - each['since'])}"
        for each in status["unanswered"]
        if each["asking"] and now - each["since"] >= 1
    ]


def converge(agent: Client, wait: Wait, show: Show) -> Json:
    """Follow the agent until there is nothing to wait for; return its last status."""
    status = agent.status()
    for _ in agent.events(limit=1, follow=True, beat=BEAT):
        show(status)
        if wait.is_over(status):
            return status
        status = agent.status()
    raise NoAgent(f"ask the agent on '{agent.path}': it has ended meanwhile (see its log)")


@command("status")
@json_option()
@click.option("--watch", is_flag=True, help="Show it anew whenever something happens.")
def status(json_: bool, watch: bool) -> None:
    """Show what is asked for, what runs, and why."""
    show = render.as_json if json_ else show_status
    if watch:
        agent = client()
        for _ in agent.events(limit=1, follow=True):
            now = agent.status()
            with render.screen():
                show(now)
        return
    with reach() as node:
        show(node.status())


def headline(status: Json) -> str:
    """The node in one line: its name, whether it is converged, and the commit that it holds."""
    verdict = render.state("converged" if status["converged"] else "not converged")
    parts = [f"{render.paint(status['node'] or 'this node', None, bold=True)}: {verdict}"]
    commit = status["commit"]
    if revision := status["revision"]:
        parts.append(revision[:10])
    if message := commit.get("message"):
        parts.append(message.splitlines()[0][:50])
    about = [text for text in (commit.get("author"), render.ago(commit.get("at"))) if text]
    return "  ".join(parts) + (render.paint(f"  ({', '.join(about)})", render.QUIET) if about else "")


def show_status(status: Json) -> None:
    render.echo(headline(status))
    if note := status["agent"].get("note"):
        render.note(str(note), colour=render.BUSY)
    if status["apps"]:
        render.echo()
        show_apps(status)
    listed("images on their way", images_coming(status))
    listed("failed builds", [each["error"] for each in status["builds"] if each["error"]])
    host = [finding(found) for found in status["findings"]]
    told = {*status["problems"], *status["apps"], *host}
    listed("not converged", [line for line in status["blockers"] if not told & {line, line.split(":")[0]}])
    source = status["source"]
    if source.get("error"):
        later = f" (tried again {render.ago(source['next_try_at'])})" if source.get("next_try_at") else ""
        listed("source", [f"{source['error']}{later}"])
    listed("state files", status["problems"])
    listed("this host", host)
    listed("plugins", [f"{plugin['name']}: {plugin['error']}" for plugin in status["plugins"]])
    listed("not ours", [f"{subject}: {why}" for subject, why in status["foreign"].items()])
    listed("held by hand", [f"{subject}: {why}" for subject, why in status["drift"].items()])


def listed(title: str, lines: list[str]) -> None:
    if lines:
        render.echo("\n" + render.paint(title, render.BUSY))
        for line in lines:
            render.note(line, indent=2, colour=None)


def images_coming(status: Json) -> list[str]:
    """A line for each image on its way."""
    lines = [
        f"{each['ref']}: " + ("the registry is asked" if each["state"] == "resolving" else amount(each))
        for each in status["transfers"]
    ]
    lines += silent(status)
    for each in (each for each in status["builds"] if not each["error"]):
        step = f", {each['step']}" if each["step"] else ""
        lines.append(f"{each['image']}: being built for {render.span(time.time() - each['began'])}{step}")
    return lines


def show_apps(status: Json) -> None:
    """A row for each app and each of its instances; what needs words follows below its row."""
    rows: list[tuple[list[str], list[str]]] = []
    for name, app in status["apps"].items():
        generation = "" if app["generation"] is None else str(app["generation"])
        reason = app_reason(name, app)
        head = [render.paint(name, None, bold=True), render.state(app["state"]), generation]
        rows.append(([*head, "", "", "", "", "", ""], [reason]))
        for container, value in app["containers"].items():
            rows.extend(container_rows(container, value, status["at"], above=reason))
    head = ["NAME", "STATE", "GEN", "SINCE", "RESTARTS", "ADDRESS", "PORTS", "LIMITS", "IMAGE"]
    render.table(head, [row for row, _ in rows], notes=[notes for _, notes in rows])


def app_reason(name: str, app: Json) -> str:
    """Why an app is not as it should be, unless one of its containers says the same."""
    if app["state"] not in ("changing", "waiting", "failed", "removing"):
        return ""
    reason = str(app["reason"]).removeprefix(f"{name}: ")
    own = {container: value["reason"] for container, value in app["containers"].items()}
    told = {f"{name}/{container}: {why}" for container, why in own.items()}
    return "" if reason in told or (app["state"] == "changing" and reason in own.values()) else reason


def container_rows(name: str, container: Json, at: float, *, above: str) -> Iterator[tuple[list[str], list[str]]]:
    instances = container["instances"] or [None]
    for number, instance in enumerate(instances):
        newest = number == len(instances) - 1
        word = container["state"] if newest else instance["state"]
        notes = list(container_notes(container, at, above)) if newest else []
        yield (
            [
                f"  {name}" if number == 0 else "",
                render.state(word),
                *instance_cells(instance, at),
                ports(container) if newest else "",
                limits(instance) if instance else "",
                image(container, instance) if newest else "",
            ],
            list(dict.fromkeys([*notes, *(instance_notes(instance) if instance else ())])),
        )


def ports(container: Json) -> str:
    """The published ports as the kernel has them, and what is asked for and missing while the container runs."""
    asked, published = container["ports"], container["published"]
    if published is None:  # the firewall's driver does not say
        published = asked
    shown = " ".join(port.removesuffix("/tcp") for port in published)
    missing = " ".join(port.removesuffix("/tcp") for port in asked if port not in published)
    if not missing or container["state"] != "running":
        return shown
    return f"{shown or 'none'} (asked {missing})"


def limits(instance: Json) -> str:
    """The limits of an instance as the kernel has them: memory and CPUs, and whatever is not as it was asked for."""
    asked, observed = instance["limits"]["asked"], instance["limits"]["observed"]
    if observed is None:
        return ""
    shown = []
    for name, (text, none, usual) in LIMITS.items():
        now, wanted = (none if each[name] is None else text(each[name]) for each in (observed, asked))
        if now != wanted and not (name == "memory_swap" and asked[name] is None):
            shown.append(f"{now} (asked {wanted})")
        elif usual and observed[name] is not None:
            shown.append(now)
    return ", ".join(shown)


#: A limit → how it reads, how its absence reads, and whether it is shown where it is as it was asked for.
LIMITS: Mapping[str, tuple[Callable[[Any], str], str, bool]] = {
    "memory": (render.size, "no memory limit", True),
    "memory_swap": (lambda both: f"{render.size(both)} with swap", "no limit with swap", False),
    "cpus": (lambda cpus: f"{cpus:.4g} CPUs", "no CPU limit", True),
    "pids": (lambda pids: f"{pids} processes", "no limit of processes", False),
}


def image(container: Json, instance: Json | None) -> str:
    """What a container runs, or would: the reference, and the beginning of the digest that it stands for."""
    shown = instance or container
    name, digest = str(shown["image"]).partition("@")[0], str(shown["digest"])
    return f"{name} ({digest[7:19]})" if digest.startswith("sha256:") else name


def instance_cells(instance: Json | None, at: float) -> list[str]:
    if instance is None:
        return ["", "", "", ""]
    since = instance["exited_at"] or instance["started_at"]
    address = next((address for address in instance["addresses"].values() if address), "")
    restarts = str(instance["restarts"]) if instance["restarts"] else ""
    address = address if instance["state"] == "running" else ""
    return [str(instance["generation"]), render.ago(since, at).removesuffix(" ago"), restarts, address]


def container_notes(container: Json, at: float, above: str) -> Iterator[str]:
    """What there is to say of a container that its app, above it, does not say of all."""
    due = container["next_at"] is not None and container["next_at"] > at
    later = f" (next try {render.ago(container['next_at'], at)})" if due else ""
    reason = "" if above and container["reason"].startswith(above) else container["reason"]
    if reason or later:
        yield (reason + later).strip()
    if container["newer"]:
        name, _, digest = container["newer"].partition("@")
        yield f"newer image: {name} ({digest[7:19]})"


def instance_notes(instance: Json) -> Iterator[str]:
    yield from instance["faults"]
    yield from (f"warning: {warning}" for warning in instance["warnings"])


COMMANDS = [plan, apply, sync, status]
