"""Robustness as a patch: what a robust fine-tune learned beyond the clean one, to add to other models or take off.

Robust Weight Signatures, Cai et al., arXiv:2302.12480 (2023).

    d = W_std − W₀,  v = W_rob − W₀         of one tensor; W₀ pretrained, W_std clean fine-tune, W_rob robust fine-tune
    R = v − d ⟨d, v⟩ / ⟨d, d⟩               the signature: v without its part along d
    W = W_target + α Σ_c w_c R_c            signatures R_c of corruptions c, on chosen (shallow) layers

Differences from the paper and its code: w is applied once (the code applies it twice, so that two patches at one
half act at one quarter). Where the clean fine-tune did not move a tensor (d = 0) the signature is v, not 0/0.
Batch-norm statistics are carried as the difference W_rob − W_std (``whole``) and not replaced, so that a patch can be
scaled and taken off; on W_std itself it gives the robust model's statistics, as replacing does. List the affine
batch-norm entries there too to treat them as the code does.
Taking off: subtracting a patch gives the target's bits back only where W_target + αR needs no rounding (then it
always does); elsewhere the two can differ by rounding, and where αR is far larger than W_target they must, because
the sum no longer holds the target's last bits. :class:`weft.edit.originals.Originals` restores every bit.
State dicts are patched most easily with :class:`weft.edit.weight_patch.WeightPatch`. To take a patch off in a recipe,
apply it with ``scale: -1``, or use the method ``restore`` with kept originals.
Complexity: extracting takes two passes, applying one. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from weft.checkpoint.memory import from_mapping
from weft.engine.chunks import Chunk, Scan
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.kernels.jit import kernel, reduction
from weft.method import configure, parameter, per_model

STATISTICS = "*running_mean *running_var"
_VARIANCE = "*running_var"


@dataclass(frozen=True)
class RwsExtract:
    """Configuration of :func:`signature`."""

    layers: str = parameter("*", "name patterns of the tensors that the patch holds; the others become zero")
    whole: str = parameter(STATISTICS, "name patterns of tensors of which the difference robust − standard is taken")


@dataclass(frozen=True)
class RwsApply:
    """Configuration of :func:`add_signatures`."""

    weights: float | tuple[float, ...] = parameter(1.0, "weight of each signature", per_model="weight")
    scale: float = parameter(1.0, "strength of the whole patch; a negative one takes it off")


def signature(base: Any, standard: Any, robust: Any, *, layers: str = "*", whole: str = STATISTICS) -> Any:
    """The part of ``robust − base`` that is orthogonal to ``standard − base``.

    Args:
        base: pretrained tensor (torch or numpy, any shape), or a state dict.
        standard: the same after clean fine-tuning.
        robust: the same after fine-tuning on corrupted data.
        layers: name patterns, separated by spaces; tensors of a state dict that match none become zero.
        whole: name patterns of tensors of which ``robust − standard`` is taken.

    Returns:
        The signature, in the form and dtype of ``standard``; each tensor of a state dict by itself.

    Raises:
        ShapeError: shapes or names differ.

    Source: arXiv:2302.12480, section 3.

    >>> import numpy as np
    >>> from weft.edit.rws import signature
    >>> signature(np.zeros(2, np.float32), np.float32([2, 0]), np.float32([3, 1]))
    array([0., 1.], dtype=float32)
    """
    config = configure(RwsExtract, {"layers": layers, "whole": whole}, "rws_extract")
    return merge_tensors(METHODS[0], [standard, robust], config, base=base)


def add_signatures(
    target: Any, signatures: Sequence[Any], *, weights: float | Sequence[float] = 1.0, scale: float = 1.0
) -> Any:
    """``target + scale · Σ weight · signature``: one sum in float32, rounded once.

    Args:
        target: tensor (torch or numpy, any shape) or state dict to patch.
        signatures: one or more in the same form, with the same names.
        weights: one number for each signature, or one for all; the paper gives each of C corruptions 1/C.
        scale: strength; a negative one takes the patch off.

    Returns:
        The patched tensor or state dict, in the form and dtype of ``target``.

    Raises:
        RecipeError: a batch-norm variance would become negative. ShapeError: shapes or names differ.

    Source: arXiv:2302.12480, section 3.

    >>> import numpy as np
    >>> from weft.edit.rws import add_signatures
    >>> add_signatures(np.float32([7, 7]), [np.float32([0, 1]), np.float32([2, 0])], weights=[1, 0.5])
    array([8., 8.], dtype=float32)
    """
    config = configure(RwsApply, {"weights": weights, "scale": scale}, "rws_apply")
    alone = not isinstance(target, Mapping)
    targets = {"tensor": target} if alone else target
    changes = [_as_float32({"tensor": s} if alone else s) for s in signatures]
    sums = merge_tensors(METHODS[1], changes, config, base=targets)
    result = {name: _like(values, targets[name]) for name, values in sums.items()}
    return result["tensor"] if alone else result


def matches(name: str, patterns: str) -> bool:
    """Whether ``name`` fits one of the patterns, which are separated by spaces."""
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def _as_float32(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().astype(np.float32, copy=False) for name, tensor in from_mapping(state).items()}


def _like(values: np.ndarray, example: Any) -> Any:
    """float32 ``values`` in the form and dtype of ``example``."""
    if isinstance(example, np.ndarray):
        with np.errstate(over="ignore"):  # beyond the range of float16 is infinity, as everywhere
            return values.astype(example.dtype)
    import torch

    return torch.from_numpy(values).to(example.device, example.dtype)


def _prepare_extract(scan: Scan, config: RwsExtract) -> tuple[np.float32, np.float32]:
    """How much of r = W_rob − W_std the signature holds, and how much of d.

    As v = r + d, the signature v − d ⟨d, v⟩ / ⟨d, d⟩ is r − d ⟨d, r⟩ / ⟨d, d⟩.
    """
    name = scan.inputs[0].name
    if not matches(name, config.layers):
        return np.float32(0), np.float32(0)
    if matches(name, config.whole):
        return np.float32(1), np.float32(0)
    along = square = 0.0
    for part in scan.collect(lambda chunk: dot_products(chunk.base, chunk.tensors[0], chunk.tensors[1])).values():
        along, square = along + part[0], square + part[1]
    return np.float32(1), np.float32(-along / square if square else 0)


def _combine_extract(chunk: Chunk, config: RwsExtract, state: tuple[np.float32, np.float32], out: np.ndarray) -> None:
    reject(chunk.base, chunk.tensors[0], chunk.tensors[1], *state, out)


def _prepare_apply(scan: Scan, config: RwsApply) -> None:
    """Refuse a patch that makes a variance negative: the network would then give NaN."""
    name = scan.inputs[0].name
    if not fnmatchcase(name, _VARIANCE):
        return

    def lowest(chunk: Chunk) -> float:
        out = chunk.scratch("patched")
        _combine_apply(chunk, config, None, out)
        return float(out.min())

    smallest = min(scan.collect(lowest).values(), default=0.0)
    if smallest < 0:
        raise RecipeError(
            f"{name}: the patch would make a batch-norm variance {smallest:.3g}. It was made for a model with other "
            "activations: lower the scale, or leave the statistics out of the patch and estimate them again."
        )


def _combine_apply(chunk: Chunk, config: RwsApply, state: None, out: np.ndarray) -> None:
    weights = np.asarray(per_model(config.weights, len(chunk.tensors))) * config.scale
    add_weighted(chunk.base, chunk.tensors, weights.astype(np.float32), out)


@reduction
def dot_products(base, standard, robust):  # (n,) each -> ⟨d, r⟩, ⟨d, d⟩; float64
    along = 0.0
    square = 0.0
    for i in range(base.size):
        d = np.float64(standard[i]) - np.float64(base[i])
        along += d * (np.float64(robust[i]) - np.float64(standard[i]))
        square += d * d
    return along, square


@kernel
def reject(base, standard, robust, beyond, along, out):  # (n,) each
    for i in range(out.size):
        out[i] = beyond * (robust[i] - standard[i]) + along * (standard[i] - base[i])


@kernel
def add_weighted(target, changes, weights, out):  # (n,), (models, n), (models,) -> (n,)
    for i in range(out.size):
        out[i] = changes[0, i] * weights[0]
    for m in range(1, changes.shape[0]):
        w = weights[m]
        for i in range(out.size):
            out[i] += changes[m, i] * w
    for i in range(out.size):
        out[i] = target[i] + out[i]


METHODS = (
    MergeMethod(
        name="rws_extract",
        family="edit",
        config=RwsExtract,
        summary="From base, clean and robust fine-tune: the robust change without its part along the clean one.",
        goal="edit",
        paper="robust-weight-signatures",
        combine=_combine_extract,
        prepare=_prepare_extract,
        base="required",
        models=(2, 2),
        function=signature,
        checked_by=("closed form", "brute force"),
    ),
    MergeMethod(
        name="rws_apply",
        family="edit",
        config=RwsApply,
        summary="Add signatures to the base model, or take them off.",
        goal="edit",
        paper="robust-weight-signatures",
        combine=_combine_apply,
        prepare=_prepare_apply,
        base="required",
        function=add_signatures,
        checked_by=("closed form", "brute force"),
    ),
)
