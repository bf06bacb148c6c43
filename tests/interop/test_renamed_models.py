"""Adapters of models whose layers transformers renames when it loads them: names of the file, and of the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.adapt import LoRA, SVFit, load_adapter_, restore_adapter_, save_adapter
from weft.errors import CheckpointError
from weft.recipe.bake import bake

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::DeprecationWarning", "ignore::UserWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 37, "num_key_value_heads": 2}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
IDS = torch.tensor([[3, 30, 36, 7, 5, 5, 11]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    t = transformers
    made = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)),
        "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**IMAGE)),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**IMAGE))
        ),
        "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={**TEXT, "rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": None},
                vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
            )
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)),
    }
    return made[kind]().eval()


KINDS = {  # layers to adapt, whose names change on loading; what the model is given
    "vit": (["q_proj", "fc2", "classifier"], {"pixel_values": PIXELS}),
    "deit": (["v_proj", "fc1"], {"pixel_values": PIXELS}),
    "llava": (["q_proj", "down_proj"], {"input_ids": IDS}),
    "qwen2_vl": (["o_proj", "up_proj"], {"input_ids": IDS}),
    "mixtral": (["k_proj", "o_proj"], {"input_ids": IDS}),
}


def outputs(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**KINDS[kind][1]).logits


def shaken(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def reloaded(kind: str, folder: Path) -> Any:
    return type(model_of(kind)).from_pretrained(folder)


def file_names(kind: str, base: Path) -> dict[str, str]:
    """The file's name by the live model's, of tensors that are stored as they are."""
    from weft.checkpoint.live_names import live_names

    with weft.open(base) as files:
        names = live_names(files)
        assert names is not None
        return names.places(model_of(kind).state_dict(), files)


@pytest.mark.parametrize("kind", KINDS)
def test_baking_files_gives_the_outputs_of_pefts_merge(kind: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=KINDS[kind][0])
    theirs = shaken(peft.get_peft_model(model_of(kind), config))
    theirs.save_pretrained(tmp_path / "adapter")
    done = bake(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert done.probe["kind"] == "outputs"
    assert done.probe["change"] < 1e-5
    merged = outputs(theirs.merge_and_unload(), kind)
    plain = outputs(model_of(kind), kind)
    assert (merged - plain).abs().max() > 1e-3, "the adapter changes nothing"
    assert (outputs(reloaded(kind, tmp_path / "out"), kind) - merged).abs().max() < 1e-5
    with weft.open(tmp_path / "base") as before, weft.open(tmp_path / "out") as after:
        assert list(before) == list(after), "the baked model has other names than its base"
        with weft.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}") as both:
            assert all(torch.equal(both[n].torch(), t.torch()) for n, t in after.items())


@pytest.mark.parametrize("config", [LoRA(rank=2), SVFit(rank=2)], ids=["peft", "weft"])
@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_our_folders_bake_and_know_their_base(kind: str, config: Any, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "base")
    model = model_of(kind)
    weft.adapt_(model, config, where=KINDS[kind][0])
    save_adapter(shaken(model), tmp_path / "adapter")
    done = bake(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert all(known.startswith("the same (") for known in done.base.values())
    assert (outputs(reloaded(kind, tmp_path / "out"), kind) - outputs(model, kind)).abs().max() < 1e-5
    other = model_of(kind)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another base"):
        bake(tmp_path / "other", [(tmp_path / "adapter", 1.0)], tmp_path / "never")


@pytest.mark.parametrize("own", [False, True], ids=["peft", "weft"])
def test_an_adapter_with_the_files_names_loads_on_the_live_model(own: bool, tmp_path: Path) -> None:
    model_of("vit").save_pretrained(tmp_path / "base")
    model = model_of("vit")
    weft.adapt_(model, SVFit(rank=2) if own else LoRA(rank=2), where=["q_proj", "fc1"])
    save_adapter(shaken(model), tmp_path / "old")
    wanted = outputs(model, "vit")
    old = {
        n.removesuffix(".weight"): f.removesuffix(".weight") for n, f in file_names("vit", tmp_path / "base").items()
    }
    weights = tmp_path / "old" / ("adapter.safetensors" if own else "adapter_model.safetensors")

    def renamed(text: str) -> str:
        found = next((n for n in old if n in text), None)
        return text if found is None else text.replace(found, old[found])

    save_file({renamed(n): t for n, t in load_file(weights).items()}, weights)
    assert any("attention.attention.query" in n for n in load_file(weights))
    for name in ("weft.json", "weft_adapter.json"):
        path = tmp_path / "old" / name
        if path.is_file():
            said = json.loads(path.read_text())
            holder, key = (said["base"], "tensors") if "base" in said else (said, "weights")
            holder[key] = {renamed(n): v for n, v in holder[key].items()}
            path.write_text(json.dumps(said))
    if not own:
        config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
        config["target_modules"] = ["query", "intermediate.dense"]
        (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    fresh = model_of("vit")
    assert load_adapter_(fresh, tmp_path / "old").base == "the same"
    assert torch.equal(outputs(fresh, "vit"), wanted)
    start = model_of("vit")
    weft.adapt_(start, SVFit(rank=2) if own else LoRA(rank=2), where=["q_proj", "fc1"])
    restore_adapter_(start, tmp_path / "old")
    assert torch.equal(outputs(start, "vit"), wanted)
    done = bake(tmp_path / "base", [(tmp_path / "old", 1.0)], tmp_path / "out")
    assert done.probe["change"] < 1e-5


def test_a_tensor_that_is_made_from_several_is_refused_with_the_reason(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "base")
    model = model_of("mixtral")
    weft.adapt_(model, LoRA(rank=2), where=["q_proj"], modules_to_save=["experts"])
    save_adapter(shaken(model), tmp_path / "fused", form="weft")
    with pytest.raises(
        CheckpointError, match=r"experts\.\w+ of the model is made from .*block_sparse_moe.* weft\.save"
    ):
        bake(tmp_path / "base", [(tmp_path / "fused", 1.0)], tmp_path / "out")
    weft.save(model, tmp_path / "saved")
    assert (outputs(reloaded("mixtral", tmp_path / "saved"), "mixtral") - outputs(model, "mixtral")).abs().max() < 1e-5

    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2"
    (tmp_path / "old").mkdir()
    factors = {f"{name}.lora_A.weight": torch.ones(1, 24), f"{name}.lora_B.weight": torch.ones(16, 1)}
    save_file(factors, tmp_path / "old" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w2"]}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj of the model is made from .*experts\.1\.w2"):
        load_adapter_(model_of("mixtral"), tmp_path / "old")
    done = bake(tmp_path / "base", [(tmp_path / "old", 1.0)], tmp_path / "experts")  # in files it is a matrix
    assert done.probe["tensors"] == 1


def test_names_that_nothing_renames_are_still_refused(tmp_path: Path) -> None:
    model_of("vit").save_pretrained(tmp_path / "base")
    weft.adapt_(model := model_of("mixtral"), LoRA(rank=2), where=["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="the base has no tensor"):
        bake(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_adapters_merge_with_whole_tensors_of_a_renamed_base(tmp_path: Path) -> None:
    from weft.edit import merge_adapters

    model_of("vit").save_pretrained(tmp_path / "base")
    whole = []
    for number in range(2):
        model = model_of("vit")
        weft.adapt_(model, LoRA(rank=1), where="q_proj", modules_to_save="layernorm_after")
        torch.manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        save_adapter(model, tmp_path / f"a{number}")
        whole.append(model.vit.layers[1].layernorm_after.weight.detach().clone())
    both = [tmp_path / "a0", tmp_path / "a1"]
    merge_adapters(both, tmp_path / "sum", weights=[0.5, 0.25], base=tmp_path / "base")
    merged = model_of("vit")
    load_adapter_(merged, tmp_path / "sum")
    start = model_of("vit").vit.layers[1].layernorm_after.weight
    expected = 0.25 * start + 0.5 * whole[0] + 0.25 * whole[1]
    torch.testing.assert_close(merged.vit.layers[1].layernorm_after.weight, expected)
