"""``weft align``: a folder comes back in another's order, bit for bit, or is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import weft
from weft.checkpoint.save import save_tensors
from weft.cli.app import app
from weft.errors import OutputError, RecipeError
from weft.symmetry import find_symmetry


def made(folder: Path, seed: int, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 48, "tie_word_embeddings": True, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_permuted_copy_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = made(tmp_path / "a", 0)
    symmetry = find_symmetry(model)
    symmetry.apply(model, symmetry.random(np.random.default_rng(0)))
    model.save_pretrained(tmp_path / "b")
    text = run("align", tmp_path / "b", "--to", tmp_path / "a", "-o", tmp_path / "c", "--quiet")
    assert "(100.0%)" in text
    with weft.open(tmp_path / "a") as a, weft.open(tmp_path / "b") as b, weft.open(tmp_path / "c") as c:
        assert set(a) == set(c)
        assert all((a[n].bits() == c[n].bits()).all() for n in a)
        assert any((a[n].bits() != b[n].bits()).any() for n in a)
    assert "b in the order of a" in (tmp_path / "c" / "README.md").read_text()


def test_another_model_keeps_its_function(tmp_path: Path) -> None:
    made(tmp_path / "a", 0)
    model = made(tmp_path / "b", 1)
    arguments = ("align", tmp_path / "b", "--to", tmp_path / "a", "-o", tmp_path / "c", "--quiet", "--json")
    facts = json.loads(run(*arguments))
    assert facts["converged"]
    assert 0 < facts["units_moved"] <= facts["units"]
    assert facts["distance_after"] < facts["distance_before"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    tokens = torch.randint(48, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.float().eval()(tokens).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(OutputError):
        run(*arguments)
    run(*arguments, "--force", "--restarts", 2)
    short = json.loads(run(*arguments, "--force", "--max-sweeps", 1))
    assert not short["converged"]
    assert short["sweeps"] == 1


def test_what_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    model = made(tmp_path / "a", 0)
    made(tmp_path / "wide", 0, intermediate_size=48)
    with pytest.raises(RecipeError, match="one architecture and one width"):
        run("align", tmp_path / "wide", "--to", tmp_path / "a", "-o", tmp_path / "c", "--quiet")
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    (tmp_path / "extra").mkdir()
    save_tensors(tmp_path / "extra" / "model.safetensors", {**state, "value.weight": torch.ones(1, 32)}, {})
    (tmp_path / "extra" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    with pytest.raises(RecipeError, match=r"such as value\.weight: they would stay in the old order"):
        run("align", tmp_path / "extra", "--to", tmp_path / "a", "-o", tmp_path / "c", "--quiet")
    save_tensors(tmp_path / "file.safetensors", state, {})
    with pytest.raises(RecipeError, match=r"no config\.json"):
        run("align", tmp_path / "file.safetensors", "--to", tmp_path / "a", "-o", tmp_path / "c", "--quiet")
    assert not (tmp_path / "c").exists()
