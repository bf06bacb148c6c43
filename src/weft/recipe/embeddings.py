"""What a step does with embedding tensors before they are merged: one row for each token, in every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.errors import RecipeError
from weft.recipe.opened import Opened
from weft.recipe.rows import Entries, embedding_rows, first_rows, gather, is_vocabulary, with_vocabulary_size
from weft.recipe.schema import Step, Tokenizer, step_models
from weft.recipe.tokenizer import Alignment, Vocabulary
from weft.recipe.tokenizer_files import TokenizerFiles

Inputs = Sequence[tuple[Checkpoint, LazyTensor | None]]
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


class Embeddings:
    """Brings the embeddings of a step's models to one vocabulary, or to one length.

    Args:
        step: the step.
        spec: the tokenizer that its result gets; None: the reference's, and rows are not matched by token.
        reference: name in the recipe of the model whose config and files the result gets.
        opened: the models.

    Attributes:
        tokenizer: the result's tokenizer.
        moved: old id -> new id of the reference's tokens that changed places.
        notes: what a user should know.
        fingerprint: changes when a row comes from elsewhere.
    """

    def __init__(self, step: Step, spec: Tokenizer | None, reference: str, opened: Opened):
        self._step = step
        self._reference = opened.get(reference)
        self._models = [opened.get(m) for m in step_models(step)]
        self._rows: int | None = None
        self._alignment: Alignment | None = None
        self._notes: dict[str, str] = {}
        self.tokenizer = opened.tokenizer(reference)
        self.moved: dict[int, int] = {}
        self.fingerprint = ""
        if spec:
            before = self.tokenizer
            self._alignment = self._align(spec, reference, opened)
            self.tokenizer, ids = self._alignment.tokenizer, self._alignment.ids
            self.fingerprint = self._alignment.fingerprint
            self.moved = {i: ids[t] for t, i in before.ids.items() if ids.get(t, i) != i} if before.exists else {}

    @property
    def notes(self) -> list[str]:
        """Remarks so far."""
        return [*self._notes.values(), *(self._alignment.notes if self._alignment else [])]

    def adjust(
        self, name: str, models: Inputs, base: tuple[Checkpoint, LazyTensor | None] | None
    ) -> tuple[list[LazyTensor | None], LazyTensor | None]:
        """The tensors of the models and of the base; embeddings with rows that mean the same in all of them."""
        tensors, base_tensor = [t for _, t in models], base[1] if base else None
        found = {c.name: t for c, t in [*models, *([base] if base else [])] if t is not None}
        if self._alignment is None:
            return self._cut(name, tensors, base_tensor) if self._step.mismatch == "crop" else (tensors, base_tensor)
        if not found or not all(self._alignment.concerns(name, m, t) for m, t in found.items()):
            return tensors, base_tensor
        first = base[0].name if base else self._reference.name if self._step.like else None
        self._rows = self._alignment.rows
        result = self._alignment.align(name, found, first)
        return [result.get(c.name) for c, _ in models], result.get(base[0].name) if base else None

    def settle(self, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
        """The config of a result that holds ``tensors``: its embedding rows, its special tokens, a head of its own."""
        settled = _with_tokens(config, self.moved)
        if config and self._rows is not None:
            settled = with_vocabulary_size(settled, self._rows)
        heads = [c for c in self._models if "lm_head.weight" in c.tensors and "lm_head.weight" in tensors]
        if config.get("tie_word_embeddings") and any(not c.config.get("tie_word_embeddings") for c in heads):
            settled["tie_word_embeddings"] = False
            self._notes["head"] = "Not all models tie the output head to the embedding; the result has its own head."
        return settled

    def settle_generation(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The generation config of the result."""
        return _with_tokens(config, self.moved)

    def _align(self, spec: Tokenizer, reference: str, opened: Opened) -> Alignment:
        start = reference if spec.source in ("base", "union") else spec.source
        fallback = self.tokenizer if start == reference else opened.tokenizer(start)
        if not fallback.exists:
            raise RecipeError(
                f"{start}: the result's tokenizer is built on this model's, which has none. Name another source, or "
                "leave the tokenizer out of the recipe."
            )
        names, found = {}, {}
        for model in dict.fromkeys([reference, *step_models(self._step)]):
            checkpoint, names[model] = opened.get(model), opened.get(model).name
            files = {reference: self.tokenizer, start: fallback}.get(model) or opened.tokenizer(model)
            if not files.exists:
                self._notes[model] = f"{checkpoint.name} has no tokenizer; it is taken to have that of {fallback.name}."
                files = fallback
            found[model] = Vocabulary(checkpoint.name, files, embedding_rows(checkpoint))
        return Alignment(spec, list(found.values()), found.get(start) or _outsider(fallback), names)

    def _cut(
        self, name: str, tensors: list[LazyTensor | None], base: LazyTensor | None
    ) -> tuple[list[LazyTensor | None], LazyTensor | None]:
        """Embeddings cut to the rows that all have, or to the base's: rows that a model lacks are then the base's."""
        found = [t for t in (base, *tensors) if t is not None]
        counts = [t.shape[0] for t in found if is_vocabulary(name, t, None)]
        if len(counts) < len(found) or len(set(counts)) < 2 or len({t.shape[1:] for t in found}) > 1:
            return tensors, base
        rows = self._rows = min(counts) if base is None else counts[0]
        self._notes["rows"] = (
            f"The models have {min(counts):,} to {max(counts):,} rows of {name}: the first {rows:,} are merged, as if "
            "they were the same tokens in all models. Choose a tokenizer source to match tokens by name."
        )
        every = np.arange(rows)

        def cut(tensor: LazyTensor | None) -> LazyTensor | None:
            if tensor is None or tensor.shape[0] == rows:
                return tensor
            if tensor.shape[0] > rows:
                return first_rows(tensor, rows)
            assert base is not None
            source = (every >= tensor.shape[0]).astype(np.int64)
            return gather(tensor, [tensor, base], Entries(np.arange(rows + 1), source, every, rows))

        return [cut(t) for t in tensors], base


def _outsider(files: TokenizerFiles) -> Vocabulary:
    """The vocabulary of a model that lends its tokenizer only."""
    return Vocabulary(files.name, files, None)


def _with_tokens(config: Mapping[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    """A config whose special tokens have the ids of a new tokenizer."""
    result = {}
    for key, value in config.items():
        if key in _TOKEN_IDS:
            value = [moved.get(v, v) for v in value] if isinstance(value, list) else moved.get(value, value)
        elif isinstance(value, dict):
            value = _with_tokens(value, moved)
        result[key] = value
    return result
