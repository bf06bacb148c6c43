"""The empirical tangent kernel of a live model: how strongly a step on one output moves another.

Jacot, Gabriel and Hongler, arXiv:1806.07572 (2018).

    K = J Jᵀ        J = ∂ outputs of the probe / ∂ parameters,  (outputs, parameters)

J is never whole where it does not fit: it is computed in blocks of samples, and blocks are computed again for each pair.
Complexity: one backward pass for each output of the probe; with B blocks (B + 1) / 2 times as many.
Re-implemented from the equation.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.errors import RecipeError, did_you_mean

MEMORY = 1 << 29  # bytes
Selection = str | Sequence[str] | None


def tangent_kernel(model: nn.Module, probe: Tensor, *, parameters: Selection = None, memory: int = MEMORY) -> Tensor:
    """The empirical tangent kernel of a model's outputs on a probe, in evaluation mode.

    Args:
        model: called with (samples, …), returns a tensor (samples, …); samples must not depend on each other.
        probe: (samples, …).
        parameters: names or patterns; None for those that require gradients.
        memory: bytes that Jacobians may take; at least two samples must fit.

    Returns:
        K (outputs, outputs) in float64, where outputs = samples · entries of one sample's output, sample by sample.

    Raises:
        RecipeError: an unknown name, an empty probe, an output of another kind, or too little memory.

    Source: K = J Jᵀ; Jacot et al., arXiv:1806.07572.

    >>> model = nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> tangent_kernel(model, x, parameters="weight").tolist() == (x @ x.T).tolist()
    True
    """
    names = selected(model, parameters)
    values = {n: p.detach() for n, p in model.named_parameters()}
    chosen, rest = {n: values.pop(n) for n in names}, values
    if not probe.dim() or not len(probe):
        raise RecipeError(f"The probe must be (samples, …) with at least one sample, got {list(probe.shape)}.")

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = functional_call(model, {**rest, **parameters}, (sample.unsqueeze(0),))
        if not isinstance(y, Tensor) or y.shape[:1] != (1,):
            raise RecipeError("The model must return one tensor (samples, …); wrap it in a module that does.")
        return y.flatten()

    with evaluating(model):
        width = len(outputs(chosen, probe[0]))
        row = sum(v.numel() * max(v.element_size(), 4) for v in chosen.values())
        # two blocks, each with the gradients and what vmap keeps beside them, and float64 copies of a tensor
        block = int(memory // max(1, 6 * width * row))
        if block < 1:
            raise RecipeError(
                f"Gradients of {width} outputs by {row >> 10} KiB of parameters need {6 * width * row} bytes for one "
                f"sample, more than memory={memory}. Name fewer parameters, select outputs, or give more memory."
            )
        recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
        jacobian = _one_by_one(outputs) if recurrent else vmap(jacrev(outputs), in_dims=(None, 0))
        starts = range(0, len(probe), block)
        kernel = torch.zeros(2 * (len(probe) * width,), dtype=torch.float64, device=probe.device)
        for i in starts:
            rows = slice(i * width, (i + block) * width)
            left = jacobian(chosen, probe[i : i + block])
            for j in starts[i // block :]:
                columns = slice(j * width, (j + block) * width)
                right = left if i == j else jacobian(chosen, probe[j : j + block])
                for name in names:
                    a, b = (g[name].flatten(2).flatten(0, 1).double() for g in (left, right))
                    kernel[rows, columns] += a @ b.T
                if i != j:
                    kernel[columns, rows] = kernel[rows, columns].T
    return kernel


def selected(model: nn.Module, parameters: Selection) -> list[str]:
    """Names of the parameters that a selection means, in the model's order.

    >>> selected(nn.Linear(2, 3), "*"), selected(nn.Linear(2, 3), ["bias"])
    (['weight', 'bias'], ['bias'])
    """
    known = dict(model.named_parameters())
    if parameters is None:
        names = [n for n, p in known.items() if p.requires_grad]
        if not names:
            raise RecipeError("No parameter requires gradients; name those that are meant (parameters='*' for all).")
        return names
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    if not patterns:
        raise RecipeError("No parameter is named; give names or patterns, or None for those that require gradients.")
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise RecipeError(f"The model has no parameter {pattern!r}.{did_you_mean(pattern, known)}")
    return [n for n in known if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _one_by_one(outputs: Callable[[dict[str, Tensor], Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Jacobians row by row: torch's recurrent layers cannot run under vmap."""

    def jacobian(parameters: dict[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
        rows = []
        for sample in samples:
            y, pullback = vjp(lambda p, sample=sample: outputs(p, sample), parameters)
            rows.append([pullback(unit)[0] for unit in torch.eye(len(y), dtype=y.dtype, device=y.device)])
        return {name: torch.stack([torch.stack([row[name] for row in r]) for r in rows]) for name in parameters}

    return jacobian


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without cuDNN (no gradients of recurrent layers in it) and fused attention (none under vmap)."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True
