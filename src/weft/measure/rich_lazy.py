"""How much a network changed while it learned: from new features (rich) to hardly any change (lazy).

Liu et al., "How connectivity structure shapes rich and lazy learning in neural circuits", arXiv:2310.08513 (2024); the
lazy limit is that of Chizat et al., arXiv:1812.07956 (2018).

    weight change              ‖W_f − W_0‖_F
    kernel alignment           ⟨K_0, K_f⟩ / (‖K_0‖ ‖K_f‖),   K = J Jᵀ,   J = ∂ outputs of the probe / ∂ parameters
    representation alignment   ⟨R_0, R_f⟩ / (‖R_0‖ ‖R_f‖),   R = H Hᵀ,   H (probe, units) activities of a layer
    sign agreement             share of the entries of H whose sign is the same

0 before training and f after it, on one fixed probe; Frobenius products, nothing is centred. Lazy: both alignments near 1
and little weight change. Compare runs at equal loss, not at equal steps.

Differences from the paper and its code: the parameters that enter K are named (the code takes the recurrent matrix), by
default all that are trained. J is computed in blocks of samples, of at most the given memory, in evaluation mode.
Complexity: one backward pass for each output of the probe; where J does not fit into memory, half as many again for
each further block. Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError, did_you_mean
from weft.measure.report import Report, ratio
from weft.measure.tangent import MEMORY, Selection, evaluating, selected, tangent_kernel

Layer = str | Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Laziness(Report):
    """How far apart a network before training and after it are.

    Attributes:
        weight_change: Frobenius norm of the difference of the parameters.
        relative_weight_change: that over the norm before; None if that is 0.
        kernel_alignment: cosine of the two tangent kernels; None if one is 0.
        representation_alignment: cosine of the two Gram matrices of the layer; None without a layer, or if one is 0.
        sign_agreement: share of the layer's activities of equal sign; None without a layer.
        parameters: names of those that were compared.
    """

    weight_change: float
    relative_weight_change: float | None
    kernel_alignment: float | None
    representation_alignment: float | None
    sign_agreement: float | None
    parameters: tuple[str, ...]


def laziness(
    before: nn.Module,
    after: nn.Module,
    probe: Tensor,
    *,
    parameters: Selection = None,
    layer: Layer | None = None,
    memory: int = MEMORY,
) -> Laziness:
    """Compare a network before training, kept with ``copy.deepcopy``, with the same one after it.

    Args:
        before, after: of one architecture; samples must not depend on each other in evaluation mode.
        probe: (samples, …), what both are called with; the same for all runs that are compared.
        parameters: names or patterns such as ``"rnn.weight_hh*"``; None for those that require gradients.
        layer: name of the module whose output is the representation, or ``f(model, probe)`` that returns it,
            (samples, …).
        memory: bytes that Jacobians may take.

    Raises:
        RecipeError: models differ in names or shapes or are one object, a name is unknown, outputs are not finite, or the
            memory is too small.

    Source: arXiv:2310.08513, section on measures of effective laziness.

    >>> from copy import deepcopy
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> start = deepcopy(model)
    >>> _ = nn.init.zeros_(model[2].bias)
    >>> report = laziness(start, model, torch.rand(5, 4), parameters="*.weight", layer="1")
    >>> report.weight_change, round(report.kernel_alignment, 4), report.sign_agreement, report.parameters
    (0.0, 1.0, 1.0, ('0.weight', '2.weight'))
    """
    if before is after:
        raise RecipeError(
            "before and after are one object, so training changed both. Keep copy.deepcopy(model) before training."
        )
    names = tuple(selected(before, parameters))
    first, last = (dict(m.named_parameters()) for m in (before, after))
    differing = [
        n for n in first.keys() | last.keys() if n not in first or n not in last or first[n].shape != last[n].shape
    ]
    if differing:
        raise RecipeError(
            f"Both models must have the same parameters; {min(differing)!r} differs in shape or is in one only."
        )
    kernels = [tangent_kernel(m, probe, parameters=names, memory=memory) for m in (before, after)]
    activities = [None if layer is None else representation(m, probe, layer) for m in (before, after)]
    change = sum(float((last[n].detach() - first[n].detach()).double().square().sum()) for n in names) ** 0.5
    size = sum(float(first[n].detach().double().square().sum()) for n in names) ** 0.5
    aligned = agreed = None
    if activities[0] is not None and activities[1] is not None:
        aligned = alignment(*(h @ h.T for h in (a.flatten(1).double() for a in activities if a is not None)))
        agreed = sign_agreement(activities[0], activities[1])
    return Laziness(change, ratio(change, size), alignment(*kernels), aligned, agreed, names)


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float | None:
    """Cosine of two matrices, ⟨A, B⟩ / (‖A‖ ‖B‖); None if one of them is 0.

    Raises:
        RecipeError: shapes differ, NaN or infinity.

    >>> round(alignment(torch.eye(2), torch.ones(2, 2)) ** 2, 6), alignment(torch.eye(2), torch.zeros(2, 2))
    (0.5, None)
    """
    if first.shape != second.shape:
        raise RecipeError(f"Matrices of one shape can be aligned, got {list(first.shape)} and {list(second.shape)}.")
    if not (bool(first.isfinite().all()) and bool(second.isfinite().all())):
        raise RecipeError(
            "A kernel or representation holds NaN or infinity: training diverged, or the probe holds some."
        )
    largest = [m.double().abs().max() if m.numel() else m.new_zeros(()) for m in (first, second)]
    a, b = (m.double() / x if x > 0 else m.double() for m, x in zip((first, second), largest))  # no overflow of squares
    return ratio(float((a * b).sum()), float(a.norm() * b.norm()))


def sign_agreement(before: Tensor, after: Tensor) -> float:
    """Share of the entries of two representations whose sign is the same; 0 agrees with 0 only.

    >>> sign_agreement(torch.tensor([[1.0, -2.0, 0.0, 0.0]]), torch.tensor([[3.0, 2.0, 0.0, 1.0]]))
    0.5
    """
    if before.shape != after.shape or not before.numel():
        raise RecipeError(
            f"Two representations of one shape are needed, got {list(before.shape)} and {list(after.shape)}."
        )
    return float((before.sign() == after.sign()).double().mean())


@torch.no_grad()
def representation(model: nn.Module, probe: Tensor, layer: Layer) -> Tensor:
    """The output of a layer on a probe, (samples, …), in evaluation mode.

    Args:
        model: called with the probe.
        probe: (samples, …).
        layer: name of a module (of several outputs the first, of several calls the last), or ``f(model, probe)``.

    Raises:
        RecipeError: no such module, it was not called, or its output is not (samples, …).

    >>> representation(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.rand(5, 4), "0").shape
    torch.Size([5, 8])
    """
    found: list[Tensor] = []
    with evaluating(model):
        if callable(layer):
            found.append(layer(model, probe))
        else:
            modules = dict(model.named_modules())
            if layer not in modules:
                raise RecipeError(f"The model has no module {layer!r}.{did_you_mean(layer, modules)}")
            hook = modules[layer].register_forward_hook(
                lambda module, given, output: found.append(output if isinstance(output, Tensor) else output[0])
            )
            try:
                model(probe)
            finally:
                hook.remove()
    if not found or not isinstance(found[-1], Tensor) or found[-1].shape[:1] != probe.shape[:1]:
        shapes = [list(f.shape) if isinstance(f, Tensor) else type(f).__name__ for f in found[-1:]]
        raise RecipeError(
            f"The representation must be (samples, …) with {len(probe)} samples, got {shapes[0] if shapes else 'nothing'}. "
            "Where samples are not the first axis, or a time must be chosen, give a function of (model, probe)."
        )
    return found[-1]
