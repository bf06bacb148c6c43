"""AdaDim: groups along either axis are one another's transpose, the better is taken, and GPTQ's loop by its definition."""

import json
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
from weft.packed import Affine, Packed, Transposed
from weft.quantize import (
    GPTQ,
    AdaDim,
    Grid,
    adadim_codes,
    fit_grid,
    gptq_by_outputs,
    gptq_factor,
    quantize_model,
    round_to_nearest,
)
from weft.quantize.probe import Around, edited, in_float32


def layer(rows: int = 16, columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of very different sizes; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(40 * columns, columns, generator=generator, dtype=torch.float64) @ mix * sizes
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def known(gram: Tensor) -> Statistics:
    return Statistics({"layer/gram": gram}, Facts(layers={"layer": ("layer", 1000)}))


def loss(weight: Tensor, made: Packed | Tensor, gram: Tensor) -> float:
    new = made.dequantize() if isinstance(made, Packed) else made
    delta = new.double() - weight.double()
    return float(((delta @ gram.double()) * delta).sum())


def test_along_outputs_is_the_transpose() -> None:
    weight, gram = layer()
    for kind in ("asymmetric", "symmetric"):
        made = adadim_codes(weight, gram, AdaDim(3, 8, kind))
        assert torch.equal(made["inputs"].dequantize(), round_to_nearest(weight, Grid(3, 8, kind)))
        assert torch.equal(made["outputs"].dequantize(), round_to_nearest(weight.T, Grid(3, 8, kind)).T)
        assert isinstance(made["inputs"], Affine)
        assert isinstance(made["outputs"], Transposed)
        inner: Any = made["outputs"].inner
        assert inner.scale.shape == (24, 2)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_better_axis_is_taken(rounding: str) -> None:
    taken = set()
    for seed in range(12):
        weight, gram = layer(seed=seed)
        weight[:, seed % 24] *= 1 + seed % 3 * 3  # an outlying input
        weight[seed % 16] *= 1 + seed % 2 * 5  # or output
        made = adadim_codes(weight, gram, AdaDim(3, 8, rounding=rounding))
        losses = {axis: loss(weight, codes, gram) for axis, codes in made.items()}
        found = AdaDim(3, 8, rounding=rounding).fit("layer", weight, known(gram))
        assert loss(weight, found, gram) == min(losses.values())
        taken.add(min(losses, key=losses.__getitem__))
        for axis in ("inputs", "outputs"):
            fixed = AdaDim(3, 8, rounding=rounding, axis=axis).fit("layer", weight, known(gram))
            assert torch.equal(fixed.dequantize(), made[axis].dequantize())
    assert taken == {"inputs", "outputs"}


def test_outliers_decide() -> None:
    """Two columns six times as large want groups along the outputs, two rows along the inputs (3 bits, groups of 64)."""
    generator = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(256, 256, generator=generator), torch.eye(256)
    columns, rows = weight.clone(), weight.clone()
    columns[:, [7, 99]] *= 6
    rows[[7, 99]] *= 6
    errors = {}
    for name, w in (("columns", columns), ("rows", rows)):
        made = adadim_codes(w, gram, AdaDim(3, 64))
        errors[name] = {axis: float((codes.dequantize() - w).norm() / w.norm()) for axis, codes in made.items()}
    assert errors["columns"]["outputs"] < 0.85 * errors["columns"]["inputs"]
    assert errors["rows"]["inputs"] < 0.85 * errors["rows"]["outputs"]
    assert errors["columns"]["outputs"] == pytest.approx(errors["rows"]["inputs"], rel=0.05)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_gptq_along_outputs_is_the_greedy_definition(kind: str) -> None:
    """A column at a time, each on grids of what it has become, the rest at the exact minimum given those before."""
    weight, gram = layer()
    config = Grid(3, 8, kind)
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=gram.dtype)
    w, done = weight.clone(), []
    for j in sorted(range(24), key=lambda k: -gram[k, k]):
        w[:, j] = round_to_nearest(w[:, j].unsqueeze(0), config)[0].double()
        done.append(j)
        free = [i for i in range(24) if i not in done]
        if free:
            delta = weight[:, done] - w[:, done]
            w[:, free] = weight[:, free] + delta @ h[done][:, free] @ torch.linalg.inv(h[free][:, free])
    factor = gptq_factor(gram, GPTQ(group_size=0))
    for block_size in (1, 7, 128):
        made = gptq_by_outputs(weight, factor, config, block_size).dequantize().T
        torch.testing.assert_close(made.double(), w, rtol=1e-5, atol=1e-5)
    nearest = round_to_nearest(weight.T, config).T
    assert loss(weight, made, h) < 0.7 * loss(weight, nearest, h)


