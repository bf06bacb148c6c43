"""Match the units of two models by how their activations correlate over data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.errors import NonFiniteError, RecipeError
from weft.merge.weight_matching.blocks import Block, axis_sections, state_of
from weft.merge.weight_matching.methods import ActivationMatching
from weft.merge.weight_matching.weights import Matching, Permutations, descend
from weft.method import configure
from weft.symmetry import Symmetry

_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def match_activations(
    reference: nn.Module,
    model: nn.Module,
    symmetry: Symmetry,
    batches: Iterable[Any],
    *,
    start: Permutations | None = None,
    groups: Sequence[str] | None = None,
    restarts: int = 1,
    seed: int = 0,
) -> Matching:
    """Find the order of a model's units in which its activations correlate most with a reference's.

    Every linear layer, convolution, embedding and norm whose output has units of a group gives a table of correlations;
    tables of one group are added, and an assignment maximises the sum. Groups that no such output has (hidden units of
    fused experts) stay, and are listed in ``unmatched``.

    Args:
        reference: A; both models run in evaluation, without gradients.
        model: B, of the same architecture.
        symmetry: of both.
        batches: inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments each.
        start, groups, restarts, seed: see :func:`match_weights`.

    Returns:
        A :class:`Matching`, its objective being the sum of correlations.

    Raises:
        RecipeError: no batch, fewer than one descent, or groups and no output with their units. ShapeError: the models
            differ. NonFiniteError: weights or activations hold NaN or infinity.

    Source: Ainsworth et al., arXiv:2209.04836, section 3.1; correlations as in Li et al., arXiv:1511.07543.

    >>> from weft.symmetry import find_symmetry
    >>> a = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> b, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(100, 3)
    >>> symmetry = find_symmetry(a, x)
    >>> _ = b.load_state_dict(symmetry.apply(a.state_dict(), symmetry.random(torch.Generator().manual_seed(0))))
    >>> found = match_activations(a, b, symmetry, [x])
    >>> torch.equal(symmetry.apply(b, found.permutations)[0].weight, a[0].weight)
    True
    """
    configure(ActivationMatching, {"restarts": restarts}, "match_activations")
    for what, each in (("The reference", reference), ("The model", model)):
        state_of(each, symmetry, what)
    places = _places(reference, symmetry)
    tables = {name: _Moments() for name in places}
    count = 0
    for batch in batches:
        count += 1
        outputs = [_outputs(each, places, batch) for each in (reference, model)]
        for name, moments in tables.items():
            if name in outputs[0] and name in outputs[1]:
                moments.add(outputs[0][name], outputs[1][name])
    if not count:
        raise RecipeError("Activations are matched over data, but there is no batch. Give at least one.")
    blocks: list[Block] = []
    for name, moments in tables.items():
        if moments.count:
            blocks += _blocks(symmetry, *places[name], moments.correlation(name))
    if symmetry.groups and not blocks:
        raise RecipeError(
            "No layer's output has units of a group, so there is nothing to correlate. Match the weights instead."
        )
    return descend(blocks, symmetry, start=start, groups=groups, restarts=restarts, seed=seed)


def _places(model: nn.Module, symmetry: Symmetry) -> dict[str, tuple[str, int]]:
    """Modules whose outputs have units of a group, with the tensor and axis whose layout the output shares."""
    members = {(m.tensor, m.axis) for group in symmetry.groups for m in group.members}
    found = {}
    for path, module in model.named_modules():
        weight = f"{path}.weight" if path else "weight"
        weight = symmetry.aliases.get(weight, weight)
        axis = 1 if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else 0
        known = isinstance(module, (*_CHANNELS_FIRST, *_CHANNELS_LAST, nn.Embedding))
        if (known or type(module).__name__ == "Conv1D" or type(module).__name__.endswith("RMSNorm")) and (
            weight, axis,
        ) in members:  # fmt: skip
            found[path] = (weight, axis)
    return found


def _outputs(model: nn.Module, places: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
    """Outputs of chosen modules in one forward pass: (features, samples) float64."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str, module: nn.Module) -> Any:
        dim = 1 if isinstance(module, _CHANNELS_FIRST) else -1

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            channels = dim
            if dim == 1 and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                channels = -len(module.kernel_size) - 1  # holds without a batch, too
            found.setdefault(path, []).append(output.detach().movedim(channels, 0).flatten(1).double())

        return module.register_forward_hook(hook)

    handles = [keep(path, module) for path, module in model.named_modules() if path in places]
    try:
        with evaluation(model), torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts, 1) for path, parts in found.items()}


def call(model: Any, batch: Any) -> Any:
    """A forward pass on a tensor, a tuple of positional arguments or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """For the length of a ``with``: all modules in evaluation."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class _Moments:
    """Sums over samples, in float64, of the features of two models."""

    count: int = 0
    sums: list[Tensor] = field(default_factory=list)

    def add(self, a: Tensor, b: Tensor) -> None:
        b = b.to(a.device)
        new = [a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1), a @ b.T]
        self.sums = [old + value for old, value in zip(self.sums, new)] if self.count else new
        self.count += a.shape[1]

    def correlation(self, name: str) -> np.ndarray:
        """Pearson's, (features of A, features of B); 0 for a feature that never changes."""
        a, b, aa, bb, ab = (s / self.count for s in self.sums)
        if not bool(torch.isfinite(ab).all()):
            raise NonFiniteError(f"Activations of {name} hold NaN or infinity. Check the batches and both models.")
        variances = [(aa - a.square()).clamp(min=0), (bb - b.square()).clamp(min=0)]
        # below this a variance is the rounding of two equal squares
        scales = [torch.where(v > 1e-12 * s, v, torch.inf).rsqrt() for v, s in zip(variances, (aa, bb))]
        table: np.ndarray = ((ab - a[:, None] * b) * scales[0][:, None] * scales[1]).cpu().numpy()
        return table


def _blocks(symmetry: Symmetry, tensor: str, axis: int, table: np.ndarray) -> Iterator[Block]:
    """A table of correlations R as blocks: ⟨1, π(Rᵀ)⟩ = Σ_i R[i, p_i], so it is matched as a weight would be."""
    one, other = torch.eye(len(table), dtype=torch.float64), torch.from_numpy(table.T.copy())
    for names, grid in axis_sections(symmetry, tensor, axis):
        if names:
            index = torch.as_tensor(grid.reshape(-1))
            a, b = (t.index_select(0, index).reshape(*grid.shape, -1) for t in (one, other))
            yield Block(a, b, (*names, "", ""))
