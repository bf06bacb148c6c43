"""Changes of blocks: chosen by pattern, resumed after a kill, with the original model's hidden states and saved statistics."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import MODELS, build

import weft
from weft.calibrate import BlockTask, Change, Statistics, Walk, collect, rewrite
from weft.calibrate.watch_block import block_layers
from weft.errors import CheckpointError, NonFiniteError, OutputError, RecipeError


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def double(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
    return 2 * weight


def saved(tmp_path: Path, name: str = "llama") -> tuple[nn.Module, list[Any], Path]:
    model, batches = build(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    return model, batches, tmp_path / "model"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_where_a_checkpoint_holds_each_layer(name: str, tmp_path: Path) -> None:
    """The matrix under the name that is found is the layer's, or its transpose."""
    _, batches, folder = saved(tmp_path, name)
    with weft.open(folder) as checkpoint, Walk(checkpoint, batches) as walk:
        for block in walk:
            layers = block_layers(block)
            names = walk.source.stored_names(block.name, layers)
            on_disk_fused = [n for n in layers if n not in names]
            assert all(name == "gpt_oss" and ".experts." in n for n in on_disk_fused)
            for layer, tensors in names.items():
                for stored, (start, stop) in tensors.items():
                    weight, tensor = layers[layer].weight, checkpoint[stored].torch()
                    weight = weight.mT if type(layers[layer]).__name__ == "Conv1D" else weight
                    assert any(torch.equal(weight.flatten(1)[start:stop], t.flatten(1)) for t in (tensor, tensor.mT))
                assert len(tensors) == (2 if layer.endswith("gate_up_proj") else 1)


class Recorded(Change):
    """Halves matrices and keeps what it was given."""

    needs = ("mean",)
    targets = True

    def __init__(self) -> None:
        self.targets_seen: list[Tensor] = []
        self.outputs_seen: list[Tensor] = []
        self.drawn: list[float] = []

    def change_block(self, task: BlockTask) -> None:
        self.drawn.append(float(torch.rand((), generator=task.generator())))
        for number in range(len(task.block.walk.batches)):
            args, kwargs = task.block.batch(number)
            with torch.no_grad():
                out = task.block.module(*args, **kwargs)
            self.outputs_seen.append(out[0] if isinstance(out, tuple) else out)
            self.targets_seen.append(task.block.target(number))
        for name in task.layers:
            task.put(name, task.weight(name) / 2)


def test_targets_are_the_original_models_hidden_states(tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path)
    change = Recorded()
    made = rewrite(folder, batches, change, tmp_path / "out")
    with torch.no_grad():
        for before, seen in ((model, change.targets_seen), (type(model).from_pretrained(made).eval(), None)):
            for number, batch in enumerate(batches):
                hidden = before(**batch, output_hidden_states=True).hidden_states
                for block in range(2):  # the last one is given after the final norm
                    if seen is not None:
                        assert torch.equal(seen[block * len(batches) + number], hidden[block + 1])
    # a block is run with what the halved blocks before it give
    assert torch.equal(change.outputs_seen[0], change.targets_seen[0])
    assert not torch.equal(change.outputs_seen[len(batches)], change.targets_seen[len(batches)])
    assert len(set(change.drawn)) == 3
    again = Recorded()
    rewrite(folder, batches, again, tmp_path / "again")
    assert again.drawn == change.drawn


def test_the_most_specific_pattern_decides(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path)
    changes = {"*": double, "*.down_proj": lambda n, w, s: 3 * w, "model.layers.1.mlp.down_proj": lambda n, w, s: None}
    made = rewrite(folder, batches, changes, tmp_path / "out", where=["mlp.*", "*_proj"])
    with weft.open(folder) as before, weft.open(made) as after:
        for name in before:
            ratio = float((after[name].torch() / before[name].torch()).nanmedian())
            down = "down_proj" in name
            expected = (1 if ".1." in name else 3) if down else 2 if "_proj" in name else 1
            assert ratio == pytest.approx(expected), name
    with pytest.raises(RecipeError, match="changes no layers"):
        rewrite(folder, None, {"*": 3}, tmp_path / "bad")
    with pytest.raises(RecipeError, match="empty"):
        rewrite(folder, None, {}, tmp_path / "bad")


