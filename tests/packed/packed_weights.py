"""Packed weights of every form, of random codes, and models that hold them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.packed import (
    Activations,
    Affine,
    Binary,
    Lookup,
    LowRank,
    Minifloat,
    Packed,
    Permuted,
    Transposed,
    Vectors,
)
from weft.packed.formats import find_format
from weft.packed.levels import dynamic_map

E8M0 = torch.float8_e8m0fnu


def codes(limit: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    return (0.1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def affine(
    bits: int,
    group: int,
    *,
    out: int = 64,
    columns: int = 96,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Affine:
    whole = codes(1 << bits, out, columns).to(torch.int16)
    scale = positive(out, columns // group, dtype=dtype)
    if symmetric:
        return Affine(whole - (1 << (bits - 1)), scale, torch.zeros_like(scale), bits, -(1 << (bits - 1)))
    return Affine(whole, scale, (1 + codes((1 << bits) - 1, *scale.shape, seed=2)).to(dtype), bits, 0)


def minifloat(
    kind: str,
    block: tuple[int, int],
    *,
    out: int = 200,
    columns: int = 320,
    dtype: torch.dtype = torch.float16,
    global_scale: Tensor | None = None,
) -> Minifloat:
    patterns = codes(16 if kind in ("e2m1", "e3m0") else 256, out, columns).to(torch.uint8)
    if kind.startswith(("e4", "e5")):
        patterns[(patterns & 127) > 123] = 0  # not a number, or infinite
    scale = positive(-(-out // block[0]), -(-columns // block[1]), dtype=torch.float32)
    scale = torch.exp2((8 * scale).round()) if dtype == E8M0 else scale
    return Minifloat(patterns, scale.to(dtype), kind, block, global_scale)


def lookup(levels: Tensor, block: int = 64, *, out: int = 33, columns: int = 130, nested: bool = False) -> Lookup:
    indices = codes(levels.shape[1], out, columns).to(torch.uint8)
    blocks = -(-out * columns // block)
    if not nested:
        return Lookup(indices, levels, positive(blocks, dtype=torch.float32), block)
    scale, nested_scale = codes(256, blocks, seed=3).to(torch.uint8), positive(-(-blocks // 256), dtype=torch.float32)
    return Lookup(indices, levels, scale, block, nested_scale, torch.tensor(0.7))


def every_form() -> dict[str, Packed]:
    """One or more of each."""
    table = codes(2, 33, seed=5).to(torch.uint8)
    two = torch.randn(2, 5, generator=torch.Generator().manual_seed(4))
    books = tuple(torch.randn(2, n, 4, generator=torch.Generator().manual_seed(n)).half() for n in (6, 32))
    indices = torch.stack([codes(6, 33, 4), codes(32, 33, 4)]).to(torch.int32)
    grid = affine(3, 32, symmetric=False)
    real = Affine(grid.codes, grid.scale, grid.zero + 0.25, 3, 0)
    low = LowRank(grid, positive(64, 5), positive(5, 96))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(6)).to(torch.int32)
    return {
        **{f"affine {b}": affine(b, 32, symmetric=b % 2 == 0) for b in range(1, 17) if b < 16},
        "real zeros": real,
        **{k: minifloat(k, (1, 32)) for k in ("e4m3", "e5m2", "e2m1", "e3m0")},
        "blocks that are cut": minifloat("e4m3", (128, 128)),
        "global": minifloat("e2m1", (1, 16), dtype=torch.float8_e4m3fn, global_scale=torch.tensor(0.3)),
        "power of two": minifloat("e2m1", (1, 32), dtype=E8M0),
        "lookup": lookup(dynamic_map()[None, ::17]),
        "nested": lookup(dynamic_map()[None, ::17], nested=True),
        "tables": Lookup(codes(5, 33, 130).to(torch.uint8), two, positive(33, dtype=torch.float32), 130, table=table),
        "vectors": Vectors(indices, books, 15, table, positive(33), positive(33, seed=7)),
        "binary": Binary(codes(2, 3, 33, 50).bool(), positive(3, 5, 2), (8, 32)),
        "transposed": Transposed(grid),
        "permuted": Permuted(grid, order),
        "low rank": low,
        "activations": Activations(Transposed(low), "int8"),
        "static": Activations(grid, "e4m3", torch.tensor(0.5)),
        "groups of inputs": Activations(grid, "e4m3", None, 32),
        "inputs in nvfp4": Activations(grid, "nvfp4", torch.tensor(0.01).double()),
        "inputs in mxfp4": Activations(grid, "mxfp4"),
    }


def cases() -> list[tuple[str, Packed]]:
    """A format's name and a packed weight that it can say, as its files have it."""
    half = torch.float16
    made: list[tuple[str, Packed]] = []
    for bits in range(2, 9):
        for symmetric in (False, True):
            made += [("pack-quantized", affine(bits, g, out=61, symmetric=symmetric)) for g in (32, 96)]
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            grid = affine(bits, 32, symmetric=symmetric)
            order = torch.randperm(96, generator=torch.Generator().manual_seed(bits)).to(torch.int32)
            whole = affine(bits, 96, symmetric=symmetric)
            made += [(name, p) for name in ("gptq", "gptq_v2") for p in (grid, whole, Permuted(grid, order))]
    for symmetric in (False, True):
        made += [("awq", affine(4, g, symmetric=symmetric)) for g in (32, 96)]
        made.append(("int-quantized", Activations(affine(8, 96, symmetric=symmetric), "int8")))
    made.append(("int-quantized", Activations(affine(8, 96), "int8", torch.tensor(0.25))))
    made.append(("int-quantized", Activations(affine(4, 32), "int8")))
    made.append(("pack-quantized", Activations(affine(4, 32), "int8")))
    made.append(("pack-quantized", Activations(affine(4, 32, symmetric=False), "e4m3", torch.tensor(0.25))))
    for block in ((1, 320), (200, 320), (128, 128), (1, 64)):
        floats = minifloat("e4m3", block, dtype=half)
        made += [("float-quantized", floats), ("float-quantized", Activations(floats, "e4m3"))]
        made.append(("float-quantized", Activations(floats, "e4m3", torch.tensor(0.5))))
    common = 1 / torch.tensor(733.1237).double()
    made.append(("float-quantized", Activations(minifloat("e4m3", (128, 64)), "e4m3", None, 64)))
    made.append(("nvfp4-pack-quantized", minifloat("e2m1", (1, 16), dtype=torch.float8_e4m3fn, global_scale=common)))
    made.append(("mxfp4-pack-quantized", minifloat("e2m1", (1, 32), dtype=E8M0)))
    made.append(("mxfp8-quantized", minifloat("e4m3", (1, 32), dtype=E8M0)))
    nvfp4, mxfp4, mxfp8 = (one for _, one in made[-3:])
    made.append(("nvfp4-pack-quantized", Activations(nvfp4, "nvfp4", 1 / torch.tensor(91.37).double())))
    made += [("mxfp4-pack-quantized", Activations(mxfp4, "mxfp4")), ("mxfp8-quantized", Activations(mxfp8, "mxfp8"))]
    made += [("int-quantized", Activations(affine(4, 32), kind)) for kind in ("int4", "e4m3")]
    made += [("pack-quantized", Activations(affine(4, 32), kind)) for kind in ("int4", "e4m3")]
    blocks = minifloat("e4m3", (128, 128), out=256, columns=384, dtype=torch.float32)
    whole_float = minifloat("e4m3", (200, 320), dtype=torch.float32)
    made += [("fp8", Activations(blocks, "e4m3", None, 128)), ("fp8", Activations(blocks, "e4m3", torch.tensor(0.5)))]
    made += [("fp8", Activations(whole_float, "e4m3")), ("fp8", Activations(whole_float, "e4m3", torch.tensor(0.5)))]
    rising, tree = torch.linspace(-1, 1, 16)[None], torch.tensor([[0, 2.0, 1, *range(3, 16)]]) / 15
    for levels in (rising, tree):
        for size in (64, 256):
            made += [("bitsandbytes", lookup(levels, size, nested=nested)) for nested in (False, True)]
    made.append(("bitsandbytes", lookup(rising, 64, out=3, columns=5)))
    return made + [("weft", p) for _, p in made] + [("weft", p) for p in every_form().values()]


