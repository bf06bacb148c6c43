"""Files and state dicts of models with functions."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import weft
from weft.adapt import LoRA
from weft.checkpoint.unbaked import refuse_unbaked
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.function.export import bake_on_save
from weft.normalize import SigmaReparam, WeightStandardization

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(autouse=True)
def _as_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever earlier tests attached: save_pretrained as it is before."""
    now = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", getattr(now, "weft_original", now))


def llama(tied: bool = True, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def with_functions(model: nn.Module, where: object = "*") -> nn.Module:
    weft.parametrize_(model, LoRA(rank=2), where=where)
    for function in (f for stack in weft.functions(model).values() for f in stack):
        nn.init.normal_(function.B, std=0.1)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def names_in(folder: Path) -> set[str]:
    return {n for file in folder.glob("*.safetensors") for n in load_file(file)}


def reloaded(folder: Path, **options: object) -> nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return model.eval()


# transformers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["weft.save", "save_pretrained"])
def test_a_saved_model_is_a_plain_one(tmp_path: Path, tied: bool, how: str) -> None:
    model = with_functions(llama(tied))
    before, state = logits(model), copy.deepcopy(model.state_dict())
    if how == "weft.save":
        weft.save(model, tmp_path, max_shard_size="10KB")
    else:
        model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not any("parametrizations" in n for n in names_in(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    back = reloaded(tmp_path)
    torch.testing.assert_close(logits(back), before)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is tied
    assert len(weft.functions(model)) == 16
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_a_part_with_functions_inside_a_model_that_knows_of_none(tmp_path: Path) -> None:
    model = llama(tied=False)
    with_functions(model.model.layers[0].self_attn, "q_proj")
    before = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded(tmp_path)), before)


def test_a_state_dict_given_by_a_trainer(tmp_path: Path) -> None:
    model = with_functions(llama())
    before = logits(model)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():  # the values of the given state count, not the model's
            value.zero_()
    model.save_pretrained(tmp_path / "keyword", state_dict=state)
    model.save_pretrained(tmp_path / "position", True, state)
    for folder in ("keyword", "position"):
        torch.testing.assert_close(logits(reloaded(tmp_path / folder)), before)


def test_a_state_dict_of_other_names_is_refused(tmp_path: Path) -> None:
    model = with_functions(llama())
    state = {f"wrapped.{n}": v for n, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"parametrizations\.weight\.original"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.glob("*.safetensors"))


def test_models_without_functions_are_saved_as_ever(tmp_path: Path) -> None:
    bake_on_save()
    original = transformers.PreTrainedModel.save_pretrained
    bake_on_save()
    assert transformers.PreTrainedModel.save_pretrained is original, "it was wrapped twice"
    model = llama()
    state = {n: v + 1 for n, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(reloaded(tmp_path).model.norm.weight, model.model.norm.weight + 1)


def test_after_baking(tmp_path: Path) -> None:
    model = with_functions(llama())
    before = logits(model)
    weft.bake_(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded(tmp_path)), before)


def test_experts_are_written_under_their_names_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    for name in ("gate_up_proj", "down_proj"):
        weft.parametrize_(model, LoRA(rank=2), where="experts", name=name)
    for stack in weft.functions(model).values():
        nn.init.normal_(stack[0].B, std=0.1)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names_in(tmp_path)
    torch.testing.assert_close(logits(reloaded(tmp_path)), before)


def test_bfloat16(tmp_path: Path) -> None:
    model = with_functions(llama().bfloat16())
    model.save_pretrained(tmp_path)
    with weft.open(tmp_path) as written:
        assert {t.dtype.name for t in written.values()} == {"BF16"}
    assert torch.equal(logits(reloaded(tmp_path, dtype=torch.bfloat16)), logits(weft_baked(model)))


def weft_baked(model: nn.Module) -> nn.Module:
    baked = copy.deepcopy(model)
    weft.bake_(baked)
    return baked


def test_a_model_from_a_pickle_is_saved_as_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_functions(llama())
    stored = pickle.dumps(model)
    # as in a new process, where nothing has been attached
    original = transformers.PreTrainedModel.save_pretrained.weft_original
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", original)
    pickle.loads(stored).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded(tmp_path)), logits(model))


# any module


def test_a_model_from_a_pickle_in_a_new_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    weft.parametrize_(model, SigmaReparam())
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pathlib, pickle, sys, torch\n"
        "model = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(model(torch.ones(4)).sum().item())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert float(out) == model.train()(torch.ones(4)).sum().item()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.also_empty = nn.Parameter(torch.empty(0, 4))


def test_any_module_is_saved_for_safetensors(tmp_path: Path) -> None:
    model = Tied()
    weft.parametrize_(model, WeightStandardization())
    weft.save(model, tmp_path / "new")
    assert names_in(tmp_path / "new") == {"also_empty", "embed.weight", "empty", "head.bias"}
    plain = Tied()
    assert load_model(plain, tmp_path / "new" / "model.safetensors") == (set(), [])
    assert torch.equal(plain.head.weight, model.head.weight)
    with pytest.raises(OutputError, match="exists already"):
        weft.save(model, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        weft.save(model, tmp_path / "file" / "inside")


def test_a_model_without_functions_has_its_own_state() -> None:
    model = nn.Linear(3, 2)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in weft.plain_state_dict(model).items())


def test_tied_names_share_one_tensor() -> None:
    model = Tied()
    weft.parametrize_(model, WeightStandardization())
    state = weft.plain_state_dict(model)
    assert state["embed.weight"] is state["head.weight"]
    assert not state["embed.weight"].requires_grad


# refusals


def test_parts_of_functions_are_no_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    weft.parametrize_(model, SigmaReparam())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt holds '0\.parametrizations\.weight\.original'.*weft\.save"):
        weft.open(tmp_path / "model.pt")
    recipe = {"steps": [{"method": "linear", "models": ["a", "b"]}]}
    with pytest.raises(CheckpointError, match="functions on its weights"):
        weft.run(recipe, tmp_path / "out", models={"a": model.state_dict(), "b": model.state_dict()})
    assert not (tmp_path / "out").exists()


def test_torchs_weight_norm_is_a_model() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with weft.open(layer.state_dict()) as opened:
        assert "parametrizations.weight.original0" in opened
    refuse_unbaked(["a.weight", "parametrizations_original", "my_parametrizations.weight.original"])


def test_loading_the_other_kind_of_state_dict_fails_loudly() -> None:
    model, plain = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    weft.parametrize_(model, LoRA(rank=1))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    for strict in (True, False):  # trainers tolerate missing names
        with pytest.raises(RuntimeError, match=r"0\.weight is computed by a weight function here.*Load it before"):
            model.load_state_dict(plain.state_dict(), strict=strict)
    model.load_state_dict({"0.bias": torch.ones(3)}, strict=False)
    assert torch.equal(model[0].bias, torch.ones(3))


def test_a_trainers_checkpoints_are_plain_models(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = with_functions(llama(), "all-linear")
    tokens = torch.randint(0, 11, (8, 6))
    options = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, learning_rate=0.1, gradient_checkpointing=True, **options)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    torch.testing.assert_close(logits(reloaded(tmp_path / "checkpoint-2")), logits(model.eval()))
    with pytest.raises(RuntimeError, match="is computed by a weight function here"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_computed_weight_says_how_to_set_it() -> None:
    model = nn.Linear(4, 3)
    weft.parametrize_(model, LoRA(rank=1))
    with pytest.raises(RecipeError, match=r"parametrizations\.weight\.original.*weft\.bake_"):
        model.weight = nn.Parameter(torch.zeros(3, 4))
