"""The state language's tables → their JSON Schema, for editors and for `holdfast schema`."""

from __future__ import annotations

from typing import Any

from holdfast.spec.authored import StateFile


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a state file as it is written, short forms included."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **StateFile.model_json_schema(by_alias=True),
        "title": "holdfast state file",
    }
