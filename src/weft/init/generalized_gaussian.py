"""Draw weights from a generalised Gaussian, the law that the weights of trained language models follow.

Wu et al., "It Takes a Good Model to Train a Good Model", arXiv:2506.00486 (2025).

    p(w) = ν / (2 a Γ(1/ν)) · exp(−(|w|/a)^ν)        a = √(Var · Γ(1/ν) / Γ(3/ν)),  Var = gain² / fan

ν = 2 is the normal law (then this is Kaiming's initialisation), ν = 1 Laplace's; smaller ν has more weights near zero
and heavier tails. A sample is ± a · G^(1/ν), with G from the gamma law of shape 1/ν.

Differences from the paper and its code: the fan is the number of inputs by default, as in Kaiming's initialisation; the
authors' code divides by the number of outputs (``mode="fan_out"``) and fills embeddings too. Here one tensor is filled.
Complexity: one pass, in float64 (the gamma sampler of torch is written for the CPU). Re-implemented from the equations
(official code: CC-BY-NC-SA-4.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, check_fillable, plain_parameter
from weft.method import configure, parameter


@dataclass(frozen=True)
class GeneralizedGaussian:
    """Configuration of :func:`generalized_gaussian_`."""

    shape: float = parameter(1.0, "exponent ν of the law: 2 is normal, 1 Laplace's", minimum=0.1, maximum=10)
    mode: str = parameter("fan_in", "count inputs or outputs", choices=("fan_in", "fan_out"))
    nonlinearity: str = parameter(
        "relu",
        "what follows the layer, for the gain",
        choices=("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"),
    )


@torch.no_grad()
def generalized_gaussian_(
    tensor: Tensor,
    shape: float = 1.0,
    mode: str = "fan_in",
    nonlinearity: str = "relu",
    generator: Generator | None = None,
) -> Tensor:
    """Fill a weight with draws from a generalised Gaussian of variance gain² / fan, in place.

    Args:
        tensor: (out, in, …), floating point.
        shape: exponent ν of the law.
        mode: "fan_in" or "fan_out".
        nonlinearity: as in ``torch.nn.init.calculate_gain``.
        generator: of torch, on the CPU; torch's global one if None.

    Returns:
        The tensor.

    Raises:
        RecipeError: the tensor has fewer than two axes, no values, or is computed by a weight function, or a parameter is out of bounds.

    Source: arXiv:2506.00486, section on initialisation.

    >>> weight = generalized_gaussian_(torch.empty(400, 100), shape=0.8, generator=torch.Generator().manual_seed(0))
    >>> abs(weight.var().item() * 100 / 2 - 1) < 0.05
    True
    """
    config = configure(GeneralizedGaussian, {"shape": shape, "mode": mode, "nonlinearity": nonlinearity})
    check_fillable(tensor)
    if tensor.dim() < 2 or not tensor.is_floating_point():
        raise RecipeError(
            f"A weight (out, in, …) of floating point is needed, got {list(tensor.shape)}, {tensor.dtype}; vectors such as "
            "biases and gains have no fan."
        )
    fan = nn.init._calculate_correct_fan(tensor, config.mode)
    if not tensor.numel():
        return tensor
    variance = nn.init.calculate_gain(config.nonlinearity) ** 2 / fan
    log_scale = 0.5 * (math.log(variance) + math.lgamma(1 / config.shape) - math.lgamma(3 / config.shape))
    law = torch.full(tensor.shape, 1 / config.shape, dtype=torch.float64)
    size = torch._standard_gamma(law, generator=generator).pow_(1 / config.shape).mul_(math.exp(log_scale))
    sign = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    return tensor.copy_(size * sign)


METHODS = (
    InitMethod(
        name="generalized_gaussian",
        family="init",
        config=GeneralizedGaussian,
        summary="Weights drawn from the heavy-tailed law that trained language models end in.",
        goal="train",
        origin="gg-prior, arXiv:2506.00486",
        function=generalized_gaussian_,
        trial=lambda: nn.Linear(12, 8),
        apply=lambda model, generator, **parameters: generalized_gaussian_(
            plain_parameter(model), generator=generator, **parameters
        ),
        checked_by=("closed form", "scipy"),
    ),
)
