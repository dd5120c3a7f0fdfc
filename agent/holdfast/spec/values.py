"""How values of state files are written that several keys share: names, paths, commands, permissions and the like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import WithJsonSchema

from holdfast.grammar import capabilities, names, network
from holdfast.keys import Checked, Items, Short, Size, Text, text_of, within
from holdfast.spec import forms

STRING = {"type": "string"}
STRINGS = {"type": "array", "items": STRING}

AppNetwork = Literal["default", "bridge"]
Pull = Literal["missing", "always", "newer", "never"]

Name = Annotated[str, Checked(names.name, {"title": "name", "pattern": f"^{names.NAME.pattern}$"})]
Reference = Annotated[str, Checked(names.reference, {"description": "a name, or app/name for another app's"})]
Words = Annotated[Items[str], Short(forms.words, ({**STRING, "description": "split as a shell would, run by none"},))]
Pairs = Annotated[
    dict[Annotated[str, Checked(names.variable, {})], Text],
    Short(forms.pairs, ({**STRINGS, "description": "NAME=VALUE"},)),
]
Absolute = Annotated[str, Checked(names.absolute, {"title": "absolute path"})]
Mode = Annotated[
    int,
    Short(forms.mode, (), show=lambda value: f"{value:04o}"),
    WithJsonSchema({**STRING, "title": "octal text", "examples": ["0644"]}),
]
OnChange = Annotated[
    str, Checked(forms.on_change, {"description": "restart, none, or a signal as SIGHUP", "examples": ["restart"]})
]
Capability = Annotated[str, Checked(capabilities.canonical, {"examples": ["NET_BIND_SERVICE", "ALL"]})]
Address = Annotated[str, Checked(network.address, {"title": "IPv4 address", "examples": ["10.90.1.2"]})]
Memory = Annotated[Size, within(0)]
Id = Annotated[int, within(0, names.LARGEST_ID)]
NameOrNumber = Annotated[str, Short(text_of, ({"type": "integer"},))]
