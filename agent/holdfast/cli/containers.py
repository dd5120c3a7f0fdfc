"""logs, exec, stop, start, restart, release, inspect, stats, commit, export: one container at a time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.client import Answer, Client
from holdfast.cli.command import (
    client,
    command,
    complete_target,
    json_option,
    reach,
    resolve,
    resolve_all,
    target_argument,
)
from holdfast.cli.since import Moment, Seconds
from holdfast.errors import NotPermitted, TryAgain, WrongCall
from holdfast.questions import Questions

Json = Mapping[str, Any]


@command("logs")
@click.argument("targets", metavar="APP[/NAME]...", nargs=-1, required=True, shell_complete=complete_target)
@click.option("-f", "--follow", is_flag=True, help="Go on as the containers write.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="The last N lines of each container only.")
@click.option("--since", type=Moment(), help="Only what was written since then.")
@click.option("--until", type=Moment(), help="Only what was written until then.")
@click.option("-t", "--timestamps", is_flag=True, help="Say when each line was written.")
@json_option()
def logs(
    targets: tuple[str, ...],
    follow: bool,
    tail: int | None,
    since: float | None,
    until: float | None,
    timestamps: bool,
    json_: bool,
) -> None:
    """Print what containers wrote, byte for byte.

    What they wrote to stderr goes to stderr. Of several, or of a whole app, the lines are merged by time, each with
    the name of its container.
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
            several = len(known) > 1
            found = ((target if several else "", path) for target in known for path in node.logs_of(target)["paths"])
            sources = [(target, Path(path)) for target, path in found]
            lines = output(sources, Wanted(tail, since, until), threading.Event() if follow else None)
        if json_:
            show_json(lines, known)
        else:
            show(lines, timestamps=timestamps, follow=follow)


