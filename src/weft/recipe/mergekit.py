"""mergekit's YAML files as recipes, so that they run as they are.

What is carried over: models, slices, modules, parameters at all levels with gradients and filters, tokenizers, chat
templates, and several documents as named stages. A field or parameter that mergekit would silently ignore becomes a
note, or an error where ignoring it would change what the file seems to say.

Differences from mergekit: everything is computed in float32 and rounded once, so ``dtype`` only says what is written;
results of stages are not rounded in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import RecipeError, did_you_mean
from weft.recipe.mergekit_methods import KNOWN_PARAMETERS, PARAMETERS, find_row
from weft.recipe.read import validate
from weft.recipe.schema import Recipe

_FIELDS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
_IGNORED_FIELDS = ("random_seed", "embed_slerp", "write_readme", "int8_mask", "residual_weight")


def translate(documents: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe that a mergekit file describes.

    Args:
        documents: the file's YAML documents; several are stages, of which later ones name earlier ones.

    Raises:
        RecipeError: a field, method or parameter that does not exist, or stages that need each other.

    >>> model = {"model": "a", "parameters": {"weight": 1}}
    >>> recipe = translate([{"merge_method": "ties", "models": [model], "base_model": "b", "dtype": "float16"}])
    >>> recipe.steps[0].method, recipe.steps[0].base, recipe.output.dtype
    ('mergekit/ties', 'b', 'float16')
    """
    names = [str(d["name"]) for d in documents if d.get("name")]
    if len(names) < len(documents) - 1 or len(set(names)) < len(names):
        raise RecipeError("Every document but one needs a name of its own, so that other documents can use its result.")
    stages = [_Document(d, frozenset(names)) for d in documents]
    last = next((s for s in stages if not s.name), stages[-1])
    ordered = _in_order(stages, last)
    steps = [s.step() for s in ordered]
    output = {key: value for key in ("tokenizer", "chat_template") if (value := steps[-1].pop(key, None))}
    dtype = _dtype(last, {s.name: s for s in stages})
    notes = [note for s in ordered for note in s.notes]
    unused = [s.name for s in stages if s not in ordered]
    if unused:
        notes.append(f"Not needed for the result, so not made: {', '.join(unused)}.")
    data = {"steps": steps, "output": {**output, **({"dtype": dtype} if dtype else {})}}
    return validate({**data, "notes": list(dict.fromkeys(notes))})


