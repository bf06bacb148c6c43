"""Train a few rows of an embedding, such as those of new tokens, and leave the others frozen.

What PEFT calls trainable tokens; no paper.

    W[rows] = θ                 W: (vocabulary, columns), θ: (len(rows), columns) in at least float32, from W₀[rows]

Where the output layer is tied to the embedding, its rows are these too.

Differences: none from PEFT's. Rows are looked up beside the table, which is not copied; multiplying by a tied table
replaces those outputs.
Complexity: one more look-up for each token. Written for this library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.adapter import Adapter
from weft.function.protocol import FunctionMethod, Gather, Inner, Looked, WeightFunction, wide
from weft.method import parameter


@dataclass(frozen=True)
class TokenRows:
    """Trainable rows of a frozen table.

    Source: the equation above.

    >>> import torch, weft
    >>> table = torch.nn.Embedding(100, 8)
    >>> report = weft.adapt_(table, TokenRows(rows=(97, 98, 99)), where="*")
    >>> report.trainable
    24
    """

    rows: tuple[int, ...] = parameter(help="token ids", minimum=0)
    dtype: str = parameter(
        "float32", "of the rows: at least float32, or the table's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one table."""
        if weight.dim() != 2:
            raise RecipeError(f"rows belong to a table (tokens, columns), and this weight is {list(weight.shape)}.")
        if not self.rows or len(set(self.rows)) != len(self.rows) or max(self.rows) >= len(weight):
            raise RecipeError(
                f"rows must name one or more tokens below {len(weight)}, each once, got {list(self.rows)[:10]}. Resize the "
                "embedding first if the tokens are new (weft.init, or resize_token_embeddings)."
            )
        return _TokenRows(self, weight)


class _TokenRows(Adapter):
    has_product = True
    has_lookup = True

    def __init__(self, config: TokenRows, table: Tensor):
        super().__init__()
        self.register_buffer("rows", torch.tensor(config.rows, device=table.device))
        place = torch.full((len(table), 1), -1, dtype=torch.long, device=table.device)
        place[self.rows, 0] = torch.arange(len(config.rows), device=table.device)
        self.register_buffer("place", place)  # (vocabulary, 1): which of the rows, or −1
        kind = wide(table) if config.dtype == "float32" else table.dtype
        self.values = nn.Parameter(table.detach()[self.rows].to(kind, copy=True))

    def forward(self, stored: Tensor) -> Tensor:
        if not self.enabled:
            return stored
        return stored.index_copy(0, self.rows, self._values(stored[self.rows]))

    def lookup(self, gather: Gather, inner: Looked) -> Tensor:
        y = inner(gather)
        if not self.enabled:
            return y
        place = gather(self.place)  # (…, 1)
        values = functional.embedding(place.squeeze(-1).clamp_min(0), self.values)
        if self.strength != 1:
            values = torch.lerp(y.to(values.dtype), values, self.strength)
        return torch.where(place >= 0, values.to(y.dtype), y)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        if not self.enabled:
            return y
        ours = functional.linear(x.to(self.values.dtype), self.values)
        if self.strength != 1:
            ours = torch.lerp(y[..., self.rows].to(ours.dtype), ours, self.strength)
        return y.index_copy(-1, self.rows, ours.to(y.dtype))

    def _values(self, stored: Tensor) -> Tensor:
        if self.strength == 1:
            return self.values.to(stored.dtype)
        return torch.lerp(stored.to(self.values.dtype), self.values, self.strength).to(stored.dtype)


METHODS = (
    FunctionMethod(
        name="token_rows",
        family="adapt",
        config=TokenRows,
        summary="Trainable rows of a frozen embedding, for new tokens.",
        goal="adapt",
        origin="PEFT's trainable tokens",
        starts_at="weight",
        adapter=True,
        trial={"rows": (0, 3, 5)},
        checked_by=("closed form", "peft"),
    ),
)
