"""GPTQ: the column loop and single columns by brute force in float64, closed forms of the loss, and models on disk."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.calibrate import collect
from weft.errors import RecipeError
from weft.packed import Affine
from weft.quantize import GPTQ, Grid, fit_grid, gptq_codes, gptq_factor, quantize_model, round_to_nearest
from weft.quantize import quantize as nearest

CONFIGS = [
    GPTQ(bits, size, kind, order=order, groups=groups)
    for bits, size, kind, (order, groups) in product(
        (2, 4),
        (0, 8),
        ("asymmetric", "symmetric"),
        (("none", "static"), ("none", "dynamic"), ("static", "static"), ("gar", "static"), ("gar", "dynamic")),
    )
]


def layer(rows: int = 5, columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of very different sizes; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(40 * columns, columns, generator=generator, dtype=torch.float64) @ mix * sizes
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def damped(gram: Tensor, share: float = 0.01) -> Tensor:
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    delta = weight - found.double()
    return float(((delta @ gram) * delta).sum()) / 2


def by_definition(weight: Tensor, gram: Tensor, config: GPTQ) -> Tensor:
    """One column after the other; the others move to the minimum of the loss given all columns that are rounded."""
    h, k = damped(gram, config.damping), weight.shape[1]
    size = config.group_size or k
    diagonal = gram.diagonal()
    if config.order == "none":
        order = list(range(k))
    elif config.order == "static":
        order = sorted(range(k), key=lambda j: -diagonal[j])
    else:
        groups = sorted(range(k // size), key=lambda g: -diagonal[g * size : (g + 1) * size].max())
        order = [j for g in groups for j in sorted(range(g * size, (g + 1) * size), key=lambda j: -diagonal[j])]
    scale, zero = (v.double() for v in fit_grid(weight, config))
    w, rounded, begun = weight.clone(), [], set()
    for j in order:
        g = j // size
        if config.groups == "dynamic" and g not in begun:
            begun.add(g)
            fitted = fit_grid(w[:, g * size : (g + 1) * size], Grid(config.bits, 0, config.kind))
            scale[:, g], zero[:, g] = fitted[0][:, 0].double(), fitted[1][:, 0].double()
        code = ((w[:, j] / scale[:, g]).round() + zero[:, g]).clamp(*config.codes)
        w[:, j] = (code - zero[:, g]) * scale[:, g]
        rounded.append(j)
        free = [i for i in range(k) if i not in rounded]
        if free:
            # min over the free columns of tr(Δ H Δᵀ): Δ_free = − Δ_rounded H_rf H_ff⁻¹
            delta = weight[:, rounded] - w[:, rounded]
            w[:, free] = weight[:, free] + delta @ h[rounded][:, free] @ torch.linalg.inv(h[free][:, free])
    return w


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_loop_is_the_greedy_definition(config: GPTQ) -> None:
    """Each column is rounded where the columns before it have moved it by the exact minimum over all that are left."""
    weight, gram = layer()
    made = gptq_codes(weight, gram, config)
    torch.testing.assert_close(
        made.codes.dequantize().double(), by_definition(weight, gram, config), rtol=1e-5, atol=1e-6
    )
    # the codes are within the loss's own identity: ½ tr(Δ H Δᵀ) with the damped H
    assert float(made.loss) == pytest.approx(loss(weight, made.codes.dequantize(), damped(gram)), rel=1e-5)
    for block_size in (1, 5, 24):
        other = gptq_codes(weight, gram, GPTQ(**{**vars(config), "block_size": block_size}))
        assert torch.equal(other.codes.codes, made.codes.codes)
        assert torch.equal(other.codes.scale, made.codes.scale)


def test_white_inputs_are_rounding_to_nearest() -> None:
    weight = layer()[0].float()
    for config in CONFIGS:
        found = gptq_codes(weight, 7 * torch.eye(24), config)
        assert torch.equal(found.codes.dequantize(), round_to_nearest(weight, config))
        plain = nearest(weight, *fit_grid(weight, config), config)
        assert all(torch.equal(getattr(found.codes, k), getattr(plain, k)) for k in ("codes", "scale", "zero"))


def test_the_inverse_factor() -> None:
    _, gram = layer()
    held = gptq_factor(gram, GPTQ(group_size=0, order="none"))
    upper = held.upper
    assert upper is not None
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped(gram)), rtol=1e-9, atol=0)
    assert torch.equal(upper, upper.triu())
    assert held.damping == pytest.approx(0.01 * float(gram.diagonal().mean()))


def test_two_columns_by_trying_all_codes() -> None:
    """The first goes to its nearest; for the second the best of all codes is taken."""
    for seed in range(30):
        weight, gram = layer(1, 2, seed)
        config = GPTQ(bits=3, group_size=0, order="none")
        scale, zero = fit_grid(weight, config)
        first = int(nearest(weight, scale, zero, config).codes[0, 0])
        losses = []
        for code in range(8):
            tried = Affine(torch.tensor([[first, code]], dtype=torch.int16), scale, zero, config.bits, config.codes[0])
            losses.append(loss(weight, tried.dequantize(), damped(gram)))
        found = gptq_codes(weight, gram, config)
        assert float(found.loss) == pytest.approx(min(losses), rel=1e-5)


def test_order_of_columns_does_not_matter_to_static_order() -> None:
    """With one grid for a row, permuted inputs give permuted codes."""
    weight, gram = layer()
    permutation = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    for order in ("static", "gar"):
        config = GPTQ(bits=3, group_size=0, order=order)
        first = gptq_codes(weight, gram, config)
        second = gptq_codes(weight[:, permutation], gram[permutation][:, permutation], config)
        assert torch.equal(first.codes.codes[:, permutation], second.codes.codes)
    unordered = GPTQ(bits=3, group_size=0, order="none")
    moved = gptq_codes(weight[:, permutation], gram[permutation][:, permutation], unordered).codes.codes
    assert not torch.equal(gptq_codes(weight, gram, unordered).codes.codes[:, permutation], moved)


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    weight, gram = layer()
    config = GPTQ(bits=3, group_size=8)
    first, second = gptq_codes(weight, gram, config), gptq_codes(weight, gram * 2.0**-20, config)
    assert torch.equal(first.codes.codes, second.codes.codes)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.60), (3, 0.60), (2, 0.70)])
def test_heavy_tailed_correlated_inputs(bits: int, most: float) -> None:
    """The output's error is below rounding to nearest's, and an order by size lowers it further."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 256, generator=generator) @ torch.randn(256, 256, generator=generator) / 16
    x = x * torch.randn(256, generator=generator).exp()
    weight, gram = torch.randn(256, 256, generator=generator), x.double().T @ x.double()
    plain = loss(weight.double(), round_to_nearest(weight, Grid(bits, 64)), gram) ** 0.5
    errors = [
        loss(weight.double(), gptq_codes(weight, gram, GPTQ(bits, 64, order=o)).codes.dequantize(), gram) ** 0.5 / plain
        for o in ("none", "static")
    ]
    assert errors[0] < 0.85
    assert errors[1] < min(most, 0.9 * errors[0])


