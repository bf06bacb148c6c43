"""``weft calibrate`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from weft.calibrate import Statistics, collect
from weft.cli.app import app
from weft.errors import CheckpointError, OutputError, RecipeError


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [[3 + (i * j) % 29 for j in range(5 + i)] for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return tmp_path / "data.jsonl"


def test_statistics_in_a_folder(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats"
    text = run("calibrate", model, data, "-o", out, "-s", "scales,gram", "--batch-size", 4).stdout
    assert text.startswith(f"wrote {out}: gram, scales of 14 layers from 45 tokens")
    found = Statistics.load(out)
    assert found.rows("model.layers.1.mlp.down_proj") == 45
    assert found.gram("model.layers.1.mlp.down_proj").shape == (24, 24)
    found.check(model)
    with pytest.raises(OutputError, match="exists already"):
        run("calibrate", model, data, "-o", out)
    facts = json.loads(run("calibrate", model, data, "-o", out, "--force", "--include", "*.q_proj", "--json").stdout)
    assert facts["layers"] == 2
    assert facts["bytes"] == Statistics.load(out).nbytes == 2 * 4 * 16 * 16


def test_a_dry_run_writes_nothing_and_tells_the_truth(model: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "stats"
    facts = json.loads(run("calibrate", model, data, "-o", out, "--dry-run", "--json", "-s", "gram,mean").stdout)
    text = run("calibrate", model, data, "-o", out, "--dry-run").stdout
    assert "14 in 2 blocks, which are given 8 tensors" in text
    assert "self" not in run("calibrate", model, data, "-o", out, "--dry-run").stdout
    assert "writes itself" in run("calibrate", model, "self", "-o", out, "--dry-run").stdout
    assert sorted(tmp_path.rglob("*")) == before
    run("calibrate", model, data, "-o", out, "-s", "gram,mean", "-q")
    assert facts["nbytes"] == Statistics.load(out).nbytes
    assert facts["tokens"] == 45


def test_options_of_the_data(model: Path, data: Path, tmp_path: Path) -> None:
    def rows(*options: object) -> int:
        run("calibrate", model, data, "-o", tmp_path / "stats", "-s", "mean", "--force", *options)
        return Statistics.load(tmp_path / "stats").rows("model.layers.0.self_attn.q_proj")

    def first() -> torch.Tensor:
        return Statistics.load(tmp_path / "stats").mean("model.layers.0.self_attn.q_proj")

    assert rows() == 45
    assert rows("--length", 4) == 24
    assert rows("--length", 4, "--samples", 2) == 8
    assert rows("--pack", "--length", 10) == 40
    assert rows("--length", 6, "--samples", 2, "--seed", 0) == rows("--length", 6, "--samples", 2, "--memory", "1KB")
    same = first()
    rows("--length", 6, "--samples", 2, "--seed", 3)
    assert not torch.equal(first(), same)


def test_what_the_model_writes_itself(model: Path, tmp_path: Path) -> None:
    options = ("--samples", 3, "--length", 7, "-s", "mean,fisher_sampled")
    run("calibrate", model, "self", "-o", tmp_path / "a", *options)
    run("calibrate", model, "self", "-o", tmp_path / "b", *options)
    found = Statistics.load(tmp_path / "a")
    assert found.rows("model.layers.0.self_attn.q_proj") == 21
    assert found.fisher("model.layers.0.self_attn.q_proj.weight", "sampled").shape == (16, 16)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_gradients_take_the_labels_of_the_data(model: Path, data: Path, tmp_path: Path) -> None:
    import transformers

    run(
        "calibrate",
        model,
        data,
        "-o",
        tmp_path / "stats",
        "-s",
        "fisher_empirical",
        "--batch-size",
        3,
        "--dtype",
        "float64",
    )
    found = Statistics.load(tmp_path / "stats")
    reread = transformers.LlamaForCausalLM.from_pretrained(model)
    batches = [{"input_ids": torch.tensor([json.loads(line)["input_ids"]])} for line in data.read_text().splitlines()]
    labels = [b["input_ids"] for b in batches]
    name = "model.layers.1.mlp.up_proj.weight"
    expected = collect(reread, batches, "fisher_empirical", labels=labels, dtype="float64")
    torch.testing.assert_close(
        found.fisher(name, "empirical"), expected.fisher(name, "empirical"), rtol=1e-4, atol=1e-9
    )


def test_what_is_wrong_is_said(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats"
    with pytest.raises(RecipeError, match="Did you mean gram"):
        run("calibrate", model, data, "-o", out, "-s", "grams")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "far.jsonl").write_text('{"input_ids": [1, 99]}')
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can read"):
        run("calibrate", model, tmp_path / "text.txt", "-o", out)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run("calibrate", model, tmp_path / "nowhere.jsonl", "-o", out)
    with pytest.raises(RecipeError, match="token 99, and the model knows 32"):
        run("calibrate", model, tmp_path / "far.jsonl", "-o", out)
    with pytest.raises(RecipeError, match="not a size"):
        run("calibrate", model, data, "-o", out, "--memory", "much")
    with pytest.raises(RecipeError, match="No layer was chosen"):
        run("calibrate", model, data, "-o", out, "--include", "*.qproj")
    with pytest.raises(CheckpointError, match="no such file"):
        run("calibrate", tmp_path / "nowhere", data, "-o", out)
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))
