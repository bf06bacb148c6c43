"""``weft compare`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from weft.cli.app import app
from weft.errors import OutputError, RecipeError
from weft.view.evidence import comparison_png


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    rows = [[3 + (i * j) % 29 for j in range(5 + i)] for i in range(8)]
    (root / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return root


def test_a_table_and_a_verdict(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", folder / "model", "--data", folder / "data.jsonl", "-o", out, "--group-size", 8, "-q"]
    text = run(*arguments, "--methods", "rtn,gptq,nf4", "--bits", "4,8", "--mixed", "6").stdout
    lines = text.splitlines()
    assert lines[0].startswith("original: ")
    assert "perplexity" in lines[0]
    names = ["rtn 4", "rtn 8", "gptq 4", "gptq 8", "nf4", "mixed 6"]
    assert [next(n for n in names if line.startswith(n)) for line in lines[3:9]] == names
    found = json.loads((out / "comparison.json").read_text())
    assert lines[-1] == found["verdict"]
    assert [row["candidate"] for row in found["rows"]] == names
    assert found["candidates"]["gptq 4"]["group_size"] == 8
    tokens = sum(5 + i for i in range(8))
    assert 5 + 6 < tokens - found["held_out"] < tokens
    assert found["held_out"] == 11 + 12  # the last two rows of eight
    with pytest.raises(OutputError, match="exists already"):
        run(*arguments)
    again = json.loads(run(*arguments, "--force", "--json", "--methods", "rtn", "--budget", "1GB").stdout)
    assert again["best"] == "rtn 4" or again["best"] == "rtn 8"
    assert again["rows"][0]["loss"] is not None


def test_all_that_fails_is_told(folder: Path, tmp_path: Path) -> None:
    result = run(
        "compare", folder / "model", "--data", folder / "data.jsonl", "-o", tmp_path / "out", "--group-size", 7, "-q",
        "--methods", "rtn", "--held-out", folder / "data.jsonl",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "do not divide" in result.stdout
    assert "No candidate could be made" in result.stdout


def test_plots(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "compare",
        folder / "model",
        "--data",
        folder / "data.jsonl",
        "--group-size",
        8,
        "--methods",
        "rtn",
        "-q",
    ]
    run(*arguments, "-o", tmp_path / "a", "--plot", tmp_path / "plot.html")
    assert (tmp_path / "plot.html").read_text() == (tmp_path / "a" / "comparison.html").read_text()
    with pytest.raises(RecipeError, match=r"\.png or an \.html"):
        run(*arguments, "-o", tmp_path / "b", "--plot", tmp_path / "plot.gif")
    pytest.importorskip("matplotlib")
    found = json.loads((tmp_path / "a" / "comparison.json").read_text())
    found["rows"][0]["candidate"] = "$x^{ <b>"
    comparison_png(found, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "gptqq"], "Did you mean gptq"),
        (["--methods", "linear"], "quantises nothing"),
        (["--bits", "4,x"], "no list of numbers"),
        (["--bits", "3.5"], "--mixed 3.5"),
        (["--bits", "9"], "bits"),
        (["--held-out-share", "0"], "both need some"),
        (["--held-out-share", "1"], "both need some"),
    ],
)
def test_what_cannot_be(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run("compare", folder / "model", "--data", folder / "data.jsonl", "-o", tmp_path / "out", "-q", *options)
    assert not list(tmp_path.iterdir())
