"""The fields of a recipe.

A recipe is a list of steps. A step applies one method to some models; a later step names an earlier one as ``@name``.
Parameters are numbers, or lists that change over the depth of the model, or lists of filters by tensor name, and may be
given for the step, for a slice, or for one model of it; the most specific wins.

    steps:
      - method: ties
        models:
          - {model: ft0/, parameters: {weight: 0.5}}
          - ft1/
        base: base/
        parameters: {density: [0.3, 0.7], normalize: true}
    output: {dtype: bfloat16}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_numbers(value: Any) -> Any:
    """YAML reads 1e-5 as text, because YAML 1.1 wants 1.0e-5: take such texts for the numbers they are."""
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return [_as_numbers(v) for v in value] if isinstance(value, list) else value


class Conditional(BaseModel):
    """A value for tensors whose name contains ``filter`` (all tensors without one)."""

    model_config = ConfigDict(extra="forbid")
    filter: str | None = None
    value: Annotated[bool | float | str | list[bool] | list[float] | list[str], BeforeValidator(_as_numbers)]


Setting = Annotated[
    bool | float | str | list[bool] | list[float] | list[str] | list[Conditional], BeforeValidator(_as_numbers)
]
Parameters = dict[str, Setting]


def _as_source(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _as_range(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return tuple(value)
    raise ValueError("layers must be [first, past_last]")


class Source(BaseModel):
    """One input model, with its own parameters.

    ``model`` is a folder, a file, ``base+adapter``, a Hub id ``org/name@revision`` or ``@step``.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    parameters: Parameters = Field(default_factory=dict)


SourceLike = Annotated[Source, BeforeValidator(_as_source)]


class LayerSource(Source):
    """A run of layers of one model: from the first number up to, not including, the second."""

    layers: Annotated[tuple[int, int], BeforeValidator(_as_range)]

    @model_validator(mode="after")
    def _ordered(self) -> LayerSource:
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers {list(self.layers)} of {self.model}: need 0 <= first < past_last")
        return self


class Slice(BaseModel):
    """A run of output layers, computed from equally long runs of the sources' layers."""

    model_config = ConfigDict(extra="forbid")
    sources: list[LayerSource] = Field(min_length=1)
    base: str | None = None
    base_layers: Annotated[tuple[int, int], BeforeValidator(_as_range)] | None = Field(
        None, description="the base's layers; default: those of the first source"
    )
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _equal(self) -> Slice:
        runs = [s.layers for s in self.sources] + ([self.base_layers] if self.base_layers else [])
        lengths = {last - first for first, last in runs}
        if len(lengths) > 1:
            raise ValueError(f"the sources of a slice must have equally many layers, got {sorted(lengths)}")
        return self


class Module(BaseModel):
    """One part of a model with several parts, merged in its own way."""

    model_config = ConfigDict(extra="forbid")
    models: list[SourceLike] = Field(default_factory=list)
    slices: list[Slice] = Field(default_factory=list, description="layer stacking; instead of models")
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give either models or slices")
        return self


class TokenSource(BaseModel):
    """Where one token's embedding row comes from.

    ``source`` is a model, ``{kind: model_token, model: …, token: …}`` (or ``token_id``), or ``{kind: zero}``. Models
    that have the token keep their own row unless ``force`` is set.
    """

    model_config = ConfigDict(extra="forbid")
    source: str | dict[str, Any] | None = None
    force: bool = False

    @model_validator(mode="after")
    def _known_form(self) -> TokenSource:
        if isinstance(self.source, dict):
            form = (self.source.get("kind"), *sorted(set(self.source) - {"kind"}))
            if form not in (("zero",), ("model_token", "model", "token"), ("model_token", "model", "token_id")):
                raise ValueError(
                    "give a model, {kind: model_token, model: …, token: …} (or token_id: …), or {kind: zero}; "
                    f"got {self.source}"
                )
        return self


class Tokenizer(BaseModel):
    """Which tokenizer a result gets, and what that means for the embedding rows."""

    model_config = ConfigDict(extra="forbid")
    source: str = Field("base", description="base, union, or a model")
    tokens: dict[str, TokenSource] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1)


