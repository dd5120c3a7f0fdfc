"""apply, sync: have a node converge, and wait for it."""

from __future__ import annotations

import time

import click

from holdfast.cli import options, render
from holdfast.cli.bars import bars
from holdfast.cli.client import Client
from holdfast.cli.command import agent_client, client, command, settings, watch
from holdfast.cli.status import headline, silent
from holdfast.convergence import Wait, obstacle
from holdfast.errors import TryAgain
from holdfast.questions import Json


@command("sync")
@click.option("--accept-rewrite", is_flag=True, help="Accept a branch whose history was rewritten.")
@click.option("--wait", is_flag=True, help="Wait until the node is converged; exit 0 only if it is.")
@options.timeout
@options.connect_timeout
def sync(accept_rewrite: bool, wait: bool, timeout: float, connect_timeout: float | None) -> None:
    """Fetch and compare now."""
    agent, waiting = client(), Wait(timeout, connect_timeout)
    status = agent.sync(accept_rewrite)
    if wait:
        status = converged(agent, waiting)
    render.echo(headline(status))
    if status["source"].get("error"):
        raise TryAgain(f"sync: {status['source']['error']}")
    if wait:
        check("sync", status, waiting)


@command("apply")
@options.timeout
@options.connect_timeout
@options.as_json
def apply(timeout: float, connect_timeout: float | None, json_: bool) -> None:
    """Converge once and exit. Uses the agent if one runs.

    Exits 0 only if the node is converged.
    """
    agent, wait = agent_client(), Wait(timeout, connect_timeout)
    if agent.listens():
        agent.sync()
        status = converged(agent, wait)
    else:
        from holdfast.cli.log import log_to_stderr
        from holdfast.daemon.once import apply_once

        log_to_stderr()
        with bars() as show:
            status = apply_once(settings(), timeout, show, connect_timeout)
    if json_:
        render.as_json(status)
    elif status["converged"]:
        render.echo(headline(status))
    check("apply", status, wait)


def converged(agent: Client, wait: Wait) -> Json:
    """Follow the agent and show its progress until there is nothing to wait for; return its last status."""
    with bars() as show:
        for status in watch(agent):
            show(status)
            if wait.is_over(status):
                break
    return status


def check(verb: str, status: Json, wait: Wait) -> None:
    """Raise the error that says what keeps the node from its state, if anything does."""
    if not status["converged"]:
        lines = "".join(f"\n  {line}" for line in (*status["blockers"], *silent(status)))
        raise obstacle(status)(f"{verb}: not converged after {render.span(time.time() - wait.began)}{lines}")
