"""logs, exec, stop, start, restart, release, inspect, stats, commit, export: one container at a time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from holdfast.cli import options, render
from holdfast.cli.archives import written
from holdfast.cli.client import Answer
from holdfast.cli.command import client, command, reach, watch
from holdfast.cli.since import DURATION, MOMENT
from holdfast.cli.targets import complete_target, resolve, resolve_all
from holdfast.errors import NotPermitted, TryAgain, WrongCall
from holdfast.questions import Json, Questions

INTERVAL = 0.5  # seconds between the two looks from which the CPU's use is computed


@command("logs")
@click.argument("targets", metavar="APP[/NAME]...", nargs=-1, required=True, shell_complete=complete_target)
@click.option("-f", "--follow", is_flag=True, help="Go on as the containers write.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines of each container.")
@click.option("--since", type=MOMENT, help="Only what was written since then.")
@click.option("--until", type=MOMENT, help="Only what was written until then.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was written.")
@options.as_json
def logs(
    targets: tuple[str, ...],
    follow: bool,
    tail: int | None,
    since: float | None,
    until: float | None,
    timestamps: bool,
    json_: bool,
) -> None:
    """Print the output of containers, byte for byte.

    Standard error goes to standard error. The lines of several containers, or of a whole app, are merged by time and
    begin with the name of the container.
    """
    from holdfast.cli.lines import show, show_json
    from holdfast.runtime.logs import LogLine, Wanted, line_of
    from holdfast.runtime.output import output

    with reach() as node:
        known = resolve_all(node.status(), targets)
        if os.geteuid() != 0:  # the log files are root's
            told = node.logs(known, tail, since, until, follow)
            lines: Iterator[LogLine | None] = (line_of(line) if line else None for line in told)
        else:
            files = [(target, Path(path)) for target in known for path in node.logs_of(target)["paths"]]
            sources = files if len(known) > 1 else [("", path) for _, path in files]
            lines = output(sources, Wanted(tail, since, until), threading.Event() if follow else None)
        if json_:
            show_json(lines, known)
        else:
            show(lines, timestamps=timestamps, follow=follow)


@command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Allocate a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait for the command; its output is discarded.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as this user of the container.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Add to its environment; can be repeated.")
@click.option("-w", "--workdir", default="", metavar="PATH", help="Run in this directory of the container.")
@options.target
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGUMENT]...")
def exec(
    interactive: bool,
    tty: bool,
    detach: bool,
    user: str,
    env: tuple[str, ...],
    workdir: str,
    target: str,
    words: tuple[str, ...],
) -> None:
    """Run a command inside a running container.

    Exits with the exit code of the command; with 127 if it does not exist, 126 if it can't be run.
    """
    if os.geteuid() != 0:
        raise NotPermitted("exec: only root may enter a container (sudo holdfast exec …)")
    if detach and (interactive or tty):
        raise WrongCall("exec --detach: has neither input nor a terminal (leave out -i and -t)")
    if tty and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise WrongCall("exec --tty: standard input and output are no terminal (leave out -t)")
    if workdir and not workdir.startswith("/"):
        raise WrongCall(f"exec --workdir '{workdir}': not an absolute path (/{workdir})")
    argv = words[1:] if words[0] == "--" else words
    environment = environment_of(env, tty=tty)
    with reach() as node:
        known = resolve(node.status(), target)
        command_line = node.exec_of(known, argv, user, environment, workdir, tty, detach)["argv"]
    if detach:
        begin(command_line)
        return
    if not interactive:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execvp(command_line[0], command_line)


def environment_of(entries: Iterable[str], *, tty: bool) -> list[str]:
    """The environment of the command: the kind of terminal, and what is named, by default with its value here."""
    found = {"TERM": os.environ["TERM"]} if tty and os.environ.get("TERM") else {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name:
            raise WrongCall(f"exec --env '{entry}': no name (expected KEY=VALUE, or KEY to pass on your own)")
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return [f"{name}={value}" for name, value in found.items()]


def begin(command_line: Sequence[str]) -> None:
    """Have the runtime start a command, and return."""
    import subprocess

    quiet = subprocess.DEVNULL
    done = subprocess.run(command_line, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    if done.returncode:
        raise TryAgain(f"exec --detach: the runtime exits with {done.returncode} (without --detach it says why)")


def holding(ask: Callable[[Questions, str], None], reached: Callable[[Json, frozenset[str]], bool]) -> click.Command:
    """A command that asks the agent for something by hand and waits until that is so."""
    verb = ask.__name__

    @command(verb, help=ask.__doc__)
    @options.target
    @click.option("--timeout", type=DURATION, default=60.0, show_default="60s", help="How long to wait at most.")
    @click.option("--no-wait", is_flag=True, help="Do not wait until it is done.")
    def act(target: str, timeout: float, no_wait: bool) -> None:
        agent, deadline = client(), time.monotonic() + timeout
        status = agent.status()
        known = resolve(status, target)
        before = running(container(status, known))
        ask(agent, known)
        for status in () if no_wait else watch(agent):
            now = container(status, known)
            if reached(now, before):
                return
            if now.get("state") == "failed" or time.monotonic() >= deadline:
                why = f": {now['reason']}" if now.get("reason") else ""
                state = f"it is {now.get('state', 'gone')} after {render.span(timeout)}"
                raise TryAgain(f"{verb} '{target}': {state}{why}")

    return act


def container(status: Json, target: str) -> Json:
    app, _, name = target.partition("/")
    found: Json = status["apps"].get(app, {}).get("containers", {}).get(name, {})
    return found


def running(container: Json) -> frozenset[str]:
    """The processes of a container: instance and start time, so that one that was started anew is another."""
    live = (each for each in container.get("instances", ()) if each["state"] == "running")
    return frozenset(f"{each['id']} {each['started_at']}" for each in live)


stop = holding(Questions.stop, lambda now, _: not running(now))
start = holding(Questions.start, lambda now, _: bool(running(now)))
restart = holding(Questions.restart, lambda now, before: bool(running(now) - before))
release = holding(Questions.release, lambda now, _: not now["held"])


@command("inspect")
@options.target
@options.as_json
def inspect(target: str, json_: bool) -> None:
    """Print all that is known of a container: what is wanted, what runs, and what was made for it."""
    with reach() as node:
        render.details(node.inspect(resolve(node.status(), target)), json=json_)


@command("stats")
@options.as_json
def stats(json_: bool) -> None:
    """Show what each running container uses.

    CPU over half a second, memory and processes, each with the limit that the kernel has for it.
    """
    with reach() as node:
        before = {each["instance"]: each["cpu"] or 0 for each in node.stats()}
        started = time.monotonic()
        time.sleep(INTERVAL if before else 0)
        found = node.stats()
        passed = max(time.monotonic() - started, 0.001)
    rows = []
    for each in found:
        used = (each["cpu"] or 0) - before.get(each["instance"], each["cpu"] or 0)
        rows.append(Answer({**each, "cpu_percent": 100 * used / passed}))  # the share of one core
    render.listing(rows, STATS, json=json_, empty="nothing runs")


STATS = {
    "CONTAINER": lambda row: row["target"],
    "CPU / LIMIT": lambda row: f"{row['cpu_percent']:.1f}% / {limit(row, 'cpus', lambda cpus: f'{cpus:.4g} CPUs')}",
    "MEMORY / LIMIT": lambda row: f"{render.size(row['memory'])} / {limit(row, 'memory', render.size)}",
    "PROCESSES / LIMIT": lambda row: f"{row['pids']} / {limit(row, 'pids', str)}",
}


def limit(row: Json, name: str, text: Callable[[Any], str]) -> str:
    """A limit as the kernel has it, and what was asked for if that differs."""
    limits = row["limits"]
    now, asked = ("-" if each[name] is None else text(each[name]) for each in (limits["observed"], limits["asked"]))
    return now if now == asked else f"{now} (asked {asked})"


@command("commit")
@options.changes
@click.option("-m", "--message", default="", metavar="TEXT", help="A comment for the image's history.")
@click.option("-a", "--author", default="", metavar="NAME", help="The author of the image.")
@options.pause
@options.target
@click.argument("name", metavar="NAME[:TAG]")
def commit(target: str, name: str, changes: tuple[str, ...], message: str, author: str, pause: bool) -> None:
    """Make an image of a container's file system.

    Volumes and mounts are not included. To run the image, commit a state file that names it.
    """
    with reach() as node:
        known = resolve(node.status(), target)
        made = node.commit(known, name, changes=changes, message=message, author=author, pause=pause)
    render.echo(f"{made['ref']}  {made['digest']}")


@command("export")
@options.output
@options.pause
@options.target
def export(target: str, output: Path | None, pause: bool) -> None:
    """Write a container's root file system as a tar archive, without volumes and mounts."""
    with reach() as node:
        known = resolve(node.status(), target)
        written(output, lambda out: node.export(known, out, pause))
