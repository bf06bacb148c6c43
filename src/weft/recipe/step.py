"""What one step of a recipe does to each tensor: merged, copied or dropped, with which configuration."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES, DType
from weft.checkpoint.open import natural_key
from weft.engine.chunks import Inputs
from weft.engine.merging import Merge, MergeMethod, Stage
from weft.engine.plan import LedgerRow
from weft.errors import MissingTensorError, RecipeError, ShapeError, did_you_mean
from weft.kernels.convert import OUTPUT_DTYPES
from weft.method import Parameter
from weft.recipe.embeddings import Embeddings
from weft.recipe.layers import LayerMap, depth_of, find_layers, find_stacks
from weft.recipe.modules import module_of, resize_layers
from weft.recipe.opened import Opened
from weft.recipe.schema import Parameters, Recipe, Slice, Source, Step, Tokenizer, evaluate, step_models

# tensors outside the layers that follow them; in a stack of slices they come from the last one
_AFTER_LAYERS = ("lm_head", "norm", "ln_f", "head", "classifier", "score", "embed_out", "pooler", "output")


@dataclass
class Entry:
    """One tensor of a step's result."""

    source: Merge | LazyTensor
    dtype: DType
    rule: str


class StepBuilder:
    """Builds the entries of one step."""

    def __init__(
        self,
        step: Step,
        method: MergeMethod,
        stage: Stage,
        recipe: Recipe,
        opened: Opened,
        ledger: list[LedgerRow],
        notes: list[str],
        label: str,
        tokenizer: Tokenizer | None,
    ):
        self.step, self.method, self.stage, self.recipe, self.opened = step, method, stage, recipe, opened
        self.ledger, self.notes, self.label = ledger, notes, label
        self.entries: dict[str, Entry] = {}
        self.parts = step.parts
        self.part_name, self.part = next(iter(self.parts.items()))
        cut = self.part.slices[0] if self.part.slices else None
        first = (cut.base or cut.sources[0].model) if cut else self.part.models[0].model
        self.reference_name = step.like or step.base or first
        self.reference = opened.get(self.reference_name)
        self.config = dict(self.reference.config)
        self.noted: set[str] = set()
        self.layers = find_layers(self.reference.tensors, self.reference.config)
        self.kinds = {self._kind(name) for name in self.reference.tensors}
        self.embeddings = Embeddings(step, tokenizer, self.reference_name, opened)

    def build(self) -> dict[str, Entry]:
        """All entries of the step."""
        begun = len(self.ledger)
        for name, part in self.parts.items():
            self.part_name, self.part = name, part
            if part.slices:
                self.from_slices()
            else:
                self.from_models()
        if self.step.modules:
            self._outside_modules()
        covered = {(row.model, row.tensor) for row in self.ledger[begun:]}
        for model in map(self.opened.get, step_models(self.step)):
            for name in model.tensors:
                if (model.name, name) not in covered:
                    self.ledger.append(LedgerRow(model.name, name, "dropped: in no slice or module", ""))
        return self.entries

    def owns(self, name: str) -> bool:
        """Whether a tensor belongs to the part at hand."""
        return module_of(name, self.parts) == self.part_name

    @property
    def scopes(self) -> tuple[Parameters, ...]:
        """Parameters of the part at hand and of the step."""
        return (self.part.parameters, self.step.parameters)

    # one output tensor for each name that any model has

    def from_models(self) -> None:
        """All models in full."""
        step, listed = self.step, self.part.models
        self.method.check_models(len(listed), step.base is not None)
        models = [(s, self.opened.get(s.model)) for s in listed]
        base = self.opened.get(step.base) if step.base else None
        stacks = find_stacks(self.reference.tensors)
        every = [*([base] if base else []), *(c for _, c in models)]
        for name in filter(self.owns, _ordered_union(every[0], every)):
            where = [(s, c, name) for s, c in models]
            self._one(name, where, (base, name) if base else None, self.scopes, depth_of(name, stacks))

    def from_slices(self) -> None:
        """Runs of layers, stacked in the order given."""
        slices = self.part.slices
        names = {s.model for cut in slices for s in cut.sources} | {b for b in map(self._slice_base, slices) if b}
        maps = {m: self._layers_of(m) for m in sorted(names)}
        for cut in slices:
            self.method.check_models(len(cut.sources), self._slice_base(cut) is not None)
        out_map = maps[slices[0].sources[0].model]
        self._outside_layers(slices[0], maps, after=False)
        total, origin = 0, []
        for cut in slices:
            length = cut.sources[0].layers[1] - cut.sources[0].layers[0]
            for offset in range(length):
                self._layer(cut, offset, offset / (length - 1) if length > 1 else 1.0, total, maps, out_map)
                origin.append(cut.sources[0].layers[0] + offset)
                total += 1
        self._outside_layers(slices[-1], maps, after=True)
        self.config = resize_layers(self.config, out_map.count, origin, self.part_name)

    def _layers_of(self, model: str) -> LayerMap:
        checkpoint = self.opened.get(model)
        found = find_layers(filter(self.owns, checkpoint.tensors), checkpoint.config)
        if found.count == 0:
            raise RecipeError(f"{model}: its tensor names show no numbered layers, so it cannot be sliced.")
        return found

    def _outside_modules(self) -> None:
        """Tensors that no module claims are copied."""
        for name, tensor in self.reference.tensors.items():
            if module_of(name, self.step.modules) is None:
                self._note(f"Tensors in none of the modules are copied from {self.reference.name}.", "module")
                self._copy(name, tensor, [(Source(model=""), self.reference, name)], None, "copied: in no module")

    def _slice_base(self, part: Slice) -> str | None:
        return part.base or self.step.base

    def _outside_layers(self, part: Slice, maps: dict[str, LayerMap], *, after: bool) -> None:
        sources = [(s, self.opened.get(s.model)) for s in part.sources]
        base = self._slice_base(part)
        opened_base = self.opened.get(base) if base else None
        every = [*([opened_base] if opened_base else []), *(c for _, c in sources)]
        every_map = [*([maps[base]] if base else []), *(maps[s.model] for s, _ in sources)]
        for name in _ordered_union(every[0], every):
            if any(m.split(name) for m in every_map) or not self.owns(name):
                continue
            if any(key in name for key in _AFTER_LAYERS) == after:
                where = [(s, c, name) for s, c in sources]
                scopes = (part.parameters, *self.scopes)
                self._one(name, where, (opened_base, name) if opened_base else None, scopes, 0.0)

    def _layer(
        self, part: Slice, offset: int, depth: float, number: int, maps: dict[str, LayerMap], out_map: LayerMap
    ) -> None:
        def rests(model: str, layer: int) -> dict[str, str]:
            found = {n: maps[model].split(n) for n in self.opened.get(model).tensors}
            return {rest: n for n, at in found.items() if at and at[0] == layer for rest in (at[1],)}

        for source in part.sources:
            if source.layers[1] > maps[source.model].count:
                raise RecipeError(
                    f"{source.model} has {maps[source.model].count} layers; the slice asks for {list(source.layers)}."
                )
        by_source = [rests(s.model, s.layers[0] + offset) for s in part.sources]
        base = self._slice_base(part)
        base_layers = part.base_layers or part.sources[0].layers
        if base and base_layers[1] > maps[base].count:
            raise RecipeError(f"{base} has {maps[base].count} layers; the slice asks for {list(base_layers)}.")
        base_rests = rests(base, base_layers[0] + offset) if base else {}
        order = dict.fromkeys([*base_rests, *(r for found in by_source for r in found)])
        for rest in order:
            where = [
                (s, self.opened.get(s.model), found.get(rest, f"(layer tensor {rest})"))
                for s, found in zip(part.sources, by_source)
            ]
            base_pair = (self.opened.get(base), base_rests.get(rest, "")) if base else None
            self._one(out_map.name(number, rest), where, base_pair, (part.parameters, *self.scopes), depth)

    # one output tensor

    def _one(
        self,
        name: str,
        where: Sequence[tuple[Source, Checkpoint, str]],
        base: tuple[Checkpoint, str] | None,
        scopes: tuple[Parameters, ...],
        depth: float,
    ) -> None:
        tensors = [_find(c, n) for _, c, n in where]
        base_tensor = _find(*base) if base else None
        models = [(c, t) for (_, c, _), t in zip(where, tensors)]
        tensors, base_tensor = self.embeddings.adjust(name, models, (base[0], base_tensor) if base else None)
        labels = [c.name for _, c, _ in where]
        first = next((t for t in [base_tensor, *tensors] if t is not None), None)
        if first is None:
            return None
        owners = [labels[i] for i, t in enumerate(tensors) if t is not None]
        if self._dropped_alias(name, where, base):
            return None
        if not first.dtype.floating:
            return self._copy(name, first, where, base, "copied: not floating point")
        if not self._selected(name):
            return self._copy(name, first, where, base, "copied: not selected")
        have = [i for i, t in enumerate(tensors) if t is not None]
        in_reference = (base_tensor is not None) if base else (tensors[0] is not None)
        expected = in_reference or len(have) > 1 or self._kind(name) in self.kinds
        if len(have) < len(tensors) or (base is not None and base_tensor is None):
            if not expected:
                self._note(f"Only {' and '.join(owners)} has {name}: copied.", "only in")
                return self._copy(name, first, where, base, f"copied: only in {owners[0]}")
            lacking = [c for c, t in zip([c for _, c, _ in where], tensors) if t is None]
            if base is not None and base_tensor is None:
                lacking.append(base[0])
            if self.step.missing == "error":
                hint = did_you_mean(name, lacking[0].tensors)
                raise MissingTensorError(
                    f"{lacking[0].name} has no tensor {name!r}, which other models have.{hint if 'Did' in hint else ''} "
                    'Check that the models share an architecture, or choose what happens: missing="skip" or missing="copy".'
                )
            without_base = base is not None and base_tensor is None
            if self.step.missing == "copy" or without_base or len(have) < self.method.models[0]:
                return self._copy(name, first, where, base, "copied: missing in " + ", ".join(c.name for c in lacking))
            where, tensors = [where[i] for i in have], [tensors[i] for i in have]
        present = [t for t in tensors if t is not None]
        if {t.shape for t in present} | {first.shape} != {first.shape}:
            if self.step.mismatch == "copy":
                return self._copy(name, first, where, base, "copied: shapes differ")
            odd = next(i for i, t in enumerate(present) if t.shape != first.shape)
            raise ShapeError(
                f"{name}: {where[odd][1].name} has shape {list(present[odd].shape)}, "
                f"{self.reference.name} has {list(first.shape)}. The models differ in architecture or vocabulary: "
                'choose a tokenizer source, or mismatch="copy" to keep the first model\'s tensor.'
            )
        config = self._configure(name, where, scopes, depth)
        inputs = Inputs(
            name=name,
            tensors=present,
            base=base_tensor if self.method.base != "none" else None,
            deltas=self.method.deltas,
            granularity=self.method.granularity,
            index=len(self.entries),
            seed=self.recipe.seed,
            purpose=self.method.name,
            allow_non_finite=self.recipe.allow_non_finite,
            labels=[*(c.name for _, c, _ in where), base[0].name if base else ""],
        )
        self.entries[name] = Entry(Merge(self.stage, config, inputs), self._out_dtype(first), self.method.name)
        self._record(name, self.method.name, where, base)
        return None

    def _kind(self, name: str) -> str:
        """The name without its layer's number: a tensor that other layers of the reference have is no stranger."""
        found = self.layers.split(name)
        return found[1] if found else name

    def _selected(self, name: str) -> bool:
        def matches(patterns: Iterable[str]) -> bool:
            return any(fnmatch.fnmatchcase(name, p) for p in patterns)

        return (not self.step.include or matches(self.step.include)) and not matches(self.step.exclude)

    def _out_dtype(self, tensor: LazyTensor) -> DType:
        natural = tensor.natural_dtype
        if natural.name in OUTPUT_DTYPES:
            return natural
        self._note(f"{natural.name} weights are written as bfloat16 after merging.", "dtype")
        return DTYPES["BF16"]

    def _dropped_alias(
        self, name: str, where: Sequence[tuple[Source, Checkpoint, str]], base: tuple[Checkpoint, str] | None
    ) -> bool:
        """Whether the tensor is a tied copy that the model's config restores by itself when it is loaded."""
        first, first_name = base if base else (where[0][1], where[0][2])
        if first_name in first.aliases and self.config.get("tie_word_embeddings"):
            self._record(name, f"dropped: tied to {first.aliases[first_name]}", where, base, output="")
            return True
        return False

    def _copy(
        self,
        name: str,
        tensor: LazyTensor,
        where: Sequence[tuple[Source, Checkpoint, str]],
        base: tuple[Checkpoint, str] | None,
        rule: str,
    ) -> None:
        self.entries[name] = Entry(tensor, tensor.natural_dtype, rule)
        self._record(name, rule, where, base)

    def _record(
        self,
        name: str,
        rule: str,
        where: Sequence[tuple[Source, Checkpoint, str]],
        base: tuple[Checkpoint, str] | None,
        output: str | None = None,
    ) -> None:
        named = [(c, n) for _, c, n in where] + ([base] if base else [])
        for checkpoint, tensor in {(c.name, n): (c, n) for c, n in named}.values():
            if tensor in checkpoint.tensors:
                self.ledger.append(LedgerRow(checkpoint.name, tensor, rule, name if output is None else output))

    def _note(self, text: str, kind: str) -> None:
        """Each kind of note once: a model has hundreds of tensors."""
        if kind not in self.noted:
            self.noted.add(kind)
            self.notes.append(text)

    # parameters

    def _configure(
        self, name: str, where: Sequence[tuple[Source, Checkpoint, str]], scopes: tuple[Parameters, ...], depth: float
    ) -> Any:
        values: dict[str, Any] = {}
        for key, row in self.method.parameters.items():
            if row.per_model:
                found = self._per_model(row, name, where, scopes, depth)
            else:
                found = _lookup(key, name, scopes, depth)
            if found is not None:
                values[key] = found
        return self.method.configure(values)

    def _per_model(
        self,
        row: Parameter,
        name: str,
        where: Sequence[tuple[Source, Checkpoint, str]],
        scopes: tuple[Parameters, ...],
        depth: float,
    ) -> tuple[float, ...] | None:
        if row.key != row.per_model:
            for scope in scopes:
                listed = scope.get(row.key)
                if listed is not None:
                    return self._listed(row, listed, where)
        found = [_lookup(row.per_model, n, (s.parameters, *scopes), depth) for s, _, n in where]
        if all(v is None for v in found):
            return None
        default = row.default if isinstance(row.default, int | float) else None
        result = [v for v in (default if f is None else f for f in found) if v is not None]
        if len(result) < len(found):
            raise RecipeError(f"{self.label}: {row.per_model!r} is given for some models only; give it for all.")
        return tuple(result)

    def _listed(
        self, row: Parameter, listed: Any, where: Sequence[tuple[Source, Checkpoint, str]]
    ) -> tuple[float, ...]:
        named = [s.model for s in self.part.models] or [s.model for s, _, _ in where]
        if isinstance(listed, int | float):
            return (listed,) * len(where)
        if not isinstance(listed, list) or len(listed) != len(named):
            count = len(listed) if isinstance(listed, list) else 1
            raise RecipeError(
                f"{self.label}: {row.key!r} has {count} values for {len(named)} models; give one for each, in their order."
            )
        chosen = [i for i, s in enumerate(self.part.models) if any(s is w for w, _, _ in where)] or range(len(where))
        return tuple(listed[i] for i in chosen)


