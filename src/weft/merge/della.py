"""Drop changes at random, small ones more often than large ones, and enlarge the rest to make up for it.

DELLA, Deep et al., arXiv:2406.11617 (2024).

    τᵢ = Wᵢ − W₀                                     differences from the base (rows of length c)
    qᵢ = density − ε + 2 ε rankᵢ / (c − 1)           rank of |τᵢ| in its row, 0 for the smallest, c − 1 for the largest
    τ̂ᵢ = bᵢ τᵢ / qᵢ                                  bᵢ ~ Bernoulli(qᵢ), so that E τ̂ᵢ = τᵢ
    W  = W₀ + λ Σᵢ wᵢ mᵢ τ̂ᵢ / Σᵢ wᵢ mᵢ               ``della``: mᵢ marks the models of the elected sign, as in TIES
    W  = W₀ + λ Σᵢ wᵢ τ̂ᵢ                             ``della_linear``

Differences from the paper and its code: ``density`` is one minus the drop rate p; ε is half the width of the range of
probabilities, as in the code and in mergekit, the whole width in the paper. Rows are runs of the last axis; the code and
mergekit rank along axis 1, which is the same for matrices. Of equal magnitudes the lowest index ranks highest. In a row
of one element q is ``density`` (both others divide by zero). Everything is kept where ``density`` is 1.
mergekit (``mergekit/della``, ``mergekit/della_linear``) rescales each tensor to its L1 norm before dropping, instead of
each element by 1 / qᵢ.
Complexity: one pass that sorts every row, O(n log c); mergekit's rows sort twice. Re-implemented from the equations
(official code: a fork of mergekit, LGPL-3.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.kernels.jit import kernel
from weft.merge.norms import norm_ratios
from weft.merge.task_arithmetic import combine_deltas
from weft.method import configure, parameter, per_model

_BY_PROBABILITY = 0.0  # in place of a scale: divide each element by its own probability
_NO_SIGN, _LOW_HALF, _HALF = np.uint64(0x7FFFFFFF), np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True)
class Della:
    """Configuration of :func:`della`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each model's changes", per_model="weight")
    density: float | tuple[float, ...] = parameter(
        0.7, "share of each model's changes that is kept on average", minimum=0, maximum=1, per_model="density"
    )
    epsilon: float | tuple[float, ...] = parameter(
        0.07,
        "how much likelier than density the largest change of a row is kept, and less likely the smallest",
        minimum=0,
        maximum=0.5,
        per_model="epsilon",
    )
    rescale: bool = parameter(True, "enlarge the changes that are kept to make up for those that are dropped")
    elect: bool = parameter(True, "elect a sign for each weight and merge the models that agree, as TIES does")
    normalize: bool = parameter(True, "divide by the sum of the weights (of those that agree, with elect)")
    lambda_: float = parameter(1.0, "scale of the merged change", key="lambda")

    def __post_init__(self) -> None:
        count = max(len(v) if isinstance(v, tuple) else 1 for v in (self.density, self.epsilon))
        densities, epsilons = per_model(self.density, count, "density"), per_model(self.epsilon, count, "epsilon")
        for density, epsilon in zip(densities, epsilons):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon <= 1:
                raise RecipeError(
                    f"della: density {density:g} with epsilon {epsilon:g} gives probabilities from "
                    f"{density - epsilon:g} to {density + epsilon:g}, which must lie in (0, 1]. "
                    f"Choose epsilon below {min(density, 1 - density):g}, or another density."
                )


def della(
    deltas: Sequence[Any],
    *,
    weights: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.7,
    epsilon: float | Sequence[float] = 0.07,
    rescale: bool = True,
    elect: bool = True,
    normalize: bool = True,
    lambda_: float = 1.0,
    match_norm: bool = False,
    seed: int = 0,
    name: str = "tensor",
) -> Any:
    """Drop by magnitude and chance, enlarge and merge differences from a common base.

    Args:
        deltas: one difference (torch or numpy, any shape), or one state dict of differences, for each model.
        weights: one number for each model, or one for all.
        density: mean probability with which elements are kept.
        epsilon: half the difference in probability between the largest and the smallest element of a row.
        rescale: divide what is kept by the probability with which it was.
        elect: merge only the models that agree with the elected sign of an element.
        normalize: divide by the sum of the weights, with ``elect`` of those that agree.
        lambda_: scale of the result.
        match_norm: rescale to the L1 norm before dropping, as mergekit does, instead of by the probabilities.
        seed, name: key the random numbers (``name`` only where ``deltas`` are not state dicts).

    Returns:
        The merged difference; add it to the base.

    Raises:
        RecipeError: a parameter, or a probability, is out of bounds. ShapeError: shapes differ.

    Source: arXiv:2406.11617, section 3.

    >>> import numpy as np
    >>> from weft.merge.della import della
    >>> della([np.float32([1, 2, 3])], density=0.5, epsilon=0.25, seed=1)
    array([0., 4., 4.], dtype=float32)
    """
    values = {
        "weights": weights,
        "density": density,
        "epsilon": epsilon,
        "rescale": rescale,
        "elect": elect,
        "normalize": normalize,
        "lambda_": lambda_,
    }
    row = METHODS[2 * match_norm + (not elect)]
    return merge_tensors(row, deltas, configure(Della, values, "della"), are_deltas=True, seed=seed, name=name)


