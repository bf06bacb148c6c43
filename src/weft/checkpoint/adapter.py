"""An adapter on top of its base: adapted weights are computed when they are read.

    W = W₀ + s · B A            B (out, r), A (r, in), s = α/r or α/√r (rsLoRA); ΔW is transposed where the layer
                                stores (in, out), and for embeddings
    W = m ⊙ (W₀ + s B A) / ‖W₀ + s B A‖         DoRA: m (out,), the norm of each output
    W[o, j] = W₀[o, j] + D[j mod r, o]          MiSS: D (r, out);  Bat: W[p, q] = W₀[p, q] (I + B[p]) + B[p] in blocks

Differences from PEFT's ``merge_and_unload``: a weight is never added in low precision (the sum is float32 and rounded
once, when it is written); where an adapter changes only one of two tied tensors the output is untied, so that it
computes what the adapted model computed (PEFT then changes both); every tensor of the adapter must find its place.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.checkpoint.adapter_names import find_places, holds
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import (
    Between,
    Factors,
    LowRankUpdate,
    ReplacedRows,
    Scratch,
    as_factors,
    as_float32,
    computed,
)
from weft.checkpoint.live_names import live_names
from weft.checkpoint.lora_config import LoraConfig
from weft.checkpoint.lora_folder import CONFIG_FILE, MissPart, Part, open_adapter, read_adapter
from weft.errors import CheckpointError, ShapeError

__all__ = ["open_adapter", "with_adapter"]
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
HEAD = "lm_head.weight"  # the output layer, by the name that nearly all language models share
_UNTIES = ("ForCausalLM", "LMHeadModel")  # classes that compute the same with two equal tensors as with one tied
_COMPUTABLE = ("F64", "F32", "F16", "BF16")


def with_adapter(base: Checkpoint, adapter: Checkpoint, weight: float = 1.0) -> Checkpoint:
    """The model that ``base`` becomes with an ``adapter``; adapted weights are computed when read.

    Closing it closes both.

    Args:
        base: the model that the adapter was trained on.
        adapter: what :func:`weft.checkpoint.lora_folder.open_adapter` returns.
        weight: what its change is multiplied by; whole tensors go that part of the way.

    Raises:
        CheckpointError: a tensor of the adapter belongs to none of the base, or the base is quantised.
        ShapeError: the factors do not fit the base's weights.

    >>> import numpy as np, weft
    >>> from weft.checkpoint.memory import from_mapping
    >>> A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    >>> factors = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B}
    >>> adapter = from_mapping(factors, "adapter")
    >>> adapter.config = {"peft_type": "LORA", "r": 1, "lora_alpha": 4}
    >>> with_adapter(weft.open({"fc.weight": np.zeros((2, 3), np.float32)}), adapter)["fc.weight"].numpy()
    array([[4., 4., 4.],
           [4., 4., 4.]], dtype=float32)
    """
    if "peft_type" not in adapter.config:
        raise CheckpointError(
            f"{adapter.name}: is not an adapter (no {CONFIG_FILE} with a peft_type). In base+adapter, the adapter is a "
            "folder that PEFT's save_pretrained wrote."
        )
    parsed = read_adapter(adapter)
    where = f"{base.name}+{adapter.name}" + (f"*{weight:g}" if weight != 1 else "")
    model = _Model(base, where, weight)
    saved = [str(m) for m in adapter.config.get("modules_to_save") or ()]
    also = [HEAD] if model.embedding else []
    place = find_places(parsed, model.tensors, saved, where, also, live=lambda: live_names(base))
    for name, tensor in parsed.originals.items():
        model.replace(place[name], tensor, alone=False)
    for name, tensor in parsed.whole.items():
        model.replace(place[name], tensor, alone=holds(saved, name) and not parsed.config.tied)
    for module, rows in parsed.rows.items():
        model.replace_rows(place[module], rows, _row_numbers(parsed.config, module, where))
    for module, part in parsed.parts.items():
        model.adapt(place[module], part, parsed.config)
    model.untie()
    return Checkpoint(
        name=where,
        tensors=model.tensors,
        aliases=model.aliases,
        config=model.config,
        metadata=base.metadata,
        folder=adapter.folder if model.resized and adapter.folder else base.folder,
        fingerprint=f"{base.fingerprint}+{adapter.fingerprint}" + (f"*{weight!r}" if weight != 1 else ""),
    )


def tied_embedding(model: Checkpoint) -> str | None:
    """Name of the input embedding if it also serves as the output layer, which then is in no file."""
    has_head = any(f".{name}".endswith(f".{HEAD}") for name in model)
    if has_head or model.config.get("tie_word_embeddings") is False:
        return None
    architectures = [str(a) for a in model.config.get("architectures") or ()]
    if not any(kind in a for a in architectures for kind in (*_UNTIES, "Conditional", "LM")):
        return None
    found = [n for n in model if n.endswith(".weight") and n.split(".")[-2] in _INPUT_EMBEDDINGS]
    return found[0] if len(found) == 1 else None


class _Model:
    """The base's tensors on their way to the adapted model's."""

    def __init__(self, base: Checkpoint, where: str, weight: float = 1.0):
        self.where = where
        self.weight_of_change = weight
        self.tensors = dict(base.tensors)
        self.aliases = dict(base.aliases)
        self.config: dict[str, Any] = copy.deepcopy(base.config)
        self.resized = False
        self._alone: set[str] = set()  # changed without the tensors they are tied to
        self._before: dict[str, LazyTensor] = {}  # what a tensor was before it was changed alone
        self._scratch, self._row_scratch = Scratch(), Scratch()
        self.embedding = tied_embedding(base)

    def _tied(self, name: str) -> list[str]:
        root = self.aliases.get(name, name)
        return [root, *(n for n, r in self.aliases.items() if r == root)]

    def weight(self, name: str) -> LazyTensor:
        """A tensor that is to be computed on."""
        tensor = self.tensors.get(name) or self._tied_base()
        if tensor.dtype.name not in _COMPUTABLE:
            raise CheckpointError(
                f"{self.where}: {name} is stored as {tensor.dtype.name}, and its values need scales that a weight alone does "
                "not have. Dequantise the base first."
            )
        return tensor

    def _tied_base(self) -> LazyTensor:
        """The output layer's weight where no file holds it: the input embedding's before the adapter."""
        assert self.embedding is not None
        return self._before.get(self.embedding, self.tensors[self.embedding])

    def set_alone(self, name: str, tensor: LazyTensor) -> None:
        """Change a tensor and not those tied to it."""
        if name in self.tensors:
            self._before.setdefault(name, self.tensors[name])
        self._alone.add(name)
        self.tensors[name] = tensor

    def replace(self, name: str, tensor: LazyTensor, *, alone: bool) -> None:
        """Put a whole tensor in the place of another, or beside them."""
        old = self.tensors.get(name) or (self._tied_base() if name == HEAD and self.embedding else None)
        if old is not None and old.shape != tensor.shape:
            if len(old.shape) != 2 or len(tensor.shape) != 2 or old.shape[1] != tensor.shape[1]:
                raise ShapeError(
                    f"{self.where}: the adapter replaces {name} {list(old.shape)} by {list(tensor.shape)}. "
                    "The adapter was trained on another model."
                )
            self.resized = True
            if self.config.get("vocab_size") == old.shape[0]:
                self.config["vocab_size"] = tensor.shape[0]
        floats = old is not None and {old.natural_dtype.name, tensor.dtype.name} <= set(_COMPUTABLE)
        stored = old.natural_dtype if old is not None and floats else None
        renamed = dataclasses.replace(tensor, info=dataclasses.replace(tensor.info, name=name), stored=stored)
        if self.weight_of_change != 1:
            renamed = self._partly(name, old, renamed, floats)
        if old is not None and alone:
            self.set_alone(name, renamed)
        else:
            self._set_tied(name, renamed)

    def _partly(self, name: str, old: LazyTensor | None, new: LazyTensor, floats: bool) -> LazyTensor:
        """A part of the way from the base's tensor to one that replaces it."""
        if old is None or old.shape != new.shape or not floats:
            raise ShapeError(
                f"{self.where}: the adapter brings {name} {list(new.shape)}, which is new or no float, so there is no part of "
                "the way to it from the base. Use the weight 1."
            )
        return computed(Between(old, new, self.weight_of_change, Scratch()), name)

    def _set_tied(self, name: str, tensor: LazyTensor) -> None:
        if name == HEAD and self.embedding:
            return  # the embedding's own copy says the same
        for other in self._tied(name):
            self.tensors[other] = _named(tensor, other)

    def replace_rows(self, name: str, rows: LazyTensor, numbers: list[int]) -> None:
        """Replace single rows of an embedding; what is tied to it follows."""
        base = self.weight(name)
        if len(base.shape) != 2 or rows.shape != (len(numbers), base.shape[1]) or max(numbers) >= base.shape[0]:
            raise ShapeError(
                f"{self.where}: the adapter replaces rows {numbers[:5]} … of {name} {list(base.shape)} by {list(rows.shape)}."
            )
        replaced = computed(ReplacedRows(base, numbers, rows, self._row_scratch))
        if self.weight_of_change != 1:
            replaced = computed(Between(base, replaced, self.weight_of_change, Scratch()))
        self._set_tied(name, replaced)

    def adapt(self, name: str, part: Part | MissPart, config: LoraConfig) -> None:
        """Add a low-rank change."""
        base = self.weight(name)
        if config.dora and self.weight_of_change != 1:
            raise CheckpointError(f"{self.where}: DoRA's change is no sum and has no weight. Use the weight 1.")
        made = computed(part.source(base, config, self._scratch, self.weight_of_change), name)
        if part.tied:
            self._set_tied(name, made)
        else:
            self.set_alone(name, made)
        if part.bias is not None:
            self._add_bias(name.removesuffix("weight") + "bias", part.bias, part.scale * self.weight_of_change)

    def _add_bias(self, name: str, change: LazyTensor, scale: float) -> None:
        if name not in self.tensors or self.tensors[name].shape != change.shape:
            raise CheckpointError(
                f"{self.where}: the adapter changes {name}, which the base does not have in that shape."
            )

        def load() -> Factors:
            return as_factors(as_float32(change)[:, None], np.ones((1, 1), np.float32), scale=scale)

        self.set_alone(name, computed(LowRankUpdate(self.weight(name), load, self._scratch, [change])))

    def untie(self) -> None:
        """Separate tensors that were changed alone from those they were tied to."""
        for name in sorted(self._alone):
            others = [n for n in self._tied(name) if n != name]
            implicit = self.embedding is not None and name in (self.embedding, HEAD)
            if not others and not implicit:
                continue
            architectures = [str(a) for a in self.config.get("architectures") or ()]
            if not all(a.endswith(_UNTIES) for a in architectures):
                raise CheckpointError(
                    f"{self.where}: the adapter changes {name} but not the tensors tied to it, and {architectures[0]} "
                    "cannot be untied without changing what it computes. Save the base untied first."
                )
            if implicit and self.embedding is not None and name == self.embedding and HEAD not in self.tensors:
                self.tensors[HEAD] = _named(self._before[name], HEAD)
            self.aliases = {n: r for n, r in self.aliases.items() if name not in (n, r)}
            for other in others[1:]:
                self.aliases[other] = others[0]
            if self.config:
                self.config["tie_word_embeddings"] = False


def _named(tensor: LazyTensor, name: str) -> LazyTensor:
    return dataclasses.replace(tensor, info=dataclasses.replace(tensor.info, name=name))


def _row_numbers(config: LoraConfig, module: str, where: str) -> list[int]:
    """Which rows of ``module`` the configuration says are replaced."""
    numbers: Any = config.token_rows
    if isinstance(numbers, Mapping):
        numbers = next((v for k, v in numbers.items() if f".{module}".endswith(f".{k}")), None)
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(
            f"{where}: the adapter replaces rows of {module}, but trainable_token_indices names none."
        )
    return numbers