def _lookup(key: str, name: str, scopes: Iterable[Parameters], depth: float) -> Any:
    for scope in scopes:
        if key in scope:
            value = evaluate(scope[key], name, depth)
            if value is not None:
                return value
    return None


def _find(checkpoint: Checkpoint, name: str) -> LazyTensor | None:
    """A tensor by name; an output head that is tied to the embedding is found there."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None and name == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
        tensor = next((t for n, t in checkpoint.tensors.items() if n.endswith("embed_tokens.weight")), None)
    return tensor


def _ordered_union(reference: Checkpoint, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """All names, layer by layer."""
    extra = {n for c in checkpoints for n in c.tensors} - set(reference.tensors)
    return sorted([*reference.tensors, *extra], key=natural_key) if extra else list(reference.tensors)


def check_parameter_names(step: Step, method: MergeMethod, label: str) -> None:
    """Raise ``RecipeError`` for a parameter that the method does not have, or not for single models."""
    shared = {p.key for p in method.parameters.values()} | {
        p.per_model for p in method.parameters.values() if p.per_model
    }
    own = {p.per_model for p in method.parameters.values() if p.per_model}
    parts = list(step.parts.values())
    cuts = [cut for part in parts for cut in part.slices]
    for scope in [step.parameters, *(p.parameters for p in parts), *(cut.parameters for cut in cuts)]:
        for key in scope:
            if key not in shared:
                raise RecipeError(f"{label}: {method.name} has no parameter {key!r}.{did_you_mean(key, shared)}")
    for source in [*(s for part in parts for s in part.models), *(s for cut in cuts for s in cut.sources)]:
        for key in source.parameters:
            if key not in own:
                reason = "is not given model by model; set it for the step" if key in shared else "does not exist"
                hint = "" if key in shared else did_you_mean(key, own)
                raise RecipeError(f"{label}: {source.model}: the parameter {key!r} of {method.name} {reason}.{hint}")
