"""Drop most of each fine-tune's changes at random and enlarge the rest, so that many models fit into one.

DARE, Yu et al., arXiv:2311.03099 (2023), *Language Models are Super Mario*.

    τᵢ = Wᵢ − W₀                          differences from the base (any shape)
    τ̂ᵢ = bᵢ ⊙ τᵢ / density                bᵢ ~ Bernoulli(density), one draw an element: E τ̂ᵢ = τᵢ
    W  = W₀ + λ Σᵢ wᵢ τ̂ᵢ                  ``dare_linear``; divided by Σᵢ wᵢ with ``normalize``
    W  = W₀ + λ Σᵢ wᵢ mᵢ τ̂ᵢ / Σᵢ wᵢ mᵢ    ``dare_ties``: mᵢ marks the models of the elected sign, as in TIES

Differences from the paper and its code: ``density`` is one minus the drop rate p. ``dare_ties`` leaves out TIES's own
trimming, because the dropping stands in its place. The mask of an element depends on the seed, the method, the
tensor's name, the model's place and the element's index alone.
mergekit (``mergekit/dare_linear``, ``mergekit/dare_ties``) enlarges the rest until its L1 norm in each tensor is what
it was before dropping, instead of by 1 / density.
Complexity: one pass; mergekit's rows take one more to measure the norms. Re-implemented from the equations (official
code: without a licence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.kernels.jit import kernel
from weft.merge.norms import norm_ratios
from weft.merge.task_arithmetic import combine_deltas
from weft.method import configure, parameter, per_model


@dataclass(frozen=True)
class Dare:
    """Configuration of :func:`dare`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model's changes", per_model="weight")
    density: float | tuple[float, ...] = parameter(
        0.1, "share of each model's changes that is kept", minimum=0, maximum=1, per_model="density"
    )
    rescale: bool = parameter(True, "enlarge the changes that are kept to make up for those that are dropped")
    elect: bool = parameter(False, "elect a sign for each weight and merge the models that agree, as TIES does")
    normalize: bool = parameter(False, "divide by the sum of the weights (of those that agree, with elect)")
    lambda_: float = parameter(1.0, "scale of the merged change", key="lambda")


def dare(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.1,
    rescale: bool = True,
    elect: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
    match_norm: bool = False,
    seed: int = 0,
    name: str = "tensor",
) -> Any:
    """Drop at random, enlarge and merge differences from a common base.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one number for each model, or one for all.
        density: probability with which each element is kept.
        rescale: divide what is kept by ``density``.
        elect: merge only the models that agree with the elected sign of an element.
        normalize: divide by the sum of the weights, with ``elect`` of those that agree.
        lambda_: scale of the result.
        match_norm: rescale to the L1 norm before dropping, as mergekit does, instead of by 1 / density.
        seed, name: key the random numbers (``name`` only where ``deltas`` are not state dicts).

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2311.03099, section 3.1.

    >>> import numpy as np
    >>> from weft.merge.dare import dare
    >>> dare([np.ones(8, np.float32)], density=0.25, seed=1)
    array([0., 4., 0., 0., 0., 0., 4., 0.], dtype=float32)
    """
    values = {
        "weights": weights,
        "density": density,
        "rescale": rescale,
        "elect": elect,
        "normalize": normalize,
        "lambda_": lambda_,
    }
    row = METHODS[2 * match_norm + elect]
    return merge_tensors(row, deltas, configure(Dare, values, "dare"), are_deltas=True, seed=seed, name=name)


def _prepare(scan: Scan, config: Dare) -> list[float]:
    densities = per_model(config.density, scan.models, "density")
    if not config.rescale or min(densities) >= 1:
        return [1.0] * scan.models
    return norm_ratios(scan, lambda chunk, model: _drop(chunk, model, densities[model], 1.0))


def _combine(chunk: Chunk, config: Dare, state: list[float] | None, out: np.ndarray) -> None:
    for model, density in enumerate(per_model(config.density, len(chunk.tensors), "density")):
        if state is not None:
            scale = state[model]
        else:
            scale = 1 / density if config.rescale and density > 0 else 1.0
        _drop(chunk, model, density, scale)
    combine_deltas(chunk.tensors, config.weights, config.elect, config.normalize, config.lambda_, out)


def _drop(chunk: Chunk, model: int, density: float, scale: float) -> None:
    if density < 1:
        keep_randomly(chunk.tensors[model], chunk.uniform(model), np.float32(density), np.float32(scale))


@kernel
def keep_randomly(values, uniform, density, scale):  # (n,) in place
    zero = np.float32(0)
    for i in range(values.size):
        values[i] = values[i] * scale if uniform[i] < density else zero


def _row(name: str, summary: str, defaults: dict[str, Any], differs: str = "") -> MergeMethod:
    return MergeMethod(
        name=name,
        family="merge",
        config=Dare,
        summary=summary,
        goal="combine",
        origin="mergekit " + name.removeprefix("mergekit/") if differs else "DARE, arXiv:2311.03099",
        defaults=defaults,
        combine=_combine,
        prepare=_prepare if differs else None,
        deltas=True,
        base="required",
        function=dare,
        differs=differs,
        checked_by=("closed form", "brute force", "mergekit") if differs else ("closed form", "brute force"),
    )


_DIFFERS = "rescales each tensor to its L1 norm before dropping, the paper by 1 / density; "
METHODS = (
    _row("dare_linear", "Drop most changes at random, enlarge the rest, add them up.", {}),
    _row(
        "dare_ties",
        "Drop most changes at random, enlarge the rest, elect a sign for each weight, average the models that agree.",
        {"elect": True, "normalize": True},
    ),
    _row(
        "mergekit/dare_linear",
        "DARE with mergekit's rescaling: the L1 norm of each tensor's change stays the same.",
        {"density": 1.0},
        _DIFFERS + "keeps everything by default",
    ),
    _row(
        "mergekit/dare_ties",
        "DARE and sign election with mergekit's rescaling: the L1 norm of each tensor's change stays the same.",
        {"density": 1.0, "elect": True},
        _DIFFERS + "keeps everything by default, and adds up the models that agree instead of averaging them",
    ),
)
