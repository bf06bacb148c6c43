"""Wanda's masks against loops over rows, and a pruned model against the same done by hand in memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.calibrate import Statistics, collect, rewrite
from weft.calibrate.facts import Facts
from weft.errors import RecipeError
from weft.prune import Wanda, prune_model, wanda_mask


def row_by_row(weight: np.ndarray, norm: np.ndarray, sparsity: float, keep: int, group: int) -> np.ndarray:
    mask = np.ones_like(weight, bool)
    width = group or weight.shape[1]
    removed = group - keep if group else int(round(sparsity * width, 6))
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            places = range(start, start + width)
            lowest = sorted(places, key=lambda j: (abs(weight[row, j]) * norm[j], -j))[:removed]
            mask[row, lowest] = False
    return mask


@pytest.mark.parametrize(
    ("sparsity", "keep", "group"), [(0.5, 0, 0), (0.7, 0, 0), (0, 0, 0), (1, 0, 0), (0.5, 2, 4), (0.5, 1, 4)]
)
@pytest.mark.parametrize("values", ["normal", "few"])
def test_masks_equal_a_loop_over_rows(sparsity: float, keep: int, group: int, values: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 20, generator=generator)
    norm = torch.rand(20, generator=generator)
    if values == "few":  # many equal scores
        weight, norm = weight.round(), torch.ones(20)
    mask = wanda_mask(weight, norm, sparsity=sparsity, keep=keep, group=group)
    expected = row_by_row(weight.double().numpy(), norm.double().numpy(), sparsity, keep, group)
    assert np.array_equal(mask.numpy(), expected)
    assert torch.equal(mask, wanda_mask(weight, 7 * norm.double(), sparsity=sparsity, keep=keep, group=group))
    assert set(mask.sum(1).tolist()) == {20 * keep // group if group else 20 - round(20 * sparsity)}


def test_rows_are_independent_of_how_many_there_are() -> None:
    weight = torch.randn(1100, 8, generator=torch.Generator().manual_seed(2))  # more than are sorted at a time
    norm = torch.rand(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(wanda_mask(weight, norm), torch.cat([wanda_mask(row, norm) for row in weight.split(100)]))


def test_unit_norms_are_magnitude_by_rows() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    kept = weight.abs().topk(4, dim=1).indices
    assert torch.equal(wanda_mask(weight, torch.ones(8)), torch.zeros(6, 8).scatter(1, kept, 1).bool())


def test_what_cannot_be_pruned_is_said() -> None:
    weight = torch.ones(2, 6)
    for config in ({"sparsity": 1.5}, {"keep": 2}, {"keep": 5, "group": 4}, {"group": 4}, {"sparsity": float("nan")}):
        with pytest.raises(RecipeError):
            wanda_mask(weight, torch.ones(6), **config)
    for norm in (torch.ones(2), torch.full((6,), float("nan")), -torch.ones(6)):
        with pytest.raises(RecipeError):
            wanda_mask(weight, norm)
    with pytest.raises(RecipeError, match="do not divide"):
        wanda_mask(weight, torch.ones(6), keep=2, group=4)


@pytest.mark.parametrize("config", [Wanda(), Wanda(keep=2, group=4)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_equals_pruning_by_hand(name: str, config: Wanda, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    made = prune_model(tmp_path / "model", tmp_path / "out", config, batches, autocast=False)
    blocks = model.model.layers if name == "llama" else model.transformer.h
    for block in blocks:  # by hand: hooks in the whole model, blocks in order
        layers = {m: [] for m in block.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        with torch.no_grad():
            for batch in batches:
                real = batch["attention_mask"].bool()
                handles = [
                    m.register_forward_pre_hook(
                        lambda m, a, real=real, layers=layers: layers[m].append(a[0][real].double())
                    )
                    for m in layers
                ]
                model(**batch)
                for handle in handles:
                    handle.remove()
            for layer, rows in layers.items():
                norm = torch.cat(rows).norm(dim=0).numpy()
                stored = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
                mask = row_by_row(stored.double().numpy(), norm, config.sparsity, config.keep, config.group)
                stored.mul_(torch.from_numpy(mask))
    pruned = type(model).from_pretrained(made).eval()
    for (n, a), (_, b) in zip(model.named_parameters(), pruned.named_parameters()):
        assert torch.equal(a, b), n


def test_experts_are_pruned_one_by_one(tmp_path: Path) -> None:
    model, batches = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():  # no token can choose expert 3 of block 0
        model.model.layers[0].mlp.gate.weight[3] = 0
    made = prune_model(tmp_path / "model", tmp_path / "out", Wanda(), batches[:1])
    with weft.open(made) as opened:
        for name, tensor in opened.items():
            share = float((tensor.torch() == 0).float().mean())
            assert share == (0.5 if ("experts" in name or "self_attn" in name) else 0.0), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_statistics_of_a_folder_will_do(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    collect(tmp_path / "model", batches, "scales", output=tmp_path / "statistics")
    statistics, config = Statistics.load(tmp_path / "statistics"), Wanda(keep=2, group=4)
    masks: dict[str, torch.Tensor] = {}

    def change(layer: str, weight: torch.Tensor, _: Statistics) -> torch.Tensor:
        masks[layer] = config.mask(layer, weight, statistics)
        return config.fit(layer, weight, statistics)

    made = rewrite(tmp_path / "model", None, change, tmp_path / "out")
    assert set(masks) == set(statistics.layers)
    walked = prune_model(tmp_path / "model", tmp_path / "walked", config, batches, autocast=False)
    with weft.open(made) as found, weft.open(walked) as other, weft.open(tmp_path / "model") as before:
        block = "h.0." if name == "gpt2" else "layers.0."
        first = [n for n in found if block in n and not torch.equal(found[n].torch(), before[n].torch())]
        assert len(first) >= 4
        for tensor in first:  # nothing before the first block has changed, so both know the same
            assert torch.equal(found[tensor].torch(), other[tensor].torch()), tensor
        if name == "llama":
            weight = before["model.layers.2.mlp.down_proj.weight"].torch().double()
            norm = statistics.norm("model.layers.2.mlp.down_proj").double()
            expected = row_by_row(weight.numpy(), norm.numpy(), 0, 2, 4)
            assert np.array_equal(masks["model.layers.2.mlp.down_proj"].numpy(), expected)


def test_an_expert_without_tokens_is_pruned_by_magnitude() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    found = Wanda().fit("e", weight, Statistics({}, Facts(layers={"e": ("e", 0)})))
    assert found.tolist() == [[3.0, 0.0, 2.0, 0.0]]
