"""What a plan promises from headers is what a walk gathers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from architectures import MODELS, build

import weft
from weft.calibrate import collect
from weft.calibrate.plan import plan_collection
from weft.errors import RecipeError

EVERYTHING = ("gram", "mean", "range", "scales", "percentiles", "routing")


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_inputs_and_bytes_are_those_of_the_walk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        batches = [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}]
    else:  # tokens enough for every expert
        batches = [{"input_ids": torch.randint(3, 64, (16, 12), generator=generator)}]
        if name == "t5":
            batches[0]["decoder_input_ids"] = batches[0]["input_ids"]
    with weft.open(tmp_path) as checkpoint:
        monkeypatch.setattr(type(checkpoint[next(iter(checkpoint))]), "read_into", None)  # headers only
        plan = plan_collection(checkpoint, EVERYTHING, check=False)
        monkeypatch.undo()
    found = collect(tmp_path, batches, EVERYTHING)
    assert plan.layers == len(found.layers)
    assert plan.inputs == len({first for first, _ in found.facts.layers.values()})
    assert plan.nbytes == found.nbytes
    assert plan.memory > 1 << 30


def test_gradients_and_choices(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    with weft.open(tmp_path) as checkpoint:
        plan = plan_collection(checkpoint, "gram,gradient,fisher_empirical", where="*.q_proj", dtype="float64")
        with pytest.raises(RecipeError, match="No layer was chosen"):
            plan_collection(checkpoint, "gram", where="nothing")
        with pytest.raises(RecipeError, match="There is no statistic"):
            plan_collection(checkpoint, "grams")
    found = collect(tmp_path, batches, "gram,gradient,fisher_empirical", where="*.q_proj", dtype="float64")
    assert plan.nbytes == found.nbytes == 3 * (8 * 32 * 32 * 3)
    assert plan.layers == plan.inputs == 3
