"""Choose each layer's weight variance in a graph network from what message passing on your graph does to the signal.

Virgo, Li, Wang and Song, "On the Initialization of Graph Neural Networks", ICML 2023 (PMLR 202).

    c_l = ‖Âˡ x̄‖²      forward:  v_1 = 2 / m_0,                        v_l = (2 / m_{l−1}) · c_{l−1} / c_l
    d_j = ‖(Âᵀ)ʲ 1‖²    backward: v_L = n / ((C − 1) · d_1),            v_{L+1−j} = (2 / m_{L+1−j}) · d_{j−1} / d_j
    harmonic: 2 / (1/forward + 1/backward), arithmetic: (forward + backward) / 2;     W_l ~ U(−√(3 v_l), √(3 v_l))

Â (n, n): what a layer multiplies features by; x̄ (n): features averaged over channels; layer l = 1…L maps m_{l−1}
channels to m_l; C classes. The 2 is ReLU's. Biases stay as they are.

Differences from the paper and its code: the backward pass goes through Âᵀ (the code uses Â, the same for symmetric
graphs). Hidden widths may differ: the forward rule divides by a layer's inputs, the backward rule by its outputs. Where
channels cancel in x̄ (standardised features), c_l = ‖Âˡ X‖² / m_0, the mean energy of a channel, takes its place,
with a warning. ``cap`` bounds what the graph may multiply a layer's variance by. Skip connections are not in the derivation.
Complexity: 2 L sparse products with one vector (with all channels of X for standardised features), in float64.
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, plain_parameter
from weft.init.adjacency import normalized_adjacency, sparse_matrix
from weft.method import configure, parameter

# x̄² of m_0 independent channels of mean zero is about 1.6 / m_0 of what it would be if all had one sign; below this
# many m_0-ths, the mean is told apart from noise no more.
_CANCELLED = 4.0


@dataclass(frozen=True)
class Virgo:
    """Configuration of :func:`virgo_`."""

    mode: str = parameter(
        "harmonic", "which pass keeps its variance", choices=("forward", "backward", "harmonic", "arithmetic")
    )
    estimate: str = parameter(
        "auto",
        "signal that is followed: the channels' mean, each channel, or the mean unless channels cancel",
        choices=("auto", "mean", "channels"),
    )
    classes: int | None = parameter(None, "number of classes; the last layer's outputs if not given", minimum=2)
    cap: float | None = parameter(None, "largest factor that the graph may put on a layer's variance", minimum=1)


@torch.no_grad()
def graph_variances(
    adjacency: Tensor,
    features: Tensor | None,
    widths: Sequence[int],
    classes: int,
    mode: str = "harmonic",
    estimate: str = "auto",
    cap: float | None = None,
) -> list[float]:
    """The variance of each layer's weights.

    Args:
        adjacency: Â (n, n), dense or sparse: what a layer multiplies features by, see :func:`normalized_adjacency`.
        features: X (n, m_0), dense or sparse; None for one-hot nodes, whose mean is the same everywhere.
        widths: (m_0, …, m_{L−1}), the input channels of each layer.
        classes: C, at least 2.
        mode: "forward", "backward", "harmonic" or "arithmetic".
        estimate: "mean" follows x̄, "channels" ‖X‖², "auto" the first unless channels cancel in it.
        cap: largest graph factor, c_{l−1} / c_l and its kind; none if None.

    Returns:
        L variances.

    Raises:
        RecipeError: shapes do not fit, values are not finite, or no message arrives after some layers.

    Source: equations above.

    >>> ring = (torch.eye(5).roll(1, 0) + torch.eye(5).roll(-1, 0)).double()  # regular: Kaiming's variances
    >>> [round(v, 9) for v in graph_variances(normalized_adjacency(ring), torch.ones(5, 8), (8, 16), 3, mode="forward")]
    [0.25, 0.125]
    """
    given = {"mode": mode, "estimate": estimate, "classes": classes, "cap": cap}
    config = configure(Virgo, given, "graph_variances")
    widths = [int(w) for w in widths]
    if not widths or min(widths) < 1:
        raise RecipeError(
            f"widths are the input channels of each layer, at least one layer and 1 channel; got {widths}."
        )
    if config.classes is None:
        raise RecipeError("classes must be given: how many labels the last layer tells apart.")
    matrix = sparse_matrix(adjacency)
    n, layers = len(matrix), len(widths)
    largest = math.inf if config.cap is None else config.cap
    forward, backward = [2.0 / widths[0]], [0.0] * layers
    if mode != "backward" and layers > 1:
        energies = list(_energies(matrix, _signal(features, n, widths[0], estimate, matrix), layers))
        forward += [2 / m * min(a / b, largest) for m, a, b in zip(widths[1:], energies, energies[1:])]
    if mode != "forward":
        ones = torch.ones(n, 1, dtype=torch.float64, device=matrix.device)
        energies = list(_energies(matrix.t(), ones, layers))
        backward[-1] = min(n / energies[0], largest) / (classes - 1)
        for layer in range(layers - 1):
            past = layers - 2 - layer
            backward[layer] = 2 / widths[layer + 1] * min(energies[past] / energies[past + 1], largest)
    if mode == "forward":
        return forward
    if mode == "backward":
        return backward
    if mode == "arithmetic":
        return [(f + b) / 2 for f, b in zip(forward, backward)]
    return [2 / (1 / f + 1 / b) for f, b in zip(forward, backward)]


@torch.no_grad()
def virgo_(
    layers: Sequence[nn.Module | Sequence[nn.Module]],
    adjacency: Tensor,
    features: Tensor | None,
    mode: str = "harmonic",
    estimate: str = "auto",
    classes: int | None = None,
    cap: float | None = None,
    generator: Generator | None = None,
) -> list[float]:
    """Fill the weights of a graph network's layers from uniform laws of Virgo's variances, in place.

    Args:
        layers: what carries each layer's ``weight`` (out, in), first to last; a list where a layer has several side by
            side (GraphSAGE's own and neighbours' weights), which all get its variance.
        adjacency: Â (n, n), see :func:`graph_variances`; for many graphs, those of a batch as blocks of one matrix.
        features: X (n, in), or None for one-hot nodes.
        mode, estimate, cap: see :func:`graph_variances`.
        classes: number of classes; the last layer's outputs if None.
        generator: of torch; torch's global one if None.

    Returns:
        The variances, one for each layer.

    Raises:
        RecipeError: a layer has no plain weight (out, in), layers do not fit each other, or see :func:`graph_variances`.

    Source: equations above.

    >>> path = normalized_adjacency(torch.diag(torch.ones(9), 1) + torch.diag(torch.ones(9), -1))
    >>> layers = [nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 3)]
    >>> [round(v, 3) for v in virgo_(layers, path, torch.rand(10, 4), mode="backward")]
    [0.031, 0.031, 0.502]
    """
    groups: list[list[nn.Module]] = [list(layer) if isinstance(layer, Sequence) else [layer] for layer in layers]
    if not all(groups) or not groups:
        raise RecipeError("virgo_ needs at least one layer, and at least one weight for each.")
    weights = [[plain_parameter(module) for module in group] for group in groups]
    for index, group in enumerate(weights):
        shapes = {tuple(weight.shape) for weight in group}
        out, inputs = next(iter(shapes)) if len(shapes) == 1 and group[0].dim() == 2 else (0, 0)
        expected = inputs if index == 0 else weights[index - 1][0].shape[0]
        if not out or inputs != expected:
            raise RecipeError(
                f"Layer {index + 1} must have weights (out, in) of one shape that take what the layer before gives"
                f"{f', {expected} channels' if index else ''}; got {sorted(map(list, shapes))}. Weights stored as (in, out) "
                "(DGL's GraphConv) do not fit: fill these yourself from graph_variances."
            )
    widths = [group[0].shape[1] for group in weights]
    classes = weights[-1][0].shape[0] if classes is None else classes
    if classes < 2:
        raise RecipeError("One output: say how many classes it tells apart (classes=2 for a yes or no).")
    variances = graph_variances(adjacency, features, widths, classes, mode, estimate, cap)
    for group, variance in zip(weights, variances):
        for weight in group:
            device = weight.device if generator is None else generator.device
            draw = torch.empty(weight.shape, dtype=torch.float64, device=device)
            weight.copy_(draw.uniform_(-math.sqrt(3 * variance), math.sqrt(3 * variance), generator=generator))
    return variances


def _signal(features: Tensor | None, n: int, channels: int, estimate: str, matrix: Tensor) -> Tensor:
    """What is followed through the graph, (n, 1) or (n, channels)."""
    if features is None:
        return torch.ones(n, 1, dtype=torch.float64, device=matrix.device)
    if tuple(features.shape) != (n, channels):
        raise RecipeError(f"features must be (nodes, first width), {[n, channels]}, got {list(features.shape)}.")
    dense = features.detach().to(matrix.device).double()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    if not bool(dense.isfinite().all()):
        raise RecipeError("features hold NaN or infinity.")
    if not bool(dense.any()):
        raise RecipeError("All features are 0, so nothing can be followed; pass features=None for one-hot nodes.")
    if estimate == "channels":
        return dense
    mean = dense.mean(1, keepdim=True)
    if estimate == "mean":
        return mean
    kept = float(mean.square().sum() / dense.abs().mean(1).square().sum())
    if kept >= min(_CANCELLED / channels, 0.5):
        return mean
    warnings.warn(
        "Channels of the features cancel in their mean (standardised features do), so layers follow the mean energy of a "
        "channel instead; estimate='channels' says so without this warning, estimate='mean' keeps the paper's rule.",
        stacklevel=4,
    )
    return dense


def _energies(matrix: Tensor, signal: Tensor, layers: int) -> Iterator[float]:
    """‖Âˡ x‖² for l = 1…L, up to a common factor of the signal's own choice."""
    for layer in range(layers):
        signal = torch.sparse.mm(matrix, signal)
        energy = float(signal.square().sum())
        if not (energy > 0 and math.isfinite(energy)):
            raise RecipeError(
                f"After {layer + 1} of {layers} layers the signal's energy is {energy:g}. Either no message arrives any "
                "more (a graph without self-loops or cycles), or it overflows: normalise the adjacency, with self-loops."
            )
        yield energy


METHODS = (
    InitMethod(
        name="virgo",
        family="init",
        config=Virgo,
        summary="Weight variances for graph networks from what message passing on the graph does to the signal.",
        goal="train",
        paper="virgo",
        needs="calibration",
        function=virgo_,
        trial=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        apply=lambda model, generator, **parameters: virgo_(
            [m for m in model.modules() if isinstance(m, nn.Linear)],
            normalized_adjacency(torch.diag(torch.ones(9), 1) + torch.diag(torch.ones(9), -1)),
            torch.arange(60.0).view(10, 6),
            generator=generator,
            **parameters,
        ),
        fills=("0.weight", "2.weight", "4.weight"),
        checked_by=("closed form", "scipy"),
    ),
)
