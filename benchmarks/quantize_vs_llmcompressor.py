"""GPTQ to W4A16 in groups of 128, by weft and by llm-compressor: seconds, memory, perplexity, on the same model and data.

python benchmarks/quantize_vs_llmcompressor.py --model LM --peer DIR     writes benchmarks/results/quantize_vs_llmcompressor.json

LM is what ``benchmarks/language_model.py`` makes, for perplexity; time and memory are also taken on a Llama of 8 layers × 768
with random weights. DIR holds llm-compressor and what it needs beside weft's own packages
(``pip install --target DIR --no-deps llmcompressor==0.14.0.1 loguru datasets``). Runs take turns, each in a process of its own
that writes a folder; both read the model from disk. Memory: the largest resident memory without pages of files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from resident import Memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "quantize_vs_llmcompressor.json"
ROWS, TOKENS, BITS, GROUP = 64, 256, 4, 128


def by_weft(model: Path, ids: Any, output: Path) -> float:
    """Seconds."""
    from weft.quantize import GPTQ, quantize_model

    batches = [{"input_ids": part} for part in ids.split(8)]
    began = time.perf_counter()
    quantize_model(model, output, GPTQ(BITS, GROUP, "symmetric"), batches)
    return time.perf_counter() - began


def by_llmcompressor(model: Path, ids: Any, output: Path) -> float:
    """Seconds."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * TOKENS] * len(ids)})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    began = time.perf_counter()
    oneshot(
        model=str(model), dataset=data, recipe=recipe, max_seq_length=TOKENS, num_calibration_samples=len(ids),
        output_dir=str(output), batch_size=8,
    )  # fmt: skip
    return time.perf_counter() - began


def measure(kind: str, model: Path, output: Path) -> None:
    """One run in this process; prints JSON last."""
    memory = Memory()
    memory.start()
    import torch
    import transformers  # noqa: F401  both need it

    ids = torch.load(model / "calibration.pt", weights_only=True)
    seconds = (by_weft if kind == "weft" else by_llmcompressor)(model, ids, output)
    size = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    print(json.dumps({"seconds": round(seconds, 2), "peak_MB": memory.peak // 1_000_000, "MB": round(size / 1e6, 1)}))


def run(kind: str, model: Path, output: Path, peer: Path) -> dict[str, float]:
    """One run in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    path = os.pathsep.join([str(ROOT / "src"), *([str(peer)] if kind != "weft" else [])])
    command = [sys.executable, __file__, "--one", kind, "--model", str(model), "--output", str(output)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(folder: Path, source: Path | None, tokenizer_of: Path, dtype: str) -> None:
    """A model's folder with its calibration data: a copy of a trained one, or random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if source is not None:
        shutil.copytree(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [json.loads(line)["text"] for line in (folder / "calibration.jsonl").read_text().splitlines()]
        stream = [t for text in texts[::5] for t in tokenizer.encode(text)]
        starts = [i * (len(stream) - TOKENS) // ROWS for i in range(ROWS)]
        torch.save(torch.tensor([stream[s : s + TOKENS] for s in starts]), folder / "calibration.pt")
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)  # the peer does not start without one
    torch.save(torch.randint(4, 4096, (ROWS, TOKENS)), folder / "calibration.pt")


def perplexity(model: Path, data: Path) -> float:
    """On held-out packages, of the weights that the files stand for."""
    from weft.calibrate.data import DataOptions, load_tokenizer, read_batches
    from weft.quantize import evaluate

    batches = read_batches(data, load_tokenizer(data.parent), DataOptions(128, 256, 8, pack=True))
    return float(evaluate(model, batches, backend="dequantize")["perplexity"])


def main() -> None:
    """Both models, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", default="")
    parser.add_argument("--output", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one, arguments.model, arguments.output)
        return
    facts: dict[str, Any] = {
        "what": f"GPTQ W4A16, group {GROUP}, {ROWS} × {TOKENS} tokens; llm-compressor 0.14.0.1", "cores": os.cpu_count(),
        "machine": platform.machine(), "rows": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for name, source, dtype in (
            ("8 × 768, random, float32", None, "float32"),
            ("8 × 768, random, bfloat16", None, "bfloat16"),
            ("trained, float32", arguments.model, "float32"),
        ):
            folder = Path(work) / f"model-{source is None}-{dtype}"
            prepare(folder, source, arguments.model, dtype)
            runs: dict[str, list[dict[str, float]]] = {"weft": [], "llm-compressor": []}
            for _ in range(arguments.rounds):
                for kind, done in runs.items():
                    done.append(run(kind, folder, Path(work) / kind, arguments.peer))
                    print(name, kind, done[-1], flush=True)
            rows: dict[str, Any] = {k: {key: min(r[key] for r in done) for key in done[0]} for k, done in runs.items()}
            rows["time ratio"] = round(rows["llm-compressor"]["seconds"] / rows["weft"]["seconds"], 2)
            rows["memory ratio"] = round(rows["weft"]["peak_MB"] / rows["llm-compressor"]["peak_MB"], 3)
            if source is not None:
                rows["original"] = {"perplexity": round(perplexity(folder, source / "held_out.jsonl"), 4)}
                for kind in runs:
                    rows[kind]["perplexity"] = round(perplexity(Path(work) / kind, source / "held_out.jsonl"), 4)
            facts["rows"][name] = rows
            print(json.dumps(rows, indent=1), flush=True)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
