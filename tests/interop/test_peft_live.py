"""Live adapters against PEFT: folders go both ways with the outputs that they had, on the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import TOLERANCE, bert_classifier, gpt2, llama, train
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from weft.adapt import EVA, Bone, LoRA, MixtureOfShards, SVFit, Whole, adapters, load_adapter_, save_adapter
from weft.errors import CheckpointError, RecipeError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::DeprecationWarning", "ignore::UserWarning")
IDS = torch.tensor([[3, 0, 36, 7, 5, 5, 11]])
TEXT = list(torch.randint(0, 37, (4, 8, 7), generator=torch.Generator().manual_seed(0)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # logits are sums over 16 channels of values that are off by TOLERANCE each
    assert (ours - theirs).abs().max() <= 16 * TOLERANCE * max(1.0, theirs.abs().max().item())


def shaken(model: Any, seed: int = 1) -> Any:
    """The same model with everything that trains moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


PARTS = ("lora_", "miss_block", "modules_to_save", "token_adapter")


def loaded_by_peft(base: Any, folder: Path) -> Any:
    """PEFT's model, after it found every tensor that it expects and no other."""
    model = peft.PeftModel.from_pretrained(base, folder)
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys
    missing = [k for k in result.missing_keys if any(part in k for part in PARTS) and "base_layer" not in k]
    assert not [k for k in missing if "lm_head.token_adapter" not in k], missing  # a tied head's are the embedding's
    return model


