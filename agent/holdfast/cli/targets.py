"""Find the containers that a person means: `app/name`, a name that is unique, or a whole app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from holdfast.errors import HoldfastError, NotFound, WrongCall


def containers_of(status: Mapping[str, Any]) -> list[str]:
    """Every container of a status, as `app/name`."""
    return [f"{app}/{name}" for app, value in status["apps"].items() for name in value["containers"]]


def resolve(status: Mapping[str, Any], target: str) -> str:
    """The `app/name` that a target means; raises WrongCall if it means several, NotFound if it means none."""
    known = containers_of(status)
    if target in known:
        return target
    meant = [each for each in known if each.partition("/")[2] == target]
    match meant:
        case [one]:
            return one
        case []:
            raise NotFound(f"container '{target}': no such container{nearest(target, known)}")
        case _:
            raise WrongCall(f"container '{target}': there are several ({', '.join(meant)})")


def resolve_all(status: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    """The containers that targets mean, each once: `app/name`, a name that is unique, or an app (`app` or `app/`)."""
    found: dict[str, None] = {}
    known = containers_of(status)
    for target in targets:
        app = target.removesuffix("/")
        named = [each for each in known if each.partition("/")[2] == target]
        if app in status["apps"] and not named:
            of_app = [each for each in known if each.partition("/")[0] == app]
            if not of_app:
                raise NotFound(f"app '{app}': it has no containers")
            found |= dict.fromkeys(of_app)
        else:
            found[resolve(status, target)] = None
    return list(found)


def nearest(target: str, known: list[str]) -> str:
    """A hint at what may have been meant, in parentheses."""
    import difflib

    by_name = {each if "/" in target else each.partition("/")[2]: each for each in known}
    if close := difflib.get_close_matches(target, by_name, n=1):
        return f" (did you mean '{by_name[close[0]]}'?)"
    return f" (there is {', '.join(known)})" if 0 < len(known) <= 8 else ""


def complete_target(ctx: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Complete a container for the shell: every `app/name`, and the name alone where it is unique."""
    from holdfast.cli.command import agent_client

    try:
        with ctx.scope():
            known = containers_of(agent_client().status())
    except HoldfastError:
        return []
    short = [each.partition("/")[2] for each in known]
    unique = [name for name in short if short.count(name) == 1]
    return [each for each in [*unique, *known] if each.startswith(typed)]
