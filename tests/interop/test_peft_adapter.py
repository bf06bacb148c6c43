"""Adapters against PEFT: the same merged weights, and the outputs of the adapted model where PEFT's merge loses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import TOLERANCE, Small, gpt2, llama, saved, state, train

import weft
from weft.checkpoint.checkpoint import Checkpoint

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::DeprecationWarning", "ignore::UserWarning")


def assert_same(ours: Checkpoint, theirs: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    for name, expected in theirs.items():
        if name not in ours:
            assert ours.config["tie_word_embeddings"] is not False, name
            continue
        actual, wanted = ours[name].numpy(), expected.float().numpy()
        assert np.abs(actual - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max()), name
    assert set(ours) <= set(theirs)


ATTENTION = ["q_proj", "v_proj", "down_proj"]
LLAMA_CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "dora with rslora": {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {r"^model.layers.0.self_attn.v_proj": 11, "layers.[0-9].self_attn.q_proj": 2},
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding with dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    "biases": {"target_modules": ATTENTION[:2], "bias": "all"},
    "bias of the adapter": {"target_modules": ATTENTION[:2], "lora_bias": True},
    "replaced rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 0, 36]},
    "replaced rows by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_adapters_equal_merge_and_unload(case: str, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    train(llama(), tmp_path / "adapter", **LLAMA_CASES[case])
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    with weft.open(f"{base}+{tmp_path / 'adapter'}") as ours:
        assert_same(ours, state(merged))
        assert ours.name == "base+adapter"
        changed = [n for n in ours if not np.array_equal(ours[n].numpy(), weft.open(base)[n].numpy())]
        assert changed, "the adapter changes something, or the comparison proves nothing"


MISS_CASES: dict[str, dict[str, Any]] = {
    "shards": {"r": 5},
    "shards that divide": {"r": 4},
    "mini": {"r": 4, "mini_r": 8, "init_weights": "mini"},
    "bat": {"r": 8, "init_weights": "bat"},
    "saved modules": {"r": 4, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", MISS_CASES)
def test_miss_equals_merge_and_unload(case: str, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    modules = ["q_proj", "up_proj", "down_proj"]
    adapted = train(llama(), tmp_path / "adapter", kind=peft.MissConfig, target_modules=modules, **MISS_CASES[case])
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    with weft.open(f"{base}+{tmp_path / 'adapter'}") as ours:
        assert_same(ours, state(merged))
        rebuilt = llama()
        rebuilt.load_state_dict({name: tensor.torch() for name, tensor in ours.items()})
        with torch.no_grad():
            actual = rebuilt(ids).logits
    assert (actual - expected).abs().max() <= 16 * TOLERANCE * max(1.0, expected.abs().max().item())
    half = weft.checkpoint.adapter.with_adapter(weft.open(base), weft.open(tmp_path / "adapter"), 0.5)
    for name, before in weft.open(base).items():
        goal = before.numpy() + 0.5 * (ours_of(base, tmp_path / "adapter", name) - before.numpy())
        assert np.abs(half[name].numpy() - goal).max() <= 2 * TOLERANCE * max(1.0, np.abs(goal).max()), name


def ours_of(base: Path, adapter: Path, name: str) -> np.ndarray:
    with weft.open(f"{base}+{adapter}") as opened:
        return opened[name].numpy()


@pytest.mark.parametrize("case", ["patterns", "saved modules", "replaced rows", "biases", "bias of the adapter"])
def test_weights_of_an_adapter_go_part_of_the_way(case: str, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    train(llama(), tmp_path / "adapter", **LLAMA_CASES[case])
    part = weft.checkpoint.adapter.with_adapter(weft.open(base), weft.open(tmp_path / "adapter"), -0.25)
    moved = 0
    for name, before in weft.open(base).items():
        goal = before.numpy() - 0.25 * (ours_of(base, tmp_path / "adapter", name) - before.numpy())
        assert np.abs(part[name].numpy() - goal).max() <= 2 * TOLERANCE * max(1.0, np.abs(goal).max()), name
        moved += not np.array_equal(goal, before.numpy())
    assert moved


def test_a_block_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = saved(llama(hidden_size=8, num_attention_heads=2), tmp_path / "base")
    train(llama(), tmp_path / "a", kind=peft.MissConfig, target_modules=["q_proj"], r=4)
    with pytest.raises(weft.WeftError, match="does not fit the base"):
        weft.open(f"{base}+{tmp_path / 'a'}")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(weft.WeftError, match="configuration says shards of rank 3"):
        weft.open(f"{base}+{tmp_path / 'a'}")


GPT2_CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "flag not set": {"target_modules": ["c_attn", "c_proj"]},
    "dora": {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    "biases": {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    "positions": {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", GPT2_CASES)
def test_gpt2_adapters_equal_merge_and_unload(case: str, tmp_path: Path) -> None:
    base = saved(gpt2(), tmp_path / "base")
    train(gpt2(), tmp_path / "adapter", **GPT2_CASES[case])
    merged = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").merge_and_unload()
    with weft.open(f"{base}+{tmp_path / 'adapter'}") as ours:
        assert_same(ours, state(merged))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_convolutions_and_tables(settings: dict[str, Any], tmp_path: Path) -> None:
    train(Small(), tmp_path, target_modules=["conv", "point", "line", "table", "fc"], **settings)
    merged = peft.PeftModel.from_pretrained(Small(), tmp_path).merge_and_unload()
    ours = weft.checkpoint.adapter.with_adapter(weft.open(Small().state_dict()), weft.open(tmp_path))
    theirs = state(merged)
    assert set(ours) == set(theirs)
    assert_same(ours, theirs)


TIED = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("explicit", [False, True], ids=["head left out", "head an alias"])
def test_tied_models_compute_what_the_adapted_model_computes(case: str, explicit: bool, tmp_path: Path) -> None:
    """PEFT's merge is no oracle here: with one of two tied tensors adapted it changes both."""
    model = llama(tie_word_embeddings=True)
    saved(model, tmp_path / "base")
    adapted = train(llama(tie_word_embeddings=True), tmp_path / "adapter", **TIED[case])
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
    base = weft.open(tmp_path / "base")
    if explicit:
        config = base.config
        base = weft.open(model.state_dict())
        base.config = config
        assert base.aliases
    ours = weft.checkpoint.adapter.with_adapter(base, weft.open(tmp_path / "adapter"))
    rebuilt = llama(tie_word_embeddings=ours.config["tie_word_embeddings"])
    tensors = {name: tensor.torch() for name, tensor in ours.items()}
    missing, unexpected = rebuilt.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    assert not missing or ours.config["tie_word_embeddings"]
    with torch.no_grad():
        actual = rebuilt.eval()(ids).logits
    # logits are sums over 16 channels of values that are off by TOLERANCE each
    assert (actual - expected).abs().max() <= 16 * TOLERANCE * max(1.0, expected.abs().max().item())
    untied = case in ("embedding", "head", "saved embedding", "saved head", "both")
    assert ours.config["tie_word_embeddings"] is not untied


