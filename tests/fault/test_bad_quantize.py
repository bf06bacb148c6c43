"""What ``weft quantize`` and its siblings refuse: one clear message, nothing left behind; damaged layers are skipped if asked."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import weft
from weft.calibrate import collect
from weft.cli.app import app
from weft.engine.journal import WorkFolder
from weft.errors import CheckpointError, NonFiniteError, OutputError, RecipeError, WeftError
from weft.quantize import GPTQ, RTN, FlexRound, quantize_model
from weft.registry import methods

LAYER = "model.layers.1.mlp.up_proj"
GRID = RTN(bits=4, group_size=32, kind="symmetric")
BATCHES = [{"input_ids": torch.arange(5, 37).reshape(2, 16)}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, and texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("bad")
    texts = [f"def f{i}(x):\n    return x + {i} * len('word {i % 7}')\n" for i in range(40)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>").save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return root


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "model", tmp_path / "model"))


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")
    return model


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(folder: Path, *arguments: object) -> str:
    """The message of the one error that a command ends in; nothing is left in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(WeftError) as caught:
        run(*arguments)
    assert caught.value.exit_code != 0
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    message = str(caught.value)
    assert "\n" not in message
    return message


PLAIN = ("--method", "rtn", "--group-size", 32)
DATA = ("--samples", 4, "--length", 16, "--batch-size", 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "gtpq"), "Did you mean gptq"),
        (("--method", "rtn", "--bits", 0), "'bits' must be between 1 and 8, got 0"),
        (("--method", "rtn", "--bits", 9), "'bits' must be between 1 and 8, got 9"),
        (("--method", "rtn", "--bits", 2.5), "'bits' must be a whole number, got 2.5"),
        (("--method", "rtn", "--bits", "four"), "'bits' must be a finite number, got 'four'"),
        (("--method", "rtn", "--group-size", 48), "q_proj: Rows of 32 inputs do not divide into groups of 48"),
        (("--method", "gptq", "--damping", -1), "'damping' must be between 0"),
        ((*PLAIN, "--where", "*.dwon_proj"), "Did you mean down_proj"),
        ((*PLAIN, "--where", "re:(("), "not a regular expression"),
        ((*PLAIN, "--sampels", 4), "Did you mean --samples"),
        ((*PLAIN, "--group-sise", 4), "Did you mean --group-size"),
        ((*PLAIN, "--xyz", 4), "lists the command's own"),
        ((*PLAIN, "--evaluate", "nowhere.jsonl"), "nowhere.jsonl: cannot be read as text (No such file or directory)"),
        ((*PLAIN, "--target-bits", 4), "add --data"),
        ((*PLAIN, "--data", "texts.jsonl", *DATA, "--target-size", "1KB"), "what is not quantised"),
        (("--scheme", "W8A16", "--bits", 4), "W8A16 has 8 bits"),
        (("--method", "gptq", "--statistics", "nowhere"), "holds no statistics.json"),
        (("--method", "awq", "--statistics", "nowhere"), "statistics alone do not do"),
    ],
    ids=lambda value: "-".join(map(str, value[-2:])) if isinstance(value, tuple) else "",
)
def test_options(arguments: tuple[object, ...], words: str, root: Path, tmp_path: Path) -> None:
    given = [root / a if a == "texts.jsonl" else a for a in arguments]
    assert words in fails(tmp_path, "quantize", root / "model", *given, "-q", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no tokens"),
        ("\n\n", "holds no tokens"),
        ("hello", "line 1: is not JSON"),
        ('{"texts": "a"}', "Did you mean text?"),
        ('{"text": null}', "text must be text"),
        ('[{"text": "a"}]', "is a list of samples"),
        ('{"input_ids": [1, 99999]}', "the model knows 400"),
        ('{"input_ids": [1, 99999999999999999999]}', "below 2³¹"),
        ('{"input_ids": [1, -1]}', "not negative"),
        (json.dumps({"input_ids": [5] * 100}), "has 64 positions; give --length 64"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
    ids=range(12),
)
def test_data(text: str | bytes, words: str, root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ("quantize", root / "model", "--method", "gptq", "--group-size", 32, "--data", data, "-q")
    assert words in fails(tmp_path, *arguments, "-o", tmp_path / "out")


def test_data_that_is_shorter_than_asked(root: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"input_ids": [5, 6, 7]}')
    with pytest.warns(UserWarning, match="too few rows of the data reached them"):
        run(
            "quantize", root / "model", "--method", "gptq", "--group-size", 32, "--data", tmp_path / "data.jsonl", "-q",
            "-o", tmp_path / "out",
        )  # fmt: skip


def test_batches_in_python(root: Path, tmp_path: Path) -> None:
    for batch, words in (
        ({"input_ids": torch.tensor([[5, 99999]])}, "within the model's vocabulary"),
        (torch.tensor([5, 6, 7]), "cannot be called with batch 0"),
        ({"text": "a"}, "cannot be called with batch 0"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "cannot be called with batch 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            quantize_model(root / "model", tmp_path / "out", GPTQ(group_size=32), [batch])
    with pytest.raises(RecipeError, match="no calibration batches"):
        quantize_model(root / "model", tmp_path / "out", GPTQ(group_size=32), [])
    with pytest.raises(RecipeError, match="gram are statistics of data"):
        quantize_model(root / "model", tmp_path / "out", GPTQ(group_size=32))
    assert not list(tmp_path.iterdir())


def truncated(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def hostile(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def missing(folder: Path) -> None:
    change(folder, lambda t: t.pop(f"{LAYER}.weight"))


def other_shape(folder: Path) -> None:
    change(folder, lambda t: t.__setitem__(f"{LAYER}.weight", torch.zeros(3, 3)))


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGE = {
    truncated: "truncated", hostile: "claims", missing: f"no tensor for {LAYER}.weight of Llama",
    other_shape: r"\[3, 3\] in the file and \[64, 32\] by config", unknown_architecture: "model_type 'lama'", no_config: "config.json",
}  # fmt: skip


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_model(damage: Callable[[Path], None], data: bool, model: Path, tmp_path: Path) -> None:
    damage(model)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        quantize_model(model, tmp_path / "out", GPTQ(group_size=32) if data else GRID, BATCHES if data else None)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "config", [GRID, GPTQ(group_size=32), FlexRound(group_size=32, steps=2)], ids=["rtn", "gptq", "flex"]
)
def test_damaged_weights(config: Any, value: float, model: Path, tmp_path: Path) -> None:
    change(model, lambda t: t[f"{LAYER}.weight"].__setitem__((0, 0), value))
    data, out = None if config is GRID else BATCHES, tmp_path / "out"
    with pytest.raises(
        NonFiniteError, match=rf"{LAYER} holds NaN.*finished blocks are kept.*skip_errors=True".replace("f", "[fF]", 1)
    ):
        quantize_model(model, out, config, data)
    assert not out.exists()
    with pytest.warns(UserWarning, match="layers are left as they are"):
        quantize_model(model, out, config, data, skip_errors=True)
    layers = json.loads((out / "weft.json").read_text())["layers"]
    assert "NaN" in layers[LAYER]["failed"]
    assert all("failed" not in notes for name, notes in layers.items() if ".0." in name)
    with weft.open(model) as before, weft.open(out) as after:
        assert torch.equal(
            before[f"{LAYER}.weight"].torch().nan_to_num(), after[f"{LAYER}.weight"].torch().nan_to_num()
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_norm_that_is_not_finite(model: Path, tmp_path: Path) -> None:
    change(model, lambda t: t["model.layers.0.input_layernorm.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"layers\.0\.input_layernorm\.weight holds NaN"):
        quantize_model(model, tmp_path / "out", GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_overflow_in_half_precision(model: Path, tmp_path: Path) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            factor = 20000 if "up_proj" in name or "down_proj" in name else 1
            tensors[name] = (tensors[name] * factor).half()

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    change(model, large)
    with pytest.raises(NonFiniteError, match=r"layers\..*half precision overflows"):
        quantize_model(model, tmp_path / "out", GPTQ(group_size=32), BATCHES, autocast=False)
    assert not (tmp_path / "out").exists()


def test_outputs(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    for target, force, words in (
        (model, False, "is, or contains, the model"),
        (model, True, "is, or contains, the model"),
        (tmp_path, True, "is, or contains, the model"),
        (model / "config.json", False, "exists already"),
        (model / "config.json", True, "not made by weft"),
        (model / "config.json" / "out", False, "cannot be written"),
        (Path("/proc/out"), False, "cannot be written"),
    ):
        with pytest.raises(OutputError, match=words):
            quantize_model(model, target, GRID, force=force)
        assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    other = WorkFolder(out)
    other.acquire()
    with pytest.raises(OutputError, match="another run is writing"):
        quantize_model(model, out, GRID)
    other.remove()
    quantize_model(model, out, GRID)
    with pytest.raises(OutputError, match="exists already"):
        quantize_model(model, out, GRID)
    quantize_model(model, out, RTN(bits=8, group_size=32), force=True)
    assert json.loads((out / "weft.json").read_text())["recipe"]["bits"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def interrupted(model: Path, out: Path, config: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Stop a run before its last part."""
    from weft.calibrate.parts import Parts

    plain = Parts.put

    def put(parts: Parts, number: int, part: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        plain(parts, number, part)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", put)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, out, config, **options)


def test_what_is_unfinished_is_not_discarded_unasked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # a recipe in words may say less than the configuration
    interrupted(model, out, {"*": GRID, "lm_head": RTN(8, 32)}, monkeypatch, recipe={"a": "b"}, format="weft")
    part = tmp_path / "out.partial" / "parts" / "0000.safetensors"
    before = part.read_bytes()
    with pytest.raises(OutputError, match="unfinished run with other options"):
        quantize_model(model, out, {"*": GRID, "lm_head": RTN(4, 32)}, recipe={"a": "b"}, format="weft")
    assert part.read_bytes() == before
    quantize_model(model, out, {"*": GRID, "lm_head": RTN(4, 32)}, recipe={"a": "b"}, format="weft", force=True)
    assert json.loads((out / "weft.json").read_text())["layers"]["lm_head"]["bits"] < 6


def test_a_replaced_output_is_restored_after_a_kill(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantize_model(model, tmp_path / "out", GRID)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    plain = os.rename

    def rename(source: Any, target: Any) -> None:
        plain(source, target)
        if Path(target).name == "replaced":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, out, RTN(8, 32), force=True)
    assert not out.exists()
    with pytest.raises(OutputError, match="unfinished run"):
        quantize_model(model, out, RTN(2, 32))
    work = WorkFolder(out)
    work.acquire()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    work.remove()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, or a skip where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free", [20_000, 90_000, 150_000])
def test_a_disk_that_is_full(free: int, root: Path, small_disk: Path, tmp_path: Path) -> None:
    filler, out = small_disk / "filler", small_disk / "out"
    filler.write_bytes(bytes(300 * 1024 - free - 8192))
    with pytest.raises(OutputError, match=r"disk/out\.partial/.*no room for .* \(No space left on device; .* free\)"):
        quantize_model(root / "model", out, GPTQ(bits=8, group_size=32), BATCHES)
    assert not out.exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    quantize_model(root / "model", out, GPTQ(bits=8, group_size=32), BATCHES)
    whole = quantize_model(root / "model", tmp_path / "whole", GPTQ(bits=8, group_size=32), BATCHES)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert [p.name for p in small_disk.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def statistics(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    collect(root / "model", BATCHES, "gram,scales,mean,range,percentiles", output=folder / "all")
    collect(root / "model", BATCHES, "mean", output=folder / "few")
    return folder


def quantisers() -> list[str]:
    return [name for name, row in methods().items() if row.family == "quantize"]


@pytest.mark.parametrize("name", quantisers())
def test_saved_statistics(name: str, root: Path, statistics: Path, tmp_path: Path) -> None:
    """Every method works with statistics alone, or says what else it needs."""
    row = methods()[name]
    config: Any = row.configure({k: 32 for k in ("group_size",) if k in row.parameters})
    if config.runs_blocks():
        with pytest.raises(RecipeError, match=r"statistics alone do not do\. Give batches"):
            quantize_model(root / "model", tmp_path / "out", config, statistics=statistics / "all", format="weft")
        assert not list(tmp_path.iterdir())
        return
    quantize_model(root / "model", tmp_path / "out", config, statistics=statistics / "all", format="weft")
    assert len(json.loads((tmp_path / "out" / "weft.json").read_text())["layers"]) == 14
    if config.needs:
        with pytest.raises(RecipeError, match=r"was not gathered; there are mean\. Gather .*(gram|scales) among them"):
            quantize_model(root / "model", tmp_path / "few", config, statistics=statistics / "few", format="weft")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damaged_statistics(model: Path, statistics: Path, tmp_path: Path) -> None:
    def attempt(words: str, edit: Callable[[Path], Any]) -> None:
        folder = Path(shutil.copytree(statistics / "all", tmp_path / "statistics"))
        edit(folder)
        with pytest.raises(WeftError, match=words):
            quantize_model(model, tmp_path / "out", GPTQ(group_size=32), statistics=folder)
        shutil.rmtree(folder)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    attempt("truncated", lambda f: cut(f / "block-00001.safetensors"))
    attempt("missing", lambda f: (f / "block-00001.safetensors").unlink())
    attempt("JSON", lambda f: cut(f / "statistics.json"))
    attempt("no file of statistics", lambda f: (f / "statistics.json").write_text("{}"))

    def not_finite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "block-00000.safetensors")
        save_file(
            {n: t * float("nan") if n.endswith("gram") else t for n, t in tensors.items()},
            folder / "block-00000.safetensors",
        )

    attempt("finite, symmetric.*gather them again", not_finite)
    change(model, lambda t: t[f"{LAYER}.weight"].add_(1))
    attempt("of another model", lambda f: None)


def test_two_processes_at_once(root: Path, tmp_path: Path, weft_command: Callable[..., Any]) -> None:
    other = WorkFolder(tmp_path / "out")
    other.acquire()
    done = weft_command("quantize", root / "model", *PLAIN, "--json", "-o", tmp_path / "out")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "another run is writing this output" in json.loads(done.stdout)["message"]
    other.remove()
    assert not list(tmp_path.iterdir())
