"""Kernels of Triton: by its interpreter on a CPU, in a process of its own, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = """
import itertools
import torch
from weft.kernels import triton_ready
from weft.kernels.triton_packed import affine_linear, lookup_linear
from weft.packed import Affine, Lookup
from weft.packed.product import _on_gpu

assert triton_ready()
torch.manual_seed(0)
shapes = ((1, 1, 1), (20, 256, 2), (70, 130, 2))
for bits, (rows, columns, groups), batch in itertools.product((3, 4), shapes, (1, 3, 17)):
    for whole in (True, False):
        zero = torch.randint(0, 1 << bits, (rows, groups)).float() + (0 if whole else 0.25)
        packed = Affine(torch.randint(0, 1 << bits, (rows, columns)).short(), torch.rand(rows, groups) + 0.1, zero, bits, 0)
        tensors = packed.tensors()
        dtype = torch.float32 if whole else torch.bfloat16
        x = torch.randn(batch, columns).to(dtype)
        made = affine_linear(x, tensors["codes"], tensors["scale"], tensors.get("zero", torch.zeros_like(zero)), bits)
        wanted = x.double() @ packed.dequantize().double().T
        bound = 1e-5 if whole else 2**-7
        assert made.dtype == dtype
        assert (made - wanted).norm() <= bound * wanted.norm(), (bits, rows, columns, groups, batch, dtype)
    levels = torch.randn(1, 1 << bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = Lookup(codes, levels, torch.rand(rows * groups), columns // groups)
    x = torch.randn(batch, columns)
    made = lookup_linear(x, packed.tensors()["codes"], levels[0], packed.scale.view(rows, groups), bits)
    wanted = x.double() @ packed.dequantize().double().T
    assert (made - wanted).norm() <= 1e-5 * wanted.norm(), (bits, rows, columns, groups, batch)
for packed in (
    Affine(torch.randint(-8, 8, (20, 64)).short(), torch.rand(20, 2), torch.zeros(20, 2), 4, -8),
    Affine(torch.randint(-4, 4, (20, 64)).short(), torch.rand(20, 2), torch.randint(-4, 4, (20, 2)).float(), 3, -4),
    Affine(torch.randint(-8, 8, (20, 64)).short(), torch.rand(20, 2), torch.randn(20, 2), 4, -8),
    Lookup(torch.randint(0, 11, (20, 64), dtype=torch.uint8), torch.randn(1, 11), torch.rand(80), 16),
):
    x = torch.randn(3, 64)
    made = _on_gpu(x, packed.tensors(), packed.settings())
    torch.testing.assert_close(made, x @ packed.dequantize().T, rtol=1e-4, atol=1e-4)
assert _on_gpu(torch.randn(65, 64), packed.tensors(), packed.settings()) is None
print("equal")
"""

COMPILED = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weft.kernels import triton_packed

def compiled(kernel, pointers, constants):
    names = kernel.arg_names
    kinds = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm

try:
    triton.knobs.nvidia.ptxas.path
except Exception as error:
    print("no assembler", error)
    sys.exit()
common = {"x": "*bf16", "words": "*i32", "scale": "*fp32", "other": "*u8"}
facts = {"bits": 4, "group": 128, "table": False, "one": True, "block_columns": 64}
one = compiled(triton_packed._vectors, {**common, "sums": "*fp32"}, {**facts, "block_rows": 16})
more = {**facts, "bits": 3, "table": True, "block_rows": 64, "block_batch": 16, "dot": tl.bfloat16}
two = compiled(triton_packed._tiles, {**common, "other": "*fp32", "y": "*bf16"}, more)
assert len(one["cubin"]) and len(two["cubin"])
print("compiled", "mma" in two["ptx"])
"""


def run(code: str, **environment: str) -> str:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def test_the_kernels_compute_the_reference() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "equal"


def test_the_kernels_compile_for_a_gpu() -> None:
    said = run(COMPILED, TRITON_INTERPRET="0")
    if said.startswith("no assembler"):
        pytest.skip(said)
    assert said == "compiled True"


def test_layers_do_not_load_triton_without_a_gpu() -> None:
    code = (
        "import sys, torch, weft.packed as p\n"
        "layer = p.QuantizedLinear.from_packed("
        "p.Affine(torch.ones(2, 32).short(), torch.ones(2, 1), torch.zeros(2, 1), 4, 0))\n"
        "layer(torch.ones(1, 32))\n"
        "print('weft.kernels.triton_packed' in sys.modules)"
    )
    assert run(code) == "False"
