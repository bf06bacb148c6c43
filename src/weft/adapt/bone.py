"""Fine-tune with one small matrix of zeros beside each frozen weight: no second factor, no scale to set.

Bone, then DiSHA, then MiSS, Kang et al., arXiv:2409.15371 (2024). Two maps go by these names, W and W₀ (out, in):

    shards          W[o, j] = W₀[o, j] + D[o, j mod rank]        D: (out, rank), or (mini_rank, rank) repeated down to out
    block_affine    W[p, q] = W₀[p, q] (I + B[p]) + B[p]         [p, q]: blocks (rank, rank) of W, B: (out / rank, rank, rank)

Shards are Bone in the paper's second version and in older PEFT, MiSS in its third and in PEFT now: ``bone`` is the row
and ``miss`` the same under the later name. They are added to any weight alike, so x is summed over its pieces of
``rank`` and multiplied by D, without building W, and the change is exactly a LoRA of that rank, of identity matrices side
by side (cut off where rank does not divide in). Block-affine, which the first version's title means, is called Bat:
row ``bat``. It depends on the weight beneath it, so there is no LoRA for it, of two on one weight the second changes
what the first made, W is built in each pass, and both sizes must be multiples of rank.

Differences from the paper and its code: D is stored (out, rank), transposed to PEFT's. The kind belongs to each adapter,
not to the layer. Stacks of matrices have parameters of their own for each, and a convolution is its matrix (out, in · …).
Dropout, in PEFT's and here off by default, acts on inputs, as in LoRA, and not with block_affine. A merge is undone by
``weft.adapt.unmerge_`` without arithmetic; :func:`unmerge_block_affine` inverts it for weights merged elsewhere.
Complexity: in + rank · out multiplications and sums a token for shards; rank · in · out for block_affine in each pass.
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.adapter import Adapter, PeftForm, add_product
from weft.function.protocol import FunctionMethod, Gather, Inner, WeightFunction, as_matrix, wide
from weft.method import parameter

FORMS = ("shards", "block_affine")


@dataclass(frozen=True)
class Bone:
    """A trainable matrix of zeros that all column blocks of a frozen weight share.

    Source: arXiv:2409.15371; PEFT's MissConfig with init_weights True, "mini" and "bat".

    >>> import torch, weft
    >>> layer = torch.nn.Linear(10, 6)
    >>> before = layer.weight.detach().clone()
    >>> report = weft.adapt_(layer, Bone(rank=4), where="*")
    >>> report.trainable, bool(torch.equal(layer.weight, before))
    (24, True)
    """

    rank: int = parameter(64, "columns of D, or of a block", minimum=1)
    form: str = parameter("shards", "shards: MiSS, block_affine: Bat", choices=FORMS)
    mini_rank: int | None = parameter(None, "rows of D, of which out is a multiple; shards only", minimum=1)
    dropout: float = parameter(0.0, "share of inputs dropped in training, in linear layers", minimum=0, maximum=1)
    dtype: str = parameter(
        "float32", "of the parameters: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for one weight."""
        matrix = weight if batched else as_matrix(weight)
        out, inputs = matrix.shape[-2:]
        if self.form == "block_affine":
            if self.mini_rank is not None or self.dropout:
                raise RecipeError("mini_rank and dropout belong to form='shards'; leave them out for block_affine.")
            if out % self.rank or inputs % self.rank:
                raise RecipeError(
                    f"block_affine cuts a matrix into blocks of {self.rank} × {self.rank}, and {[out, inputs]} is not a "
                    "multiple of that; choose a rank that divides both sizes, form='shards', or leave the layer out."
                )
            return _BlockAffine(self, matrix)
        if self.rank > inputs:
            raise RecipeError(
                f"rank {self.rank} is more than the {inputs} inputs of {[out, inputs]}; choose a lower rank, or leave the "
                "layer out."
            )
        if self.mini_rank is not None and out % self.mini_rank:
            raise RecipeError(
                f"mini_rank {self.mini_rank} does not divide the {out} outputs of {[out, inputs]}; choose one that does."
            )
        if self.dropout and (batched or weight.dim() != 2):
            raise RecipeError(
                f"dropout acts on the inputs of linear layers, and this weight {list(weight.shape)} is built whole; set "
                "dropout=0, or leave the layer out."
            )
        return _Shards(self, matrix)


