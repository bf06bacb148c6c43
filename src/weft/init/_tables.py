"""The tables of a model that have a row for each token: read as one matrix each, written back at another size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.classes import unwrapped
from weft.function.initializer import plain_parameter
from weft.function.stack import is_sharded


class Tables:
    """The input table of a model, and its output table if it has one of its own.

    Attributes:
        values: one matrix (rows, columns) for a model whose tables are tied, or that has no output table, else two.
            What an output table adds to logits (biases) are further columns of it, so that they are treated as weights.
        rows: how many rows each has.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None):
        if unwrapped(model) is not model:
            raise RecipeError(
                f"{type(model).__name__} wraps the model and would not see new parameters; extend the vocabulary first, "
                "then compile or distribute the model."
            )
        self.model: Any = model
        self.bare = isinstance(model, nn.Embedding)
        self.embedding, self.head = self._modules(head)
        weight = _table(self.embedding, "input embedding")
        self.rows = len(weight)
        self.extras: list[Tensor] = []
        self.tied = True
        if self.head is not None:
            output = _table(self.head, "output head")
            self.tied = output is weight or output.data_ptr() == weight.data_ptr()
            self.extras = self._extras()
            for other in (output, *(e.reshape(-1) for e in self.extras)):
                if len(other) != self.rows:
                    raise RecipeError(
                        f"The input embedding has {self.rows} rows and the output head has a tensor of {len(other)}; both "
                        "must have one row a token. Extend two vocabularies one at a time, as nn.Embedding each."
                    )
        owners = [self.embedding] if self.tied else [self.embedding, self.head]
        dtype = torch.float32
        for tensor in (*(o.weight for o in owners), *self.extras):
            dtype = torch.promote_types(dtype, tensor.dtype)
        self.values = [o.weight.detach().to(dtype) for o in owners]
        columns = [e.detach().reshape(-1, 1).to(self.values[-1]) for e in self.extras]
        self.values[-1] = torch.cat([self.values[-1], *columns], dim=1)
        for value in self.values:
            broken = value.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()
            if broken:
                raise RecipeError(
                    f"{len(broken)} rows of a table hold NaN or infinity (the first is row {broken[0]}), which a mean would "
                    "spread over all new rows; repair them first."
                )

    def width(self, number: int) -> int:
        """How many columns of matrix ``number`` are weights."""
        return self.values[number].shape[1] - (len(self.extras) if number == len(self.values) - 1 else 0)

    def write(self, values: list[Tensor]) -> None:
        """Put matrices as in ``values``, of any one number of rows, into the model."""
        size = len(values[0])
        if size != self.rows:
            self._resize(size)
        owners = [self.embedding] if self.tied else [self.embedding, self.head]
        with torch.no_grad():
            for owner, value in zip(owners, values, strict=True):
                width = owner.weight.shape[1]
                owner.weight.copy_(value[:, :width])
                owner.weight.grad = None  # of rows that are others now
            for column, extra in enumerate(self._extras() if self.head is not None else []):
                extra.copy_(values[-1][:, width + column].reshape(extra.shape))
                extra.grad = None

    def move_special(self, old: Mapping[str, int], new: Mapping[str, int]) -> tuple[str, ...]:
        """Let the padding row and the configuration's token ids (``eos_token_id``, …) follow their tokens.

        Returns:
            Names of those whose token is not in the new vocabulary; they are None now.
        """
        tokens = {index: token for token, index in old.items()}
        lost = []

        def moved(index: int) -> int | None:
            return new.get(tokens.get(index, ""))

        if self.embedding.padding_idx is not None:
            self.embedding.padding_idx = moved(self.embedding.padding_idx)
        configs = [getattr(self.model, n, None) for n in ("config", "generation_config")]
        text = getattr(configs[0], "get_text_config", None)
        configs.append(text() if text is not None else None)
        for config in {id(c): c for c in configs if c is not None}.values():
            for name, value in list(vars(config).items()):
                many = isinstance(value, list | tuple)
                ids = [i for i in (value if many else [value]) if isinstance(i, int) and i >= 0]
                if not name.endswith("_token_id") or not ids:
                    continue
                kept = [j for j in map(moved, ids) if j is not None]
                setattr(config, name, (kept if many else kept[0]) if kept else None)
                if len(kept) < len(ids):
                    lost.append(name)
        return tuple(dict.fromkeys(lost))

    def _modules(self, head: nn.Module | None) -> tuple[Any, Any]:
        if self.bare:
            if head is not None and not isinstance(head, nn.Linear):
                raise RecipeError(f"The head must be an nn.Linear, got {type(head).__name__}.")
            return self.model, head
        if not hasattr(self.model, "get_input_embeddings"):
            raise RecipeError(
                f"{type(self.model).__name__} does not say where its tables are; give a transformers model, or the "
                "nn.Embedding itself, with head=... for its output layer."
            )
        if head is not None:
            raise RecipeError("A transformers model knows its own head; head=... is for a bare nn.Embedding.")
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not (head is None or isinstance(head, nn.Linear)):
            raise RecipeError(
                f"Tables must be an nn.Embedding and an nn.Linear, {type(self.model).__name__} has "
                f"{type(embedding).__name__} and {type(head).__name__}; merge adapters and dequantise first."
            )
        return embedding, head

    def _extras(self) -> list[Tensor]:
        """What is added to the logits: the head's bias, and the buffer that BART and its kin add."""
        bias = [] if self.head.bias is None else [plain_parameter(self.head, "bias")]
        return bias + [b for n, b in self.model.named_buffers() if n == "final_logits_bias"]

    def _resize(self, size: int) -> None:
        if self.bare:
            for module, count in ((self.embedding, "num_embeddings"), (self.head, "out_features")):
                if module is not None:
                    for name in ("weight", "bias"):
                        held = module._parameters.get(name)
                        if held is not None and len(held) != size:
                            empty = held.detach().new_empty((size, *held.shape[1:]))
                            setattr(module, name, nn.Parameter(empty, requires_grad=held.requires_grad))
                    setattr(module, count, size)
            if self.head is not None and self.tied:
                self.head.weight = self.embedding.weight
            return
        trains = [self.head is not None and e.requires_grad for e in self.extras]
        device = self.embedding.weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # rows drawn there are replaced
            try:
                self.model.resize_token_embeddings(size, mean_resizing=False)
            except (NotImplementedError, TypeError, ValueError) as error:
                raise RecipeError(f"{type(self.model).__name__} cannot be resized by transformers: {error}") from error
        self.embedding, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for extra, train in zip(self._extras() if self.head is not None else [], trains, strict=True):
            if isinstance(extra, nn.Parameter):
                extra.requires_grad_(train)


def _table(module: nn.Module, what: str) -> nn.Parameter:
    weight = plain_parameter(module)
    if is_sharded(weight) or weight.dim() != 2 or hasattr(weight, "ds_id"):
        raise RecipeError(
            f"The {what} is sharded over processes ({list(weight.shape)} here); extend the vocabulary before sharding."
        )
    if type(weight.data) is not Tensor or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise RecipeError(
            f"The {what} must hold plain floating-point numbers, got {type(weight.data).__name__} of {weight.dtype}; "
            "quantised tables have no room for new rows: dequantise, extend, quantise again."
        )
    if not weight.numel():
        raise RecipeError(f"The {what} has no rows to start from ({list(weight.shape)}).")
    return weight
