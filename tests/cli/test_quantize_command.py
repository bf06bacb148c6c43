"""``weft quantize``, ``eval``, ``check`` and ``generate`` as a user calls them."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import weft
from weft.cli.app import app
from weft.errors import WeftError
from weft.quantize import RTN, quantize_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, and texts beside it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("quantize")
    texts = [f"def f{i}(x):\n    return x + {i} * len('word {i % 7}')\n" for i in range(200)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.tensor([fast.encode("".join(texts))])
    for step in range(30):
        start = (step * 97) % (ids.shape[1] - 256)
        part = torch.stack([ids[0, start + 32 * k : start + 32 * k + 64] for k in range(6)])
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "model")
    fast.save_pretrained(root / "model")
    lines = [json.dumps({"text": "".join(texts[i : i + 5])}) for i in range(0, 200, 5)]
    (root / "texts.jsonl").write_text("\n".join(lines[:30]))
    (root / "held.jsonl").write_text("\n".join(lines[30:]))
    return root


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


DATA = ("--samples", "16", "--length", "48", "--batch-size", "4")


def test_quantize_evaluate_and_generate(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "w4"
    text = run(
        "quantize", folder / "model", "--method", "gptq", "--bits", 4, "--group-size", 32, "--data", folder / "texts.jsonl",
        *DATA, "--evaluate", folder / "held.jsonl", "--json", "-q", "-o", out,
    )  # fmt: skip
    facts = json.loads(text)
    assert facts["layers"] == 21
    assert facts["bits_per_weight"] == pytest.approx(4 + 32 / 32, abs=0.01)  # scales in float32, the model's type
    assert facts["scores"]["perplexity"] == pytest.approx(facts["scores"]["original_perplexity"], rel=0.2)
    assert facts["memory_peak"] > 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] is True
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["method"] == "gptq"
    assert report["recipe"]["parameters"]["group_size"] == 32
    assert report["scores"]["after"]["kl"] > 0
    assert all(row["seconds"] is not None for row in report["layers"])
    assert "<html" in (out / "report.html").read_text()
    shown = run("eval", out, folder / "held.jsonl", "--against", folder / "model", *DATA, "-n", 21, "-q")
    assert "perplexity" in shown
    assert "KL to the original" in shown
    assert "down_proj" in shown
    scores = json.loads(run("eval", out, folder / "held.jsonl", "--against", folder / "model", *DATA, "--json", "-q"))
    assert scores["kl"] > 0
    assert scores["bytes"] < scores["bytes_against"]
    assert len(scores["layers"]) == 21
    made = json.loads(run("generate", out, "def f1(x):", "-n", 8, "--json", "-q"))
    assert made["text"].startswith("def f1(x):")
    assert 1 <= made["tokens"] <= 8
    assert run("generate", out, "def f1(x):", "-n", 4, "-q").startswith("def f1(x):")


def test_schemes_need_no_data(folder: Path, tmp_path: Path) -> None:
    for scheme, method in (
        ("W8A16", "compressed-tensors"), ("w4a16_asym", "compressed-tensors"), ("MXFP4", "compressed-tensors"), ("Q8_0", "weft"),
    ):  # fmt: skip
        out = tmp_path / scheme
        extra = ["--group-size", "32"] if "A16" in scheme.upper() else []
        run("quantize", folder / "model", "--scheme", scheme, *extra, "-q", "-o", out)
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == method
    with weft.open(tmp_path / "W8A16") as made, weft.open(folder / "model") as before:
        name = "model.layers.0.mlp.up_proj.weight"
        error = (made[name].torch() - before[name].torch()).norm() / before[name].torch().norm()
        assert float(error) < 0.01
    with pytest.raises(WeftError, match=r"no scheme 'NVFP4A14'.*NVFP4A16"):
        run("quantize", folder / "model", "--scheme", "NVFP4A14", "-o", tmp_path / "x")
    with pytest.raises(WeftError, match="do not divide into groups of 128"):
        run("quantize", folder / "model", "--scheme", "W4A16", "-q", "-o", tmp_path / "x")


def test_schemes_with_data_and_methods(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "texts.jsonl", *DATA, "--json", "-q")
    facts = json.loads(run("quantize", folder / "model", "--scheme", "NVFP4", *data, "-o", tmp_path / "nvfp4"))
    assert (facts["method"], facts["inputs"], facts["layers"]) == ("nvfp4", "nvfp4", 21)
    assert facts["bits_per_weight"] == pytest.approx(4.5, abs=0.02)
    assert run("generate", tmp_path / "nvfp4", "def f1(x):", "-n", 4, "-q").startswith("def f1(x):")
    grid = ("--group-size", 32)
    made = tmp_path / "w4a8"
    facts = json.loads(run("quantize", folder / "model", "--scheme", "W4A8", *grid, *data, "-o", made))
    assert facts["method"] == "gptq"  # there is data
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    facts = json.loads(
        run("quantize", folder / "model", "--scheme", "W4A8", "--method", "awq", *grid, *data, "-o", tmp_path / "awq")
    )
    assert facts["method"] == "awq"
    # in whole bytes nothing would be gained by fewer bits
    chosen = (
        "--format",
        "pack-quantized",
        "--target-bits",
        6,
        "--bits-from",
        "4,8",
        *grid,
        *data,
        "-o",
        tmp_path / "chosen",
    )
    facts = json.loads(run("quantize", folder / "model", "--scheme", "W4A8", "--method", "rtn", *chosen))
    assert set(facts["bits"].values()) == {4, 8}
    with pytest.raises(WeftError, match=r"no gptq of it.*Leave --method out, or take.*W4A16"):
        run("quantize", folder / "model", "--scheme", "NVFP4", "--method", "gptq", *data, "-o", tmp_path / "x")
    with pytest.raises(WeftError, match="vptq makes no grids"):
        run("quantize", folder / "model", "--scheme", "W4A16", "--method", "vptq", *data, "-o", tmp_path / "x")
    with pytest.raises(WeftError, match="FP8 needs data"):
        run("quantize", folder / "model", "--scheme", "FP8", "-q", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bits_by_budget(folder: Path, tmp_path: Path) -> None:
    common = (
        "quantize", folder / "model", "--method", "gptq", "--group-size", 32, "--data", folder / "texts.jsonl", *DATA,
        "--json", "-q",
    )  # fmt: skip
    facts = json.loads(run(*common, "--target-bits", 4.6, "-o", tmp_path / "bits"))
    assert facts["bits_per_weight"] <= 4.75
    assert len(set(facts["bits"].values())) > 1
    whole = sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors"))
    wanted = int(0.45 * whole)
    facts = json.loads(run(*common, "--target-size", str(wanted), "-o", tmp_path / "size"))
    size = sum(p.stat().st_size for p in (tmp_path / "size").glob("*.safetensors"))
    assert 0.9 * wanted < size < 1.05 * wanted  # the file's header comes on top
    with pytest.raises(WeftError, match="least"):
        run(*common, "--target-bits", 0.5, "-o", tmp_path / "small")
    with pytest.raises(WeftError, match="one of them"):
        run(*common, "--target-bits", 4, "--target-size", "1GB", "-o", tmp_path / "both")


def test_head_and_embeddings(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        "quantize", folder / "model", "--method", "rtn", "--bits", 4, "--group-size", 32, "--head-bits", 8,
        "--embedding-bits", 8, "--format", "weft", "-q", "-o", out,
    )  # fmt: skip
    layers = json.loads((out / "weft.json").read_text())["layers"]
    assert {"lm_head", "model.embed_tokens"} <= layers.keys()


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (
        "--method",
        "gptq",
        "--group-size",
        32,
        "--data",
        folder / "texts.jsonl",
        *DATA,
        "--dry-run",
        "-o",
        out,
    )
    text = run("quantize", folder / "model", *arguments)
    assert "Nothing was written" in text
    assert not list(tmp_path.iterdir())
    plan = json.loads(run("quantize", folder / "model", *arguments, "--json"))
    assert plan["layers"] == 21
    run("quantize", folder / "model", *arguments[:-3], "-q", "-o", out)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert plan["bytes"] == pytest.approx(size, rel=0.05)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for message, arguments in (
        ("Say how", []),
        ("needs data", ["--method", "gptq"]),
        ("does not quantise", ["--method", "ties"]),
        (r"no option --bit\b.*bits", ["--method", "rtn", "--bit", "4"]),
        ("must be between", ["--method", "rtn", "--bits", "9"]),
        ("do not divide into groups", ["--method", "rtn", "--group-size", "48"]),
        ("No layer was chosen", ["--method", "rtn", "--group-size", "32", "--where", "q_porj"]),
        ("stop or skip", ["--method", "rtn", "--on-error", "go"]),
        ("no format", ["--method", "rtn", "--group-size", "32", "--format", "pack"]),
    ):
        with pytest.raises(WeftError, match=message):
            run("quantize", folder / "model", *arguments, "-q", "-o", out)
        assert not list(tmp_path.iterdir()), arguments
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32))
    bert.save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).write_bytes((folder / "model" / name).read_bytes())
    with pytest.raises(WeftError, match="does not write text"):
        run("generate", tmp_path / "bert", "a", "-q")


def test_check_names_what_will_not_load(folder: Path, tmp_path: Path) -> None:
    def found(out: Path, *arguments: object) -> tuple[bool, str]:
        facts = json.loads(run("check", out, "--json", *arguments))
        return facts["loads"], " ".join(f["text"] for f in facts["findings"])

    run("quantize", folder / "model", "--scheme", "W4A16", "--group-size", 32, "-q", "-o", tmp_path / "a")
    loads, text = found(tmp_path / "a")
    assert loads
    assert "multiples of 64" in text
    loads, text = found(tmp_path / "a", "--tensor-parallel", 4)
    assert not loads
    assert "no whole number of groups" in text
    loads, text = found(tmp_path / "a", "--tensor-parallel", 3)
    assert not loads
    assert "evenly" in text
    assert found(tmp_path / "a", "--for", "transformers")[0]
    loads, text = found(tmp_path / "a", "--for", "llama.cpp")
    assert not loads
    assert "GGUF" in text
    run("quantize", folder / "model", "--method", "nf4", "--format", "weft", "-q", "-o", tmp_path / "b")
    loads, text = found(tmp_path / "b")
    assert not loads
    assert "does not load the quant_method 'weft'" in text
    mixed = {"*": RTN(4, 32, "symmetric"), "k_proj": RTN(8, 32, "symmetric")}
    loads, text = found(quantize_model(folder / "model", tmp_path / "c", mixed))
    assert not loads
    assert "q, k and v" in text
    assert "not quantised" in found(folder / "model")[1]
    with pytest.raises(WeftError, match="vllm"):
        run("check", tmp_path / "a", "--for", "vlm")
