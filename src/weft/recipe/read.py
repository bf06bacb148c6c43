"""Read a recipe from YAML, JSON or Python data; mergekit's files are recognised and translated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from weft.errors import RecipeError, did_you_mean
from weft.recipe.schema import Recipe

_MAX_BYTES = 4_000_000
_MAX_NODES = 200_000


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML that counts what aliases expand to: a few lines can otherwise stand for billions of nodes."""


def read_recipe(source: str | Path | Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a file or of Python data, and the data as written.

    Raises:
        RecipeError: not readable, not a recipe, or with a wrong field; the message names the field and the nearest.
    """
    documents = _documents(source)
    if any("merge_method" in d for d in documents):
        from weft.recipe.mergekit import translate

        return translate(documents), documents[0] if len(documents) == 1 else {"documents": documents}
    if len(documents) != 1:
        raise RecipeError(f"A recipe is one YAML document with steps, found {len(documents)} documents.")
    return validate(documents[0]), documents[0]


def validate(data: Mapping[str, Any]) -> Recipe:
    """A checked recipe from plain data."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """pydantic's findings in one line each, with the nearest field name for a typo."""
    lines = []
    for finding in error.errors():
        where = ".".join(str(p) for p in finding["loc"] if not (isinstance(p, str) and p[:1].isupper()))
        if finding["type"] == "extra_forbidden":
            known = _fields_at(finding["loc"][:-1])
            lines.append(f"{where}: there is no such field.{did_you_mean(str(finding['loc'][-1]), known)}")
        else:
            lines.append(f"{where or 'recipe'}: {finding['msg'].removeprefix('Value error, ')}")
    unique = list(dict.fromkeys(lines))
    return "The recipe is not valid:\n  " + "\n  ".join(unique[:8])


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model at a place in the recipe."""
    from weft.recipe import schema

    models: dict[str, type[BaseModel]] = {
        "steps": schema.Step, "models": schema.Source, "slices": schema.Slice, "sources": schema.LayerSource,
        "modules": schema.Module, "output": schema.Output, "tokenizer": schema.Tokenizer, "tokens": schema.TokenSource,
    }  # fmt: skip
    names = [p for p in location if isinstance(p, str) and p in models]
    return list(models[names[-1]].model_fields) if names else list(Recipe.model_fields)


def _documents(source: str | Path | Mapping[str, Any]) -> list[dict[str, Any]]:
    if isinstance(source, Mapping):
        return [dict(source)]
    path = Path(source)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than {_MAX_BYTES:,} bytes, which no recipe is.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file.") from None
    return [_checked(d, path) for d in _parse(text, path)]


def _parse(text: str, path: Path) -> list[Any]:
    if path.suffix == ".json":
        try:
            return [json.loads(text)]
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: not valid JSON ({error}).") from None
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
        for node in nodes:
            _count(node)
        return [d for d in yaml.load_all(text, Loader=_Loader) if d is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise RecipeError(f"{path}: not a plain YAML file ({reason[:300]}).") from None


def _count(root: yaml.Node | None) -> None:
    """Raise if the document, with its aliases expanded, has too many nodes."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > 100:
            raise ValueError("nested deeper than 100 levels")
        if id(node) not in sizes:
            sizes[id(node)] = 1  # a node inside itself would never end
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                children = [n for pair in node.value for n in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = 1 + sum(size(c, depth + 1) for c in children)
            if sizes[id(node)] > _MAX_NODES:
                raise ValueError(f"its aliases expand to more than {_MAX_NODES:,} values")
        return sizes[id(node)]

    if root is not None:
        size(root, 0)


def _checked(document: Any, path: Path) -> dict[str, Any]:
    if not isinstance(document, dict) or not all(isinstance(k, str) for k in document):
        raise RecipeError(f"{path}: a recipe is a mapping with the field steps (or a mergekit file with merge_method).")
    return document