def test_white_inputs_are_rounded_to_nearest() -> None:
    weight, _ = layer()
    factor = gptq_factor(torch.eye(24), GPTQ(group_size=0))
    found = gptq_by_outputs(weight.float(), factor, Grid(3, 8)).dequantize()
    assert torch.equal(found, round_to_nearest(weight.float().T, Grid(3, 8)))
    unseen = gptq_factor(torch.zeros(24, 24), GPTQ(group_size=0))
    assert torch.equal(gptq_by_outputs(weight.float(), unseen, Grid(3, 8)).dequantize(), found)


def test_an_axis_that_does_not_divide_is_left_out() -> None:
    weight, gram = layer(12, 24)
    assert list(adadim_codes(weight, gram, AdaDim(3, 8))) == ["inputs"]
    assert list(adadim_codes(weight, gram, AdaDim(3, 8, axis="outputs"))) == ["inputs"]
    assert list(adadim_codes(weight[:, :6], gram[:6, :6], AdaDim(3, 4))) == ["outputs"]
    with pytest.raises(RecipeError, match="Neither 24 inputs nor 12 outputs"):
        adadim_codes(weight, gram, AdaDim(3, 9))
    grouped = torch.stack([gram, gram])  # of a convolution
    assert list(adadim_codes(weight, grouped, AdaDim(3, 4, rounding="gptq"))) == ["inputs"]
    AdaDim(3, 4).fit("layer", weight, known(grouped))


@torch.no_grad()
def test_a_block_decides_by_the_modules_around() -> None:
    """The losses are those of attention and MLP with one layer replaced, all others as they were."""
    model, batches = build("llama")
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in path:
                p *= 5
    config = AdaDim(3, 8, tokens=10**6)
    with Walk(model, batches) as walk:
        block = next(iter(walk))
        name = f"{block.name}.self_attn."
        expected = {}
        with in_float32(block):
            around = Around(block, [f"{name}{p}_proj" for p in "qkv"], 10**6)
            for part in "qkv":
                weight = model.get_submodule(f"{name}{part}_proj").weight
                for axis, new in (
                    ("inputs", round_to_nearest(weight, config)),
                    ("outputs", round_to_nearest(weight.T, config).T),
                ):
                    with edited([(weight, new)]):
                        expected[part, axis] = around.loss()
        output = model.get_submodule(f"{name}o_proj").weight.clone()
        gram = collect(model, batches, "gram").gram(f"{name}o_proj")
        (task,) = change_block(block, {"*": config}, "*", None, [], 0, False)
    axes = set()
    for part in "qkv":
        notes = task.notes[f"{name}{part}_proj"]
        assert notes["losses"] == pytest.approx({a: expected[part, a] for a in ("inputs", "outputs")}, rel=1e-5)
        assert notes["axis"] == min(notes["losses"], key=notes["losses"].__getitem__)
        assert isinstance(task.packed[f"{name}{part}_proj"], Transposed if notes["axis"] == "outputs" else Affine)
        axes.add(notes["axis"])
    notes = task.notes[f"{name}o_proj"]
    ratio = loss(output, round_to_nearest(output, config), gram) / loss(
        output, round_to_nearest(output.T, config).T, gram
    )
    assert notes["losses"]["inputs"] / notes["losses"]["outputs"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_models_on_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    for rounding in ("nearest", "gptq"):
        config = AdaDim(8, 8, rounding=rounding)
        out = quantize_model(tmp_path / "model", tmp_path / rounding, config, batches, format="dense")
        report = json.loads((out / "weft.json").read_text())["layers"]
        assert all(v["losses"][v["axis"]] == min(v["losses"].values()) for v in report.values() if "axis" in v)
        assert "outputs" in {v.get("axis") for v in report.values()}
        reread: nn.Module = type(model).from_pretrained(out).eval()
        with torch.no_grad():
            a, b = (m(**batches[0])[0][batches[0]["attention_mask"].bool()] for m in (model, reread))
        assert float((a - b).norm() / a.norm()) < 0.02


def test_without_data_the_weights_decide() -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 20
    found = AdaDim(3, 8, rounding="gptq").without_data().fit("layer", weight, Statistics({}, Facts()))
    assert torch.equal(found.dequantize(), round_to_nearest(weight.T, Grid(3, 8)).T)


def test_what_is_refused() -> None:
    for wrong in ({"axis": "both"}, {"rounding": "odd"}, {"tokens": 0}, {"bits": 0}):
        with pytest.raises(RecipeError):
            AdaDim(**wrong)
    weight, gram = layer()
    with pytest.raises(RecipeError, match="24 inputs"):
        adadim_codes(weight, gram[:8, :8], AdaDim(3, 8))
    for rounding in ("nearest", "gptq"):
        with pytest.raises(RecipeError, match="NaN"):
            adadim_codes(weight / 0, gram, AdaDim(3, 8, rounding=rounding))
    fit_grid(weight, Grid(3, 8))
