"""How much baking an adapter changes a model's outputs: weft and PEFT, float32 and bfloat16.

python benchmarks/baking.py        writes benchmarks/results/baking.json; two minutes

A Llama of random weights whose adapters were moved some steps from their start. Given is the largest difference between
the outputs with the live adapter and after baking, as a share of the largest output, over ten seeds. Both libraries bake
the same adapter: PEFT loads the folder that weft saved, as factors where the method is not PEFT's own.

Which of two roundings of a weight changes the outputs less is chance, so two more things are given: how far the baked
weights are from the merge in float64, which is no matter of chance; and how many of them differ from PEFT's at all. The
last LoRA has a scale of 11/8: with powers of two, scaling a product rounds nothing.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.adapt import EVA, Bone, LoRA, MixtureOfShards, SVFit
from weft.checkpoint.open import open_checkpoint

RESULTS = Path(__file__).with_name("results") / "baking.json"
SEEDS = 10
METHODS: dict[str, tuple[Any, str]] = {  # configuration, and the form in which PEFT reads it
    "lora": (LoRA(rank=8), "peft"),
    "miss": (Bone(rank=8), "peft"),
    "eva": (EVA(rank=8), "peft"),
    "mixture_of_shards": (MixtureOfShards(budget_rank=2, rank=4, private_rank=1), "lora"),
    "svfit": (SVFit(rank=8), "lora"),
    "lora of scale 11/8": (LoRA(rank=8, alpha=11), "peft"),
}


def llama(seed: int, dtype: torch.dtype) -> nn.Module:
    """A model of random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def moved(model: nn.Module, method: str, seed: int) -> None:
    """Attach an adapter, and move what trains as far as training would."""
    tokens = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(seed))
    weft.adapt_(model, METHODS[method][0], data=[tokens])
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn(value.shape, generator=generator).to(value.dtype))


@torch.no_grad()
def outputs(model: nn.Module, seed: int) -> Tensor:
    """Outputs of fixed tokens, in float64."""
    tokens = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(seed + 2))
    made: Tensor = model(input_ids=tokens).logits.double()
    return made


def change(live: Tensor, baked: Tensor) -> float:
    """The largest difference, as a share of the largest output."""
    return float((live - baked).abs().max() / live.abs().max())


def rounding(baked: nn.Module, exact: nn.Module) -> float:
    """Mean distance of weights from the exact ones, as a share of the mean weight."""
    goal = exact.state_dict()
    off = sum(float((t.double() - goal[n]).abs().sum()) for n, t in baked.state_dict().items())
    return off / sum(float(t.abs().sum()) for t in goal.values())


def different(baked: nn.Module, other: nn.Module) -> float:
    """Share of weights that are not the same number."""
    pairs = list(zip(baked.state_dict().values(), other.state_dict().values(), strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def measure(method: str, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """What baking changes: in memory, through files, and by PEFT."""
    import peft

    model = llama(seed, dtype)
    moved(model, method, seed)
    live = outputs(model, seed)
    exact = copy.deepcopy(model).double()
    weft.bake_(exact)
    with tempfile.TemporaryDirectory() as folder:
        llama(seed, dtype).save_pretrained(f"{folder}/base")
        weft.adapt.save_adapter(model, f"{folder}/adapter", form=METHODS[method][1])
        plain = llama(seed, dtype)
        with open_checkpoint(f"{folder}/base+{folder}/adapter") as files:
            state = {n: t.torch().to(dtype) for n, t in files.items()}
        plain.load_state_dict(state)
        through_files = outputs(plain, seed)
        theirs = peft.PeftModel.from_pretrained(llama(seed, dtype), f"{folder}/adapter").eval()
        their_live = outputs(theirs, seed)
        merged = theirs.merge_and_unload()
        their_baked = outputs(merged, seed)
    weft.bake_(model)
    return {
        "weft": change(live, outputs(model, seed)),
        "weft through files": change(live, through_files),
        "peft": change(their_live, their_baked),
        "live, weft and peft": change(live, their_live),
        "weft, rounding": rounding(model, exact),
        "weft through files, rounding": rounding(plain, exact),
        "peft, rounding": rounding(merged, exact),
        "weights that are not peft's": different(model, merged),
        "weights through files that are not peft's": different(plain, merged),
    }


def main() -> None:
    """Measure and write."""
    import peft

    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, peft {peft.__version__}",
        "measure": f"largest change of the outputs by baking, as a share of the largest output: mean of {SEEDS} seeds",
        "rounding": "mean distance of baked weights from the merge in float64, as a share of the mean weight",
    }
    for dtype in (torch.float32, torch.bfloat16):
        for method in METHODS:
            rows = [measure(method, dtype, seed) for seed in range(SEEDS)]
            row = {name: float(f"{sum(r[name] for r in rows) / SEEDS:.3g}") for name in rows[0]}
            for ours in ("weft", "weft through files"):
                row[f"{ours} not above peft, seeds"] = sum(r[ours] <= r["peft"] for r in rows)
                row[f"{ours} rounds not more than peft, seeds"] = sum(
                    r[f"{ours}, rounding"] <= r["peft, rounding"] for r in rows
                )
            result[f"{method}, {str(dtype).removeprefix('torch.')}"] = row
            print(method, dtype, json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