def write_model(
    folder: Path,
    name: str,
    layers: Mapping[str, Packed],
    others: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float16,
    config: Mapping[str, Any] | None = None,
    ignored: Sequence[str] = ("lm_head",),
) -> dict[str, Packed]:
    """A model's folder as a writer of files would make it; the packed weights as the files have them."""
    form = find_format(name)
    fitted = {layer: form.fit(packed, dtype) for layer, packed in layers.items()}
    tensors = dict(others)
    for layer, packed in fitted.items():
        tensors |= form.write(layer, packed, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**(config or {"dtype": str(dtype)[6:]}), "quantization_config": form.config(fitted, ignored)}
    (folder / "config.json").write_text(json.dumps(settings))
    for file, content in form.files(fitted, ignored).items():
        (folder / file).write_text(json.dumps(content))
    return fitted


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny Llama in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def packed_llama(
    source: Path,
    folder: Path,
    name: str,
    make: Callable[[str, int, int], Packed],
    *,
    heads: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Packed]:
    """The tiny Llama with its projections packed: ``make(layer, out, in)``."""
    layers, others = {}, {}
    for tensor, weight in load_file(source / "model.safetensors").items():
        layer = tensor.removesuffix(".weight")
        if layer.endswith("_proj") or (heads and layer == "lm_head"):
            layers[layer] = make(layer, *weight.shape)
        else:
            others[tensor] = weight
    config = json.loads((source / "config.json").read_text())
    ignored = [] if heads else ["lm_head"]
    return write_model(folder, name, layers, others, dtype=dtype, config=config, ignored=ignored)