ATTENTION = ["q_proj", "v_proj", "down_proj"]
FROM_PEFT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ATTENTION}),
    "rslora": (llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "more rank than a matrix has": (llama, {"target_modules": ATTENTION, "r": 20}),
    "patterns": (
        llama,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {r"^model.layers.0.self_attn.v_proj": 11, "layers.[0-9].self_attn.q_proj": 2},
        },
    ),
    "patterns, rslora": (llama, {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 5}, "use_rslora": True}),
    "expression": (llama, {"target_modules": r".*layers\.1.*(q_proj|up_proj)"}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "saved modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "saved block": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "biases": (llama, {"target_modules": ATTENTION[:2], "bias": "all"}),
    "rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 0, 36]}),
    "rows by name": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "miss": (llama, {"kind": peft.MissConfig, "r": 5, "target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "mini miss": (
        llama,
        {"kind": peft.MissConfig, "r": 4, "mini_r": 8, "init_weights": "mini", "target_modules": ATTENTION},
    ),
    "bat": (llama, {"kind": peft.MissConfig, "r": 8, "init_weights": "bat", "target_modules": ATTENTION}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, positions": (gpt2, {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_peft_to_weft_to_peft(case: str, tmp_path: Path) -> None:
    make, settings = FROM_PEFT[case]
    theirs = train(make(), tmp_path / "a", **settings)
    ours = make()
    before = logits(ours)
    report = load_adapter_(ours, tmp_path / "a", name="mine")
    assert len(report.loaded) == len(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert_near(logits(ours), logits(theirs))
    assert (logits(ours) - before).abs().max() > 1e-2  # not too small to matter
    back = save_adapter(ours, tmp_path / "b", "mine", form="auto" if case != "biases" else "weft")
    again = make()
    load_adapter_(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(ours))
    if case == "biases":  # PEFT saves a layer's bias beside its factors, and only by its own flag
        return
    assert back.form == "peft", back.why
    assert_near(logits(loaded_by_peft(make(), tmp_path / "b")), logits(theirs))
    # the factors themselves have gone through unchanged
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert {k for k in first if "base_layer" not in k} == set(second)
    assert all(torch.equal(v, first[k]) for k, v in second.items())


TO_PEFT: dict[str, tuple[Callable[..., Any], Callable[[Any], Any], str]] = {
    "lora": (llama, lambda m: weft.adapt_(m, LoRA(rank=3, alpha=5), where=ATTENTION), "peft"),
    "rslora": (llama, lambda m: weft.adapt_(m, LoRA(rank=3, rslora=True, dropout=0.1), where="all-linear"), "peft"),
    "patterns": (
        llama,
        lambda m: weft.adapt_(
            m, {"q_proj": LoRA(rank=3, alpha=5), "layers.1.mlp.up_proj": LoRA(rank=2, alpha=7), "v_proj": LoRA(rank=3, alpha=1)},
            where="*",
        ),
        "peft",
    ),
    "embedding and head": (llama, lambda m: weft.adapt_(m, LoRA(rank=3), where=["embed_tokens", "lm_head"]), "peft"),
    "heads, norms, rows": (
        llama,
        lambda m: weft.adapt_(m, LoRA(rank=3), where="q_proj", modules_to_save=["lm_head", "norm"], token_rows=[1, 30]),
        "peft",
    ),
    "whole copies only": (llama, lambda m: weft.adapt_(m, Whole(), where="lm_head"), "peft"),
    "gpt2": (gpt2, lambda m: weft.adapt_(m, LoRA(rank=3), where=["c_attn", "c_fc", "wpe"]), "peft"),
    "gpt2, tied rows": (gpt2, lambda m: weft.adapt_(m, LoRA(rank=3), where="c_attn", token_rows=[5, 7]), "peft"),
    "classifier": (bert_classifier, lambda m: weft.adapt_(m, LoRA(rank=3), where=["query", "dense"]), "peft"),
    "classifier, trained": (
        bert_classifier, lambda m: weft.adapt_(m, LoRA(rank=3), where="query", modules_to_save="classifier"), "peft"
    ),
    "eva, ranks by layer": (
        llama,
        lambda m: weft.adapt_(m, EVA(rank=3, rho=2.0), where="all-linear", data=TEXT),
        "peft",
    ),
    "eva, scaled by layer": (
        llama,
        lambda m: weft.adapt_(m, EVA(rank=3, adjust_alpha=False), where=ATTENTION, data=TEXT),
        "peft",
    ),
    "miss": (
        llama, lambda m: weft.adapt_(m, Bone(rank=5, dropout=0.1), where="all-linear", modules_to_save="norm"), "peft"
    ),
    "mini miss": (llama, lambda m: weft.adapt_(m, Bone(rank=5, mini_rank=4), where=ATTENTION), "peft"),
    "bat": (llama, lambda m: weft.adapt_(m, Bone(rank=8, form="block_affine"), where=ATTENTION), "peft"),
    "miss as lora": (
        llama, lambda m: weft.adapt_(m, {"q_proj": Bone(rank=5), "v_proj": Bone(rank=3, mini_rank=4)}, "*"), "lora"
    ),
    "svfit as lora": (llama, lambda m: weft.adapt_(m, SVFit(rank=5), where=ATTENTION), "lora"),
    "mixture of shards as lora": (
        llama, lambda m: weft.adapt_(m, MixtureOfShards(budget_rank=2, rank=3), where=ATTENTION), "lora"
    ),
    "pissa as lora": (llama, lambda m: weft.adapt_(m, LoRA(rank=3, start="pissa"), where=ATTENTION), "lora"),
    "lora as lora": (llama, lambda m: weft.adapt_(m, {"q_proj": LoRA(rank=3, rslora=True), "v_proj": LoRA(rank=2)}), "lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", TO_PEFT)
def test_weft_to_peft_to_weft(case: str, tmp_path: Path) -> None:
    make, attach, form = TO_PEFT[case]
    ours = make()
    attach(ours)
    shaken(ours)
    report = save_adapter(ours, tmp_path / "a", form="lora" if form == "lora" else "auto", base="tiny")
    assert report.form == form, report.why
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    if case.startswith("eva"):
        assert config["rank_pattern"]
        assert bool(config["alpha_pattern"]) == ("ranks" in case)
    theirs = loaded_by_peft(make(), tmp_path / "a")
    assert_near(logits(theirs), logits(ours))
    assert (logits(make()) - logits(ours)).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path / "b")
    again = make()
    load_adapter_(again, tmp_path / "b", train=True)
    assert_near(logits(again), logits(ours))
    if form == "peft":
        assert adapters(again)["default"].parameters == adapters(ours)["default"].parameters


def test_convolutions_and_tables_go_both_ways(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 12)
            self.line = nn.Conv1d(3, 4, 3, padding=1)
            self.conv = nn.Conv2d(1, 5, (3, 2))
            self.fc = nn.Linear(30, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.line(self.table(tokens).reshape(len(tokens), 3, 4))
            return self.fc(self.conv(x[:, None]).flatten(1))

    tokens = torch.arange(8)
    ours = Mixed().eval()
    weft.adapt_(ours, LoRA(rank=2, alpha=3), where=["table", "line", "conv", "fc"])
    shaken(ours)
    assert save_adapter(ours, tmp_path / "a").form == "peft"
    theirs = loaded_by_peft(Mixed(), tmp_path / "a").eval()
    expected = ours(tokens).detach()
    torch.testing.assert_close(theirs(tokens), expected)
    theirs.save_pretrained(tmp_path / "b")
    again = Mixed().eval()
    load_adapter_(again, tmp_path / "b")
    assert torch.equal(again(tokens), expected)


def test_pissa_starts_where_pefts_does(tmp_path: Path) -> None:
    ours = llama()
    weft.adapt_(ours, LoRA(rank=3, alpha=6, start="pissa"), where="q_proj")
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj"])
    theirs = peft.get_peft_model(llama(), config)
    name = "model.layers.1.self_attn.q_proj"
    mine = ours.get_submodule(name).parametrizations.weight[0]
    other = theirs.base_model.model.get_submodule(name)
    product = other.lora_B["default"].weight @ other.lora_A["default"].weight
    torch.testing.assert_close(mine.B @ mine.A, product)
    assert_near(logits(ours), logits(theirs))
    # trained alike and converted by PEFT to twice the rank, on the untouched base: what weft's form "lora" says
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for module in (n for n, m in ours.named_modules() if n.endswith("q_proj")):
            mine = ours.get_submodule(module).parametrizations.weight[0]
            other = theirs.base_model.model.get_submodule(module)
            for ending, value in (("A", mine.A), ("B", mine.B)):
                move = torch.randn_like(value) * 0.1
                value += move
                layer = getattr(other, f"lora_{ending}")["default"].weight
                # singular vectors of both sides have the same sign or both the other
                layer.copy_(value)
    theirs.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = llama()
    report = load_adapter_(converted, tmp_path / "peft")
    assert adapters(converted)["default"].parameters == 2 * adapters(ours)["default"].parameters, report
    assert_near(logits(converted), logits(ours))


def test_forms_that_cannot_say_it_say_why(tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (LoRA(rank=2, start="pissa"), {"where": "q_proj"}, "start='pissa'"),
        (LoRA(rank=2), {"where": "q_proj", "tensor": "bias"}, ""),
        (Whole(), {"where": "q_proj"}, r"q_proj\.bias is not trained"),
        (
            {"q_proj": Bone(rank=4), "v_proj": LoRA(rank=2)},
            {"where": "*"},
            "one type, and this adapter is MISS and LORA",
        ),
        ({"q_proj": Bone(rank=4), "v_proj": Bone(rank=2)}, {"where": "*"}, "one configuration for all MiSS layers"),
        (Bone(rank=4), {"where": "embed_tokens"}, "PEFT's MISS of a layer such as model.embed_tokens"),
        (Bone(rank=4), {"where": "q_proj", "token_rows": [1]}, "beside LoRA only"),
    ]
    for number, (config, options, reason) in enumerate(cases):
        model = llama()
        if not reason:
            continue
        weft.adapt_(model, config, **options)
        with pytest.raises(RecipeError, match=reason):
            save_adapter(model, tmp_path / "x", form="peft")
        report = save_adapter(model, tmp_path / str(number))
        assert report.form == "weft"
        assert "PEFT" in report.why
        shaken(model)
    assert not (tmp_path / "x").exists()
    tied = llama(tie_word_embeddings=True)
    weft.adapt_(tied, LoRA(rank=2), where="embed_tokens")
    with pytest.raises(RecipeError, match="one tensor, which PEFT would take apart"):
        save_adapter(tied, tmp_path / "x", form="peft")
    train(llama(tie_word_embeddings=True), tmp_path / "tied", target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="Untie them first"):
        load_adapter_(llama(tie_word_embeddings=True), tmp_path / "tied")


def edit(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v.clone().contiguous() for k, v in change(load_file(path)).items()}, path)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "nothing": (lambda t: {}, "holds no tensors"),
    "empty": (lambda t: {k: v[:0] for k, v in t.items()}, "saved before a distributed run"),
    "half": (lambda t: {k: v for k, v in t.items() if "layers.0" not in k}, r"chooses '.*layers\.0.*missing"),
    "partner": (lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_A" not in k}, "lora_A"),
    "rank": (lambda t: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in t.items()}, "configuration says rank 3"),
    "place": (lambda t: {k.replace("q_proj", "q_porj"): v for k, v in t.items()}, "Did you mean model.layers.0.self_attn.q_proj"),
    "two": (lambda t: t | {k.replace("lora_A.w", "lora_A.x.w").replace("lora_B.w", "lora_B.x.w"): v for k, v in t.items()}, "several"),
    "width": (lambda t: {k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in t.items()}, "trained on another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(case: str, tmp_path: Path) -> None:
    change, reason = DAMAGE[case]
    train(llama(), tmp_path / "a", target_modules=["q_proj"])
    edit(tmp_path / "a", change)
    model = llama()
    before = logits(model)
    with pytest.raises(CheckpointError, match=reason):
        load_adapter_(model, tmp_path / "a")
    assert not adapters(model)
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("add", ["", "model.", "base_model.model."])
@pytest.mark.parametrize("named", [False, True])
def test_names_with_and_without_prefixes(add: str, named: bool, tmp_path: Path) -> None:
    theirs = train(llama(), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for key, value in tensors.items():
            name = key.removeprefix("base_model.model.")
            if add != "base_model.model." and "lm_head" not in name:
                name = add + name.removeprefix("model.")
            else:
                name = "base_model.model." * (add == "base_model.model.") + name
            if named:
                name = name.replace("lora_A.", "lora_A.task.").replace("lora_B.", "lora_B.task.")
                name = name.replace("lm_head.", "lm_head.modules_to_save.task.")
            made[name] = value
        return made

    edit(tmp_path / "a", change)
    ours = llama()
    load_adapter_(ours, tmp_path / "a")
    assert_near(logits(ours), logits(theirs))


def test_dora_and_factors_of_biases_are_refused_with_what_reads_them(tmp_path: Path) -> None:
    for number, settings in enumerate(({"use_dora": True}, {"lora_bias": True})):
        train(llama(), tmp_path / str(number), target_modules=["q_proj"], **settings)
        with pytest.raises(CheckpointError, match="weft bake"):
            load_adapter_(llama(), tmp_path / str(number))


def test_half_precision_is_kept_or_widened(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    weft.adapt_(model, LoRA(rank=2, dtype="weight"), where="q_proj")
    shaken(model)
    save_adapter(model, tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for dtype, wanted in (("stored", torch.bfloat16), ("float32", torch.float32)):
        again = llama().to(torch.bfloat16)
        load_adapter_(again, tmp_path / "a", dtype=dtype, train=True)
        assert {p.dtype for p in again.parameters() if p.requires_grad} == {wanted}
    assert load_adapter_(llama(), tmp_path / "a").base == "the same"  # float32 files of the same base
    # the base in another precision is the same base, a fine-tune is not
    tuned = llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 1e-2 * torch.randn_like(parameter))
    with pytest.raises(CheckpointError, match="another base: 2 of 2"):
        load_adapter_(tuned, tmp_path / "a")
    assert load_adapter_(tuned, tmp_path / "a", check_base=False).base == "not checked, as asked"
