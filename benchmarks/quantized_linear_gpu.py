"""Time of layers over packed weights on a GPU, by Triton's kernels, beside a dense bfloat16 layer.

python benchmarks/quantized_linear_gpu.py        prints a table; needs CUDA and triton

Each time is the median of runs between two events, over enough layers in turn that none stays in the cache. The share of the
memory's bandwidth is that of the bytes of weights, scales and zeros, against a copy on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from weft.packed import Affine, Lookup, QuantizedLinear

OUT, INPUTS, GROUP = 4096, 4096, 128
LAYERS, RUNS = 32, 20


def milliseconds(call: Callable[[int], object]) -> float:
    """Of one call; ``call`` takes the number of a layer."""
    times = []
    for run in range(RUNS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for layer in range(LAYERS):
            call(layer)
        end.record()
        torch.cuda.synchronize()
        if run >= 3:
            times.append(start.elapsed_time(end) / LAYERS)
    return sorted(times)[len(times) // 2]


def packed() -> dict[str, QuantizedLinear]:
    """A layer of each kind."""
    codes = torch.randint(0, 16, (OUT, INPUTS))
    scale, zero = torch.rand(OUT, INPUTS // GROUP) * 0.01, torch.randint(0, 16, (OUT, INPUTS // GROUP)).float()
    return {
        "4 bits": QuantizedLinear.from_packed(Affine(codes.short(), scale.half(), zero.half(), 4, 0)).cuda(),
        "table": QuantizedLinear.from_packed(
            Lookup(codes.to(torch.uint8), torch.randn(1, 16), torch.rand(OUT * INPUTS // 64), 64)
        ).cuda(),
    }


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    dense = [torch.randn(OUT, INPUTS, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    target = torch.empty_like(dense[0])
    copied = 2 * target.nbytes / milliseconds(lambda i: target.copy_(dense[i]))
    layers = {
        name: [layer, *(QuantizedLinear.from_packed(layer.packed()) for _ in range(LAYERS - 1))]
        for name, layer in packed().items()
    }
    for batch in (1, 4, 16, 64):
        x = torch.randn(batch, INPUTS, device="cuda", dtype=torch.bfloat16)
        base = milliseconds(lambda i, x=x: functional.linear(x, dense[i]))
        line = [f"batch {batch}: dense {base:.4f} ms ({dense[0].nbytes / base / copied:.0%})"]
        for name, several in layers.items():
            wanted: Tensor = x.float() @ several[0].weight.T
            error = float((several[0](x).float() - wanted).norm() / wanted.norm())
            time = milliseconds(lambda i, x=x, several=several: several[i](x))
            share = several[0].nbytes / time / copied
            line.append(
                f"{name} {time:.4f} ms ({base / time:.2f} times, {share:.0%} of a copy's bandwidth, error {error:.1e})"
            )
        print("; ".join(line))


if __name__ == "__main__":
    main()
