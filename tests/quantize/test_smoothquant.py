"""SmoothQuant: the formula and its two ends, exactness before rounding, and outliers with weights and inputs in int8."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import BlockTask, Change, Walk, collect
from weft.calibrate.rewrite import change_block
from weft.errors import RecipeError
from weft.packed import Activations, Packed
from weft.packed.levels import quantize_inputs
from weft.quantize import W8A8, SmoothQuant, fake_quantize, fit_grid, quantize_model, smooth_scales

FIRST = "model.layers.0."


def outlying(name: str = "llama") -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model whose norms make three channels fifty times as large, and the layers behind read them as much less."""
    model, batches = build(name)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "layernorm" in path and "layers" in path:
                p[[3, 11, 20]] *= 50
            elif p.dim() == 2 and "embed" not in path:
                p *= 5
            if path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                p[:, [3, 11, 20]] /= 50
    return model, [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches]


def rounded_inputs(model: nn.Module, packed: dict[str, Packed]) -> list[Any]:
    """Hooks that give layers what int8 kernels would: inputs on their grid."""

    def hook(made: Any) -> Any:
        return lambda m, args: (quantize_inputs(args[0], made.kind, made.input_scale), *args[1:])

    return [model.get_submodule(n).register_forward_pre_hook(hook(p)) for n, p in packed.items()]


@torch.no_grad()
def error(config: Any, batches: int = 3) -> float:
    """Of a block's output, weights and inputs in int8."""
    model, data = outlying()
    with Walk(model, data) as walk:
        block = next(iter(walk))
        calls = [block.batch(i) for i in range(batches)]
        plain = [block.module(*a, **k) for a, k in calls]
        (task,) = change_block(block, {"*": config}, "*", None, [], 0, False)
        handles = rounded_inputs(model, task.packed)
        found = [block.module(*a, **k) for a, k in calls]
        for handle in handles:
            handle.remove()
    moved = [((f - p).norm() / (p - a[0]).norm()) for f, p, (a, _) in zip(found, plain, calls)]
    return float(torch.stack(moved).mean())


def test_the_formula() -> None:
    largest, weight = torch.tensor([8.0, 0.5, 0.0]), torch.tensor([0.5, 2.0, 0.0])
    found = smooth_scales(largest, weight, 0.25)
    torch.testing.assert_close(found, torch.tensor([8**0.25 / 0.5**0.75, 0.5**0.25 / 2**0.75, 1e-5**-0.5]))
    # the ends: one makes the inputs' channels equally large, the other the weights'
    torch.testing.assert_close(largest[:2] / smooth_scales(largest, weight, 1.0)[:2], torch.ones(2))
    torch.testing.assert_close(weight[:2] * smooth_scales(largest, weight, 0.0)[:2], torch.ones(2))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_come_from_the_layers_together_and_are_exact(alpha: float) -> None:
    """With a grid so fine that it rounds nothing away, the block is what it was; its norms are divided by the formula."""
    model, batches = outlying()
    found = collect(model, batches, "scales")
    with Walk(model, batches) as walk:
        block = next(iter(walk))
        layer: Any = block.module
        args, kwargs = block.batch(0)
        plain, norm = layer(*args, **kwargs), layer.input_layernorm.weight.clone()
        readers = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        weight = torch.cat([m.weight for m in readers]).abs().amax(0)
        before = [m.weight.clone() for m in readers]
        largest = found.max_abs(f"{FIRST}self_attn.q_proj")
        config = SmoothQuant(alpha=alpha, group_size=1)  # every weight has a scale of its own
        (task,) = change_block(block, {"*": config}, "*", None, [], 0, False)
        expected = largest**alpha / weight ** (1 - alpha)
        torch.testing.assert_close(norm / layer.input_layernorm.weight, expected, rtol=1e-5, atol=0)
        for old, reader in zip(before, readers):
            torch.testing.assert_close(reader.weight, old * expected, rtol=1e-5, atol=0)
        moved = layer(*args, **kwargs) - plain
        assert float(moved.norm() / plain.norm()) < 1e-5
        if alpha in (0.0, 1.0):
            new = collect(model, batches, "scales").max_abs(f"{FIRST}self_attn.q_proj")
            both = torch.cat([m.weight for m in readers]).abs().amax(0)
            torch.testing.assert_close(new if alpha else both, torch.ones(32), rtol=1e-4, atol=0)
    assert task.notes[f"{FIRST}self_attn.q_proj"]["alpha"] == alpha
    assert "scaled_by" not in task.notes[f"{FIRST}mlp.down_proj"]


