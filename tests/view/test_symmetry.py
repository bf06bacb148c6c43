"""What ``weft inspect --symmetry`` prints, and that nothing else pays for it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weft.errors import CheckpointError, RecipeError
from weft.symmetry import Symmetry, find_symmetry
from weft.view.symmetry import render, symmetry_command

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": 16,
    "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_text_and_json_from_the_command_line(
    folder: Path, weft_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    told = weft_command("inspect", folder, "--symmetry", check=True).stdout
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert lines[0].startswith(
        "13 groups"
    )  # hidden, and for each of three layers: two kinds of heads, head_dim, intermediate
    assert any(line.startswith("model.layers.*.mlp.intermediate intermediate 24 3 ") for line in lines)
    heads = "model.layers.*.self_attn.query_heads query_heads 2 in each of 2 3 q_proj.weight, o_proj.weight"
    assert heads in lines
    assert "lm_head.weight 0 11 1 an output of the model" in lines
    assert "model.layers.*.self_attn.q_proj.weight 0 2, 2 3 constant model.rotary_emb.inv_freq" in lines
    told = weft_command("inspect", folder, "--symmetry", "--json", check=True).stdout
    assert Symmetry.from_json(told) == find_symmetry(folder)


def test_what_does_not_belong_together_is_refused(folder: Path, weft_command: Callable[..., Any]) -> None:
    refused = weft_command("inspect", folder, "--symmetry", "--spectrum")
    assert refused.returncode == 2
    assert "--symmetry reads no weights" in refused.stderr
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        symmetry_command(folder / "none")
    (folder / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(CheckpointError, match="cannot read this configuration"):
        symmetry_command(folder)
    with pytest.raises(RecipeError, match="limit"):
        symmetry_command(folder, limit=-1)


def test_the_plain_inspection_loads_neither_torch_nor_this(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from weft.view.commands import inspect_command\n"
        "inspect_command({'w': np.ones((4, 4), np.float32)})\n"
        "print([m for m in ('torch', 'transformers', 'weft.symmetry', 'weft.view.symmetry') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_operations_and_limits_are_told() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6), nn.LSTM(6, 4))
    text = render(find_symmetry(model, torch.zeros(3, 5)), limit=1)
    assert "Operations without a rule freeze what they touch: aten.lstm.input (1×)" in text
    assert "more rows" in text
    assert text.startswith("1 group of axes permutes without")
