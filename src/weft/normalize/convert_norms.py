"""Turn a trained pre-LN transformer into the same function with RMS norm, or with CRMS norm at width d − 1.

Pre-RMSNorm and Pre-CRMSNorm Transformers, Jiang et al., arXiv:2305.14858 (2023).

    LN(x) = RMS(C x), C = I − 11ᵀ/d, so what writes into the residual stream may write without its mean:
    writers   W ← C W, b ← C b (embeddings: each row);   norms  γ ⊙ LN(x) + β ← γ ⊙ RMS(x);   readers  b ← b + A β
    and then the last feature says nothing: writers lose their last row, readers  A ← (A diag(γ))[:, :−1] − (A γ)[:, −1:]

W: (d, in); A: (out, d); b of a reader: (out). Which weights write and read is found by ``torch.export``, not by names.

Differences from the paper and its code: no list of layers by hand; γ stays in the RMS norm, whose parameters keep their
names; a table that is the output head as well stays whole and tied, and its rows lose their mean on the way out; where
a norm's gain cannot go into what reads it, the dropped feature is put back behind the CRMS norm.
Complexity: each changed weight is read and written once, in float64; the model runs twice to check.
Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.normalize._changes import Changes, as_layer_norms, evaluated
from weft.normalize._stream import Norm, Stream, example, find_streams
from weft.normalize._stream_rules import Graph, Writer
from weft.normalize.centered import CenteredEmbedding, CenteredLayerNorm, RestoringCRMSNorm
from weft.normalize.crms_norm import CRMSNorm
from weft.normalize.rms_norm import RMSNorm

# largest difference of outputs from the model before, in parts of the largest output; half precision rounds each weight
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class ConvertedNorms:
    """What was done.

    Args:
        norms: modules that were replaced.
        writers: weights whose output has no mean any more.
        restored: norms whose gain or shift stayed with them, each with the reason.
        kept: layer norms that read no residual stream and were left alone.
        widths: d of each stream.
        unused: tensors that the example call did not use; a call that adds one to the stream (a mask token, say) would
            bring its mean back.
    """

    norms: tuple[str, ...]
    writers: tuple[str, ...]
    restored: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()


def convert_to_rms_(model: nn.Module, inputs: Any = None) -> ConvertedNorms:
    """Replace the layer norms of a pre-LN model by RMS norms, in place; the model computes the same.

    Parameters stay the same objects under the same names; shifts of norms go into the biases that read them. The
    model is traced in evaluation; in training, dropout on what is written brings back a little of the mean.

    Args:
        model: pre-LN: layers without a nonlinearity after them write its residual stream, and only ``nn.LayerNorm``
            reads it.
        inputs: an example, to trace and to check on: a tensor, a tuple, or a mapping of keyword arguments. Models of
            transformers that take ids or pixels need none.

    Returns:
        What was replaced.

    Raises:
        RecipeError: the model is not pre-LN, with the layer that does not fit; it cannot be traced; outputs differ
            afterwards. The model is as it was then.

    Source: arXiv:2305.14858, section 3.2.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> convert_to_rms_(model, torch.randn(5, 3)).norms, model[1]
    (('1',), RMSNorm(8, eps=1e-05))
    """
    return _convert(model, inputs, _to_rms, "rms")


def convert_to_crms_(model: nn.Module, inputs: Any = None) -> ConvertedNorms:
    """Replace the norms of a pre-LN model by CRMS norms, in place: one feature less in the stream, the same function.

    Shapes of parameters change, so make the optimizer afterwards. Code of a model that has the width in it, or passes
    it to a fused operation, may not run with one feature less: the converted model is run, and put back if it does not
    give the same.

    Args:
        model: as :func:`convert_to_rms_` takes it, or as it leaves it.
        inputs: as there.

    Returns:
        What was replaced.

    Raises:
        RecipeError: as there; or the model does not run at width d − 1. The model is as it was then.

    Source: arXiv:2305.14858, section 3.3.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> _ = convert_to_crms_(model, torch.randn(5, 3))
    >>> model[0].weight.shape, model[1], model[2].weight.shape
    (torch.Size([7, 3]), CRMSNorm(7, eps=1e-05), torch.Size([2, 7]))
    """
    return _convert(model, inputs, _to_crms, "crms")


@torch.no_grad()
def _convert(model: nn.Module, inputs: Any, apply: Callable[..., dict[str, str]], name: str) -> ConvertedNorms:
    if type(model) in (nn.LayerNorm, RMSNorm):
        raise RecipeError("The model is a norm itself and cannot be replaced in place; convert what holds it.")
    if any(isinstance(m, CRMSNorm | RestoringCRMSNorm) for m in model.modules()):
        raise RecipeError("The model has CRMS norms: it is converted already.")
    args, kwargs = example(model, inputs)
    with evaluated(model):
        graph, streams, kept = _streams(model, args, kwargs)
        virtual = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        before = None if virtual else _outputs(model(*args, **kwargs))
        changes = Changes(model)
        restored: dict[str, str] = {}
        try:
            for stream in streams:
                restored.update(apply(changes, stream))
            if before is not None:
                _check(before, _outputs(model(*args, **kwargs)))
            else:
                model(*args, **kwargs)
            config: Any = getattr(model, "config", None)
            if hasattr(config, "to_dict"):  # goes into config.json, so that a saved model says what it is
                config.weft_norms = name
        except BaseException as error:
            changes.back()
            if isinstance(error, RecipeError) or not isinstance(error, Exception):
                raise
            raise RecipeError(
                f"The converted model does not run ({type(error).__name__}: {str(error)[:300]}), so all was put back. "
                "Likely cause: code of the model that has the stream's width in it, such as nn.MultiheadAttention"
                + "".join(f"; or that wants {p} to give the width that it takes, but {r}" for p, r in restored.items())
                + ". convert_to_rms_ keeps all shapes; an output head with its own weights (module.weight = "
                "nn.Parameter(module.weight.detach().clone()), config.tie_word_embeddings = False) can be narrowed."
            ) from error
    for old, new in changes.replaced:
        new.train(old.training)
    return ConvertedNorms(
        tuple(n.path for s in streams for n in s.norms),
        tuple(w.weight for s in streams for w in s.writers),
        restored,
        tuple(kept),
        tuple(s.width for s in streams),
        tuple(name for name in dict.fromkeys(graph.tensor.values()) if not graph.uses(name)),
    )


def _to_rms(changes: Changes, stream: Stream) -> dict[str, str]:
    restored = {}
    for norm in stream.norms:
        old: Any = changes.model.get_submodule(norm.path)
        new = RMSNorm(stream.width, eps=old.eps)
        _take(new, old, changes)
        if getattr(old, "bias", None) is not None:
            reason = norm.reason
            if norm.readers is not None and (bare := [r.weight for r in norm.readers if r.bias is None]):
                reason = f"{bare[0]} has no bias to take it"
            if reason:
                restored[norm.path] = reason
                new.bias = old.bias
            else:
                _fold(changes, norm, None, old.bias)
        changes.module(norm.path, new)
    for writer in stream.writers:
        _write(changes, writer, narrow=False)
    return restored


def _to_crms(changes: Changes, stream: Stream) -> dict[str, str]:
    restored = {}
    for norm in stream.norms:
        old: Any = changes.model.get_submodule(norm.path)
        new: Any
        reason = norm.reason
        for reader in norm.readers or ():
            owner, last = reader.weight.rpartition(".")[::2]
            if reader.bias is None and getattr(old, "bias", None) is not None:
                is_linear = isinstance(changes.model.get_submodule(owner), nn.Linear) and last == "weight"
                reason = reason or ("" if is_linear else f"{reader.weight} has no bias to take its shift")
        if norm.readers is not None and not reason:
            new = CRMSNorm(stream.width - 1, eps=old.eps, affine=False)
            _fold(changes, norm, old.weight, getattr(old, "bias", None))
            for reader in norm.readers:
                weight = changes.wide(reader.weight)
                first, last = weight.split([stream.width - 1, 1], dim=reader.axis)
                changes.write(reader.weight, first - last)
                changes.resize(reader.weight, reader.axis, stream.width)
        else:
            restored[norm.path] = reason
            new = RestoringCRMSNorm(stream.width, eps=old.eps, bias=getattr(old, "bias", None) is not None)
            _take(new, old, changes)
            new.bias = getattr(old, "bias", None)
        changes.module(norm.path, new)
    for writer in stream.writers:
        _write(changes, writer, narrow=True)
    return restored


def _take(new: Any, old: Any, changes: Changes) -> None:
    """The gain of a norm that is replaced; ones that do not train if it had none."""
    new.weight = old.weight
    if old.weight is None:
        like = next(changes.model.parameters())
        new.weight = nn.Parameter(like.new_ones(new.features), requires_grad=False)


def _fold(changes: Changes, norm: Norm, gain: Tensor | None, shift: Tensor | None) -> None:
    """Gain and shift of a norm into what reads it."""
    for reader in norm.readers or ():
        weight = changes.wide(reader.weight)
        if shift is not None:
            offset = weight.movedim(reader.axis, -1) @ shift.double()
            if reader.bias is not None:
                changes.write(reader.bias, changes.wide(reader.bias) + offset)
            else:
                changes.parameter(
                    reader.weight.rpartition(".")[0], "bias", offset.to(changes.tensor(reader.weight).dtype)
                )
        if gain is not None:
            shape = [1] * weight.dim()
            shape[reader.axis] = -1
            changes.write(reader.weight, weight * gain.double().view(shape))


def _write(changes: Changes, writer: Writer, *, narrow: bool) -> None:
    """Take the mean off what a writer writes, and the last feature if the stream loses it."""
    if writer.kind == "norm":
        norm: Any = changes.model.get_submodule(writer.weight)
        centred = CenteredLayerNorm(norm.normalized_shape, norm.eps, device="meta")
        centred.weight, centred.bias, centred.narrow = norm.weight, norm.bias, narrow
        changes.module(writer.weight, centred)
        return
    if writer.modules:  # read elsewhere: the table stays, its rows change on the way out
        for path in writer.modules:
            old: Any = changes.model.get_submodule(path)
            if type(old) not in (nn.Embedding, CenteredEmbedding) or old.max_norm is not None:
                raise RecipeError(
                    f"{writer.weight} writes into the residual stream and is read elsewhere as well, and {path} "
                    f"({type(old).__name__}) is no plain nn.Embedding; untie it first: give one side its own copy."
                )
            new = CenteredEmbedding(*old.weight.shape, padding_idx=old.padding_idx, _weight=old.weight)
            new.weight = old.weight
            new.narrow = narrow
            changes.module(path, new)
        return
    weight = changes.wide(writer.weight)
    width = weight.shape[writer.axis]
    scale = None
    if writer.scale:
        shape = [1] * weight.dim()
        shape[writer.axis] = -1
        gain = changes.tensor(writer.scale)
        scale = changes.wide(writer.scale).flatten()
        weight = weight * scale.view(shape)
        ones = torch.ones_like(gain)
        changes.write(writer.scale, ones.narrow(writer.scale_axis, 0, width - 1) if narrow else ones)
    weight = weight - weight.mean(writer.axis, keepdim=True)
    changes.write(writer.weight, weight.narrow(writer.axis, 0, width - 1) if narrow else weight)
    made = f"{writer.weight.rpartition('.')[0]}.bias"  # folding gives one to a layer that both reads and writes
    name = writer.bias or (made if made in changes.made else None)
    if name:
        bias = changes.wide(name)
        bias = bias if scale is None else bias * scale
        bias = bias - bias.mean()
        changes.write(name, bias[: width - 1] if narrow else bias)
    if narrow and writer.kind != "tensor":
        changes.resize(writer.weight, writer.axis, width)
        owner: Any = changes.model.get_submodule(writer.weight.rpartition(".")[0])
        if writer.kind == "conv" and getattr(owner, "groups", 1) != 1:
            raise RecipeError(f"{writer.weight}: a convolution with groups cannot write one feature less.")


def _streams(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, list[Stream], list[str]]:
    with as_layer_norms(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export and of old code in models
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise RecipeError(
                "The model cannot be traced: its forward pass must accept the example inputs and must not depend on the "
                f"values of tensors. torch.export says: {type(error).__name__}: {str(error)[:400]}"
            ) from error
        graph = Graph(model, program)
        return graph, *find_streams(graph)


def _outputs(result: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            raise RecipeError(
                f"An output's shape changed from {list(old.shape)} to {list(new.shape)}; all was put back."
            )
        largest = old.double().abs().max() if old.numel() else torch.zeros(())
        difference = (old.double() - new.double()).abs().max() if old.numel() else largest
        tolerance = TOLERANCES.get(old.dtype, 0.1)
        if not difference <= tolerance * largest + torch.finfo(old.dtype).tiny:
            raise RecipeError(
                f"Outputs differ from those before by {float(difference):.2g}, more than rounding makes "
                f"({tolerance:g} of {float(largest):.2g}), so all was put back. Likely cause: an RMSNorm whose stream has "
                "a mean (it was not made from a LayerNorm), outputs that are not finite, or code that depends on the width."
            )