def test_saved_statistics_are_used(tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path)
    collect(folder, batches, "scales", output=tmp_path / "stats")

    def by_norm(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight * (statistics.norm(name) > statistics.norm(name).median())

    made = rewrite(folder, None, by_norm, tmp_path / "out", statistics=tmp_path / "stats")
    found = collect(model, batches, "scales")
    with weft.open(folder) as before, weft.open(made) as after:
        for name in found.layers:
            expected = by_norm(name, before[f"{name}.weight"].torch(), found)
            assert torch.equal(after[f"{name}.weight"].torch(), expected)
    other, _ = build("llama", torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="of another model"):
        rewrite(tmp_path / "other", None, by_norm, tmp_path / "out2", statistics=tmp_path / "stats")


def test_what_fails_is_skipped_if_asked(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path)

    def breaks(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight * float("nan") if name.endswith("1.mlp.up_proj") else 2 * weight

    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        rewrite(folder, batches, breaks, tmp_path / "out")
    assert (tmp_path / "out.partial" / "parts" / "0000.safetensors").is_file()  # what was done is kept
    with pytest.warns(UserWarning, match=r"1 layers are left as they are: model\.layers\.1\.mlp\.up_proj \(.*NaN"):
        made = rewrite(folder, batches, breaks, tmp_path / "out", skip_errors=True)
    report = json.loads((made / "weft.json").read_text())
    assert "NaN" in report["layers"]["model.layers.1.mlp.up_proj"]["failed"]
    assert len(report["changed"]) == 3 * 7 - 1
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from architectures import build
from weft.calibrate import rewrite
import weft.calibrate.parts as parts
_, batches = build("llama", torch.float32)
count = 0
def change(name, weight, statistics):
    global count
    count += 1
    if count == {stop}:
        os.kill(os.getpid(), signal.SIGKILL)
    return weight * statistics.mean(name).tanh()
rewrite({folder!r}, batches, change, {out!r}, what="mean")
"""


@pytest.mark.parametrize("stop", [1, 9, 21])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(stop: int, tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path)
    whole = rewrite(folder, batches, lambda n, w, s: w * s.mean(n).tanh(), tmp_path / "whole", what="mean")
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), stop=stop, folder=str(folder), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    seen: list[str] = []

    def change(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        seen.append(name)
        return weight * statistics.mean(name).tanh()

    rewrite(folder, batches, change, out, what="mean")
    assert len(seen) == 21 - 7 * ((stop - 1) // 7)
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert not (tmp_path / "out.partial").exists()


def test_another_run_begins_anew_if_forced(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path)

    def stops(name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        if ".1." in name:
            raise KeyboardInterrupt
        return 3 * weight

    with pytest.raises(KeyboardInterrupt):
        rewrite(folder, batches, stops, tmp_path / "out", recipe={"factor": 3})
    with pytest.raises(OutputError, match="unfinished run with other options"):
        rewrite(folder, batches, double, tmp_path / "out", recipe={"factor": 2})
    made = rewrite(folder, batches, double, tmp_path / "out", recipe={"factor": 2}, force=True)
    with weft.open(folder) as before, weft.open(made) as after:
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(after[name].torch(), 2 * before[name].torch())


def test_where_single_experts_lie(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path, "mixtral")
    with weft.open(folder) as checkpoint, Walk(checkpoint, batches) as walk:
        block = next(iter(walk))
        layers = block_layers(block)
        whole = walk.source.stored_names(block.name, layers)
        for name, layer in layers.items():
            assert walk.source.stored_names(block.name, {name: layer}) == {name: whole[name]}
