"""``weft convert`` to GGUF and back, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import weft
from weft.cli.convert import gguf_command

transformers = pytest.importorskip("transformers")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_there_and_back(model: Path, tmp_path: Path, weft_command: Command) -> None:
    there = weft_command("convert", model, "-o", tmp_path / "m.gguf", "--type", "f32", "--json", check=True)
    facts = json.loads(there.stdout)
    assert facts["types"] == {"F32": 12}
    assert "no tokenizer" in facts["notes"][0]
    back = weft_command("convert", tmp_path / "m.gguf", "-o", tmp_path / "back", check=True)
    assert "AutoTokenizer.from_pretrained" in back.stderr
    with weft.open(model) as before, weft.open(tmp_path / "back") as after:
        assert {n: t.numpy().tolist() for n, t in before.items()} == {n: t.numpy().tolist() for n, t in after.items()}
        assert after.config["hidden_size"] == 32
    shown = weft_command("inspect", tmp_path / "m.gguf", "--json", check=True)
    assert "model.layers.0.self_attn.q_proj.weight" in shown.stdout


def test_importance_changes_the_scales(model: Path, tmp_path: Path) -> None:
    from weft.calibrate import Imatrix, collect, write_imatrix

    squares = {"blk.0.attn_v.weight": np.linspace(0, 5, 32, dtype=np.float32)[None]}
    write_imatrix(tmp_path / "i.gguf", Imatrix(squares, {"blk.0.attn_v.weight": np.array([3])}))
    collect(str(model), [{"input_ids": torch.arange(16).reshape(2, 8)}], "scales", output=str(tmp_path / "stats"))

    def made(name: str, imatrix: str = "") -> dict[str, np.ndarray]:
        gguf_command(
            str(model), str(tmp_path / f"{name}.gguf"), kind="q4_0", imatrix=imatrix and str(tmp_path / imatrix)
        )
        with weft.open(tmp_path / f"{name}.gguf") as opened:
            return {n: t.numpy() for n, t in opened.items()}

    plain, file, folder = made("plain"), made("file", "i.gguf"), made("folder", "stats")
    changed = [[n for n in plain if not np.array_equal(plain[n], other[n])] for other in (file, folder)]
    assert changed[0] == ["model.layers.0.self_attn.v_proj.weight"]
    assert len(changed[1]) == 7


def test_a_gguf_file_is_merged_with_a_folder(model: Path, tmp_path: Path) -> None:
    gguf_command(str(model), str(tmp_path / "m.gguf"), kind="q8_0")
    step = {"method": "linear", "models": [str(tmp_path / "m.gguf"), str(model)]}
    weft.run({"steps": [step]}, tmp_path / "merged")
    with weft.open(tmp_path / "m.gguf") as a, weft.open(model) as b, weft.open(tmp_path / "merged") as mean:
        for name, tensor in mean.items():
            np.testing.assert_allclose(tensor.numpy(), (a[name].numpy() + b[name].numpy()) / 2, atol=1e-7)


def test_writing_does_not_load_torch(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom weft.cli.convert import gguf_command\n"
        "gguf_command(sys.argv[1], sys.argv[2], kind='q4_0')\n"
        "print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, str(model), str(tmp_path / "m.gguf")]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_options_are_checked(model: Path, tmp_path: Path, weft_command: Command) -> None:
    for arguments, words in (
        (["-o", tmp_path / "x.gguf", "--dtype", "float16"], "no --dtype"),
        (["-o", tmp_path / "x", "--type", "q4_0"], "let the output end in .gguf"),
        (["-o", tmp_path / "x.gguf", "--type", "q3"], "not 'q3'"),
    ):
        done = weft_command("convert", model, *arguments)
        assert done.returncode == 2
        assert words in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
