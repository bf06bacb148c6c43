"""Whether a program will load a quantised model, and run it fast: checked from names, shapes and the configuration.

What is known of the programs is theirs to change; each finding says the rule that it rests on. Findings are errors (it will
not load, or not compute what it should), warnings (it loads and is slow, or only in some versions), and notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import read_json
from weft.errors import RecipeError, did_you_mean
from weft.packed.around import Activations, within
from weft.packed.form import Packed
from weft.packed.forms import Affine, Minifloat
from weft.packed.outline import describe, outline
from weft.quantize.fused import fused_layers

TARGETS = ("vllm", "transformers", "llama.cpp")
READS = {  # quant_method of files that a program loads
    "vllm": ("compressed-tensors", "gptq", "awq", "fp8", "bitsandbytes", "mxfp4"),
    "transformers": ("compressed-tensors", "gptq", "awq", "fp8", "bitsandbytes", "mxfp4"),
}
PACKAGES = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel and optimum",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
}
ROW_PARALLEL = ("o_proj", "down_proj", "w2", "out_proj", "dense", "fc2", "c_proj")  # GPUs share their inputs
COLUMNS, INPUTS = 64, 128  # multiples of outputs and inputs that Marlin's kernels take
GROUPS = (32, 64, 128)  # group sizes of Marlin's kernels; a whole row too


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: error, warning or note.
        text: the rule, what was found, and what to do.
        layers: which layers, if it is not all.
    """

    level: str
    text: str
    layers: tuple[str, ...] = ()


def check_serving(checkpoint: Checkpoint, target: str = "vllm", tensor_parallel: int = 1) -> list[Finding]:
    """Look at a quantised model with the eyes of a program that is to run it.

    Args:
        checkpoint: an open model.
        target: one of ``TARGETS``.
        tensor_parallel: how many GPUs share each layer.

    Returns:
        Findings, errors first; none of the level error means that it loads.

    Raises:
        RecipeError: the program is not known.
    """
    if target not in TARGETS:
        raise RecipeError(
            f"weft knows how {', '.join(TARGETS)} load models, not {target!r}.{did_you_mean(target, TARGETS)}"
        )
    found = list(_llama_cpp(checkpoint) if target == "llama.cpp" else _engine(checkpoint, target, tensor_parallel))
    return sorted(found, key=lambda f: ("error", "warning", "note").index(f.level))


def _llama_cpp(checkpoint: Checkpoint) -> Iterator[Finding]:
    if any(key.startswith("general.") for key in checkpoint.metadata):
        yield Finding("note", "It is a GGUF file.")
    else:
        yield Finding("error", "llama.cpp reads GGUF files: weft convert MODEL -o model.gguf --type q4_0.")


