"""Magnitude pruning against a loop over sorted weights, and against torch's own."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.errors import RecipeError
from weft.prune import Magnitude, magnitude_mask, prune_model


def one_by_one(weight: np.ndarray, sparsity: float, keep: int, group: int) -> np.ndarray:
    flat = weight.reshape(-1)
    width = group or flat.size
    removed = group - keep if group else int(round(sparsity * width, 6))
    mask = np.ones(flat.size, bool)
    for start in range(0, flat.size, width):
        places = sorted(range(start, start + width), key=lambda j: (abs(flat[j]), -j))
        mask[places[:removed]] = False
    return mask.reshape(weight.shape)


@pytest.mark.parametrize(
    ("sparsity", "keep", "group"),
    [(0.5, 0, 0), (0.29, 0, 0), (0.7, 0, 0), (0, 0, 0), (1, 0, 0), (0.5, 2, 4), (0.5, 1, 4), (0, 4, 4)],
)
@pytest.mark.parametrize("values", ["normal", "few", "equal"])
def test_masks_equal_a_loop_over_sorted_weights(sparsity: float, keep: int, group: int, values: str) -> None:
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    if values != "normal":  # ties: the lower index stays
        weight = weight.round() if values == "few" else torch.ones(5, 20)
    mask = magnitude_mask(weight, sparsity=sparsity, keep=keep, group=group)
    assert np.array_equal(mask.numpy(), one_by_one(weight.double().numpy(), sparsity, keep, group))


@pytest.mark.parametrize("removed", [0, 1, 33, 119, 120])
def test_torch_removes_the_same(removed: int) -> None:
    layer = nn.Linear(12, 10)
    mask = magnitude_mask(layer.weight, sparsity=removed / 120)
    prune.l1_unstructured(layer, "weight", amount=removed)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_weights_near_each_other_are_told_apart() -> None:
    one = torch.tensor([[1.0, 1 + 1e-12]], dtype=torch.float64)
    assert magnitude_mask(one).tolist() == [[False, True]]


def test_what_cannot_be_pruned_is_said() -> None:
    with pytest.raises(RecipeError, match="do not divide"):
        magnitude_mask(torch.ones(2, 6), keep=2, group=4)
    with pytest.raises(RecipeError, match="keep=2, group=4"):
        Magnitude(keep=5, group=4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_on_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    made = prune_model(tmp_path / "model", tmp_path / "out", Magnitude(0.3))
    with weft.open(tmp_path / "model") as before, weft.open(made) as after:
        moved = {n for n in before if not torch.equal(before[n].torch(), after[n].torch())}
        for tensor in moved:
            weight, found = before[tensor].torch(), after[tensor].torch()
            weight, found = (weight.T, found.T) if name == "gpt2" else (weight, found)
            assert torch.equal(found, weight * torch.from_numpy(one_by_one(weight.numpy(), 0.3, 0, 0)))
    assert len(moved) == 3 * (7 if name == "llama" else 4)
    reread = type(model).from_pretrained(made).eval()
    assert reread(**batches[0])[0].isfinite().all()