def _prepare(scan: Scan, config: Della) -> list[float]:
    if not config.rescale or min(per_model(config.density, scan.models, "density")) >= 1:
        return [1.0] * scan.models
    return norm_ratios(scan, lambda chunk, model: _drop(chunk, model, config, 1.0))


def _combine(chunk: Chunk, config: Della, state: list[float] | None, out: np.ndarray) -> None:
    for model in range(len(chunk.tensors)):
        if state is not None:
            scale = state[model]
        else:
            scale = _BY_PROBABILITY if config.rescale else 1.0
        _drop(chunk, model, config, scale)
    combine_deltas(chunk.tensors, config.weights, config.elect, config.normalize, config.lambda_, out)


def _drop(chunk: Chunk, model: int, config: Della, scale: float) -> None:
    density = per_model(config.density, len(chunk.tensors), "density")[model]
    epsilon = per_model(config.epsilon, len(chunk.tensors), "epsilon")[model]
    delta = chunk.tensors[model]
    if density <= 0:
        delta[:] = 0
    elif density < 1:
        keys = chunk.workspace.array("ranks", (chunk.size,), np.uint64)
        probability = chunk.scratch("probability")
        pack_magnitudes(delta.view(np.uint32), chunk.row_length, keys)
        keys.reshape(-1, chunk.row_length).sort(axis=1)
        probability_by_rank(keys, chunk.row_length, np.float32(density), np.float32(epsilon), probability)
        keep_by_probability(delta, chunk.uniform(model), probability, np.float32(scale))


@kernel
def pack_magnitudes(bits, row_length, keys):  # (n,) uint32 view of float32 -> (n,) magnitude, then place from the end
    for start in range(0, bits.size, row_length):
        for i in range(row_length):
            keys[start + i] = ((np.uint64(bits[start + i]) & _NO_SIGN) << _HALF) | np.uint64(row_length - 1 - i)


@kernel
def probability_by_rank(keys, row_length, density, epsilon, out):  # keys sorted in each row -> (n,)
    one, two = np.float32(1), np.float32(2)
    for start in range(0, out.size, row_length):
        last = np.uint64(start + row_length - 1)
        for rank in range(row_length):
            share = np.float32(rank) / np.float32(row_length - 1) if row_length > 1 else np.float32(0.5)
            out[last - (keys[start + rank] & _LOW_HALF)] = density + epsilon * (two * share - one)


@kernel
def keep_by_probability(values, uniform, probability, scale):  # (n,) in place
    zero, one = np.float32(0), np.float32(1)
    for i in range(values.size):
        factor = scale if scale != zero else one / probability[i]
        values[i] = values[i] * factor if uniform[i] < probability[i] else zero


def _row(name: str, summary: str, defaults: dict[str, Any], differs: str = "") -> MergeMethod:
    return MergeMethod(
        name=name,
        family="merge",
        config=Della,
        summary=summary,
        goal="combine",
        origin="mergekit " + name.removeprefix("mergekit/") if differs else "DELLA-Merging, arXiv:2406.11617",
        defaults=defaults,
        combine=_combine,
        prepare=_prepare if differs else None,
        deltas=True,
        base="required",
        granularity="row",
        function=della,
        differs=differs,
        checked_by=("closed form", "brute force", "mergekit") if differs else ("closed form", "brute force"),
    )


_DIFFERS = (
    "rescales each tensor to its L1 norm before dropping, the paper each element by its probability; "
    "keeps everything by default"
)
_MERGEKIT = {"density": 1.0, "epsilon": 0.15}
METHODS = (
    _row(
        "della",
        "Drop small changes more often than large ones, enlarge the rest, elect signs, average the models that agree.",
        {},
    ),
    _row(
        "della_linear",
        "Drop small changes more often than large ones, enlarge the rest, add them up.",
        {"elect": False, "normalize": False},
    ),
    _row(
        "mergekit/della",
        "DELLA with mergekit's rescaling: the L1 norm of each tensor's change stays the same.",
        _MERGEKIT,
        _DIFFERS,
    ),
    _row(
        "mergekit/della_linear",
        "DELLA without sign election, with mergekit's rescaling.",
        {**_MERGEKIT, "elect": False, "normalize": False},
        _DIFFERS,
    ),
)
