"""Values with `${…}` in them → values without: node.name, node.labels.X, vars.X, env.X, and `$$` for a dollar.

Keys are left alone, and so is a `$` before anything but `{` and `$`. Called by `load`, before the tables are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from holdfast.spec.model import NodeFacts
from holdfast.tables import Fault
from holdfast.toml import KeyPath
from holdfast.words import suggestion

_MARK = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<inner>[^}]*)\})")


def interpolated(value: Any, facts: NodeFacts, faults: list[Fault], path: KeyPath = ()) -> Any:
    """Replace every variable in a value; one without a value is noted in faults and stays as it was."""
    match value:
        case str() if "$" in value:
            return _text(value, facts, faults, path)
        case dict():
            return {key: interpolated(inner, facts, faults, (*path, key)) for key, inner in value.items()}
        case list():
            return [interpolated(inner, facts, faults, (*path, index)) for index, inner in enumerate(value)]
        case _:
            return value


def _text(text: str, facts: NodeFacts, faults: list[Fault], path: KeyPath) -> str:
    def replace(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name, marked, default = match["inner"].partition(":-")
        try:
            found = _lookup(name, facts)
            if found is None and not marked:
                raise ValueError(_missing(name, facts))
        except ValueError as error:
            faults.append(Fault(path, str(error)))
            return match[0]
        return default if found is None else found

    closed = text.rfind("}") + 1  # what follows has no closing brace: looked for at each mark, that takes for ever
    rest = text[closed:].replace("$$", "\0")
    if "${" in rest:
        faults.append(Fault(path, f"'{text}': '}}' is missing (a lone '${{' is written '$${{')"))
    return _MARK.sub(replace, text[:closed]) + rest.replace("\0", "$")


def _lookup(name: str, facts: NodeFacts) -> str | None:
    """Return the value of a variable, None if it has none. Raises ValueError for a name that can't be a variable."""
    if name == "node.name":
        return facts.name
    for prefix, values in _places(facts).items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return values.get(name.removeprefix(prefix))
    near = suggestion(name, ["node.name", *(p + key for p, values in _places(facts).items() for key in values)])
    known = near or " (expected node.name, node.labels.X, vars.X or env.X; '$${' is a literal '${')"
    raise ValueError(f"'${{{name}}}' is not a variable{known}")


def _missing(name: str, facts: NodeFacts) -> str:
    prefix = next(prefix for prefix in _places(facts) if name.startswith(prefix))
    near = suggestion(name, [prefix + key for key in _places(facts)[prefix]])
    return f"'${{{name}}}' has no value{near or _REMEDY[prefix]}"


_REMEDY = {
    "node.labels.": " (expected a label in [node] labels of agent.toml, or a default as ${node.labels.x:-default})",
    "vars.": " (expected it in vars.toml or in [vars] of agent.toml, or a default as ${vars.x:-default})",
    "env.": " (expected it in the agent's environment and in [env] allow of agent.toml, or a default)",
}


def _places(facts: NodeFacts) -> dict[str, Mapping[str, str]]:
    return {"node.labels.": facts.labels, "vars.": facts.vars, "env.": facts.env}