def test_a_gram_matrix_without_full_rank() -> None:
    weight, _ = layer()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = GPTQ(bits=3, group_size=8, damping=0)
    made = gptq_codes(weight, x.T @ x, config)
    assert made.codes.dequantize().isfinite().all()
    assert len(made.notes) == 1
    assert "not positive definite" in made.notes[0]
    assert loss(weight, made.codes.dequantize(), x.T @ x) < loss(weight, round_to_nearest(weight, config), x.T @ x)
    assert not gptq_codes(weight, x.T @ x, GPTQ(bits=3, group_size=8)).notes  # damped, it is


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    weight, gram = layer()
    gram[:, [3, 9]] = 0
    gram[[3, 9]] = 0
    for order in ("none", "static", "gar"):
        config = GPTQ(bits=3, group_size=8, order=order)
        made = gptq_codes(weight, gram, config)
        plain = round_to_nearest(weight, config)
        assert torch.equal(made.codes.dequantize()[:, [3, 9]], plain[:, [3, 9]])
        live = [j for j in range(24) if j not in (3, 9)]
        assert loss(weight[:, live], made.codes.dequantize()[:, live], gram[live][:, live]) < loss(weight, plain, gram)
    nothing = gptq_codes(weight, torch.zeros(24, 24), config)
    assert torch.equal(nothing.codes.dequantize(), plain)
    assert "rounded to nearest" in nothing.notes[0]


def test_one_matrix_for_each_group_of_a_convolution() -> None:
    weight, first = layer(4, 24, 1)
    _, second = layer(4, 24, 2)
    config = GPTQ(bits=3, group_size=8)
    made = gptq_codes(weight, torch.stack([first, second]), config)
    parts = [gptq_codes(weight[:2], first, config), gptq_codes(weight[2:], second, config)]
    assert torch.equal(made.codes.dequantize(), torch.cat([p.codes.dequantize() for p in parts]))
    assert float(made.loss) == pytest.approx(float(parts[0].loss + parts[1].loss))


def test_what_is_refused() -> None:
    weight, gram = layer()
    config = GPTQ(group_size=8)
    bad: list[tuple[Any, str]] = [
        (gram[:5], "Gram matrix"),
        (gram[:5, :5], "divide"),
        (gram[:16, :16], "24 inputs"),
        (gram / 0, "finite"),
        (-gram, "negative"),
        (gram + gram.triu(1), "symmetric"),
        (torch.stack([gram] * 3), "rows for each"),
    ]
    for value, words in bad:
        with pytest.raises(RecipeError, match=words):
            gptq_codes(weight, value, config)
    with pytest.raises(RecipeError, match="allows"):
        gptq_factor(torch.full((24, 24), 1.1) - 0.1 * torch.eye(24), config)
    for wrong in ({"damping": -1}, {"block_size": 0}, {"order": "x"}, {"groups": "x"}, {"bits": 0}):
        with pytest.raises(RecipeError):
            GPTQ(**wrong)
    with pytest.raises(RecipeError, match="gar"):
        GPTQ(order="static", groups="dynamic")


