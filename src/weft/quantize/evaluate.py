"""What a model scores on data, and how near it is to the model that it was made from.

Of a causal language model: perplexity = exp(mean −log p(next token)). Against another model with the same outputs, with
p its probabilities and q those of the model that is judged, over all tokens that are not padding:

    KL = mean Σ p log(p / q)        top-1 agreement = share of tokens with the same likeliest next token

Of an encoder: 1 − cos of the means of the last hidden states over tokens, averaged over rows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.calibrate.change_model import output_of
from weft.calibrate.forward import call, on_cpu
from weft.calibrate.per_sample import evaluating
from weft.calibrate.walker import Walk
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.engine.progress import Progress
from weft.errors import RecipeError
from weft.quantize.load import load_quantized

IGNORED = -100  # labels that do not count, as in transformers
_ROWS = 256  # tokens whose distributions are compared at a time


def evaluate(
    model: nn.Module | Checkpoint | str | Path,
    batches: Iterable[Any],
    against: nn.Module | Checkpoint | str | Path | None = None,
    *,
    backend: str = "auto",
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores of a model.

    A quantised model on disk runs on its packed weights; another one, and ``against``, goes block by block, so that neither
    need fit into memory.

    Args:
        model: a module, or a folder, Hub id or open checkpoint of a transformers model.
        batches: mappings with ``input_ids`` (rows, tokens), and ``attention_mask`` where there is padding; for other models
            tensors or tuples. ``labels`` (−100 where nothing is to be predicted) say which tokens count.
        against: the model that it was made from.
        backend: of packed layers (:class:`weft.packed.QuantizedLinear`).
        memory: bytes of hidden states to keep in memory.
        progress: where to report.

    Returns:
        ``tokens`` and ``seconds``; of a causal language model ``nll`` (nats a token) and ``perplexity``; with ``labels`` of
        one number a row ``accuracy``; with ``against`` the distances above, by what the model returns: ``kl``,
        ``top1_agreement``, or ``cosine_distance``, and always ``output_error``, ‖y − y₀‖ / ‖y₀‖.

    Raises:
        RecipeError: there is no data, or the outputs of the two models do not compare.
        CheckpointError: a model cannot be read or walked.

    >>> model = nn.Linear(4, 2)
    >>> found = evaluate(model, [torch.randn(3, 4)], model)
    >>> found["output_error"]
    0.0
    """
    data = [on_cpu(b) for b in batches]
    if not data:
        raise RecipeError("There is nothing to evaluate on: the data is empty, or its iterator was used up before.")
    progress = progress or Progress()
    progress.start("evaluating", len(data), len(data), "batches")
    sums: dict[str, float] = {}
    began = time.perf_counter()
    with contextlib.ExitStack() as stack, torch.no_grad():
        mine, causal = _outputs(model, data, backend, memory, stack)
        theirs = None if against is None else _outputs(against, data, backend, memory, stack)[0]
        for number, (batch, out) in enumerate(zip(data, mine)):
            with torch.no_grad():
                _score(sums, batch, out, causal)
                if theirs is not None:
                    _compare(sums, batch, out, next(theirs), number)
            progress.advance(f"batch {number + 1}", 1)
    return _means(sums, time.perf_counter() - began)


def _outputs(
    model: Any, data: list[Any], backend: str, memory: int, stack: contextlib.ExitStack
) -> tuple[Iterator[Any], bool]:
    """A model's outputs batch by batch, and whether it predicts the next token."""
    if isinstance(model, nn.Module):
        stack.enter_context(evaluating(model))
        return (call(model, _inputs(b)) for b in data), _is_causal(model)
    opened = open_checkpoint(model)
    if opened is not model:
        stack.callback(opened.close)
    if opened.packed:
        network = load_quantized(opened, backend=backend)
        return (call(network, _inputs(b)) for b in data), _is_causal(network)
    walk = stack.enter_context(Walk(opened, [_inputs(b) for b in data], memory=memory))
    for block in walk:
        block.run(keep=True)
    return walk.outputs(), _is_causal(walk.model)


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _inputs(batch: Any) -> Any:
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else batch


