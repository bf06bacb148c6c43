"""Folds: found in every architecture as its code says, exact for any scales, and refused where they do not hold."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import MODELS, build

from weft.calibrate import Block, Walk
from weft.quantize.folding import find_folds
from weft.quantize.probe import Around, edited, in_float32, matrix_of, run_block
from weft.quantize.scores import score_layers

# producer, its rows, its kind -> readers, of the block's own names; experts by their first two
ATTENTION = {
    ("input_layernorm", 0, "norm"): ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ("self_attn.v_proj", 0, "linear"): ["self_attn.o_proj"],
}
GATED = {
    ("post_attention_layernorm", 0, "norm"): ["mlp.gate_proj", "mlp.up_proj"],
    ("mlp.up_proj", 0, "linear"): ["mlp.down_proj"],
}
EXPERTS = [f"mlp.experts.{i}.gate_up_proj" for i in range(4)]


def experts(width: int) -> dict[tuple[str, int, str], list[str]]:
    return {(f"mlp.experts.{i}.gate_up_proj", width, "linear"): [f"mlp.experts.{i}.down_proj"] for i in range(4)}


def t5(mlp: int) -> dict[tuple[str, int, str], list[str]]:
    own = "layer.0.SelfAttention"
    return {
        ("layer.0.layer_norm", 0, "norm"): [f"{own}.q", f"{own}.k", f"{own}.v"],
        (f"{own}.v", 0, "linear"): [f"{own}.o"],
        (f"layer.{mlp}.layer_norm", 0, "norm"): [f"layer.{mlp}.DenseReluDense.wi"],
        (f"layer.{mlp}.DenseReluDense.wi", 0, "linear"): [f"layer.{mlp}.DenseReluDense.wo"],  # a ReLU
    }


SHARED = "mlp.shared_expert"
EXPECTED: dict[str, dict[tuple[str, int, str], list[str]]] = {
    "llama": ATTENTION | GATED,
    "qwen3": ATTENTION | GATED,
    "gemma3": {
        ("input_layernorm", 0, "offset"): ATTENTION["input_layernorm", 0, "norm"],
        ("pre_feedforward_layernorm", 0, "offset"): GATED["post_attention_layernorm", 0, "norm"],
        ("self_attn.v_proj", 0, "linear"): ["self_attn.o_proj"],
        ("mlp.up_proj", 0, "linear"): ["mlp.down_proj"],
    },
    "mixtral": ATTENTION | {("post_attention_layernorm", 0, "norm"): ["mlp.gate", *EXPERTS]} | experts(48),
    "qwen2_moe": ATTENTION
    | {
        ("post_attention_layernorm", 0, "norm"): [
            f"{SHARED}.gate_proj", f"{SHARED}.up_proj", "mlp.shared_expert_gate", "mlp.gate", *EXPERTS,
        ],
        (f"{SHARED}.up_proj", 0, "linear"): [f"{SHARED}.down_proj"],
    }
    | experts(16),
    "qwen3_moe": ATTENTION | {("post_attention_layernorm", 0, "norm"): ["mlp.gate", *EXPERTS]} | experts(16),
    "gpt_oss": ATTENTION | {("post_attention_layernorm", 0, "norm"): ["mlp.router", *EXPERTS]},  # its gates are clamped
    "gpt2": {
        ("ln_1", 0, "norm"): ["attn.c_attn"],
        ("attn.c_attn", 64, "linear"): ["attn.c_proj"],
        ("ln_2", 0, "norm"): ["mlp.c_fc"],
    },
    "bert": {("attention.self.value", 0, "linear"): ["attention.output.dense"]},
    "bert_masked": {("attention.self.value", 0, "linear"): ["attention.output.dense"]},
    "modernbert": {
        ("attn_norm", 0, "norm"): ["attn.Wqkv"],
        ("attn.Wqkv", 64, "linear"): ["attn.Wo"],
        ("mlp_norm", 0, "norm"): ["mlp.Wi"],
        ("mlp.Wi", 48, "linear"): ["mlp.Wo"],
    },
    "t5": t5(1),
    "vit": {
        ("layernorm_before", 0, "norm"): ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
        ("attention.v_proj", 0, "linear"): ["attention.o_proj"],
        ("layernorm_after", 0, "norm"): ["mlp.fc1"],
    },
}  # fmt: skip


def lively(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list]:
    """A model whose norms are not ones and whose blocks do something."""
    model, batches = build(name, dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator).to(dtype)
            elif "embed" not in path and path != "shared.weight":
                p *= 5
    return model, batches


@contextmanager
def second(model: nn.Module, batches: list) -> Iterator[Block]:
    """The second block of a walk, in float32."""
    with Walk(model, batches) as walk:
        blocks = iter(walk)  # a block's experts are single layers as long as the iterator stays there
        next(blocks).run(keep=True)
        block = next(blocks)
        with in_float32(block):
            yield block


@pytest.mark.parametrize("name", sorted(MODELS))
def test_folds_of_every_architecture(name: str) -> None:
    model, batches = lively(name)
    with second(model, batches) as block:
        folds, refused = find_folds(block)
        prefix = len(block.name) + 1
        found = {(f.name[prefix:], f.rows[0], f.kind): [r.name[prefix:] for r in f.readers] for f in folds}
        assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in EXPECTED[name].items()}
        if "bert" in name and name != "modernbert":
            assert len(refused) == 1
            assert "attention.output.LayerNorm" in refused[0]  # its output goes on past the layers that read it
        else:
            assert not refused
        # all of them at once, with any scales, on data that they were not found on
        plain = [run_block(block, i).output for i in range(3)]
        generator = torch.Generator().manual_seed(0)
        before = {n: p.clone() for n, p in block.module.named_parameters()}
        for fold in folds:
            fold.apply(0.4 + 2 * torch.rand(fold.channels, generator=generator))
        for i, output in enumerate(plain):
            moved = run_block(block, i).output - output
            assert float(moved.norm() / output.norm()) < 1e-5
        changed = {n for n, p in block.module.named_parameters() if not torch.equal(p, before[n])}
        assert len(changed) >= 2
        one = max(folds, key=lambda f: f.channels)
        with edited(one.divided(0.5 + torch.rand(one.channels, generator=generator))):
            moved = run_block(block, 1).output - plain[1]
            assert float(moved.norm() / plain[1].norm()) > 1e-4


def test_grouped_query_attention_shares_scales() -> None:
    model, batches = lively("llama")  # 4 query heads of 8, 2 of keys and values
    with second(model, batches) as block:
        folds, _ = find_folds(block)
        fold = next(f for f in folds if f.name.endswith("v_proj"))
        source = fold.readers[0].source
        assert fold.channels == 16
        assert source.tolist() == [head // 2 * 8 + i for head in range(4) for i in range(8)]
        values = torch.arange(32.0)
        assert fold.gathered(values, source)[:8].tolist() == [4.0 + i for i in range(8)]
        assert fold.gathered(values, source, largest=True)[8:].tolist() == [24.0 + i for i in range(8)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit", "mixtral", "modernbert", "t5"])
def test_query_and_key_are_found(name: str) -> None:
    model, batches = lively(name)
    with second(model, batches) as block:
        folds, _ = find_folds(block)
        by_input: dict[int, list[str]] = {}
        inputs = run_block(block, 0, block.linears()).inputs
        for path in inputs:
            first = next(k for k, p in enumerate(inputs) if torch.equal(inputs[p], inputs[path]))
            by_input.setdefault(first, []).append(path)
        found = {n.rpartition(".")[2] for n in score_layers(block, list(by_input.values()), folds)}
    fused = {"gpt2": {"c_attn"}, "modernbert": {"Wqkv"}, "bert": {"query", "key"}, "t5": {"q", "k"}}
    assert found == fused.get(name, {"q_proj", "k_proj"})


def test_query_and_key_of_cross_attention_are_found() -> None:
    model, batches = lively("t5")
    with Walk(model, batches) as walk:
        for block in walk:
            if not block.name.startswith("decoder.block.1"):
                continue
            folds, _ = find_folds(block)
            cross = f"{block.name}.layer.1.EncDecAttention."
            own = f"{block.name}.layer.0.SelfAttention."
            shared = [[f"{own}{p}" for p in "qkv"], [f"{cross}q"], [f"{cross}k", f"{cross}v"]]
            assert score_layers(block, shared, folds) == {f"{a}{p}" for a in (own, cross) for p in "qk"}


class Made(nn.Module):
    """A block of two layers with something between them."""

    def __init__(self, between: nn.Module, leak: float = 0.0, idle: bool = False):
        super().__init__()
        self.norm, self.first, self.between, self.second = nn.LayerNorm(8), nn.Linear(8, 12), between, nn.Linear(12, 8)
        self.idle, self.leak = (nn.Linear(8, 8) if idle else None), leak

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.norm(hidden_states)
        return hidden_states + self.leak * x + self.second(self.between(self.first(x)))


def folds_of_made(block: nn.Module) -> tuple[set[str], list[str]]:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    with Walk(nn.Sequential(nn.Sequential(block)), [torch.randn(5, 4, 8)], blocks="0") as walk:
        folds, refused = find_folds(next(iter(walk)))
    return {f.name for f in folds}, refused


def test_what_a_scale_passes() -> None:
    assert folds_of_made(Made(nn.ReLU()))[0] == {"0.0.norm", "0.0.first"}
    assert folds_of_made(Made(nn.LeakyReLU()))[0] == {"0.0.norm", "0.0.first"}
    assert folds_of_made(Made(nn.GELU())) == ({"0.0.norm"}, [])
    assert folds_of_made(Made(nn.ReLU6())) == ({"0.0.norm"}, [])
    assert folds_of_made(Made(nn.Softmax(-1))) == ({"0.0.norm"}, [])


def test_what_does_not_hold_is_refused_with_a_reason() -> None:
    found, refused = folds_of_made(Made(nn.ReLU(), leak=1e-3))  # a thousandth of the norm's output goes past its reader
    assert found == {"0.0.first"}
    assert refused == ["0.0.norm: more than first depends on its scale"]
    found, refused = folds_of_made(Made(nn.ReLU(), idle=True))
    assert found == {"0.0.first"}
    assert "0.0.idle did not run" in refused[0]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_half_precision_comes_back_to_the_bit(name: str) -> None:
    model, batches = lively(name, torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with Walk(model, batches) as walk:
        for block in walk:
            with in_float32(block) as kept:
                assert all(p.dtype == torch.float32 for p in block.module.parameters())
                assert set(kept.values()) == {torch.bfloat16}
                assert all(matrix_of(m).dtype == torch.float32 for m in block.linears().values())
                find_folds(block)
                for layer in block.experts.values():  # still views of the fused parameter
                    assert matrix_of(layer).untyped_storage().data_ptr() == (
                        getattr(layer.experts, layer.part).untyped_storage().data_ptr()
                    )
            assert all(m.weight.dtype == torch.bfloat16 for m in block.linears().values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_rounded_norm_leaves_the_rest_of_its_scale_to_the_readers() -> None:
    model, batches = lively("llama", torch.bfloat16)
    with second(model, batches) as block:
        folds, _ = find_folds(block)
        plain = run_block(block, 0).output
        fold = folds[0]
        scale = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(1))
        exact = fold.apply(scale, torch.bfloat16)
        assert not torch.equal(exact, scale)
        torch.testing.assert_close(exact, scale, rtol=2**-8, atol=0)
        assert torch.equal(fold.module.weight, fold.module.weight.bfloat16().float())
        assert float((run_block(block, 0).output - plain).norm() / plain.norm()) < 1e-6


def test_a_channel_that_would_overflow_keeps_a_scale_of_one() -> None:
    model, batches = lively("llama")
    with second(model, batches) as block:
        norm, value = (f for f in find_folds(block)[0] if f.name.endswith(("input_layernorm", "v_proj")))
        with torch.no_grad():
            norm.module.weight[3], norm.module.weight[4] = 1.0, 0.1
            value.module.weight[3] = 0.01
            value.module.weight[4, 7] = -3.0
        plain = run_block(block, 0).output
        for fold, over, fits in ((norm, 3, 4), (value, 4, 3)):
            scale = torch.full((fold.channels,), 0.5)
            scale[[3, 4]] = 1e-5
            exact = fold.apply(scale, torch.float16)
            assert exact[over] == 1
            torch.testing.assert_close(exact[[0, fits]], scale[[0, fits]], rtol=1e-3, atol=0)
            assert all(bool(p.half().isfinite().all()) for p in fold.module.parameters())
        assert float((run_block(block, 0).output - plain).norm() / plain.norm()) < 1e-5


def test_around_is_the_smallest_module_and_leaves_padding_out() -> None:
    model, batches = lively("llama")
    with second(model, batches) as block:
        names = [f"{block.name}.self_attn.{p}_proj" for p in "qkv"]
        around = Around(block, names, 10**6)
        assert around.name == f"{block.name}.self_attn"
        assert around.loss() == 0
        attention = block.module.self_attn
        seen = []
        handle = attention.register_forward_hook(lambda m, a, o: seen.append(o[0]))
        new = attention.v_proj.weight + 0.1
        for i in range(3):
            run_block(block, i)
        with edited([(attention.v_proj.weight, new)]):
            for i in range(3):
                run_block(block, i)
            found = around.loss()
        handle.remove()
        keep = [b["attention_mask"].bool() for b in batches]
        squares = torch.cat([(b - a)[k].square() for a, b, k in zip(seen[:3], seen[3:6], keep)])
        assert found == pytest.approx(float(squares.mean()), rel=1e-5)
        assert found > 0
        few = Around(block, [f"{block.name}.mlp.gate_proj"], 1)
        assert few.name == f"{block.name}.mlp"
        assert len(few._calls) == 1
        assert Around(block, [names[0], f"{block.name}.mlp.up_proj"], 1).name == block.name