@command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Hand on standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait for its end; its output goes nowhere.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as this user of the container.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Add to its environment; may be repeated.")
@click.option("-w", "--workdir", default="", metavar="PATH", help="Run in this directory of the container.")
@target_argument()
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGUMENT]...")
def exec_(
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

    Exits with the command's own exit code; with 127 if there is no such command, 126 if it can't be run.
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
    """What is handed on of this process's environment: the terminal's kind, and what is named without a value."""
    found = {"TERM": os.environ["TERM"]} if tty and os.environ.get("TERM") else {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name:
            raise WrongCall(f"exec --env '{entry}': no name (expected KEY=VALUE, or KEY to hand on one's own)")
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return [f"{name}={value}" for name, value in found.items()]


def begin(command_line: Sequence[str]) -> None:
    """Have the runtime start a command, and come back."""
    import subprocess

    quiet = subprocess.DEVNULL
    done = subprocess.run(command_line, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    if done.returncode:
        raise TryAgain(f"exec --detach: the runtime exits with {done.returncode} (without --detach it says why)")


def holding(ask: Callable[[Questions, str], None], reached: Callable[[Json, frozenset[str]], bool]) -> click.Command:
    """A command that asks the agent for something by hand and waits until that is so."""
    verb = ask.__name__

    @command(verb, help=ask.__doc__)
    @target_argument()
    @click.option("--timeout", type=Seconds(), default=60.0, show_default="60s", help="How long to wait at most.")
    @click.option("--no-wait", is_flag=True, help="Only ask.")
    def act(target: str, timeout: float, no_wait: bool) -> None:
        agent = client()
        status = agent.status()
        known = resolve(status, target)
        before = running(container(status, known))
        ask(agent, known)
        if not no_wait:
            wait(agent, known, verb, timeout, lambda now: reached(now, before))

    return act


def container(status: Json, target: str) -> Json:
    app, _, name = target.partition("/")
    found: Json = status["apps"].get(app, {}).get("containers", {}).get(name, {})
    return found


def running(container: Json) -> frozenset[str]:
    """The processes of a container: instance and start time, so that one that was started anew is another."""
    live = (each for each in container.get("instances", ()) if each["state"] == "running")
    return frozenset(f"{each['id']} {each['started_at']}" for each in live)


def wait(agent: Client, target: str, verb: str, timeout: float, reached: Callable[[Json], bool]) -> None:
    deadline = time.monotonic() + timeout
    for _ in agent.events(limit=1, follow=True, beat=0.1):
        now = container(agent.status(), target)
        if reached(now):
            return
        if now.get("state") == "failed" or time.monotonic() >= deadline:
            told = f": {now['reason']}" if now.get("reason") else ""
            raise TryAgain(f"{verb} '{target}': it is {now.get('state', 'gone')} after {render.span(timeout)}{told}")


stop = holding(Questions.stop, lambda now, _: not running(now))
start = holding(Questions.start, lambda now, _: bool(running(now)))
restart = holding(Questions.restart, lambda now, before: bool(running(now) - before))
release = holding(Questions.release, lambda now, _: not now["held"])


@command("inspect")
@target_argument()
@json_option()
def inspect(target: str, json_: bool) -> None:
    """Print everything that is known of a container.

    What is wanted, what runs, and what was made for it.
    """
    with reach() as node:
        found = node.inspect(resolve(node.status(), target))
    if json_:
        render.as_json(found)
        return
    for line in render.pairs(found):
        render.echo(line)


@command("stats")
@json_option()
def stats(json_: bool) -> None:
    """Show what each running container uses.

    CPU over half a second, memory and processes, each with the limit that the kernel has for it.
    """
    with reach() as node:
        before = {each["instance"]: each for each in node.stats()}
        started = time.monotonic()
        time.sleep(0.5 if before else 0)
        found = list(node.stats())
        passed = max(time.monotonic() - started, 0.001)
    rows = list(usage(before, found, passed))
    if json_:
        render.as_json(rows)
    elif not rows:
        render.echo("nothing runs")
    else:
        render.table(
            ["CONTAINER", "CPU / LIMIT", "MEMORY / LIMIT", "PROCESSES / LIMIT"],
            [
                [
                    row["target"],
                    f"{row['cpu_percent']:.1f}% / {limit(row, 'cpus', lambda cpus: f'{cpus:.4g} CPUs')}",
                    f"{render.size(row['memory'])} / {limit(row, 'memory', render.size)}",
                    f"{row['pids']} / {limit(row, 'pids', str)}",
                ]
                for row in rows
            ],
        )


def limit(row: Json, name: str, text: Callable[[Any], str]) -> str:
    """A limit as the kernel has it, beside what was asked for where that reads otherwise."""
    limits = row["limits"]
    now, asked = ("-" if each[name] is None else text(each[name]) for each in (limits["observed"], limits["asked"]))
    return now if now == asked else f"{now} (asked {asked})"


@command("commit")
@click.option(
    "-c", "--change", "changes", multiple=True, metavar="'CMD [\"sh\"]'", help="Set CMD, ENV …; may repeat."
)
@click.option("-m", "--message", default="", metavar="TEXT", help="What the image's history says of it.")
@click.option("-a", "--author", default="", metavar="NAME", help="Who made it.")
@click.option("--pause/--no-pause", default=True, show_default=True, help="Whether processes stand still meanwhile.")
@target_argument()
@click.argument("name", metavar="NAME[:TAG]")
def commit(target: str, name: str, changes: tuple[str, ...], message: str, author: str, pause: bool) -> None:
    """Make an image of what a container has become.

    Without what lies in its volumes and mounts. Containers that are to run it need a commit of their own.
    """
    with reach() as node:
        known = resolve(node.status(), target)
        made = node.commit(known, name, changes=changes, message=message, author=author, pause=pause)
    render.echo(f"{made['ref']}  {made['digest']}")


@command("export")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Where to.")
@click.option("--pause/--no-pause", default=True, show_default=True, help="Whether processes stand still meanwhile.")
@target_argument()
def export(target: str, output: Path | None, pause: bool) -> None:
    """Write a container's root file system as a tar archive.

    To standard output, unless a file is named; without what lies in volumes and mounts.
    """
    from holdfast.cli.images import written

    with reach() as node:
        known = resolve(node.status(), target)
        written(output, lambda out: node.export(known, out, pause))


def usage(before: Mapping[str, Json], found: list[Json], passed: float) -> Iterator[dict[str, Any]]:
    """The later reading, with the share of one core that was used since the earlier one."""
    for each in found:
        earlier = before.get(each["instance"], each)
        percent = 100 * ((each["cpu"] or 0) - (earlier["cpu"] or 0)) / passed
        yield Answer({**each, "cpu_percent": percent})


COMMANDS = [logs, exec_, stop, start, restart, release, inspect, stats, commit, export]
