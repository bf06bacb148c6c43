"""Time of layers over packed weights beside dense ones, on a CPU: by way, shape and batch.

python benchmarks/quantized_linear.py        writes benchmarks/results/quantized_linear.json; takes about two minutes
python benchmarks/quantized_linear.py --busy  on a machine that others use: one thread, and its processor time

Each round runs every way once, in another order, so that a shared machine slows all of them. A run is six layers one after
the other, each with weights of its own, as in a model that generates: weights come from memory rather than from a cache, and
the threads are awake. Reported are medians for one layer in milliseconds with quartiles, and for each way the ratio to the
faster of the two dense layers: above 1 is faster. The table is what ``weft.packed.product.LARGEST`` is chosen by: the batch
up to which a way beats unpacking.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.packed import Activations, Affine, QuantizedLinear

RESULTS = Path(__file__).with_name("results") / "quantized_linear.json"
SHAPES = [(4096, 4096), (11008, 4096), (1024, 4096), (2000, 1000)]  # (out, in); the last divides into no group of 128
BATCHES = [1, 4, 16, 64, 128, 256]
RUN = 6  # layers one after the other


def layers(out: int, inputs: int) -> dict[str, QuantizedLinear]:
    """A layer for each way."""
    groups = inputs // 128 if inputs % 128 == 0 else 1
    four = Affine(
        torch.randint(0, 16, (out, inputs)).to(torch.int16), torch.rand(out, groups) * 0.01 + 0.01,
        torch.randint(0, 16, (out, groups)).float(), 4, 0,
    )  # fmt: skip
    eight = Affine(
        torch.randint(-128, 128, (out, inputs)).to(torch.int16),
        torch.rand(out, 1) * 0.001,
        torch.zeros(out, 1),
        8,
        -128,
    )
    return {
        "int4": QuantizedLinear.from_packed(four, backend="int4"),
        "int4 unpacked": QuantizedLinear.from_packed(four, backend="dequantize"),
        "int4 auto": QuantizedLinear.from_packed(four),
        "int8": QuantizedLinear.from_packed(eight, backend="int8"),
        "int8 unpacked": QuantizedLinear.from_packed(eight, backend="dequantize"),
        "integer": QuantizedLinear.from_packed(Activations(eight, "int8"), backend="integer"),
    }


def ways(dense: list[Tensor], packed: dict[str, list[Any]], batch: int) -> dict[str, list[Callable[[], Any]]]:
    """What is timed, by name: a run of calls each."""
    x = torch.randn(batch, dense[0].shape[1])
    narrow = x.to(torch.bfloat16)
    made: dict[str, list[Callable[[], Any]]] = {
        "dense float32": [partial(functional.linear, x, weight) for weight in dense],
        "dense bfloat16": [partial(functional.linear, narrow, weight.to(torch.bfloat16)) for weight in dense],
        "int4 unpacked, float32": [partial(layer, x) for layer in packed["int4 unpacked"]],
    }
    return {**made, **{name: [partial(layer, narrow) for layer in each] for name, each in packed.items()}}


def measured(
    calls: dict[str, list[Callable[[], Any]]], seconds: float, clock: Callable[[], float], least: int = 5
) -> dict[str, dict[str, float]]:
    """Median and quartiles of one layer of each run, in milliseconds."""
    order = list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        for call in run:
            call()
    until, shuffle, rounds = time.perf_counter() + seconds, random.Random(0), 0
    while time.perf_counter() < until or rounds < least:
        shuffle.shuffle(order)
        for name in order:
            start = clock()
            for call in calls[name]:
                call()
            times[name].append(1e3 * (clock() - start) / len(calls[name]))
        rounds += 1
    return {name: _summary(sorted(found)) for name, found in times.items()}


def _summary(times: list[float]) -> dict[str, float]:
    low, middle, high = (round(times[int(part * (len(times) - 1))], 3) for part in (0.25, 0.5, 0.75))
    return {"median": middle, "low": low, "high": high}


def table(results: dict[str, Any], out: int = 4096, inputs: int = 4096) -> str:
    """The rows of one shape as a table in Markdown."""
    rows = [r for r in results["rows"] if (r["out"], r["in"]) == (out, inputs)]
    names = [n for n in rows[0]["milliseconds"] if n != "int4 auto"]
    lines = ["| rows of x | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['milliseconds'][n]['median']:.2f} ({row['against_dense'][n]:.2f})" for n in names]
        lines.append(f"| {row['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and batch")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options = parser.parse_args()
    clock = time.thread_time if options.busy else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for out, inputs in SHAPES:
            packed = {
                name: [layer, *(deepcopy(layer) for _ in range(RUN - 1))] for name, layer in layers(out, inputs).items()
            }
            dense = [torch.randn(out, inputs) for _ in range(RUN)]
            for batch in BATCHES:
                times = measured(ways(dense, packed, batch), options.seconds, clock)
                best = min(times["dense float32"]["median"], times["dense bfloat16"]["median"])
                ratios = {name: round(best / t["median"], 2) for name, t in times.items()}
                rows.append({"out": out, "in": inputs, "batch": batch, "milliseconds": times, "against_dense": ratios})
                line = "  ".join(f"{name} {t['median']:.2f} ({ratios[name]:.2f})" for name, t in times.items())
                print(f"{out} x {inputs}, {batch}: {line}", flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 2),
        "clock": "processor" if options.busy else "wall",
    }  # fmt: skip
    lines = ",\n ".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"machine": {json.dumps(machine)},\n "rows": [\n {lines}\n]}}\n')


if __name__ == "__main__":
    main()
