"""The JSON Schema of recipes: the fields, the known methods, and each method's parameters."""

from __future__ import annotations

from typing import Any

from weft.recipe.schema import Recipe
from weft.registry import index

_TYPES = {"bool": "boolean", "str": "string", "int": "integer"}


def recipe_schema() -> dict[str, Any]:
    """For editors: completion and checks while a recipe is written."""
    schema = Recipe.model_json_schema()
    rows = index()
    step = schema["$defs"]["Step"]
    step["properties"]["method"]["enum"] = [r["name"] for r in rows]
    step["allOf"] = [
        {
            "if": {"properties": {"method": {"const": row["name"]}}, "required": ["method"]},
            "then": {"properties": {"parameters": {"properties": _parameters(row), "additionalProperties": False}}},
        }
        for row in rows
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "weft recipe", **schema}


def _parameters(row: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for parameter in row["parameters"]:
        scalar: dict[str, Any] = {"type": _TYPES.get(parameter["type"], "number")}
        if "choices" in parameter:
            scalar = {"enum": parameter["choices"]}
        for bound in ("minimum", "maximum"):
            if bound in parameter:
                scalar[bound] = parameter[bound]
        value = {
            "description": parameter.get("help", ""),
            "anyOf": [scalar, {"type": "array", "items": {"anyOf": [scalar, {"$ref": "#/$defs/Conditional"}]}}],
        }
        for key in {parameter["key"], parameter.get("per_model") or parameter["key"]}:
            found[key] = value
    return found
