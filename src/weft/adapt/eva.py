"""Start LoRA at the directions that each layer's inputs take in your data, and give rank to the layers that need it.

Explained Variance Adaptation, Paischer et al., arXiv:2410.07170 (2024).

    X = U diag(S) Vᵀ                   X: (tokens, in), a layer's inputs without their mean; V: (in, cap)
    ratio_j = S_j² / Σ_d Σ_tokens X²   share of the inputs' variance along direction j
    rank of a layer                    how many of its first cap = rank · ρ ratios are among the Σ rank largest of all
    A = V[:, :rank]ᵀ, B = 0            whiten: row j of A divided by √S_j
    W = W₀ + alpha / rank · B A        of the configuration's rank, whatever a layer's own (adjust_alpha)

A and B then train as LoRA's do. A layer of rank 0 gets no adapter. An orthonormal A of V's rows captures more of the
inputs' variance than any other of its rank, which is what B's first gradient sees. To load trained factors, attach
LoRA with their ranks: ranks found in other data may differ. Processes that train together need the same data here.

Differences from the paper and its code: data are passed once, and the same for all layers, until all layers' needed
directions stand still, data end, or max_batches (with a warning); the code takes a layer out when it stands still,
puts it back when it needs more, and starts the data again, without end if a batch has fewer tokens than directions.
Standing still is the overlap of subspaces (mean squared cosine of their principal angles) from one batch to the next,
at least ``tolerance``: directions of nearly equal variance turn among themselves for ever, so that the code's cosine
of each direction never settles, and the mean rather than the least because the last direction has such neighbours
outside. Layers fed one tensor share the decomposition but not the factors: the code whitens shared ones again for each
layer. Centring, which the code does where the paper speaks of the inputs' own decomposition, can be left out.
Decompositions are exact, in float64. rank and alpha have LoRA's defaults (paper: rank 16).
Complexity: a forward pass a batch (two for the first), and for each distinct input about tokens · in · (cap + 1024)
multiplications. Re-implemented from the equations (official code: MIT; PEFT's: Apache-2.0).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapt.lora import LoRA
from weft.engine.batches import counted, evaluating, fed_alike, feed, layer_inputs, rows_of
from weft.engine.incremental_pca import IncrementalPCA, overlap
from weft.errors import RecipeError
from weft.function.attach import holders
from weft.function.protocol import FunctionConfig, FunctionMethod, WeightFunction
from weft.function.where import is_linear
from weft.method import parameter

_BLOCK = 1024  # rows of a decomposition, whose cost grows with their square


@dataclass(frozen=True)
class EVA:
    """LoRA that starts at the principal components of its layers' inputs; needs data.

    Source: arXiv:2410.07170, section 3.

    >>> import torch, weft
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> report = weft.adapt_(model, EVA(rank=2), data=[torch.randn(64, 16) for _ in range(4)])
    >>> sum(f.A.shape[0] for fs in weft.functions(model).values() for f in fs)
    4
    """

    rank: int = parameter(8, "rows of A, on average over layers", minimum=1)
    alpha: float = parameter(16.0, "numerator of the scale", minimum=0)
    rho: float = parameter(2.0, "a layer gets at most this many times the rank; 1: all get the same", minimum=1)
    whiten: bool = parameter(False, "divide rows of A by the root of their singular value; may help in vision")
    center: bool = parameter(True, "components of the inputs without their mean")
    adjust_alpha: bool = parameter(True, "scale by alpha / rank of this configuration instead of the layer's own rank")
    label_mask: bool = parameter(True, "leave out tokens whose label is -100, where batches have labels")
    tolerance: float = parameter(
        0.99, "overlap with the batch before at which directions stand still", minimum=0, maximum=1
    )
    max_batches: int = parameter(100, "batches to look at, at most", minimum=1)
    dropout: float = parameter(0.0, "share of inputs dropped in training", minimum=0, maximum=1)
    dtype: str = parameter(
        "float32", "of the factors: at least float32, or the weight's own", choices=("float32", "weight")
    )

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """Not for one weight alone: :meth:`plan` shares ranks out among all."""
        raise RecipeError("EVA needs the whole model and data; attach it with weft.adapt_(model, EVA(), data=batches).")

    def plan(
        self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None
    ) -> Mapping[str, FunctionConfig]:
        """LoRA for each weight, with its rank and its start.

        Args:
            model: the model; it is run in evaluation.
            weights: the chosen weights by full name, (out, in).
            data: batches as the model takes them.

        Raises:
            RecipeError: there are no data or too few, a layer is not linear or never runs, or inputs hold NaN.
        """
        if data is None:
            raise RecipeError(
                "EVA starts from the inputs of the layers, and data is missing. Pass some hundreds of samples that you "
                "will train on, in batches as the model takes them: weft.adapt_(model, EVA(), data=batches), each batch "
                "a tensor, a tuple, or a mapping such as a tokenizer's."
            )
        try:
            batches = iter(data)
        except TypeError:
            raise RecipeError(
                f"data is a {type(data).__name__}, not batches: give a list or a DataLoader of what the model takes."
            ) from None
        layers = _linear_layers(model, weights, self.rank)
        caps = {n: min(max(self.rank, round(self.rank * self.rho)), *w.shape) for n, w in weights.items()}
        found = _components(self, model, layers, caps, batches)
        ranks = _shares(self, found, caps)
        builders: dict[str, FunctionConfig] = {}
        for name, rank in ranks.items():
            if rank:
                alpha = self.alpha * rank / self.rank if self.adjust_alpha else self.alpha
                lora = LoRA(rank=rank, alpha=alpha, dropout=self.dropout, dtype=self.dtype)
                builders[name] = _Started(lora, _start(self, found[name], rank, name))
        return builders


def redistribute_ranks(
    ratios: Mapping[str, Sequence[float] | Tensor], budget: int, cap: int | Mapping[str, int]
) -> dict[str, int]:
    """Share a budget of directions out to layers, to the largest ratios first.

    Args:
        ratios: for each layer its directions' shares of explained variance, falling.
        budget: directions in all.
        cap: the most that a layer gets, one number or one a layer.

    Returns:
        For each layer how many; they sum to the budget. Of equal ratios the layer that comes first gets the direction.

    Raises:
        RecipeError: there are fewer directions than the budget, or a ratio is NaN.

    >>> redistribute_ranks({"a": [0.5, 0.3, 0.1], "b": [0.2, 0.1, 0.05]}, 4, 3)
    {'a': 3, 'b': 1}
    """
    pooled = []
    for name, values in ratios.items():
        most = cap if isinstance(cap, int) else cap[name]
        pooled += [(float(v), name) for v in list(values)[:most]]
    if not 0 <= budget <= len(pooled):
        raise RecipeError(f"A budget of {budget} directions cannot be shared out of {len(pooled)}.")
    if any(v != v for v, _ in pooled):
        raise RecipeError("A ratio of explained variance is NaN; look for NaN in the inputs.")
    ranks = dict.fromkeys(ratios, 0)
    for _, name in sorted(pooled, key=lambda pair: -pair[0])[:budget]:
        ranks[name] += 1
    return ranks


@dataclass(frozen=True, eq=False)
class _Started:
    """LoRA with a given A."""

    lora: LoRA
    A: Tensor

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        function: Any = self.lora.build(weight, batched=batched)
        with torch.no_grad():
            function.A.copy_(self.A)
        return function


def _start(config: EVA, pca: IncrementalPCA, rank: int, name: str) -> Tensor:
    """(rank, in), of its own."""
    assert pca.components is not None
    assert pca.singular_values is not None
    A, values = pca.components[:rank].clone(), pca.singular_values[:rank]
    if config.whiten:
        if bool((values <= 1e-9 * values[0]).any()):
            raise RecipeError(
                f"{name}: its inputs do not vary in all of {rank} directions, so they cannot be whitened; set "
                "whiten=False, lower the rank, or leave the layer out."
            )
        A = A / values.sqrt().unsqueeze(1)
    return A


def _shares(config: EVA, found: Mapping[str, IncrementalPCA], caps: Mapping[str, int]) -> dict[str, int]:
    return redistribute_ranks({n: found[n].ratios.tolist() for n in caps}, config.rank * len(caps), caps)


def _linear_layers(model: nn.Module, weights: Mapping[str, Tensor], rank: int) -> dict[str, list[nn.Module]]:
    """The linear layers that multiply by each weight; of a tied one all, the embedding not."""
    found = {}
    for name, layers in holders(model, weights).items():
        weight, linear = weights[name], [m for m in layers.values() if is_linear(m)]
        if weight.dim() != 2 or not linear:
            kind = type(next(iter(layers.values()))).__name__
            reason = "a row for each token, no inputs that it multiplies" if "Embedding" in kind else "no linear layer"
            raise RecipeError(
                f"{name} {list(weight.shape)} of a {kind} is {reason}, and EVA needs inputs (…, in) that a matrix "
                'multiplies. Choose where="all-linear", or give this layer LoRA: {"all-linear": EVA(), …: LoRA()}.'
            )
        if weight.is_meta:
            raise RecipeError(f"{name} is on the meta device, and EVA runs the model; load its weights first.")
        if rank > min(weight.shape):
            raise RecipeError(
                f"{name}: rank {rank} is more than a matrix of {list(weight.shape)} can have; choose a lower rank, or "
                "leave the layer out."
            )
        found[name] = list({id(m): m for m in linear}.values())
    return found


def _components(
    config: EVA,
    model: nn.Module,
    layers: Mapping[str, list[nn.Module]],
    caps: Mapping[str, int],
    batches: Iterator[Any],
) -> dict[str, IncrementalPCA]:
    """Principal components of the inputs of each weight."""
    first = next(batches, None)
    if first is None:
        raise RecipeError("EVA got no batch: data is empty, or an iterator that was used up before.")
    with evaluating(model):
        owner = fed_alike(model, layers, first)
        idle = [n for n in layers if n not in owner]
        if idle:
            raise RecipeError(
                f"{idle[0]} saw no inputs: its layer did not run as a layer in the first batch (attention may read the "
                f"weight itself, experts may get no token). Leave it out, or give it LoRA; {len(idle)} of {len(layers)} "
                "are so."
            )
        shared = {o: max(caps[n] for n in caps if owner[n] == o) for o in owner.values()}
        own = {o: IncrementalPCA(cap, center=config.center) for o, cap in shared.items()}
        found = {n: own[o] for n, o in owner.items()}
        masks: list[Tensor] = []

        def measure(name: str, x: Tensor) -> None:
            for rows in rows_of(x, masks).split(_BLOCK):
                try:
                    own[name].update(rows)
                except RecipeError as error:
                    raise RecipeError(f"{name}, its inputs: {error}") from None

        with layer_inputs({o: layers[o] for o in own}, measure):
            for count, batch in enumerate(itertools.chain([first], batches)):
                if count == config.max_batches:
                    _warn(count)
                    break
                before = {o: pca.components for o, pca in own.items()}
                masks[:] = counted(batch, labels=config.label_mask)
                feed(model, batch)
                if all(pca.components is not None for pca in own.values()) and _still(
                    config, found, caps, owner, before
                ):
                    break
    for name, cap in caps.items():
        if found[name].count < cap + config.center:
            raise RecipeError(
                f"{name}: the data hold {found[name].count} tokens for it, and {cap} directions need "
                f"{cap + config.center} or more. Pass more data, or lower rank or rho."
            )
    return found


def _still(
    config: EVA,
    found: Mapping[str, IncrementalPCA],
    caps: Mapping[str, int],
    owner: Mapping[str, str],
    before: Mapping[str, Tensor | None],
) -> bool:
    """Whether the directions that each weight would get now are those of the batch before."""
    if any(found[n].count < cap + config.center for n, cap in caps.items()):
        return False
    for name, rank in _shares(config, found, caps).items():
        old, new = before[owner[name]], found[name].components
        if old is None or new is None or len(old) < rank or overlap(old[:rank], new[:rank]) < config.tolerance:
            return False
    return True


def _warn(count: int) -> None:
    warnings.warn(
        f"EVA stopped after {count} batches while directions still turned. The start is that of these batches; raise "
        "max_batches for one that more data would leave as it is, or lower tolerance.",
        stacklevel=2,
    )


METHODS = (
    FunctionMethod(
        name="eva",
        family="adapt",
        config=EVA,
        summary="LoRA that starts at the principal components of each layer's inputs, with rank where they need it.",
        goal="adapt",
        paper="eva",
        needs="calibration",
        starts_at="weight",
        adapter=True,
        # the checks load one model's state into another, whose ranks differ where they depend on the inputs
        trial={"rank": 2, "alpha": 4.0, "rho": 1.0},
        checked_by=("closed form", "scikit-learn", "peft"),
    ),
)
