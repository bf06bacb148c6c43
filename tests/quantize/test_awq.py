"""AWQ: the published search written out, clips by brute force, and what it is worth on trained weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import Statistics, Walk, collect
from weft.calibrate.facts import Facts
from weft.calibrate.rewrite import change_block
from weft.errors import RecipeError
from weft.quantize import (
    AWQ,
    GPTQ,
    Grid,
    awq_scales,
    fake_quantize,
    fit_grid,
    gptq_codes,
    output_clip,
    round_to_nearest,
    weight_share,
)


def outlying(x: Tensor, seed: int = 0) -> Tensor:
    """A few channels thirty times as large."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(x.shape[-1])
    scale[torch.randperm(x.shape[-1], generator=generator)[: max(1, x.shape[-1] // 16)]] = 30
    return x * scale


def lively(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model with outlying channels, and batches without padding."""
    model, batches = build(name, dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() == 1 and "norm" in path:
                p += 2 * torch.randn(p.shape, generator=generator).exp().to(dtype)
            elif "embed" not in path:
                p *= 5
    return model, [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches]


def rtn(weight: Tensor, bits: int, size: int) -> Tensor:
    """Group by group, written out: asymmetric, with zero."""
    new = torch.empty_like(weight)
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size]
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(-low / scale)
        codes = (torch.round(group / scale) + zero).clamp(0, 2**bits - 1)
        new[:, start : start + size] = (codes - zero) * scale
    return new


@torch.no_grad()
def published(
    layers: list[nn.Linear], x: Tensor, source: Tensor, channels: int, f: Any, bits: int, size: int, duo: bool
) -> tuple[float | None, Tensor]:
    """The search: exponents 0, 1/20, …, and what f of the layers with each moves by, the smallest of which wins."""
    weights = [m.weight.clone() for m in layers]
    mean = x.abs().reshape(-1, x.shape[-1]).mean(0)
    shares = torch.cat(weights).abs().unflatten(1, (-1, size))
    share = (shares / shares.amax(-1, keepdim=True)).flatten(1).mean(0)
    s_x, s_w = (torch.stack([v[source == c].mean() for c in range(channels)]) for v in (mean, share))
    reference = f()

    def loss(scale: Tensor) -> float:
        for layer, weight in zip(layers, weights):
            layer.weight.copy_(rtn(weight * scale[source], bits, size) / scale[source])
        value = float((f() - reference).pow(2).mean())
        for layer, weight in zip(layers, weights):
            layer.weight.copy_(weight)
        return value

    best, chosen, found = loss(torch.ones(channels)), None, torch.ones(channels)
    for i in range(20):
        alpha = i / 20
        scale = s_x**alpha / (s_w ** (1 - alpha) + 1e-4) if duo else s_x**alpha
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        value = loss(scale)
        if value < best:
            best, chosen, found = value, alpha, scale
    return chosen, found


@pytest.mark.parametrize("duo", [True, False])
def test_the_search_is_the_published_one(duo: bool) -> None:
    """On a block of a Llama with grouped queries: the same exponents, and the same scales in norms and value rows."""
    model, batches = lively("llama")
    config = AWQ(bits=3, group_size=8, duo=duo, clip=False, tokens=10**6)
    with Walk(model, batches) as walk:
        block = next(iter(walk))
        layer: Any = block.module
        attention, mlp = layer.self_attn, layer.mlp
        kept: dict[str, list[Any]] = {}

        def keep(name: str) -> Any:
            return lambda m, a, k, o: kept.setdefault(name, []).append((a, k, o))

        named = {
            "attention": attention,
            "mlp": mlp,
            "o": attention.o_proj,
            "down": mlp.down_proj,
            "q": attention.q_proj,
        }
        handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in named.items()]
        block.run()
        for handle in handles:
            handle.remove()

        def inputs(name: str) -> Tensor:
            return torch.cat([a[0].reshape(-1, a[0].shape[-1]) for a, _, _ in kept[name]])

        def again(module: Any, name: str) -> Any:
            def f() -> Tensor:
                outs = [module(*a, **k) for a, k, _ in kept[name]]
                return torch.cat([(o[0] if isinstance(o, tuple) else o).reshape(-1, 32) for o in outs])

            return f

        def itself(module: nn.Linear, x: Tensor) -> Any:
            return lambda: module(x)

        same, heads = torch.arange(32), torch.tensor([h // 2 * 8 + i for h in range(4) for i in range(8)])
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        o, down, x = attention.o_proj, mlp.down_proj, inputs("mlp")
        expected = {
            "self_attn.q_proj": published(qkv, inputs("q"), same, 32, again(attention, "attention"), 3, 8, duo),
            "self_attn.o_proj": published([o], inputs("o"), heads, 16, itself(o, inputs("o")), 3, 8, duo),
            "mlp.up_proj": published([mlp.gate_proj, mlp.up_proj], x, same, 32, again(mlp, "mlp"), 3, 8, duo),
            "mlp.down_proj": published(
                [down], inputs("down"), torch.arange(48), 48, itself(down, inputs("down")), 3, 8, duo
            ),
        }
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        (task,) = change_block(block, {"*": config}, "*", None, [], 0, False)
        found = {n: task.notes[f"{block.name}.{n}"]["alpha"] for n in expected}
        assert found == {n: alpha for n, (alpha, _) in expected.items()}
        assert sum(alpha is not None for alpha in found.values()) >= 3
        assert all(task.notes[f"{block.name}.{n}"]["loss"] <= 1 for n in expected)
        for norm, reader in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
            scale = before[f"{norm}.weight"] / layer.get_submodule(norm).weight
            torch.testing.assert_close(scale, expected[reader][1], rtol=1e-4, atol=0)
        # and the layers are what is rounded of the scaled weights
        s_qkv, s_o = expected["self_attn.q_proj"][1], expected["self_attn.o_proj"][1]
        value = before["self_attn.v_proj.weight"] * s_qkv / s_o[:, None]
        assert float((attention.v_proj.weight.detach() - rtn(value, 3, 8)).norm() / value.norm()) < 0.02
        output = before["self_attn.o_proj.weight"] * s_o[heads]
        assert float((o.weight.detach() - rtn(output, 3, 8)).norm() / output.norm()) < 0.02


def test_clips_by_trying_each_on_the_inputs() -> None:
    """The Gram matrix gives what the inputs themselves give: the mean square of each group's part of the output."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 24, generator=generator), torch.randn(50, 24, generator=generator)
    weight[2, 5], weight[4, 11] = 9, -7
    x = outlying(x @ torch.randn(24, 24, generator=generator))
    for kind in ("asymmetric", "symmetric", "narrow"):
        grid = Grid(3, 8, kind)
        found, clipped = output_clip(weight, x.T @ x, grid), 0
        for row in range(6):
            for g in range(3):
                part, w = x[:, 8 * g : 8 * g + 8], weight[row, 8 * g : 8 * g + 8]
                losses = []
                for i in range(10):
                    m = w.abs().max() * (1 - i / 20)
                    new = round_to_nearest(w.clamp(-m, m).unsqueeze(0), Grid(3, 0, kind))[0]
                    losses.append((float((part @ (new - w)).square().mean()), float(m)))
                assert float(found[row, g]) == pytest.approx(min(losses)[1])
                clipped += min(losses)[1] < losses[0][1]
        assert clipped >= 3


def test_scales() -> None:
    size = torch.tensor([4.0, 1.0, 0.25])
    torch.testing.assert_close(awq_scales(size, None, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    assert torch.equal(awq_scales(size, None, 0.0), torch.ones(3))
    assert torch.equal(awq_scales(torch.full((5,), 0.3), torch.full((5,), 0.6), 0.35), torch.ones(5))  # equal channels
    both = awq_scales(size, torch.tensor([0.5, 0.1, 0.5]), 0.5)
    assert float(both.max() * both.min()) == pytest.approx(1)
    assert float(both[1] / both[2]) == pytest.approx(2 * (0.5**0.5 + 1e-4) / (0.1**0.5 + 1e-4))
    assert awq_scales(torch.tensor([0.0, 1.0]), None, 0.5).isfinite().all()  # a channel that was never anything
    assert weight_share([torch.zeros(2, 4)], 2).tolist() == [0] * 4


def statistics(x: Tensor, name: str = "0") -> Statistics:
    return collect(nn.Sequential(nn.Linear(x.shape[1], 1)), [x], "gram,scales")


def test_a_layer_alone_is_clipped() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(32, 64, generator=generator), outlying(torch.randn(400, 64, generator=generator))
    weight[::5, ::9] *= 4
    known = statistics(x)
    plain = float((x @ (round_to_nearest(weight, Grid(3, 32)) - weight).T).norm())
    made = AWQ(3, 32).fit("0", weight, known)
    assert float((x @ (made.dequantize() - weight).T).norm()) < 0.95 * plain
    bounds = output_clip(weight, known.gram("0"), Grid(3, 32)).unsqueeze(-1)
    clipped = weight.unflatten(1, (2, 32)).clamp(-bounds, bounds).flatten(1)
    assert torch.equal(made.dequantize(), round_to_nearest(clipped, Grid(3, 32)))
    assert torch.equal(
        AWQ(3, 32, clip=False).fit("0", weight, known).dequantize(), round_to_nearest(weight, Grid(3, 32))
    )
    columns = AWQ(3, 32, rounding="gptq").fit("0", weight, known).dequantize()
    fitted = fit_grid(clipped, Grid(3, 32))
    assert torch.equal(columns, gptq_codes(weight, known.gram("0"), GPTQ(3, 32), fitted).codes.dequantize())
    assert float((x @ (columns - weight).T).norm()) < 0.9 * plain
    assert torch.equal(fake_quantize(columns, *fitted, Grid(3, 32)), columns)


def test_a_convolution_with_groups_is_clipped_by_its_own_gram_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 16, generator=generator), outlying(torch.randn(2, 99, 16, generator=generator))
    gram = x.mT @ x
    known = Statistics({"layer/gram": gram}, Facts(layers={"layer": ("layer", 99)}))
    halves = [Statistics({"layer/gram": g}, Facts(layers={"layer": ("layer", 99)})) for g in gram]
    for rounding in ("nearest", "gptq"):
        config = AWQ(3, 8, rounding=rounding)
        parts = [config.fit("layer", w, h).dequantize() for w, h in zip(weight.chunk(2), halves)]
        assert torch.equal(config.fit("layer", weight, known).dequantize(), torch.cat(parts))
    with pytest.raises(RecipeError, match="rows for each"):
        AWQ(3, 8).fit("layer", weight[:7], known)


def test_outlying_channels_are_what_scales_are_for() -> None:
    """One channel in sixteen thirty times as large: most of the error of rounding to nearest goes."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(128, 256, generator=generator), outlying(torch.randn(512, 256, generator=generator))
    errors = []
    for i in range(20):
        scale = awq_scales(x.abs().mean(0), None, i / 20)
        new = round_to_nearest(weight * scale, Grid(3, 128)) / scale
        errors.append(float((x @ (new - weight).T).norm()))
    assert min(errors) < 0.65 * errors[0]


def test_losses_that_are_not_finite_are_skipped_and_noted() -> None:
    model, batches = lively("llama")
    with Walk(model, batches) as walk:
        block = next(iter(walk))
        found = collect(model, batches, "gram,scales")
        name = "model.layers.0.self_attn.q_proj"
        tensors = {n: found._tensors[n] for n in found.names}
        sizes = tensors[f"{name}/mean_abs"].clone()
        sizes[3] = float("inf")
        held = Statistics({**tensors, f"{name}/mean_abs": sizes}, found.facts)
        (task,) = change_block(block, {"*": AWQ(3, 8, duo=False, points=4)}, "*", held, [], 0, False)
    assert task.notes[name]["not_finite"] == [0.25, 0.5, 0.75]
    assert task.notes[name]["alpha"] is None
    assert all(p.isfinite().all() for p in block.module.parameters())


def test_what_is_refused() -> None:
    for wrong in ({"points": -1}, {"tokens": 0}, {"rounding": "odd"}, {"bits": 0}):
        with pytest.raises(RecipeError):
            AWQ(**wrong)
    weight = torch.randn(4, 8)
    for gram in (torch.eye(7), torch.full((8, 8), float("nan")), torch.ones(8)):
        with pytest.raises(RecipeError, match="Gram"):
            output_clip(weight, gram, Grid(3, 8))
    with pytest.raises(RecipeError, match="divide"):
        output_clip(weight, torch.eye(8), Grid(3, 3))
