"""Which tokenizer a result gets, and which embedding row each of its tokens gets from each model.

Models are brought to one vocabulary before they are merged. A model that has a token keeps its own row. One that lacks
it gets the base's row, or the row of the only model that has it, or the mean of those that have it, in this order;
a token that no model has gets zeros. Rows beyond the tokens (padding) are kept and treated in the same way, by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import LazyTensor
from weft.errors import RecipeError, ShapeError, did_you_mean
from weft.recipe.rows import Entries, gather, is_vocabulary
from weft.recipe.schema import Tokenizer
from weft.recipe.tokenizer_files import TokenizerFiles, added_token


@dataclass
class Vocabulary:
    """A model's tokenizer and the number of its embedding rows (None if it is not among the models that are merged)."""

    name: str
    files: TokenizerFiles
    rows: int | None

    @cached_property
    def ids(self) -> dict[str, int]:
        """Tokens that have a row."""
        return {t: i for t, i in self.files.ids.items() if self.rows is None or i < self.rows}


class Alignment:
    """One vocabulary for several models.

    Args:
        spec: what the recipe asks for.
        models: all models of the step, in order.
        start: the model whose tokenizer the result's is built on.
        names: the model that each name in the recipe stands for.

    Attributes:
        tokenizer: the result's tokenizer.
        rows: the result's embedding rows.
        notes: what a user should know.
        fingerprint: changes when a row comes from elsewhere.
    """

    def __init__(self, spec: Tokenizer, models: Sequence[Vocabulary], start: Vocabulary, names: Mapping[str, str]):
        self._models = {m.name: m for m in models}
        self._ids = {m.name: m.ids for m in models}
        self._names = names
        self.notes: list[str] = []
        keep = start.ids
        if len(keep) < len(start.files.ids):
            lost = sorted(set(start.files.ids) - set(keep))
            self.notes.append(f"{start.name}: {_some(lost)} left out, beyond the {start.rows} embedding rows.")
        new = _union(keep, start, models) if spec.source == "union" else []
        known = {**keep, **{t["content"]: t["id"] for t in new}}
        for token in spec.tokens:
            if token not in known:
                known[token] = max(known.values(), default=-1) + 1
                new.append(added_token(token, known[token]))
        self.tokenizer = start.files.changed(keep, new)
        self.ids = known
        self._tokens = max(known.values(), default=-1) + 1
        self.rows = max(self._tokens, start.rows or 0)
        multiple = spec.pad_to_multiple_of or 1
        self.rows += -self.rows % multiple
        self._index = {m.name: self._rows_of(m) for m in models}
        self._fixed = {known[t]: (t, s) for t, s in spec.tokens.items()}
        self._cached: dict[Any, dict[str, Entries]] = {}
        digest = xxhash.xxh3_64()
        for index in self._index.values():
            digest.update(index.tobytes())
        self.fingerprint = digest.hexdigest()

    def concerns(self, name: str, model: str, tensor: LazyTensor) -> bool:
        """Whether the tensor has a row for every token of the model."""
        return model in self._models and is_vocabulary(name, tensor, self._models[model].rows)

    def align(self, name: str, tensors: Mapping[str, LazyTensor], base: str | None) -> dict[str, LazyTensor]:
        """The tensors of all models with one row for each token of the result.

        Args:
            name: the output tensor's name.
            tensors: model -> its tensor, (tokens of the model, …).
            base: the model whose rows come first where others lack a token.
        """
        shapes = {t.shape[1:] for t in tensors.values()}
        if len(shapes) > 1:
            raise ShapeError(
                f"{name}: the models' rows have the shapes {sorted(map(list, shapes))}, so a tokenizer cannot bring "
                "them together. The models differ in hidden size."
            )
        key = (tuple(tensors), base)
        if key not in self._cached:
            self._cached[key] = self._entries(list(tensors), base, name)
        return {m: self._arranged(name, m, tensors, self._cached[key][m]) for m in tensors}

    def _arranged(self, name: str, model: str, tensors: Mapping[str, LazyTensor], entries: Entries) -> LazyTensor:
        tensor, own = tensors[model], self._index[model]
        forced = any(s.force for _, s in self._fixed.values())
        if not forced and len(own) == tensor.shape[0] and bool((own == np.arange(len(own))).all()):
            return tensor
        if not all(t.dtype.floating for t in tensors.values()):
            raise RecipeError(f"{name}: {model} stores it as {tensor.dtype}, whose rows cannot be rearranged.")
        return gather(tensor, list(tensors.values()), entries)

    def _rows_of(self, model: Vocabulary) -> np.ndarray:
        """(rows,) which row of the model each row of the result is, -1 if it has none."""
        ids = self._ids[model.name]
        index = np.full(self.rows, -1, np.int64)
        for token, number in self.ids.items():
            index[number] = ids.get(token, -1)
        if model.rows is not None:
            padding = np.setdiff1d(np.arange(self.rows), np.fromiter(self.ids.values(), np.int64))
            padding = np.setdiff1d(padding[padding < model.rows], np.fromiter(ids.values(), np.int64))
            index[padding] = padding
        return index

    def _entries(self, models: list[str], base: str | None, name: str) -> dict[str, Entries]:
        index = np.stack([self._index[m] for m in models])  # (models, rows)
        lacking = index < 0
        for number, (_, source) in self._fixed.items():
            lacking[:, number] |= source.force
        used = np.zeros(self.rows, bool)
        used[np.fromiter(self.ids.values(), np.int64, len(self.ids))] = True
        fill: dict[int, list[tuple[int, int]]] = {}
        tally = dict.fromkeys(("the base's rows", "their only owner's rows", "mean rows", "zeros"), 0)
        for number in np.flatnonzero(lacking.any(axis=0)).tolist():
            if number in self._fixed:
                fill[number] = self._chosen(number, models, index, name)
                continue
            owners = np.flatnonzero(index[:, number] >= 0).tolist()
            kind = "mean rows" if owners else "zeros"
            if len(owners) == 1:
                kind = "their only owner's rows"
            if base in models and models.index(base) in owners:
                owners, kind = [models.index(base)], "the base's rows"
            fill[number] = [(m, int(index[m, number])) for m in owners]
            tally[kind] += bool(used[number])
        if any(tally.values()):
            shown = ", ".join(f"{kind} ({n:,})" for kind, n in tally.items() if n)
            self.notes.append(f"{name}: {sum(tally.values()):,} tokens are not in all models, which get {shown}.")
        return {m: _pack(index[i], i, lacking[i], fill, self._tokens) for i, m in enumerate(models)}

    def _chosen(self, number: int, models: list[str], index: np.ndarray, name: str) -> list[tuple[int, int]]:
        """The row that the recipe names for a token."""
        token, spec = self._fixed[number]
        source = spec.source
        if isinstance(source, dict) and source["kind"] == "zero":
            return []
        if source is None:
            raise RecipeError(f"tokens: {token!r} has no source, and not all models have it. Name a model.")
        wanted = source["model"] if isinstance(source, dict) else source
        model = self._names.get(wanted, wanted)
        if model not in models:
            raise RecipeError(
                f"tokens: {token!r} takes its row of {name} from {wanted}, which has no such tensor here."
            )
        place = models.index(model)
        if isinstance(source, str):
            row = int(index[place, number])
        elif "token_id" in source:
            row = int(source["token_id"])
        else:
            row = self._ids[model].get(source["token"], -1)
        rows = self._models[model].rows
        if row < 0 or (rows is not None and row >= rows):
            missing = source.get("token", source.get("token_id")) if isinstance(source, dict) else token
            hint = did_you_mean(missing, self._ids[model]) if isinstance(missing, str) else ""
            raise RecipeError(
                f"tokens: {token!r} takes its row from {missing!r} of {wanted}, which has none."
                f"{hint if 'Did' in hint else ''}"
            )
        return [(place, row)]


