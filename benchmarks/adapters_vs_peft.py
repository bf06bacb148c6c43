"""A training step with weft's adapters and with PEFT's, in turn: seconds, and peak memory.

python benchmarks/adapters_vs_peft.py        writes benchmarks/results/adapters_vs_peft.json; about ten minutes

A Llama of 55 M parameters, adapters on all linear layers but the head, AdamW, one thread. Both models stand in one process
and take turns, the first of each pair drawn at random, so that a busy machine slows both; the ratio is that of pairs.
Memory is measured in a process each: the largest resident set without file pages during three steps, on top of the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).with_name("results") / "adapters_vs_peft.json"
RANK = 16
BATCH, LENGTH = 4, 128
KINDS = {"lora": "LoraConfig", "miss": "MissConfig"}
Step = Callable[[], float]


def llama(dtype: torch.dtype) -> nn.Module:
    """A Llama of 55 M random parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10,
        num_key_value_heads=10, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def adapted(library: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """The model with an adapter; factors are float32 in both libraries."""
    model = llama(dtype)
    if library == "weft":
        import weft

        config = weft.adapt.LoRA(rank=RANK, alpha=RANK) if kind == "lora" else weft.adapt.Bone(rank=RANK)
        weft.adapt_(model, config)
        return model
    import peft

    options = {"lora_alpha": RANK} if kind == "lora" else {}
    made = getattr(peft, KINDS[kind])(r=RANK, target_modules="all-linear", **options)
    return peft.get_peft_model(model, made, autocast_adapter_dtype=True)


def training_step(model: nn.Module) -> Step:
    """One step of AdamW on random tokens; returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def trainable(model: nn.Module) -> int:
    """Numbers that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seconds(kind: str, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """Seconds a step of both, and their ratio over pairs with its 95% interval."""
    models = {library: adapted(library, kind, dtype) for library in ("weft", "peft")}
    steps = {library: training_step(model) for library, model in models.items()}
    first = {library: step() for library, step in steps.items()}  # warm-up
    assert math.isclose(first["weft"], first["peft"], rel_tol=1e-4), f"the models differ: {first}"
    times: dict[str, list[float]] = {library: [] for library in steps}
    order = list(steps)
    generator = random.Random(0)
    for _ in range(pairs):
        generator.shuffle(order)
        for library in order:
            began = time.perf_counter()
            steps[library]()
            times[library].append(time.perf_counter() - began)
    logs = [math.log(a / b) for a, b in zip(times["weft"], times["peft"])]
    logs = sorted(logs)[len(logs) // 20 : len(logs) - len(logs) // 20]  # a break of the machine hits one of a pair
    mean, half = statistics.mean(logs), 1.98 * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "trainable": {library: trainable(model) for library, model in models.items()},
        "pairs": pairs,
        "weft_seconds": round(statistics.median(times["weft"]), 3),
        "peft_seconds": round(statistics.median(times["peft"]), 3),
        "ratio": round(math.exp(mean), 3),
        "interval": [round(math.exp(mean - half), 3), round(math.exp(mean + half), 3)],
    }


def resident() -> int:
    """Resident bytes of this process without file pages."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def memory(library: str, kind: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the backward pass keeps of the forward pass, and the peak of three steps on top of the model."""
    model = adapted(library, kind, dtype)
    step = training_step(model)
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        loss = model(input_ids=tokens, labels=tokens).loss
    del loss
    before, peak, stop = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    stop.set()
    watcher.join()
    return {"kept_MB": round(sum(kept.values()) / 1e6), "peak_MB": round((peak - before) / 1e6)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--memory", help="measure LIBRARY,KIND,DTYPE, and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        library, kind, dtype = arguments.memory.split(",")
        print(json.dumps(memory(library, kind, getattr(torch, dtype))))
        return
    import peft
    import transformers

    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, 1 thread",
        "against": f"peft {peft.__version__}, transformers {transformers.__version__}",
        "model": f"Llama of {sum(p.numel() for p in llama(torch.float32).parameters()) / 1e6:.0f} M parameters, rank {RANK}, "
        f"{BATCH} x {LENGTH} tokens, AdamW",
        "memory": "MB on top of the model: kept for the backward pass, and the peak of three steps",
    }
    for kind in arguments.kinds.split(","):
        for dtype in arguments.dtypes.split(","):
            row = seconds(kind, getattr(torch, dtype), arguments.pairs)
            for library in ("weft", "peft"):
                command = [sys.executable, __file__, "--memory", f"{library},{kind},{dtype}"]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row[f"{library}_memory"] = json.loads(output.splitlines()[-1])
            result[f"{kind}, {dtype}"] = row
            print(kind, dtype, json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