class Alone(SmoothQuant):
    """Layer by layer, nothing folded."""

    change_block = Change.change_block


def test_outliers_in_int8() -> None:
    """One scale for all inputs suffers most from outliers, and gains most."""
    plain, smooth = error(W8A8()), error(SmoothQuant())
    fixed, fixed_smooth = error(Alone(static=True)), error(SmoothQuant(static=True))
    print(plain, smooth, fixed, fixed_smooth)
    assert smooth < 0.6 * plain
    assert fixed_smooth < 0.6 * fixed
    assert error(SmoothQuant(static=True, search=8, tokens=10**6)) < 1.1 * fixed_smooth
    assert error(SmoothQuant(folds="all", static=True)) < 1.2 * fixed_smooth


def test_the_search_takes_the_best_alpha() -> None:
    model, batches = outlying()
    kept: list[float] = []
    module = sys.modules["weft.quantize.smoothquant"]

    class Recorded(SmoothQuant):
        def _loss(self, *args: Any) -> float:
            kept.append(super()._loss(*args))
            return kept[-1]

    assert module.SmoothQuant is SmoothQuant
    with Walk(model, batches) as walk:
        block = next(iter(walk))
        (task,) = change_block(block, {"*": Recorded(search=4, static=True)}, "*", None, [], 0, False)
    first = kept[:6]  # without scales, then α = 0, ¼, ½, ¾, 1
    best = first.index(min(first))
    assert best > 0
    assert task.notes[f"{FIRST}self_attn.q_proj"]["alpha"] == (best - 1) / 4
    assert task.notes[f"{FIRST}self_attn.q_proj"]["loss"] == min(first)
    assert len(kept) == 12


def test_one_layer() -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    known = collect(nn.Sequential(nn.Linear(32, 1)), [x], "scales")
    made = SmoothQuant(static=True).fit("0", weight, known)
    assert isinstance(made, Activations)
    assert made.kind == "int8"
    assert made.input_scale is not None
    assert float(made.input_scale) == pytest.approx(float(x.abs().max()) / 127)
    grid = W8A8()
    assert torch.equal(made.dequantize(), fake_quantize(weight, *fit_grid(weight, grid), grid))
    assert torch.equal(W8A8().fit("0", weight, known).dequantize(), made.dequantize())
    assert SmoothQuant().fit("0", weight, known).input_scale is None
    product = quantize_inputs(x, made.kind, made.input_scale) @ made.dequantize().T
    plain = x @ weight.T
    assert float((product - plain).norm() / plain.norm()) < 0.015
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((made.dequantize() - weight).abs() <= largest / 254 * 1.0001).all())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "bert"])
def test_models_on_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    out = quantize_model(tmp_path / "model", tmp_path / "out", SmoothQuant(static=True), batches, format="dense")
    report = json.loads((out / "weft.json").read_text())["layers"]
    assert any("scaled_by" in v for v in report.values()) == (name != "bert")
    assert {v["form"] for v in report.values() if "form" in v} == {"activations"}
    reread = type(model).from_pretrained(out).eval()
    with torch.no_grad():
        a, b = (m(**batches[0])[0][batches[0]["attention_mask"].bool()] for m in (model, reread))
    assert float((a - b).norm() / a.norm()) < 0.03


def test_what_is_refused() -> None:
    for wrong in ({"alpha": -0.1}, {"alpha": 1.5}, {"search": -1}, {"tokens": 0}, {"folds": "some"}, {"bits": 9}):
        with pytest.raises(RecipeError):
            SmoothQuant(**wrong)
    assert BlockTask.__dataclass_fields__["elsewhere"].default == frozenset()
