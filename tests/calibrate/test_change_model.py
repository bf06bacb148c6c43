"""Models in memory are changed as models on disk are."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import build

import weft
from weft.calibrate import BlockTask, Change, Statistics, change_model_, collect, rewrite
from weft.errors import RecipeError


def by_mean(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
    return weight * (1 + statistics.mean(name).tanh())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5"])
def test_in_memory_as_on_disk(name: str, tmp_path: Path) -> None:
    model, batches = build(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    made = rewrite(tmp_path / "model", batches, by_mean, tmp_path / "out", what="mean")
    changed = change_model_(model, batches, by_mean, what="mean")
    reread = type(model).from_pretrained(made)
    for (path, a), (_, b) in zip(model.named_parameters(), reread.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=path)
    assert changed.report
    assert not changed.packed


class Targets(Change):
    """Checks that a whole model's targets are its outputs, and its inputs the batches."""

    needs = ("gram",)
    targets = True

    def change_block(self, task: BlockTask) -> None:
        for number in range(len(task.block.walk.batches)):
            args, kwargs = task.block.batch(number)
            with torch.no_grad():
                assert torch.equal(task.block.module(*args, **kwargs), task.block.target(number))
        for name in task.layers:
            assert task.statistics.gram(name).shape[0] == task.weight(name).shape[1]
            task.put(name, 2 * task.weight(name))


def test_a_model_without_blocks_is_one_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).train()
    before = [model[0].weight.clone(), model[4].weight.clone()]
    batches = [torch.randn(5, 1, 4, 4) for _ in range(3)]
    made = change_model_(model, batches, Targets())
    assert list(made.report) == ["0", "4"]
    assert torch.equal(model[0].weight, 2 * before[0])
    assert torch.equal(model[4].weight, 2 * before[1])
    assert model.training
    assert model[1].training
    assert float(made.report["4"]["error"]) == pytest.approx(1)
    assert float(made.report["4"]["output_error"]) == pytest.approx(1, rel=1e-4)


def test_saved_statistics_and_what_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    found = collect(model, [torch.randn(20, 4)], "mean", output=tmp_path / "stats")
    expected = by_mean("1", model[1].weight.detach(), found)
    change_model_(model, None, by_mean, statistics=tmp_path / "stats", where="1")
    assert torch.equal(model[1].weight, expected)
    with pytest.raises(RecipeError, match="calibration data"):
        change_model_(model, None, Targets())
    with pytest.raises(RecipeError, match="No layer was chosen"):
        change_model_(model, None, by_mean, where="conv")
    with pytest.raises(weft.errors.CheckpointError, match="another model"):
        change_model_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), None, by_mean, statistics=tmp_path / "stats")
