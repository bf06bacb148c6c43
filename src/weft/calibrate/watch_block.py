"""Statistics of one block of a walk: its layers, its padding, its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import Slice
from weft.calibrate.facts import Facts
from weft.calibrate.walker import Block
from weft.calibrate.watch import Watch, experts_of, layers_of
from weft.checkpoint.fingerprint import fingerprint_of
from weft.function.where import Selector, matches


def watched(
    block: Block, what: Sequence[str], where: Selector = "*", layers: Mapping[str, nn.Module] | None = None
) -> Watch:
    """A :class:`Watch` of a walked block's layers, with padding left out; use it around ``block.run()``.

    Args:
        block: whose weights are loaded.
        what: kinds of statistics of inputs, and ``routing``.
        where: which layers.
        layers: those to watch, instead of ``where``.
    """
    mine = block_layers(block, where) if layers is None else layers
    experts = experts_of(block.module, block.name) if "routing" in what else {}
    return Watch(mine, [k for k in what if k in KINDS], experts=experts, mask=mask_in(block))


def block_layers(block: Block, where: Selector = "*") -> dict[str, nn.Module]:
    """The chosen layers of a walked block: linear ones, single experts, convolutions."""
    every = {} if block.is_rest else layers_of(block.module, block.name)
    every |= block.linears()
    return {n: m for n, m in every.items() if matches(where, n, m)}


def results_of(
    watch: Watch, layers: Mapping[str, nn.Module], facts: Facts, *, fingerprints: bool = True
) -> Iterable[tuple[str, Tensor]]:
    """Tensors of finished sums by name, each forgotten as soon as it is given; facts are filled in at once."""
    for name, module in layers.items():
        leader = watch.leaders.get(name)
        if leader is not None or isinstance(module, Slice):  # an expert that no token chose has no rows
            facts.layers[name] = (leader or name, watch.inputs[leader].rows if leader else 0)
            weight: Any = module.weight
            if fingerprints:
                facts.fingerprints[f"{name}.weight"] = fingerprint_of(weight)
    if not watch.inputs:
        facts.layers.clear()
    facts.experts = {name: routing.rows for name, routing in watch.routing.items()}
    for name in facts.experts:
        matrices: Any = watch.experts[name].down_proj
        facts.fingerprints[f"{name}.down_proj"] = fingerprint_of(matrices)

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for name in list(watch.inputs):
            for kind, tensor in watch.inputs.pop(name).result().items():
                yield f"{name}/{kind}", tensor
        for name, routing in watch.routing.items():
            yield from ((f"{name}/{kind}", tensor) for kind, tensor in routing.result().items())

    return tensors()


def mask_in(block: Block) -> Callable[[Tensor], Tensor | None]:
    """Which tokens of a layer's input are not padding: those of its list's own mask, or, of a decoder's layer that is given
    the encoder's states, those of the encoder's.
    """
    walk = block.walk
    decodes = _decodes(block)

    def mask(x: Tensor) -> Tensor | None:
        batch = walk.batches[walk.batch_number]
        crosses = decodes and any(x is given for given in block.given(walk.batch_number))
        return two_axes(batch, "decoder_attention_mask" if decodes and not crosses else "attention_mask")

    return mask


def tokens_of(block: Block, batch: int) -> Tensor | None:
    """Which of a block's tokens are not padding: (rows, tokens), or None where the batch does not say."""
    return two_axes(block.walk.batches[batch], "decoder_attention_mask" if _decodes(block) else "attention_mask")


def _decodes(block: Block) -> bool:
    """Whether a block is of a decoder that follows an encoder."""
    walk = block.walk
    encodes = bool(getattr(getattr(walk.model, "config", None), "is_encoder_decoder", False))
    return encodes and any(block.name in stack for stack in walk.source.stacks[1:])


def two_axes(batch: Any, name: str) -> Tensor | None:
    """A batch's mask (rows, tokens), if it has one of that name and form."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
