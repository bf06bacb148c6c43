"""Start a network of sines so that every layer sees inputs of one variance, as SIREN does.

Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", arXiv:2006.09661 (2020).

    h_{l+1} = sin(ω_l (W_l h_l + b_l)),  last layer linear       W_0 ~ U(−1/d, 1/d),   W_l ~ U(−√(6/d) / ω, √(6/d) / ω)

h_0: coordinates; W_l (out, in), d its inputs. Behind the first layer h has E[h²] = 1/2, so that ω W_l h has variance 1.

Differences from the paper and its code: none; biases keep torch's law, as in the code. ω of the first layer only enters the
forward pass.
Complexity: one pass. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, plain_parameter
from weft.method import configure, parameter

OMEGA = 30.0


@dataclass(frozen=True)
class SirenInit:
    """Configuration of :func:`siren_`."""

    omega: float | None = parameter(None, "ω of the hidden layers: the network's own, or else 30", minimum=1e-6)


class Siren(nn.Module):
    """A network of sines from coordinates to a signal, started as SIREN is.

    Args:
        inputs: coordinates of a point.
        width: of the hidden layers.
        outputs: channels of the signal.
        hidden: layers of sines.
        omega: ω of the layers of sines.
        first_omega: ω of the first; ``omega`` if None.

    Source: arXiv:2006.09661, section 3.

    >>> Siren(2, 64, 3)(torch.rand(10, 2)).shape
    torch.Size([10, 3])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        hidden: int = 4,
        omega: float = OMEGA,
        first_omega: float | None = None,
    ):
        super().__init__()
        if hidden < 1:
            raise RecipeError(f"A Siren has at least 1 layer of sines, got hidden={hidden}.")
        self.omega = omega
        self.first_omega = omega if first_omega is None else first_omega
        widths = [inputs, *[width] * hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        siren_(self)

    def forward(self, coordinates: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        x = coordinates
        for index, layer in enumerate(self.layers[:-1]):
            x = torch.sin((self.omega if index else self.first_omega) * layer(x))
        y: Tensor = self.layers[-1](x)
        return y

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"omega={self.omega:g}, first_omega={self.first_omega:g}"


@torch.no_grad()
def siren_(
    network: nn.Module | Sequence[nn.Module], omega: float | None = None, generator: Generator | None = None
) -> None:
    """Fill the weights of a network of sines as SIREN does, in place; biases keep their values.

    Args:
        network: whose linear layers in order are meant, or these layers.
        omega: ω of the hidden layers; the network's attribute ``omega`` if it has one, else 30.
        generator: of torch; torch's global one if None.

    Raises:
        RecipeError: no layers, or a weight that cannot be filled.

    Source: arXiv:2006.09661, section 3.2 and its supplement.

    >>> layers = [nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1)]
    >>> siren_(layers, generator=torch.Generator().manual_seed(0))
    >>> layers[0].weight.abs().max() <= 1 / 2, layers[1].weight.abs().max() <= (6 / 64) ** 0.5 / 30
    (tensor(True), tensor(True))
    """
    weights = linear_weights(network, 1)
    config = configure(SirenInit, {"omega": omega})
    own: float = getattr(network, "omega", OMEGA)
    hidden = own if config.omega is None else config.omega
    for index, weight in enumerate(weights):
        inputs = weight.shape[1]
        bound = math.sqrt(6 / inputs) / hidden if index else 1 / inputs
        weight.copy_(empty_like(weight, generator).uniform_(-bound, bound, generator=generator))


def linear_weights(network: nn.Module | Sequence[nn.Module], least: int) -> list[nn.Parameter]:
    """Weights (out, in) of a network's linear layers in order, or of these layers; at least so many.

    >>> [list(weight.shape) for weight in linear_weights(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), 2)]
    [[8, 2], [1, 8]]
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)] if isinstance(network, nn.Module) else network
    if len(layers) < least:
        raise RecipeError(
            f"At least {least} linear layer{'s are' if least > 1 else ' is'} needed, first to last; found {len(layers)}."
        )
    weights = [plain_parameter(layer) for layer in layers]
    if wrong := [list(w.shape) for w in weights if w.dim() != 2 or not w.shape[1]]:
        raise RecipeError(f"Weights must be (out, in) with at least one input, got {wrong[0]}.")
    return weights


def empty_like(weight: Tensor, generator: Generator | None) -> Tensor:
    """Where numbers for a weight are drawn: in float64, on the generator's device.

    >>> empty_like(torch.zeros(2, 3), None).dtype
    torch.float64
    """
    device = weight.device if generator is None else generator.device
    return torch.empty(weight.shape, dtype=torch.float64, device=device)


METHODS = (
    InitMethod(
        name="siren",
        family="init",
        config=SirenInit,
        summary="Weights of a network of sines whose layers all see inputs of one variance.",
        goal="train",
        origin="SIREN, arXiv:2006.09661",
        function=siren_,
        trial=lambda: Siren(1, 8, 1, hidden=2),
        apply=lambda model, generator, **parameters: siren_(model, generator=generator, **parameters),
        fills=("layers.0.weight", "layers.1.weight", "layers.2.weight"),
        checked_by=("closed form",),
    ),
)