def _engine(checkpoint: Checkpoint, target: str, shares: int) -> Iterator[Finding]:
    settings = _settings(checkpoint)
    if not settings:
        if checkpoint.packed or settings is None:
            yield Finding(
                "error", "config.json has no quantization_config, so no program will know what the tensors mean."
            )
        else:
            yield Finding("note", "The model is not quantised; nothing to check.")
        return
    method = str(settings.get("quant_method", ""))
    if method not in READS[target]:
        yield Finding(
            "error",
            f"{target} does not load the quant_method {method!r}; it loads {', '.join(READS[target])}. Quantise with "
            "--format pack-quantized, gptq or awq, or load it with weft.quantize.load_quantized.",
        )
        return
    if target == "transformers" and method in PACKAGES:
        yield Finding("note", f"transformers needs {PACKAGES[method]} beside it for this.")
    packed = {name: outline(describe(load())) for name, load in checkpoint.packed.items()}  # one at a time in memory
    yield from _names(checkpoint, packed, settings)
    yield from _experts(packed, settings, target)
    if target == "vllm":
        yield from _fused(packed)
        yield from _shares(packed, shares)
        yield from _kernels(packed, shares)
        yield from _inputs(packed)
    else:
        yield from _types(checkpoint, packed)
    yield from _tables(checkpoint, packed, target)


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The quantization_config as it stands in the folder."""
    if checkpoint.folder is None or not (checkpoint.folder / "config.json").is_file():
        return None
    found = read_json(checkpoint.folder / "config.json").get("quantization_config", {})
    return found if isinstance(found, Mapping) else None


def _names(checkpoint: Checkpoint, packed: Mapping[str, Packed], settings: Mapping[str, Any]) -> Iterator[Finding]:
    if not packed:
        yield Finding("error", "config.json says that the model is quantised, and no tensor is packed. Fetch it again.")
        return
    plain = [
        n.removesuffix(".weight") for n, t in checkpoint.items()
        if n.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) and len(t.shape) == 2
        and n.removesuffix(".weight") not in packed
    ]  # fmt: skip
    ignored = [str(i) for i in settings.get("ignore") or settings.get("modules_to_not_convert") or ()]
    missing = tuple(
        n for n in plain if not any(n == i or n.endswith(f".{i}") or i in n or i.startswith("re:") for i in ignored)
    )
    if missing:
        yield Finding(
            "error",
            f"{len(missing)} linear layers are not packed and not among those that config.json leaves out, so their weights "
            "will be looked for under packed names. Add them to its ignore list.",
            missing,
        )


def _experts(packed: Mapping[str, Packed], settings: Mapping[str, Any], target: str) -> Iterator[Finding]:
    """transformers stacks experts into one tensor as it loads them, from some layouts only."""
    if target != "transformers" or settings.get("quant_method") != "compressed-tensors":
        return
    experts = {n: within(p, Activations) for n, p in packed.items() if ".experts." in n}
    zeros = tuple(n for n, p in experts.items() if isinstance(p, Affine) and bool(p.zero.count_nonzero()))
    if zeros:
        yield Finding(
            "error",
            "transformers takes experts apart without their zero points (an assertion fails). Quantise with --kind symmetric.",
            zeros,
        )
    grids = tuple(n for n, p in experts.items() if isinstance(p, Affine) and n not in zeros)
    if grids and settings.get("format") == "int-quantized":
        yield Finding(
            "error",
            "transformers loads experts of whole numbers from packed files only. Quantise with --format pack-quantized.",
            grids,
        )
    wrong = tuple(n for n, p in experts.items() if isinstance(p, Minifloat) and not _stacks(p))
    if wrong:
        yield Finding(
            "error",
            "transformers loads experts of floating-point numbers with one scale or one a row, and of MXFP4; those of NVFP4 it "
            "loads without their global scale, which gives other weights. Quantise with --scheme FP8_DYNAMIC or MXFP4, or run it "
            "elsewhere.",
            wrong,
        )


def _stacks(packed: Minifloat) -> bool:
    """Whether transformers gets an expert's weights right."""
    if packed.bits == 4:
        return packed.global_scale is None
    return packed.block in (packed.shape, (1, packed.shape[1]))