class _Document:
    """One YAML document."""

    def __init__(self, data: Mapping[str, Any], stages: frozenset[str]):
        self.data, self._stages = data, stages
        self.notes: list[str] = []
        _check_fields(data, _FIELDS, "the file", self.notes, _IGNORED_FIELDS)
        if "merge_method" not in data:
            raise RecipeError(f"Document {data.get('name', '')!r} has no merge_method.")
        self.method = str(data["merge_method"])
        self.row = find_row(self.method)
        self.name = str(data.get("name") or "")
        self._takes_base = self.row.base != "none"
        self._base = self.reference(data["base_model"]) if data.get("base_model") else None
        self._given: set[str] = set()
        self._step = self._translated()

    @property
    def needs(self) -> set[str]:
        """Names of the stages that this one uses."""
        return {n for n in self._stages if any(m == f"@{n}" or m.startswith(f"@{n}+") for m in _texts(self._step))}

    def step(self) -> dict[str, Any]:
        """The step, as the recipe schema takes it."""
        return dict(self._step)

    def reference(self, value: Any) -> str:
        """A model as weft names it: ``path@revision+adapter@revision``, or ``@stage``."""
        if isinstance(value, Mapping):
            _check_fields(value, ("model", "lora", "override_architecture"), "a model reference", self.notes)
            parts = [value.get("model"), *([value["lora"]] if value.get("lora") else [])]
            value = "+".join(map(_path, parts))
        if not isinstance(value, str) or not value:
            raise RecipeError(f"A model is a path or a Hub id, got {value!r}.")
        model, plus, adapter = value.partition("+")
        path = model.partition("@")[0]
        return f"@{path}{plus}{adapter}" if path in self._stages else value

    def _translated(self) -> dict[str, Any]:
        data = self.data
        step: dict[str, Any] = {"name": self.name, "method": self.row.name, "mismatch": "crop"}
        if self._base:
            step["base" if self._takes_base else "like"] = self._base
        sections = [k for k in ("models", "slices", "modules") if data.get(k)]
        if len(sections) != 1:
            raise RecipeError(
                f"Give one of models, slices and modules; the file has {' and '.join(sections) or 'none'}."
            )
        if sections == ["modules"]:
            step["modules"] = {name: self._module(name, module) for name, module in data["modules"].items()}
        else:
            step |= self._section(data)
        step["parameters"] = self._parameters(data.get("parameters"), "the file")
        for key, value in PARAMETERS.get(self.method, {}).items():
            own = next((p for p in self.row.parameters.values() if key in (p.key, p.per_model)), None)
            if key not in step["parameters"] and own and value is not None and own.default != value:
                step["parameters"][key] = value
        if PARAMETERS.get(self.method, {}).get("weight", 0) is None and "weight" not in self._given:
            self.notes.append(f"{self.method}: no weight is given, so each model has 1; mergekit would stop here.")
        tokenizer = self._tokenizer()
        chat_template = data.get("chat_template")
        return {**step, **tokenizer, **({"chat_template": chat_template} if chat_template else {})}

    def _module(self, name: str, module: Any) -> dict[str, Any]:
        _check_fields(module, ("models", "slices", "parameters"), f"module {name}", self.notes, _IGNORED_FIELDS)
        return {**self._section(module), "parameters": self._parameters(module.get("parameters"), f"module {name}")}

    def _section(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if data.get("models"):
            return {"models": self._models(data["models"])}
        return {"slices": [self._slice(s) for s in data.get("slices") or []]}

    def _models(self, listed: Any) -> list[dict[str, Any]]:
        models = [self._source(m, ("model", "parameters"), ("layer_range",)) for m in _list(listed, "models")]
        if self._base and not self._takes_base and self._base not in [m["model"] for m in models]:
            models.append({"model": self._base})
        return self._without_base(models, self._base)

    def _slice(self, data: Any) -> dict[str, Any]:
        fields = ("sources", "base_model", "parameters")
        _check_fields(data, fields, "a slice", self.notes, _IGNORED_FIELDS)
        listed = _list(data.get("sources"), "sources")
        sources = [self._source(s, ("model", "layer_range", "parameters"), ()) for s in listed]
        own = self.reference(data["base_model"]) if data.get("base_model") else None
        base = own or self._base
        result: dict[str, Any] = {"parameters": self._parameters(data.get("parameters"), "a slice")}
        if self._takes_base:
            result["base"] = own
            result["base_layers"] = next((s["layers"] for s in sources if s["model"] == base), None)
        return {**result, "sources": self._without_base(sources, base)}

    def _without_base(self, models: list[dict[str, Any]], base: str | None) -> list[dict[str, Any]]:
        """The models beside the base; the base alone is merged with itself, which gives the base."""
        if not self._takes_base:
            return models
        return [m for m in models if m["model"] != base] or models

    def _source(self, data: Any, fields: tuple[str, ...], ignored: tuple[str, ...]) -> dict[str, Any]:
        if isinstance(data, str):
            data = {"model": data}
        _check_fields(data, fields, "a model", self.notes, ignored)
        model = self.reference(data.get("model"))
        shown = Path(model).name if Path(model).is_absolute() else model
        result = {"model": model, "parameters": self._parameters(data.get("parameters"), shown, one_model=True)}
        if "layer_range" in fields:
            result["layers"] = data.get("layer_range")
        return result

    def _parameters(self, given: Any, where: str, *, one_model: bool = False) -> dict[str, Any]:
        if given is not None and not isinstance(given, Mapping):
            raise RecipeError(f"{where}: parameters must be a mapping from names to values, got {given!r}.")
        result = {}
        effective = PARAMETERS.get(self.method)
        taken = {k for p in self.row.parameters.values() for k in (p.key, p.per_model) if k}
        alone = {p.per_model for p in self.row.parameters.values() if p.per_model}
        for key, value in (given or {}).items():
            self._given.add(key)
            if value is None:
                continue
            if key not in (taken if effective is None else effective):
                self._not_used(key, taken)
            elif key not in taken:
                if effective is None or value != effective[key]:
                    raise RecipeError(f"{where}: {self.row.name} has no {key!r}, which mergekit's {self.method} has.")
            elif one_model and key not in alone:
                self.notes.append(f"{where}: {key} counts only for all models together; here it is ignored.")
            else:
                result[key] = [value] if isinstance(value, Mapping) else value
        return result

    def _not_used(self, key: str, taken: Iterable[str]) -> None:
        if key not in KNOWN_PARAMETERS:
            raise RecipeError(f"{self.method} has no parameter {key!r}.{did_you_mean(str(key), taken)}")
        self.notes.append(f"{self.method}: the parameter {key} has no effect and is ignored.")

    def _tokenizer(self) -> dict[str, Any]:
        source, given = self.data.get("tokenizer_source"), self.data.get("tokenizer")
        if source and given:
            raise RecipeError("Give tokenizer or tokenizer_source, not both.")
        if source:
            given = {"source": source}
        if not given:
            return {}
        _check_fields(given, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", self.notes)
        tokens = {str(t): self._token(c or {}) for t, c in (given.get("tokens") or {}).items()}
        return {
            "tokenizer": {
                "source": self._tokenizer_source(given.get("source") or "union"),
                "tokens": tokens,
                "pad_to_multiple_of": given.get("pad_to_multiple_of"),
            }
        }

    def _tokenizer_source(self, value: Any) -> str:
        return value if value in ("base", "union") else self.reference(value)

    def _token(self, data: Any) -> dict[str, Any]:
        _check_fields(data, ("source", "force"), "a token", self.notes)
        source = data.get("source")
        if isinstance(source, Mapping) and "kind" in source:
            source = {k: self.reference(v) if k == "model" else v for k, v in source.items() if v is not None}
        elif source is not None:
            source = self.reference(source)
        return {"source": source, "force": bool(data.get("force", False))}


def _in_order(stages: list[_Document], last: _Document) -> list[_Document]:
    """What ``last`` needs, each stage after those that it needs itself."""
    by_name = {s.name: s for s in stages}
    ordered: list[_Document] = []

    def visit(stage: _Document, waiting: tuple[str, ...]) -> None:
        if stage.name in waiting:
            raise RecipeError(f"The stages need each other in a circle: {' -> '.join([*waiting, stage.name])}.")
        for name in sorted(stage.needs):
            if by_name[name] not in ordered:
                visit(by_name[name], (*waiting, stage.name))
        ordered.append(stage)

    visit(last, ())
    return ordered


def _dtype(document: _Document, by_name: Mapping[str, _Document]) -> str | None:
    """The type that mergekit would write; without one, that of the stage that the document starts from."""
    own = document.data.get("out_dtype") or document.data.get("dtype")
    if own:
        return str(own)
    stages = [m[1:] for m in _texts(document.step()) if m[:1] == "@" and m[1:] in by_name]
    return _dtype(by_name[stages[0]], by_name) if stages else None


def _texts(value: Any) -> list[str]:
    """All texts inside a nested value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for v in inner for text in _texts(v)]


def _path(value: Any) -> str:
    if isinstance(value, Mapping):
        revision = value.get("revision")
        return f"{value.get('path', '')}@{revision}" if revision else str(value.get("path", ""))
    return str(value or "")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{name} must be a list with at least one entry, got {value!r}.")
    return value


def _check_fields(data: Any, known: Sequence[str], where: str, notes: list[str], ignored: Sequence[str] = ()) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {data!r}.")
    for key in data:
        if key in known:
            continue
        if key in ignored:
            notes.append(f"{where}: {key} has no effect and is ignored.")
        elif key in KNOWN_PARAMETERS and "parameters" in known:
            raise RecipeError(
                f"{where}: {key!r} stands outside of parameters, where mergekit ignores it. Move it there."
            )
        else:
            raise RecipeError(f"{where}: there is no field {key!r}.{did_you_mean(str(key), known)}")
