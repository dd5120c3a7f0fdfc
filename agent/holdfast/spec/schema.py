"""The state language's tables → their JSON Schema, for editors and for `holdfast schema`."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from holdfast.spec.authored import StateFile


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a state file as it is written, short forms included."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **StateFile.model_json_schema(schema_generator=AsWritten),
        "title": "holdfast state file",
    }


class AsWritten(GenerateJsonSchema):
    """pydantic's schema of what is written in TOML: there is no null, and defaults are not in bytes and seconds."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        default = schema.get("default")
        return {**inner, "default": default} if isinstance(default, str | bool) else inner

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        found = super().dict_schema(schema)
        return {**found, "additionalProperties": False} if "patternProperties" in found else found

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False