def test_two_adapters_one_on_the_other(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    for number in (1, 2):
        train(llama(), tmp_path / f"a+{number}", target_modules=ATTENTION, lora_alpha=number, seed=number)
    model = llama()
    for number in (1, 2):
        model = peft.PeftModel.from_pretrained(model, tmp_path / f"a+{number}").merge_and_unload()
    with weft.open(f"{base}+{tmp_path / 'a+1'}+{tmp_path / 'a+2'}") as ours:
        assert_same(ours, state(model), 2 * TOLERANCE)
        assert ours.name == "base+a+1+a+2"


def test_half_precision_bases_keep_their_dtype_and_are_summed_in_float32(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    train(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    merged = peft.PeftModel.from_pretrained(model.float(), tmp_path / "adapter").merge_and_unload()
    with weft.open(f"{base}+{tmp_path / 'adapter'}") as ours:
        assert_same(ours, state(merged))
        name = "model.layers.0.self_attn.q_proj.weight"
        assert (ours[name].dtype.name, ours[name].natural_dtype.name) == ("F32", "BF16")
        assert ours["model.norm.weight"].dtype.name == "BF16"


@pytest.mark.parametrize("rename", [("transformer.", ""), ("transformer.", "model.gpt."), ("", "wrapped.")])
def test_other_prefixes_are_found(rename: tuple[str, str], tmp_path: Path) -> None:
    train(gpt2(), tmp_path, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    merged = peft.PeftModel.from_pretrained(gpt2(), tmp_path).merge_and_unload()
    strip, add = rename
    base = {add + k.removeprefix(strip): v for k, v in gpt2().state_dict().items() if k != "lm_head.weight"}
    ours = weft.checkpoint.adapter.with_adapter(weft.open(base), weft.open(tmp_path))
    theirs = {add + k.removeprefix(strip): v for k, v in state(merged).items() if k != "lm_head.weight"}
    assert set(ours) == set(theirs)
    assert_same(ours, theirs)


def test_bin_files(tmp_path: Path) -> None:
    adapted = train(llama(), tmp_path, target_modules=["q_proj"])
    expected = weft.checkpoint.adapter.with_adapter(weft.open(llama().state_dict()), weft.open(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    adapted.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    ours = weft.checkpoint.adapter.with_adapter(weft.open(llama().state_dict()), weft.open(tmp_path))
    for name in expected:
        assert np.array_equal(ours[name].numpy(), expected[name].numpy()), name


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_are_refused(kind: str, tmp_path: Path) -> None:
    train(llama(), tmp_path, target_modules=["q_proj"], init_lora_weights=kind)
    with pytest.raises(weft.WeftError, match=rf"{kind}.*path_initial_model_for_weight_conversion"):
        weft.open(tmp_path)


@pytest.mark.parametrize("config", [{"peft_type": k.value} for k in peft.PeftType if k.value not in ("LORA", "MISS")])
def test_every_other_type_is_refused_by_name(config: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(weft.WeftError, match=f"adapter of the type {config['peft_type']};"):
        weft.open(tmp_path)
