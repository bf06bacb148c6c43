"""``weft eval``, ``check`` and ``generate``: what the commands do with a quantised model, or a plain one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate.data import DataOptions
from weft.checkpoint.open import open_checkpoint
from weft.cli.calibrate import read_for
from weft.cli.show import size
from weft.engine.progress import Progress
from weft.errors import RecipeError

_LABELS = {
    "perplexity": "perplexity",
    "original_perplexity": "  of the original",
    "accuracy": "accuracy",
    "kl": "KL to the original",
    "top1_agreement": "same likeliest token",
    "cosine_distance": "1 − cos",
    "output_error": "error of outputs",
    "tokens": "tokens",
    "tokens_per_second": "tokens a second",
    "bytes": "size",
    "bytes_against": "  of the original",
}


def evaluate_command(
    model: str,
    data: str,
    against: str,
    options: DataOptions,
    *,
    backend: str,
    limit: int,
    as_json: bool,
    progress: Progress,
) -> str:
    """What ``weft eval`` prints."""
    from weft.quantize.evaluate import evaluate

    batches = read_samples(model, data, options, progress)
    facts: dict[str, Any] = evaluate(model, batches, against or None, backend=backend, progress=progress)
    facts["bytes"] = file_bytes(model)
    if against:
        facts["bytes_against"] = file_bytes(against)
        facts["layers"] = layer_errors(model, against)
    if as_json:
        return json.dumps(facts)
    lines = score_lines(facts)
    if against and limit:
        worst = sorted(facts["layers"].items(), key=lambda item: -item[1])[:limit]
        lines += ["", f"error of weights, worst {len(worst)} of {len(facts['layers'])}"]
        lines += [f"  {error:8.4f}  {name}" for name, error in worst]
    return "\n".join(lines)


def layer_errors(model: str, against: str) -> dict[str, float]:
    """‖Ŵ − W‖ / ‖W‖ of every tensor that differs, one at a time in memory."""
    found = {}
    with closing(open_checkpoint(model)) as mine, closing(open_checkpoint(against)) as theirs:
        for name, tensor in mine.items():
            if name not in theirs or theirs[name].shape != tensor.shape or not tensor.dtype.floating:
                continue
            before = theirs[name].torch().double()
            error, norm = float((tensor.torch().double() - before).norm()), float(before.norm())
            if error:
                found[name] = error / norm if norm else error
    return found


def check_command(model: str, target: str, tensor_parallel: int, *, as_json: bool) -> tuple[str, bool]:
    """What ``weft check`` prints, and whether the model will load."""
    from weft.quantize.serving import check_serving

    with closing(open_checkpoint(model)) as checkpoint:
        findings = check_serving(checkpoint, target, tensor_parallel)
    fine = not any(f.level == "error" for f in findings)
    if as_json:
        facts = [{"level": f.level, "text": f.text, "layers": list(f.layers)} for f in findings]
        return json.dumps({"loads": fine, "findings": facts}, indent=1), fine
    lines = [
        f"{f.level:8} {f.text}" + (f"\n{'':9}{', '.join(f.layers[:5])}{' …' * (len(f.layers) > 5)}" if f.layers else "")
        for f in findings
    ]
    return "\n".join([*lines, f"{target} {'loads this model' if fine else 'will not load this model'}"]), fine


def generate_command(
    model: str, prompt: str, *, tokens: int, temperature: float, seed: int, dtype: str, backend: str, as_json: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Print the text as it is made."""
    import torch

    from weft.calibrate.data import load_tokenizer
    from weft.checkpoint.dtypes import dtype_of
    from weft.quantize.load import load_quantized

    with closing(open_checkpoint(model)) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder or Path())
        network = load_quantized(checkpoint, backend=backend, progress=progress)
    progress.finish()
    if not hasattr(network, "generate") or not network.can_generate():
        raise RecipeError(f"{model}: {type(network).__name__} does not write text; give a causal language model.")
    if dtype:
        network.to(getattr(torch, dtype_of(dtype).torch))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise RecipeError("The prompt is empty; give the text that is to be written on.")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0}
    if tokenizer.pad_token_id is not None or tokenizer.eos_token_id is not None:
        options["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    began = time.perf_counter()
    made = network.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)[0]
    seconds = time.perf_counter() - began
    new = len(made) - ids.shape[1]
    if as_json:
        text = tokenizer.decode(made, skip_special_tokens=True)
        print(
            json.dumps(
                {
                    "text": text,
                    "tokens": new,
                    "seconds": round(seconds, 3),
                    "tokens_per_second": round(new / seconds, 2),
                }
            )
        )
    else:
        print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} a second", file=sys.stderr)


def read_samples(model: str, data: str, options: DataOptions, progress: Progress) -> list[dict[str, Tensor]]:
    """Batches as the model takes them, from a file or from the model itself."""
    with closing(open_checkpoint(model)) as checkpoint:
        return read_for(checkpoint, data, options, [], progress)


def file_bytes(model: str) -> int:
    """What a model's weights take on disk; of a model elsewhere, what its tensors take."""
    path = Path(model).expanduser()
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
    if path.is_file():
        return path.stat().st_size
    with closing(open_checkpoint(model)) as checkpoint:
        return checkpoint.nbytes


def score_lines(facts: Mapping[str, Any]) -> list[str]:
    """A line for each number that has a name.

    >>> score_lines({"kl": 0.01234, "layers": {}})
    ['KL to the original     0.01234']
    """
    return [f"{_LABELS[key]:22} {_number(key, value)}" for key, value in facts.items() if key in _LABELS]


def _number(key: str, value: float) -> str:
    if key.startswith("bytes"):
        return size(int(value))
    return f"{value:,.0f}" if key == "tokens" else f"{value:.4g}"
