"""Baking: what comes out is what the live model computed, the probe notices what is not, and nothing else is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.adapt import Bone, LoRA, SVFit, load_adapter_, save_adapter, switch_
from weft.checkpoint.checkpoint import Checkpoint
from weft.engine.run import Options
from weft.errors import CheckpointError, RecipeError, VerificationError
from weft.recipe.bake import bake, probe_text
from weft.recipe.probe import probe_products

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 0, 36, 7, 5]])


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 20,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).to(dtype).eval()


def adapted(
    folder: Path, config: Any, where: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    model = llama(dtype)
    weft.adapt_(model, config, where=where, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_adapter(model, folder)
    return model


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    adapted(tmp_path / "a", LoRA(rank=3), ["q_proj", "down_proj"], 1, modules_to_save=["norm"])
    adapted(tmp_path / "b", LoRA(rank=2, start="pissa"), ["q_proj", "up_proj"], 2)
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_baked_is_live(folders: Path) -> None:
    done = bake(folders / "base", [(folders / "a", 1.0), (folders / "b", -0.5)], folders / "out")
    live = llama()
    for name in "ab":
        load_adapter_(live, folders / name, name=name)
    switch_(live, {"a": 1.0, "b": -0.5})
    baked = transformers.LlamaForCausalLM.from_pretrained(folders / "out")
    torch.testing.assert_close(logits(baked), logits(live), rtol=1e-4, atol=1e-5)
    assert (logits(live) - logits(llama())).abs().max() > 0.1
    assert done.probe["kind"] == "outputs"
    assert done.probe["change"] < 1e-5
    assert done.probe["top1"] == 1.0
    assert set(done.base) == {"a", "b"}
    assert all(known.startswith("the same") for known in done.base.values())
    report = json.loads((folders / "out" / "weft.json").read_text())
    assert report["probe"] == done.probe
    assert report["adapters"] == [{"name": "a", "weight": 1.0}, {"name": "b", "weight": -0.5}]
    assert str(folders) not in (folders / "out" / "weft.json").read_text()


def test_half_precision_is_rounded_once_and_the_probe_says_how_much(folders: Path) -> None:
    done = bake(folders / "base", [(folders / "a", 1.0)], folders / "out", dtype="bfloat16")
    exact = bake(folders / "base", [(folders / "a", 1.0)], folders / "exact")
    with weft.open(folders / "out") as rounded, weft.open(folders / "exact") as whole:
        for name, tensor in whole.items():
            assert torch.equal(rounded[name].torch(), tensor.torch().to(torch.bfloat16))
    assert 1e-4 < done.probe["change"] < 0.1
    assert exact.probe["change"] < 1e-5
    limit = done.probe["change"] / 2
    with pytest.raises(VerificationError, match="nothing was published"):
        bake(folders / "base", [(folders / "a", 1.0)], folders / "no", dtype="bfloat16", max_change=limit)
    assert {p.name for p in folders.iterdir()} == {"base", "a", "b", "out", "exact"}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries may sum in another order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LoRA(rank=5, alpha=7), Bone(rank=4), SVFit(rank=3)], ids=["lora", "miss", "svfit"])
def test_files_get_the_bits_of_baking_in_memory(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    llama(dtype).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "a", config, ["q_proj", "down_proj"], dtype=dtype)
    bake(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", probe=False)
    weft.bake_(model)
    files = type(model).from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    assert all(torch.equal(files[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("form", ["outputs", "products"])
def test_the_probe_notices_a_wrong_result(form: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.checkpoint import computed

    right = computed.add_product

    def wrong(left: np.ndarray, factor: np.ndarray, scale: np.float32, out: np.ndarray) -> None:
        right(left, factor, scale * np.float32(1.1), out)

    monkeypatch.setattr(computed, "add_product", wrong)
    options = Options(memory=10**9 if form == "outputs" else 10**4)
    done = bake(folders / "base", [(folders / "a", 1.0)], folders / "out", options=options)
    assert done.probe["kind"] == form
    assert done.probe["change"] > 1e-3
    with pytest.raises(VerificationError):
        bake(folders / "base", [(folders / "a", 1.0)], folders / "no", options=options, max_change=1e-3)
    assert not (folders / "no").exists()


def test_a_model_of_encoder_and_decoder_is_probed_by_its_outputs(tmp_path: Path) -> None:
    sizes = {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "base")
    weft.adapt_(model, LoRA(rank=2), where=["q", "wo"])
    fill_b(model)
    save_adapter(model, tmp_path / "a")
    done = bake(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert done.probe["kind"] == "outputs"
    assert done.probe["change"] < 1e-5
    made = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        first, second = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, made))
    assert (first - second).abs().max() < 1e-5


def fill_b(model: Any) -> None:
    for several in weft.functions(model).values():
        torch.nn.init.normal_(several[0].B)


def test_where_outputs_cannot_be_compared_products_are(folders: Path) -> None:
    options = Options(memory=10**4)
    adapters: list[Any] = [(folders / "a", 1.0), (folders / "b", 0.3)]
    done = bake(folders / "base", adapters, folders / "out", options=options, dtype="bfloat16")
    assert "more than the budget" in done.probe["why_not_outputs"]
    assert done.probe["tensors"] == 7  # q, down and up of two layers, and the norm
    assert done.probe["by_value"] == 1
    assert 1e-4 < done.probe["change"] < 0.02
    assert "outputs were not compared" in probe_text(done.probe)
    exact = bake(folders / "base", adapters, folders / "x.safetensors", options=Options(memory=10**4))
    assert exact.probe["change"] < 1e-6
    # in float64 the reference is the formula itself
    with (
        weft.open(folders / "base") as base,
        weft.open(folders / "a") as a,
        weft.open(folders / "x.safetensors") as made,
    ):
        assert probe_products(base, [(a, 1.0)], made, seed=0)["change"] > 0.01  # without b


@pytest.mark.parametrize("case", ["dora", "miss", "bat", "rows"])
def test_what_peft_made_is_baked_and_probed(case: str, folders: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"]),
        "miss": peft.MissConfig(r=5, target_modules=["q_proj"]),
        "bat": peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj"]),
        "rows": peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 3]),
    }
    model = peft.get_peft_model(llama(), configs[case]).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folders / "p")
    done = bake(folders / "base", [(folders / "p", 1.0)], folders / "out")
    assert done.base["p"].startswith("not checked")
    assert done.probe["change"] < 1e-5
    baked = transformers.LlamaForCausalLM.from_pretrained(folders / "out")
    torch.testing.assert_close(logits(baked), logits(model), rtol=1e-4, atol=1e-5)


def test_another_base_is_refused_and_can_be_asked_for(folders: Path) -> None:
    bake(folders / "base", [(folders / "b", 1.0)], folders / "other", probe=False)
    with pytest.raises(CheckpointError, match=r"another base: 2 of 5 weights.*check_base=False"):
        bake(folders / "other", [(folders / "a", 1.0)], folders / "out")
    assert not (folders / "out").exists()
    done = bake(folders / "other", [(folders / "a", 1.0)], folders / "out", check_base=False)
    assert done.base["a"] == "not checked, as asked"


def test_an_interrupted_run_goes_on_and_is_probed(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.recipe import bake as module

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "probe_outputs", stop)
        with pytest.raises(KeyboardInterrupt):
            bake(folders / "base", [(folders / "a", 1.0)], folders / "out")
    assert not (folders / "out").exists()
    with pytest.raises(weft.WeftError, match="different recipe"):
        bake(folders / "base", [(folders / "a", 0.5)], folders / "out")
    done = bake(folders / "base", [(folders / "a", 1.0)], folders / "out")
    assert (done.tensors, done.resumed) == (0, 21)
    assert done.probe["change"] < 1e-5
    bake(folders / "base", [(folders / "a", 1.0)], folders / "again")
    files = [(folders / n / "model.safetensors").read_bytes() for n in ("out", "again")]
    assert files[0] == files[1]


def test_tied_tables_come_apart_with_a_note(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = peft.get_peft_model(llama(tie_word_embeddings=True), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    with pytest.warns(UserWarning, match="ensure_weight_tying|save_embedding_layers"):
        model.save_pretrained(tmp_path / "a")
    done = bake(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert any("one tensor and are two now" in note for note in done.notes)
    assert "Untie them first" in done.probe["why_not_outputs"]
    assert done.probe["change"] < 1e-6
    baked = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(baked), logits(model), rtol=1e-4, atol=1e-5)


def test_nan_and_overflow_are_not_published(folders: Path) -> None:
    huge = llama()
    weft.adapt_(huge, LoRA(rank=1), where="layers.0.self_attn.q_proj")
    with torch.no_grad():
        for parameter in huge.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e4)
    save_adapter(huge, folders / "huge")
    for options in (Options(), Options(memory=10**4)):
        with pytest.raises(VerificationError, match=r"NaN or infinity.*too large for the dtype"):
            bake(folders / "base", [(folders / "huge", 1.0)], folders / "out", dtype="float16", options=options)
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("adapters", "options", "reason"),
    [
        ([], {}, "at least one adapter"),
        ([("a", float("nan"))], {}, "finite number"),
        ([("base", 1.0)], {}, "is not an adapter"),
        ([("a", 1.0)], {"dtype": "int8"}, "choose one of"),
        ([("a", 1.0)], {"data": "none.jsonl"}, "cannot be read"),
    ],
)
def test_bad_requests(adapters: list[Any], options: dict[str, Any], reason: str, folders: Path) -> None:
    with pytest.raises(weft.WeftError, match=reason):
        bake(folders / "base", [(folders / a, w) for a, w in adapters], folders / "out", **options)
    with pytest.raises(weft.WeftError, match="input"):
        bake(folders / "base", [(folders / "a", 1.0)], folders / "a")
    assert not (folders / "out").exists()


def test_a_base_that_is_an_adapted_model(folders: Path) -> None:
    done = bake(f"{folders / 'base'}+{folders / 'a'}", [(folders / "b", 1.0)], folders / "out", check_base=False)
    assert "computed when it is read" in done.probe["why_not_outputs"]
    assert done.probe["change"] < 1e-6
    bake(folders / "base", [(folders / "a", 1.0), (folders / "b", 1.0)], folders / "both")
    with weft.open(folders / "out") as one, weft.open(folders / "both") as other:
        for name, tensor in one.items():
            assert torch.equal(tensor.torch(), other[name].torch())


def test_a_name_that_differs_is_said(folders: Path) -> None:
    (folders / "a" / "weft.json").unlink()
    config = json.loads((folders / "a" / "adapter_config.json").read_text())
    (folders / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    done = bake(folders / "base", [(folders / "a", 1.0)], folders / "out", probe=False)
    assert done.base["a"].endswith("names 'other'")


def test_texts(folders: Path) -> None:
    (folders / "bad.jsonl").write_text('"one"\n{"txt": "two"}\n')
    with pytest.raises(RecipeError, match="line 2 is neither"):
        bake(folders / "base", [(folders / "a", 1.0)], folders / "out", data=str(folders / "bad.jsonl"))
    words = {f"w{i}": i for i in range(36)} | {"[PAD]": 36}
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]").save_pretrained(folders / "base")
    (folders / "good.jsonl").write_text('"w1 w2 w3"\n{"text": "w9 w8"}\n')
    done = bake(folders / "base", [(folders / "a", 1.0)], folders / "out", data=str(folders / "good.jsonl"))
    assert (done.probe["kind"], done.probe["positions"], done.probe["on"]) == ("outputs", 5, "good.jsonl")
    assert done.probe["change"] < 1e-5


def test_an_open_checkpoint_stays_open(folders: Path) -> None:
    with weft.open(folders / "base") as base, weft.open(folders / "a") as a:
        bake(base, [(a, 1.0)], folders / "out", probe=False)
        assert isinstance(base, Checkpoint)
        assert base["model.norm.weight"].numpy().shape == (16,)
