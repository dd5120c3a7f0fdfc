"""status: what was asked for, what runs, and why they differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from holdfast.cli import options, render
from holdfast.cli.command import client, command, reach
from holdfast.cli.command import watch as watching
from holdfast.questions import Json

REDRAW = 1.0  # seconds between looks, for somebody who watches


@command("status")
@options.as_json
@click.option("--watch", is_flag=True, help="Show it again whenever something happens.")
def status(json_: bool, watch: bool) -> None:
    """Show what was committed, what runs, and why they differ."""
    show = render.as_json if json_ else show_status
    if watch:
        for now in watching(client(), REDRAW):
            with render.screen():
                show(now)
        return
    with reach() as node:
        show(node.status())


def headline(status: Json) -> str:
    """The node in one line: its name, whether it is converged, and the commit that it holds."""
    verdict = render.state("converged" if status["converged"] else "not converged")
    node, commit = render.paint(status["node"] or "this node", None, bold=True), status["commit"]
    message = (commit.get("message") or "").partition("\n")[0][:50]
    about = ", ".join(filter(None, (commit.get("author"), render.ago(commit.get("at")))))
    told = "  ".join(filter(None, (f"{node}: {verdict}", status["revision"][:10], message)))
    return told + (render.paint(f"  ({about})", render.QUIET) if about else "")


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


def amount(transfer: Json) -> str:
    """How much of an image has come, in words."""
    layers = [layer for layer in transfer["layers"] if layer["state"] != "here"]
    done = sum(layer["state"] == "done" for layer in layers)
    share = f"{render.size(transfer['done'])} of {render.size(transfer['total'])}"
    return f"{share}, {done} of {len(layers)} layers"


def show_apps(status: Json) -> None:
    """Print a row for each app and each of its instances, with remarks below."""
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
    older, newest = container["instances"][:-1], (container["instances"] or [None])[-1]
    head = f"  {name}"
    for instance in older:
        cells = [head, render.state(instance["state"]), *instance_cells(instance, at), "", limits(instance), ""]
        yield cells, instance_notes(instance)
        head = ""
    cells = [
        *instance_cells(newest, at),
        ports(container),
        limits(newest) if newest else "",
        image(container, newest),
    ]
    notes = [*container_notes(container, at, above), *(instance_notes(newest) if newest else ())]
    yield [head, render.state(container["state"]), *cells], list(dict.fromkeys(notes))


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
    """The image of a container: its reference, and the beginning of its digest."""
    shown = instance or container
    name, digest = str(shown["image"]).partition("@")[0], str(shown["digest"])
    return f"{name} ({digest[7:19]})" if digest.startswith("sha256:") else name


def instance_cells(instance: Json | None, at: float) -> list[str]:
    if instance is None:
        return ["", "", "", ""]
    since = render.ago(instance["exited_at"] or instance["started_at"], at).removesuffix(" ago")
    addresses = filter(None, instance["addresses"].values() if instance["state"] == "running" else ())
    return [str(instance["generation"]), since, str(instance["restarts"] or ""), next(addresses, "")]


def container_notes(container: Json, at: float, above: str) -> Iterator[str]:
    """What is to be said of a container, unless the line of its app says the same."""
    due = container["next_at"] is not None and container["next_at"] > at
    later = f" (next try {render.ago(container['next_at'], at)})" if due else ""
    reason = "" if above and container["reason"].startswith(above) else container["reason"]
    if reason or later:
        yield (reason + later).strip()
    if container["newer"]:
        name, _, digest = container["newer"].partition("@")
        yield f"newer image: {name} ({digest[7:19]})"


def instance_notes(instance: Json) -> list[str]:
    return list(dict.fromkeys([*instance["faults"], *(f"warning: {warning}" for warning in instance["warnings"])]))


def silent(status: Json) -> list[str]:
    """A line for each registry that is being asked and has not answered for a while."""
    now = time.time()
    return [
        f"image '{each['ref']}': the registry has not answered for {render.span(now - each['since'])}"
        for each in status["unanswered"]
        if each["asking"] and now - each["since"] >= 1
    ]


def finding(found: Json) -> str:
    """What others did to the host, in one line."""
    return f"{found['subject']}: {found['text']}" + (f" ({found['remedy']})" if found["remedy"] else "")