class Step(BaseModel):
    """One method applied to some models."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field("", description="later steps refer to it as @name")
    method: str = Field(description="a method's id; `weft methods` lists them")
    models: list[SourceLike] = Field(default_factory=list)
    slices: list[Slice] = Field(default_factory=list, description="layer stacking; instead of models")
    modules: dict[str, Module] = Field(
        default_factory=dict,
        description="parts merged each in its own way (text_decoder, vision_tower, a prefix of names); instead of models",
    )
    base: str | None = Field(None, description="the common start of the models")
    like: str | None = Field(
        None, description="whose config and companion files the result gets; default: the base, else the first model"
    )
    parameters: Parameters = Field(default_factory=dict)
    missing: Literal["error", "skip", "copy"] = Field(
        "error",
        description="a tensor that some models lack: stop, merge those that have it, or copy the first model's",
    )
    mismatch: Literal["error", "copy", "crop"] = Field(
        "error",
        description="a tensor whose shape differs between models: stop, copy the first model's, "
        "or cut embeddings to the rows that all models have (to the base's, for methods with one)",
    )
    score: str = Field(
        "",
        description="for greedy_soup: a shell command that prints a score last; {} stands for the candidate's folder",
    )
    include: list[str] = Field(default_factory=list, description="globs of tensors to merge; the others are copied")
    exclude: list[str] = Field(default_factory=list, description="globs of tensors to copy instead of merging")
    tokenizer: Tokenizer | None = Field(None, description="of this step's result; for the last step see output")
    chat_template: str | None = Field(None, description="of this step's result; for the last step see output")

    @model_validator(mode="after")
    def _one_form(self) -> Step:
        if sum(map(bool, (self.models, self.slices, self.modules))) != 1:
            raise ValueError("give one of models, slices and modules")
        return self

    @property
    def parts(self) -> dict[str, Module]:
        """The step as modules: itself under an empty name if it is not divided."""
        return self.modules or {"": Module.model_construct(models=self.models, slices=self.slices, parameters={})}


class Output(BaseModel):
    """What is written."""

    model_config = ConfigDict(extra="forbid")
    dtype: str | None = Field(None, description="element type; default: each tensor keeps the type of its first model")
    shard_size: str | int = Field("5GB", description="largest shard")
    tokenizer: Tokenizer | None = None
    chat_template: str | None = Field(None, description="a template's name, or jinja text")


class Recipe(BaseModel):
    """Steps, output and seed. The result of the last step is written."""

    model_config = ConfigDict(extra="forbid")
    steps: list[Step] = Field(min_length=1)
    output: Output = Output()
    seed: int = Field(0, description="of all random numbers")
    allow_non_finite: bool = Field(False, description="let NaN and infinity through")
    notes: list[str] = Field(default_factory=list, description="remarks, shown before the run and kept in its report")

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        known: set[str] = set()
        for number, step in enumerate(self.steps, 1):
            for model in _references(step):
                if model.startswith("@") and model[1:].partition("+")[0] not in known:
                    shown = ", ".join(f"@{k}" for k in sorted(known)) or "none so far"
                    raise ValueError(f"step {number} names {model}, but the steps before it are called: {shown}")
            if step.name:
                if step.name in known:
                    raise ValueError(f"two steps are called {step.name!r}")
                known.add(step.name)
        return self


def _references(step: Step) -> list[str]:
    """Everything in a step that may name an earlier one."""
    tokenizer = [step.tokenizer.source] if step.tokenizer else []
    return [*step_models(step), *([step.like] if step.like else []), *tokenizer]


def step_models(step: Step) -> list[str]:
    """All models that a step merges, each once, in order; the bases last."""
    parts = step.parts.values()
    slices = [s for part in parts for s in part.slices]
    named = [s.model for part in parts for s in part.models] + [s.model for cut in slices for s in cut.sources]
    named += [cut.base for cut in slices if cut.base] + ([step.base] if step.base else [])
    return list(dict.fromkeys(named))


def evaluate(setting: Setting, tensor: str, depth: float) -> Any:
    """The value of a setting for one tensor; None if no filter matches.

    Args:
        setting: a value, a list over depth (numbers are interpolated, texts are picked), or filters.
        tensor: name of the tensor.
        depth: 0 for the first layer, 1 for the last.

    >>> evaluate([0.0, 1.0, 0.0], "w", 0.25), evaluate([Conditional(filter="mlp", value=3)], "a.mlp.b", 0)
    (0.5, 3.0)
    """
    if not isinstance(setting, list):
        return setting
    if all(isinstance(v, Conditional) for v in setting):
        for case in setting:
            assert isinstance(case, Conditional)
            if case.filter in (None, "*") or case.filter in tensor:
                return evaluate(case.value, tensor, depth)
        return None
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in setting):
        numbers = [float(v) for v in setting if isinstance(v, int | float)]
        position = depth * (len(numbers) - 1)
        low = int(position)
        high = min(low + 1, len(numbers) - 1)
        share = position - low
        return (1 - share) * numbers[low] + share * numbers[high]
    return setting[int(depth * (len(setting) - 1))]
