"""The state language: files of a revision → Spec. Pure: no clock, no disk, no kernel.

`load` is the way in; `model` holds the nouns that it makes. The modules, in reading order: `model` (with `parts` and
`resources`), `load`, `authored` (the keys that become something else), `values` and `forms` (how values are written),
`interpolate`, `resolve`, `policy`, `links`, `builds` (with `dockerfile` and `dockerignore`), `schema`.
"""

from holdfast.spec.load import Cache, load
from holdfast.spec.model import App, Container, NodeFacts, Problem, Spec
from holdfast.spec.schema import json_schema

__all__ = ["App", "Cache", "Container", "NodeFacts", "Problem", "Spec", "json_schema", "load"]
