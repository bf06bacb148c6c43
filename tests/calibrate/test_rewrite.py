"""Models are rewritten block by block: what changed is what should, the rest is the same bytes, and transformers loads it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import MODELS, build

import weft
from weft.calibrate import Statistics, rewrite
from weft.errors import NonFiniteError, OutputError, RecipeError


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def double(name: str, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return 2 * weight


def saved(tmp_path: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list, Path]:
    model, batches = build(name, dtype)
    model.save_pretrained(tmp_path / "model")
    return model, batches, tmp_path / "model"


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_changed_model_loads_and_computes(name: str, data: bool, tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path, name)
    made = rewrite(folder, batches if data else None, double, tmp_path / "out", what="mean" if data else ())
    reread = type(model).from_pretrained(made).eval()
    reread.config._experts_implementation = "eager"
    report = json.loads((made / "weft.json").read_text())
    with weft.open(folder) as before, weft.open(made) as after:
        assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
        for tensor in before:
            a, b = before[tensor].torch(), after[tensor].torch()
            assert torch.equal(b, 2 * a if tensor in report["changed"] else a)
    # the same change by hand: all matrices inside of blocks, tables of position biases and norms apart
    for path, module in model.named_modules():
        inside = any(part.isdigit() for part in path.split("."))
        is_matrix = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if inside and is_matrix:
            module.weight.data.mul_(2)
        if type(module).__name__.endswith("Experts"):
            for part in ("gate_up_proj", "down_proj"):
                getattr(module, part).data.mul_(2)
    for (path, a), (_, b) in zip(model.named_parameters(), reread.named_parameters(), strict=True):
        assert torch.equal(a, b), path
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(reread(**batch)[0], model(**batch)[0])


def test_later_blocks_are_given_what_changed_blocks_compute(tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path, "llama")
    seen: dict[str, torch.Tensor] = {}

    def change(name: str, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor | None:
        seen[name] = statistics.gram(name)
        return weight * (weight > 0) if name.endswith("down_proj") else None

    made = rewrite(folder, batches, change, tmp_path / "out", what="gram")
    changed = type(model).from_pretrained(made)
    # block 2 of the changed model is given what the walk gave it
    found = weft.calibrate.collect(changed, batches)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        torch.testing.assert_close(seen[f"model.layers.2.{name}"].float(), found.gram(f"model.layers.2.{name}"))
    assert len(json.loads((made / "weft.json").read_text())["changed"]) == 3


def test_what_does_not_change_keeps_its_precision(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))  # files are float32
    made = rewrite(folder, batches, double, tmp_path / "out", where="q_proj")
    with weft.open(folder) as before, weft.open(made) as after:
        for name in before:
            a, b = before[name].torch(), after[name].torch()
            assert b.dtype == torch.float32
            assert torch.equal(b, (2 * a).bfloat16().float() if name.endswith("q_proj.weight") else a)


def test_shards_and_companions(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path, "mixtral", torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.py").write_text("")
    made = rewrite(folder, batches, double, tmp_path / "out", shard_bytes=20_000, recipe={"method": "double"})
    names = {p.name for p in made.iterdir()}
    assert {"config.json", "tokenizer.json", "weft.json", "model.safetensors.index.json"} <= names
    assert "model.py" not in names
    shards = [p for p in made.iterdir() if p.suffix == ".safetensors"]
    assert len(shards) > 2
    assert max(p.stat().st_size for p in shards) < 25_000
    with weft.open(made) as opened, weft.open(folder) as before:
        assert opened.keys() == before.keys()
    assert json.loads((made / "weft.json").read_text())["recipe"] == {"method": "double"}
    assert str(tmp_path) not in (made / "weft.json").read_text()


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path, "llama")
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        rewrite(folder, batches, lambda n, w, s: w / 0, out)
    with pytest.raises(RecipeError, match="keep the shape"):
        rewrite(folder, batches, lambda n, w, s: w[:1], out)
    with pytest.raises(RecipeError, match="No layer was chosen"):
        rewrite(folder, batches, double, out, where="nowhere")
    with pytest.raises(RecipeError, match="statistics of data"):
        rewrite(folder, None, double, out, what="gram")
    with pytest.raises(RecipeError, match="no statistic"):
        rewrite(folder, batches, double, out, what="fisher_exact")
    with pytest.raises(OutputError, match="is, or contains, the model"):
        rewrite(folder, batches, double, folder, force=True)
    with pytest.raises(OutputError, match="is, or contains, the model"):
        rewrite(folder, batches, double, tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    rewrite(folder, None, double, out)
    with pytest.raises(OutputError, match="exists already"):
        rewrite(folder, None, double, out)
    rewrite(folder, None, double, out, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="not made by weft"):
        rewrite(folder, None, double, tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model", "out"]