def share_shards(shards: Tensor, out: int, columns: int) -> Tensor:
    """The change of a weight that all its column blocks share.

    Args:
        shards: D, (…, rows, rank); rows divide ``out``.
        out, columns: of the weight; ``rank`` need not divide ``columns``.

    Returns:
        (…, out, columns), with ``[…, o, j] = shards[…, o mod rows, j mod rank]``. Source: arXiv:2409.15371.

    >>> import torch
    >>> share_shards(torch.tensor([[1.0, 2.0]]), 2, 5)
    tensor([[1., 2., 1., 2., 1.],
            [1., 2., 1., 2., 1.]])
    """
    stack = [1] * (shards.dim() - 2)
    return _across(shards.repeat(*stack, out // shards.shape[-2], 1), columns)


def block_affine(weight: Tensor, blocks: Tensor) -> Tensor:
    """W[p, q] (I + B[p]) + B[p] for all blocks.

    Args:
        weight: (…, out, in), both multiples of ``rank``.
        blocks: B, (…, out / rank, rank, rank).

    Returns:
        As the weight, in at least float32. Source: arXiv:2409.15371 (Bat).

    >>> import torch
    >>> block_affine(torch.ones(2, 4), torch.eye(2).unsqueeze(0))
    tensor([[3., 2., 3., 2.],
            [2., 3., 2., 3.]])
    """
    return weight + _block_change(weight, blocks)


def unmerge_block_affine(weight: Tensor, blocks: Tensor) -> Tensor:
    """The weight W₀ of which :func:`block_affine` made W: W₀[p, q] = (W[p, q] − B[p]) (I + B[p])⁻¹.

    Of several adapters, undo the last first. Computed in at least float32; the error grows with the condition of I + B.

    Args:
        weight: W, (…, out, in).
        blocks: B, (…, out / rank, rank, rank).

    Returns:
        W₀, of W's shape and dtype.

    Raises:
        RecipeError: a block I + B[p] has no inverse at this precision, or the shapes do not fit.

    >>> import torch
    >>> W, B = torch.randn(6, 4), 0.1 * torch.randn(3, 2, 2)
    >>> torch.allclose(unmerge_block_affine(block_affine(W, B), B), W, atol=1e-5)
    True
    """
    rank, (out, inputs) = blocks.shape[-1], weight.shape[-2:]
    if blocks.shape != (*weight.shape[:-2], out // rank, rank, rank) or out % rank or inputs % rank:
        raise RecipeError(
            f"blocks must be {[*weight.shape[:-2], 'out / rank', 'rank', 'rank']} for a weight of {list(weight.shape)}, "
            f"got {list(blocks.shape)}."
        )
    kind = wide(weight)
    moved = blocks.to(kind)
    affine = moved + torch.eye(rank, dtype=kind, device=weight.device)
    finite = bool(moved.isfinite().all())
    condition = float(torch.linalg.cond(affine).max()) if finite else torch.nan
    if not condition < 0.1 / torch.finfo(kind).eps:
        raise RecipeError(
            f"This merge cannot be undone: a block I + B has a condition of {condition:.3g}, so its inverse would be noise. "
            "Take the weight from the base model instead."
        )
    beneath = torch.linalg.solve(affine.unsqueeze(-3), _cut(weight.to(kind), rank) - moved.unsqueeze(-3), left=False)
    return _joined(beneath, weight.shape).to(weight.dtype)


def _across(rows: Tensor, columns: int) -> Tensor:
    """(…, rank) -> (…, columns), side by side."""
    return rows.repeat(*[1] * (rows.dim() - 1), -(-columns // rows.shape[-1]))[..., :columns]


def _block_change(weight: Tensor, blocks: Tensor) -> Tensor:
    moved = blocks.to(wide(weight)).unsqueeze(-3)  # (…, out / rank, 1, rank, rank)
    return _joined(_cut(weight.to(moved.dtype), blocks.shape[-1]) @ moved + moved, weight.shape)


def _cut(matrix: Tensor, rank: int) -> Tensor:
    """(…, out, in) -> (…, out / rank, in / rank, rank, rank)."""
    return matrix.unflatten(-1, (-1, rank)).unflatten(-3, (-1, rank)).transpose(-3, -2)


def _joined(cut: Tensor, shape: torch.Size) -> Tensor:
    return cut.transpose(-3, -2).reshape(shape)


class _Shards(Adapter):
    has_product = True
    has_lookup = True

    def __init__(self, config: Bone, matrix: Tensor):
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        *stack, self.out, self.inputs = matrix.shape
        kind = wide(matrix) if config.dtype == "float32" else matrix.dtype
        rows = config.mini_rank or self.out
        self.D = nn.Parameter(torch.zeros(*stack, rows, config.rank, dtype=kind, device=matrix.device))

    def change(self, stored: Tensor) -> Tensor:
        return share_shards(self.D, self.out, self.inputs).reshape(stored.shape)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        if not self.enabled:
            return inner(x)
        return add_product(inner(x), self._summed(x), self._shards(), self.scale * self.strength)

    def changed(self, x: Tensor) -> Tensor:
        return functional.linear(self._summed(x), self._shards())

    def _summed(self, x: Tensor) -> Tensor:
        """Column blocks of the input, summed: (…, in) -> (…, rank)."""
        rank = self.D.shape[-1]
        x = x.to(self.D.dtype)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        if self.inputs % rank:  # a pad of nothing would copy
            x = functional.pad(x, (0, -self.inputs % rank))
        return x.unflatten(-1, (-1, rank)).sum(-2)

    def _shards(self) -> Tensor:
        """(out, rank), of which a mini one repeats."""
        return self.D if self.D.shape[-2] == self.out else share_shards(self.D, self.out, self.D.shape[-1])

    def change_rows(self, gather: Gather) -> Tensor:
        return _across(gather(share_shards(self.D, self.out, self.D.shape[-1])), self.inputs)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        rank = self.D.shape[-1]
        eye = torch.eye(rank, dtype=self.D.dtype, device=self.D.device)
        A = _across(eye, self.inputs).expand(*self.D.shape[:-2], -1, -1)
        return A, self.scale * share_shards(self.D, self.out, rank)

    def peft(self) -> PeftForm | None:
        if self.D.dim() != 2:
            return None
        rows = self.config.mini_rank
        mini = {"init_weights": True} if rows is None else {"mini_r": rows, "init_weights": "mini"}
        return PeftForm("MISS", {"r": self.D.shape[1], "miss_dropout": self.dropout, **mini}, {"miss_block": self.D.mT})


class _BlockAffine(Adapter):
    def __init__(self, config: Bone, matrix: Tensor):
        super().__init__()
        *stack, out, _ = matrix.shape
        self.matrix_shape = matrix.shape
        kind = wide(matrix) if config.dtype == "float32" else matrix.dtype
        shape = (*stack, out // config.rank, config.rank, config.rank)
        self.B = nn.Parameter(torch.zeros(shape, dtype=kind, device=matrix.device))

    def change(self, stored: Tensor) -> Tensor:
        return _block_change(stored.reshape(self.matrix_shape), self.B).reshape(stored.shape)

    def peft(self) -> PeftForm | None:
        if self.B.dim() != 3:
            return None
        return PeftForm(
            "MISS", {"r": self.B.shape[-1], "init_weights": "bat", "miss_dropout": 0.0}, {"miss_block": self.B}
        )


METHODS = (
    FunctionMethod(
        name="bone",
        family="adapt",
        config=Bone,
        summary="One small matrix beside each frozen weight, shared by all its column blocks.",
        goal="adapt",
        paper="bone",
        starts_at="weight",
        adapter=True,
        trial={"rank": 3},
        checked_by=("closed form", "peft"),
    ),
    FunctionMethod(
        name="miss",
        family="adapt",
        config=Bone,
        summary="Bone under its later name: matrix shard sharing.",
        goal="adapt",
        paper="bone",
        defaults={"form": "shards"},
        starts_at="weight",
        adapter=True,
        trial={"rank": 5, "mini_rank": 4},
        checked_by=("closed form", "peft"),
    ),
    FunctionMethod(
        name="bat",
        family="adapt",
        config=Bone,
        summary="One small affine map of the blocks of each frozen weight; it works on what the weight is.",
        goal="adapt",
        paper="bone",
        defaults={"form": "block_affine"},
        starts_at="weight",
        adapter=True,
        trial={"rank": 4},
        checked_by=("closed form", "peft"),
    ),
)