def _fused(packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """Layers that are one in vLLM need one scheme."""
    wrong = []
    for names in fused_layers(packed):
        if len({_scheme(packed[n]) for n in names}) > 1:
            wrong += names
    if wrong:
        yield Finding(
            "error",
            "vLLM makes one layer of q, k and v, and of gate and up: these have different bits or groups. Choose bits for "
            "them together.",
            tuple(wrong),
        )


def _shares(packed: Mapping[str, Packed], shares: int) -> Iterator[Finding]:
    """Each GPU's part must be whole groups."""
    uneven, groups = [], []
    for name, one in packed.items():
        inner = within(one, Activations)
        rows, columns = one.shape
        if name.rpartition(".")[2] in ROW_PARALLEL:
            if columns % shares:
                uneven.append(name)
            elif (
                isinstance(inner, Affine | Minifloat) and _group(inner) < columns and columns // shares % _group(inner)
            ):
                groups.append(name)
        elif rows % shares:
            uneven.append(name)
    if uneven:
        yield Finding("error", f"{shares} GPUs do not share these layers evenly; take fewer.", tuple(uneven))
    if groups:
        yield Finding(
            "error",
            f"With {shares} GPUs a part of the inputs of these layers is no whole number of groups. Take a smaller "
            "--group-size, or fewer GPUs.",
            tuple(groups),
        )


def _kernels(packed: Mapping[str, Packed], shares: int) -> Iterator[Finding]:
    """Fast kernels take some sizes only."""
    sizes, shapes, bits = [], [], []
    for name, one in packed.items():
        if not isinstance(one, Affine):
            continue
        rows, columns = one.shape
        if name.rpartition(".")[2] in ROW_PARALLEL:
            columns //= shares
        else:
            rows //= shares
        if one.bits not in (4, 8):
            bits.append(name)
        elif one.group_size not in GROUPS and one.group_size != one.shape[1]:
            sizes.append(name)
        elif rows % COLUMNS or columns % INPUTS:
            shapes.append(name)
    if bits:
        yield Finding(
            "warning", "vLLM's fast kernels take 4 and 8 bits; others are refused by some versions.", tuple(bits)
        )
    if sizes:
        yield Finding(
            "warning", f"vLLM's fast kernels take groups of {', '.join(map(str, GROUPS))} or whole rows.", tuple(sizes)
        )
    if shapes:
        yield Finding(
            "warning",
            f"vLLM's fast kernels take outputs in multiples of {COLUMNS} and inputs of {INPUTS} on each GPU; these layers run on slow ones.",
            tuple(shapes),
        )


def _inputs(packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """Quantised inputs go with some weights only."""
    wrong = []
    for name, one in packed.items():
        if isinstance(one, Activations) and isinstance(one.inner, Affine):
            whole_rows = one.inner.group_size == one.shape[1]
            known = one.kind in ("int8", "e4m3") and (one.inner.bits == 4 or (one.inner.bits == 8 and whole_rows))
            wrong += [] if known else [name]
    if wrong:
        yield Finding(
            "error",
            "vLLM has no products of these whole numbers with quantised inputs: it takes 8 bits with a scale a row, or 4 bits, and "
            "inputs of 8 bits. Quantise with --scheme W8A8, W4A8 or W4AFP8.",
            tuple(wrong),
        )


def _types(checkpoint: Checkpoint, packed: Mapping[str, Packed]) -> Iterator[Finding]:
    """compressed-tensors unpacks some formats to one type, whatever the model's."""
    small = tuple(n for n, p in packed.items() if _small_scales(within(p, Activations)))
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    if small and dtype.removeprefix("torch.") != "bfloat16":
        yield Finding(
            "warning",
            f"The model is {dtype}, and compressed-tensors unpacks NVFP4 and MX formats to bfloat16, so that products fail. Load it "
            "with dtype=torch.bfloat16.",
            small,
        )


def _small_scales(packed: Packed) -> bool:
    """Whether scales have eight bits, as those of NVFP4 and MX formats."""
    return isinstance(packed, Minifloat) and packed.scale.element_size() == 1


def _tables(checkpoint: Checkpoint, packed: Mapping[str, Packed], target: str) -> Iterator[Finding]:
    from weft.packed.formats.compressed_tensors import in_bytes
    from weft.packed.formats.groups import EMBEDDINGS

    tables = tuple(n for n in packed if n.rpartition(".")[2] in EMBEDDINGS)
    if not tables:
        return
    if target == "vllm":
        yield Finding("error", "vLLM does not load packed embeddings. Quantise with --embedding-bits 0.", tables)
        return
    other = tuple(n for n in tables if not in_bytes(n, packed[n]))
    if other:
        yield Finding(
            "error",
            "transformers does not load packed embeddings, only those of 8 bits, symmetric, which are stored as bytes. Quantise "
            "with --embedding-bits 8, or 0.",
            other,
        )
    writes = any("LM" in name or "Generation" in name for name in checkpoint.config.get("architectures") or ())
    heads = any(n.removesuffix(".weight").endswith(("lm_head", "embed_out")) for n in checkpoint)
    if writes and checkpoint.config.get("tie_word_embeddings", not heads):
        yield Finding(
            "error",
            "The output head is tied to the embeddings, and transformers would multiply by their codes. Quantise with "
            "--embedding-bits 0.",
            tables,
        )


def _scheme(packed: Packed) -> str:
    inner = within(packed, Activations)
    facts: dict[str, Any] = {"form": inner.form}
    if isinstance(inner, Affine):
        facts |= {"bits": inner.bits, "group": inner.group_size < inner.shape[1] and inner.group_size}
    elif isinstance(inner, Minifloat):
        facts |= {"kind": inner.kind, "block": list(inner.block)}
    return json.dumps(facts)


def _group(packed: Affine | Minifloat) -> int:
    return packed.group_size if isinstance(packed, Affine) else packed.block[1]