@pytest.mark.filterwarnings("ignore:.*too few rows")  # of this little data
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_on_disk(name: str, tmp_path: Path) -> None:
    """Layers are those of the pure function on the Gram matrices that the new model's blocks before them give."""
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    config = GPTQ(bits=4, group_size=8)
    made = quantize_model(tmp_path / "model", tmp_path / "out", config, batches, format="dense", autocast=False)
    reread = type(model).from_pretrained(made).eval()
    found = collect(model, batches, "gram")  # of the first block the inputs are the same
    report = json.loads((made / "weft.json").read_text())
    assert report["recipe"]["config"] == "GPTQ"
    assert report["recipe"]["group_size"] == 8
    layers = report["layers"]
    assert all("few_rows" in e or (e["loss"] > 0 and 0 < e["output_error"] < 0.1) for e in layers.values())
    names = [n for n in found.layers if "0." in n and "experts" not in n and n in layers]
    first = [n for n in names if n.endswith(("q_proj", "k_proj", "c_attn"))]
    assert first
    for path in first:
        seen = model.get_submodule(path).weight.detach()
        new = reread.get_submodule(path).weight.detach()
        seen, new = (seen.T, new.T) if name == "gpt2" else (seen, new)
        rounded = gptq_codes(seen, found.gram(path), config)
        torch.testing.assert_close(new, rounded.codes.dequantize())
        assert layers[path]["loss"] == pytest.approx(float(rounded.loss), rel=1e-3)
    with torch.no_grad():
        a, b = model(**batches[0])[0], reread(**batches[0])[0]
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.95


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("groups", ["static", "dynamic"])
def test_the_kernel_does_what_the_plain_loop_does(kind: str, groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(300, 96)
    config = GPTQ(3, 32, kind, order="none", groups=groups, block_size=40)
    for w in (weight, weight.float()):
        found = gptq_codes(w, gram.to(w.dtype), config)
        with monkeypatch.context() as patch:  # the loop that other devices take
            patch.setattr(sys.modules["weft.quantize.gptq"], "_has_kernel", lambda w: False)
            other = gptq_codes(w, gram.to(w.dtype), config)
        same = (found.codes.codes == other.codes.codes).float().mean()
        assert (
            same == 1 if w.dtype == torch.float64 else same > 0.99
        )  # a tie may fall to the other side, and move the rest
        torch.testing.assert_close(found.loss, other.loss, rtol=1e-3, atol=0)


def test_layers_with_equal_inputs_share_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    module, counted = sys.modules["weft.quantize.gptq"], []
    plain = module.gptq_factor
    monkeypatch.setattr(module, "gptq_factor", lambda *a: (counted.append(1), plain(*a))[1])
    quantize_model(tmp_path / "model", tmp_path / "out", GPTQ(group_size=8), batches)
    assert len(counted) == 3 * 4  # query, key and value; output; gate and up; down


def test_statistics_of_a_folder_will_do(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    collect(tmp_path / "model", batches, "gram", output=tmp_path / "statistics")
    config = GPTQ(bits=4, group_size=8)
    made = quantize_model(tmp_path / "model", tmp_path / "out", config, statistics=tmp_path / "statistics")
    walked = quantize_model(tmp_path / "model", tmp_path / "walked", config, batches, autocast=False)
    with weft.open(made) as found, weft.open(walked) as other, weft.open(tmp_path / "model") as before:
        first = [n for n in found if "layers.0." in n and not torch.equal(found[n].torch(), before[n].torch())]
        assert len(first) == 7
        for tensor in first:  # nothing before the first block has changed, so both know the same
            assert torch.equal(found[tensor].torch(), other[tensor].torch()), tensor


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    model, batches = build("mixtral")
    with torch.no_grad():  # the router of the first block never chooses the last expert
        for block in model.model.layers[:1]:
            gate = next(p for n, p in block.named_parameters() if p.shape == (4, 32))
            gate.zero_()
    model.save_pretrained(tmp_path / "model")
    config = GPTQ(bits=4, group_size=8)
    with pytest.warns(UserWarning, match="too few rows of the data"):
        made = quantize_model(tmp_path / "model", tmp_path / "out", config, batches)
    layers = json.loads((made / "weft.json").read_text())["layers"]
    missed = [name for name, facts in layers.items() if facts.get("few_rows") == 0]
    assert missed
    assert all("experts" in name and "loss" not in layers[name] for name in missed)
    nearest = quantize_model(tmp_path / "model", tmp_path / "nearest", config.without_data())
    with weft.open(made) as one, weft.open(nearest) as other:
        same = {name for name in one if torch.equal(one[name].torch(), other[name].torch())}
    assert any(".experts." in name for name in same)
