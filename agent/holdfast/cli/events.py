"""events: what happened, when and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.command import client, command, reach
from holdfast.cli.since import Moment


@command("events")
@click.option("-f", "--follow", is_flag=True, help="Go on as things happen.")
@click.option(
    "-n", "--tail", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="How many."
)
@click.option("--since", type=Moment(), help="Only what happened since then.")
@click.option("--json", "json_", is_flag=True, help="Print each event as one line of JSON.")
def events(follow: bool, tail: int, since: float | None, json_: bool) -> None:
    """Show what the agent did, found and was told."""
    for event in after(since, happened(follow, tail)):
        render.echo(render.json_text(event) if json_ else line(event))
        for said in () if json_ else event.get("output", ()):
            render.note(str(said), indent=4)


def happened(follow: bool, tail: int) -> Iterator[Mapping[str, Any]]:
    with nullcontext(client()) if follow else reach() as node:
        yield from (event for event in node.events(limit=tail, follow=follow) if event)


def after(since: float | None, found: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (event for event in found if since is None or event["at"] >= since)


def line(event: Mapping[str, Any]) -> str:
    """One event as a person reads it: when, what kind, about what, in words."""
    kind = str(event["kind"])
    colour = render.BAD if "fail" in kind or event.get("ok") is False else None
    when = render.paint(render.clock(event["at"]), render.QUIET)
    subject = str(event["subject"])
    return "  ".join(
        part for part in (when, render.paint(f"{kind:<9}", colour), subject, str(event["message"])) if part
    )


COMMANDS = [events]
