"""What weight functions cost: microseconds a call, and seconds and memory to attach and bake on a 0.5 B model.

python benchmarks/functions.py           writes benchmarks/results/functions.json; needs 5 GB of memory, takes minutes
python benchmarks/functions.py --calls   measures calls anew, and keeps what the file says of the whole model

PEFT's LoRA stands beside. Calls are measured in short blocks, all layers in turn, and the median and the least of the
blocks are given: on a shared machine the least is what the code costs. Attaching and baking run in a process each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_shaped import VOCABULARY, dimensions
from torch import Tensor, nn

import weft
from weft.adapt import LoRA
from weft.contract.models import attach
from weft.function import FunctionMethod
from weft.registry import methods

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "functions.json"
GOAL_MICROSECONDS = 45  # a call, on top of a plain nn.Linear's
WHOLE = ("lora", "sigma_reparam", "weight_standardization")
BLOCK = 20  # calls: two milliseconds at most, so that most blocks run without a break


def layers(features: int) -> dict[str, nn.Module]:
    """A linear layer with each function, PEFT's LoRA, and torch's own parametrization with the smallest function."""
    from peft import LoraConfig, inject_adapter_in_model

    class Identity(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight

    made: dict[str, nn.Module] = {"nn.Linear": nn.Linear(features, features)}
    for name, row in methods().items():
        if isinstance(row, FunctionMethod):
            made[name] = nn.Linear(features, features)
            attach(row, made[name], moved=False)
    made["lora on lora"] = nn.Linear(features, features)
    for _ in range(2):
        weft.parametrize_(made["lora on lora"], LoRA())
    adapted = nn.Sequential(nn.Linear(features, features))
    made["peft lora"] = inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"]), adapted)[0]
    made["torch, the identity"] = nn.Linear(features, features)
    nn.utils.parametrize.register_parametrization(made["torch, the identity"], "weight", Identity())
    return made


def calls(features: int, blocks: int, training: bool) -> dict[str, dict[str, float]]:
    """Microseconds of one call of each layer, and what it has on top of the plain one."""
    measured = {name: layer.train(training) for name, layer in layers(features).items()}
    x = torch.randn(4, features)
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    with torch.set_grad_enabled(training):
        for _ in range(blocks):
            for name, layer in measured.items():
                began = time.perf_counter()
                for _ in range(BLOCK):
                    layer(x)
                seconds[name].append((time.perf_counter() - began) / BLOCK * 1e6)
    plain = seconds["nn.Linear"]
    return {
        name: {
            "median": round(statistics.median(times), 1),
            "least": round(min(times), 1),
            "on_top_median": round(statistics.median(t - p for t, p in zip(times, plain)), 1),
            "on_top_least": round(min(times) - min(plain), 1),
        }
        for name, times in seconds.items()
    }


def llama(parameters: float) -> nn.Module:
    """A Llama of random bfloat16 weights."""
    import transformers

    size = dimensions(parameters)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["hidden"] // 64,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.02)
    return model


def resident() -> int:
    """Resident bytes of this process without file pages."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def watched(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a piece of work, and the most memory it had on top of what was there before."""
    before, peak, stop = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    return {"seconds": round(seconds, 2), "peak_MB_on_top": round(max(peak - before, 0) / 1e6)}, made


def attach_and_bake(name: str, parameters: float) -> dict[str, Any]:
    """One function, or PEFT's LoRA, on all linear layers but the head: attached, then baked."""
    model = llama(parameters)
    torch.set_num_threads(1)
    size = {"model_MB": round(sum(p.nbytes for p in model.parameters()) / 1e6)}
    if name == "peft lora":
        from peft import LoraConfig, get_peft_model

        attached, adapted = watched(lambda: get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")))
        del model
        baked, _ = watched(lambda: adapted.merge_and_unload())
    else:
        config = methods()[name].configure({})
        attached, report = watched(lambda: weft.parametrize_(model, config, where="all-linear"))
        size["layers"] = len(report.touched)
        baked, _ = watched(lambda: weft.bake_(model))
    return {**size, "attach": attached, "bake": baked}


def whole_models(parameters: float) -> dict[str, Any]:
    """Attaching to and baking a whole model, each function in a process of its own."""
    result: dict[str, Any] = {
        "model": f"Llama-shaped, bfloat16, {parameters / 1e9:g} B parameters, all linear layers but the head",
        "peak": "resident memory without file pages, on top of the model before the step",
    }
    for name in (*WHOLE, "peft lora"):
        command = [sys.executable, __file__, "--whole", name, "--parameters", str(parameters)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[name] = json.loads(output.splitlines()[-1])
        print(name, json.dumps(result[name]), flush=True)
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--calls", action="store_true", help="measure calls only; the rest of the file stays")
    parser.add_argument("--whole", help="measure one method on a whole model, and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.whole:
        print(json.dumps(attach_and_bake(arguments.whole, arguments.parameters)))
        return
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, 1 thread",
        "call": f"microseconds of a 16 x 16 linear layer on 4 rows, {arguments.blocks} blocks of {BLOCK} calls in turn",
        "load_before_calls": round(load, 2),
        "goal_on_top": GOAL_MICROSECONDS,
        "training": calls(16, arguments.blocks, training=True),
        "evaluation": calls(16, arguments.blocks, training=False),
    }
    if arguments.calls:
        result["whole_model"] = json.loads(RESULTS.read_text())["whole_model"]
    else:
        result["whole_model"] = whole_models(arguments.parameters)
    for mode in ("training", "evaluation"):
        for name, row in result[mode].items():
            print(f"{mode:10}  {name:32} {row['least']:6.1f} µs, {row['on_top_least']:6.1f} on top")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