def _score(sums: dict[str, float], batch: Any, out: Any, causal: bool) -> None:
    logits = out.get("logits") if isinstance(out, Mapping) else None
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    mask = _mask(batch, ids)
    _add(sums, "tokens", float(mask.sum()) if mask is not None else len(output_of(out)))
    if logits is None:
        return
    if causal and ids is not None:
        wanted = labels if labels is not None else ids.masked_fill(~mask, IGNORED) if mask is not None else ids
        for row_logits, row in zip(logits, wanted):
            counts = row[1:] != IGNORED
            losses = functional.cross_entropy(row_logits[:-1][counts].float(), row[1:][counts], reduction="sum")
            _add(sums, "nll", float(losses))
            _add(sums, "predicted", float(counts.sum()))
    elif labels is not None and labels.shape == logits.shape[:-1]:
        _add(sums, "right", float((logits.argmax(-1) == labels).sum()))
        _add(sums, "judged", labels.numel())


def _compare(sums: dict[str, float], batch: Any, out: Any, other: Any, number: int) -> None:
    mine, theirs = output_of(_plain(out)), output_of(_plain(other))
    if mine.shape != theirs.shape:
        raise RecipeError(
            f"The models do not compare: of batch {number} one returns {list(mine.shape)} and the other {list(theirs.shape)}."
        )
    if isinstance(batch, Mapping) and mine.dim() == 3:
        mask = _mask(batch, batch.get("input_ids"))
        if mask is not None and mask.shape == mine.shape[:2]:
            if "logits" not in out:
                _add_cosine(sums, mine.float(), theirs.float(), mask)
            mine, theirs = mine[mask], theirs[mask]
    mine, theirs = (
        mine.flatten(0, -2) if mine.dim() > 1 else mine,
        theirs.flatten(0, -2) if theirs.dim() > 1 else theirs,
    )
    _add(sums, "squares", float((mine.double() - theirs.double()).square().sum()))
    _add(sums, "whole", float(theirs.double().square().sum()))
    if not (isinstance(out, Mapping) and "logits" in out) or mine.dim() != 2:
        return
    for q, p in zip(mine.split(_ROWS), theirs.split(_ROWS)):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        _add(sums, "kl", float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True)))
        _add(sums, "agreed", float((p.argmax(-1) == q.argmax(-1)).sum()))
        _add(sums, "compared", len(p))


def _add_cosine(sums: dict[str, float], mine: Tensor, theirs: Tensor, mask: Tensor) -> None:
    weights = mask.unsqueeze(-1).double()
    a, b = (((t.double() * weights).sum(1) / weights.sum(1).clamp(min=1)) for t in (mine, theirs))
    _add(sums, "distance", float((1 - functional.cosine_similarity(a, b)).sum()))
    _add(sums, "rows", len(a))


def _means(sums: dict[str, float], seconds: float) -> dict[str, float]:
    found = {"tokens": sums["tokens"], "seconds": seconds}
    if sums.get("predicted"):
        found["nll"] = sums["nll"] / sums["predicted"]
        found["perplexity"] = math.exp(found["nll"]) if found["nll"] < 700 else math.inf
    if sums.get("judged"):
        found["accuracy"] = sums["right"] / sums["judged"]
    if sums.get("compared"):
        found["kl"] = max(sums["kl"] / sums["compared"], 0.0)  # rounding aside it is not negative; NaN stays NaN
        found["top1_agreement"] = sums["agreed"] / sums["compared"]
    if sums.get("rows"):
        found["cosine_distance"] = sums["distance"] / sums["rows"]
    if "whole" in sums:
        found["output_error"] = (
            math.sqrt(sums["squares"] / sums["whole"]) if sums["whole"] else math.sqrt(sums["squares"])
        )
    return found


def _mask(batch: Any, ids: Tensor | None) -> Tensor | None:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    return None if ids is None else torch.ones_like(ids, dtype=torch.bool)


def _plain(out: Any) -> Any:
    """What of a model's outputs is compared."""
    if isinstance(out, Mapping):
        return next((out[k] for k in ("logits", "last_hidden_state") if k in out), out)
    return out


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value