def _union(keep: Mapping[str, int], start: Vocabulary, models: Sequence[Vocabulary]) -> list[dict[str, Any]]:
    """Tokens to add to those of ``start``: first ordinary ones, then special ones, model by model in order of ids."""
    new: dict[str, dict[str, Any]] = {}
    added = {t["content"] for t in start.files.added}
    number = max(keep.values(), default=-1) + 1
    special = {m.name: {t["content"]: t for t in m.files.added} for m in models}
    either = {content for found in special.values() for content in found}
    for model in models:
        for token in sorted(model.ids, key=model.ids.__getitem__):
            if token not in keep and token not in either and token not in new:
                new[token] = added_token(token, number)
                number += 1
    for model in models:
        ids = model.ids
        for token, entry in special[model.name].items():
            if token in ids and token not in new and token not in added:
                new[token] = {**entry, "id": keep.get(token, number)}
                number += token not in keep
    return list(new.values())


def _pack(own: np.ndarray, model: int, lacking: np.ndarray, fill: Mapping[int, Any], mean_from: int) -> Entries:
    missing = np.flatnonzero(lacking).tolist()
    counts = np.ones(len(own), np.int64)
    counts[missing] = [len(fill[number]) for number in missing]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    tensor, row = np.full(offsets[-1], model, np.int64), np.empty(offsets[-1], np.int64)
    row[offsets[:-1][~lacking]] = own[~lacking]
    for number in missing:
        for place, (source, source_row) in enumerate(fill[number], int(offsets[number])):
            tensor[place], row[place] = source, source_row
    return Entries(offsets, tensor, row, mean_from)


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:3]))
    return f"{len(tokens)} tokens ({shown}{', …' if len(tokens) > 3 else ''})"
