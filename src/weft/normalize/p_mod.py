"""Let each decoder layer work on the tokens that a router picks, fewer of them in deeper layers.

p-MoD, Zhang et al., arXiv:2412.04449 (2024).

    r = w · x + c                     router, zero at the start
    ω = α tanh(r) + 1                 TanhNorm: gates in (1 − α, 1 + α), exactly 1 at the start
    kept targets: the K with the largest r; all tokens that are no targets are kept
    y = u + ω o    kept target        u + o    kept, no target        ω x    skipped target (STRing: both get gradients)
    R_l = cos(π l / (L − 1)) / 2 + β, dense above 0.85, at least 0.15        share of targets kept in layer l of L

x, y: (batch, tokens, d); u, o: the block's residual stream and the branch that the gate weighs, y = u + o for an
ungated block.

Differences from the paper and its code: any block can be wrapped: without ``parts`` the gate weighs all that the block
adds (u = x, o = block(x) − x), where the code weighs the MLP branch only; ``parts`` gives (u, o) for that. Selection
uses r itself, weights use the tanh, so a saturated gate is no tie; of equal r the first token wins, on every device.
The number of kept tokens is one number for the batch, so that shapes are static; a sample with more or fewer targets
than ``target_count`` keeps as many tokens in all. The schedule uses the model's own number of layers.
Complexity: the block on K + (tokens − targets) tokens, and a sort. Re-implemented from the equations (official code:
Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.layer import LayerMethod
from weft.method import parameter
from weft.normalize._tokens import check_features

Parts = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PModConfig:
    """Mixture of depths around a block.

    >>> PModConfig(ratio=0.25).build(8)(torch.ones(1, 4, 8)).shape
    torch.Size([1, 4, 8])
    """

    ratio: float = parameter(0.5, "share of the targets that the block works on", minimum=0, maximum=1)
    alpha: float = parameter(0.2, "gates lie between 1 - alpha and 1 + alpha", minimum=0, maximum=1)

    def build(self, features: int, block: nn.Module | None = None) -> nn.Module:
        """The wrapped block; without one, a linear layer stands for it."""
        return MixtureOfDepths(nn.Linear(features, features) if block is None else block, features, **asdict(self))


def progressive_ratios(
    layers: int, *, shift: float = 0.5, dense_above: float = 0.85, least: float = 0.15
) -> tuple[float, ...]:
    """The share of tokens to keep in each layer, falling with depth as a cosine.

    Args:
        layers: how many layers the model has.
        shift: β; the mean share before the limits.
        dense_above: layers with a larger share keep everything.
        least: no layer keeps less.

    Source: arXiv:2412.04449, section 3.4.

    >>> [round(r, 2) for r in progressive_ratios(8)]
    [1.0, 1.0, 0.81, 0.61, 0.39, 0.19, 0.15, 0.15]
    """
    if layers < 1:
        raise RecipeError(f"a model has at least one layer, got {layers}.")
    shares = [math.cos(math.pi * l / max(layers - 1, 1)) / 2 + shift for l in range(layers)]
    return tuple(1.0 if s > dense_above else max(s, least) for s in shares)


def tanh_norm(logits: Tensor, *, alpha: float = 0.2) -> Tensor:
    """Gates around 1.

    >>> tanh_norm(torch.tensor([0.0, 100.0]))
    tensor([1.0000, 1.2000])
    """
    return alpha * logits.tanh() + 1


def select_tokens(logits: Tensor, count: int, targets: Tensor | None = None) -> Tensor:
    """Which tokens to keep: all that are no targets first, then targets by logits, the first of equals.

    Args:
        logits: (batch, tokens).
        count: how many to keep in each sample.
        targets: (batch, tokens), true for tokens that may be skipped; None: all.

    Returns:
        Indices (batch, count), ascending.

    >>> select_tokens(torch.tensor([[0.0, 2.0, 0.0, 1.0]]), 3)
    tensor([[0, 1, 3]])
    """
    order = logits if targets is None else torch.where(targets, logits, torch.inf)
    return order.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


class MixtureOfDepths(nn.Module):
    """A block that works on some tokens; the others go past it, weighed by their gate.

    Args:
        block: any module (batch, tokens, d) -> (batch, tokens, d), residual connection included.
        features: d.
        ratio: share of the targets that the block works on; 1 is dense.
        alpha: gates lie between 1 − alpha and 1 + alpha.
        parts: (block, tokens, **inputs) -> (u, o): what the gate leaves alone and what it weighs, (batch, tokens, d)
            each; None: u is the input, o all that the block adds.

    Source: arXiv:2412.04449, section 3.

    >>> layer = MixtureOfDepths(nn.Linear(4, 4), 4, ratio=0.5)
    >>> x = torch.ones(1, 6, 4)
    >>> bool((layer(x) == x).all(-1).sum() == 3)
    True
    """

    def __init__(
        self,
        block: nn.Module,
        features: int,
        *,
        ratio: float = 0.5,
        alpha: float = 0.2,
        parts: Parts | None = None,
    ):
        super().__init__()
        self.block = block
        self.features = features
        self.ratio = ratio
        self.alpha = alpha
        self.parts = parts or _residual
        self.router = nn.Linear(features, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        target_count: int | None = None,
        **per_token: Tensor | tuple[Tensor, ...],
    ) -> Tensor:
        """Run the block on the kept tokens.

        Args:
            x: (batch, tokens, d).
            targets: (batch, tokens), true for tokens that may be skipped (pictures' tokens); None: all.
            target_count: how many targets each sample has; needed with ``targets``.
            per_token: inputs of the block with one entry a token, (batch, tokens, …), or tuples of them, such as
                position_ids and position_embeddings; those of the kept tokens are passed on.

        Returns:
            (batch, tokens, d).

        Raises:
            RecipeError: ``targets`` came without their number.
        """
        check_features(x, -1, self.features, "MixtureOfDepths")
        tokens = x.shape[1]
        if targets is not None and target_count is None:
            raise RecipeError("targets need target_count, how many there are in each sample, to keep shapes static.")
        count = tokens if target_count is None else target_count
        logits = self.router(x).squeeze(-1)  # (batch, tokens)
        gates = tanh_norm(logits, alpha=self.alpha).to(x.dtype)
        if targets is not None:
            gates = torch.where(targets, gates, 1)
        kept = select_tokens(logits, tokens - count + int(self.ratio * count), targets)
        passed = {
            n: tuple(_take(one, kept) for one in v) if isinstance(v, tuple) else _take(v, kept)
            for n, v in per_token.items()
        }
        stream, branch = self.parts(self.block, _take(x, kept), **passed)
        weighed = (stream + branch * _take(gates, kept).unsqueeze(-1)).to(x.dtype)
        return (x * gates.unsqueeze(-1)).scatter(1, kept.unsqueeze(-1).expand_as(weighed), weighed)


def _residual(block: nn.Module, x: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    return x, block(x, **inputs) - x


def _take(values: Tensor, kept: Tensor) -> Tensor:
    """(batch, tokens, …), (batch, count) -> (batch, count, …)."""
    index = kept.reshape(*kept.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.expand(len(kept), *values.shape[1:]).gather(1, index)


METHODS = (
    LayerMethod(
        name="p_mod",
        family="normalize",
        config=PModConfig,
        layer=MixtureOfDepths,
        summary="A decoder layer works on the tokens that a router picks, fewer in deeper layers.",
        goal="train",
        paper="p-mod",
        checked_by=("closed form", "brute force"),
    ),
)
