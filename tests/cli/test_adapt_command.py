"""weft adapt, as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import weft
from weft.cli.adapt import forecast
from weft.cli.app import app
from weft.errors import CheckpointError, OutputError, RecipeError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["adapt", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_counts_without_an_output(folder: Path) -> None:
    text = run(folder, "--rank", 4, "--where", "q_proj", "--where", "v_proj").stdout
    count = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert text.startswith(f"trainable params: {count:,} || all params: ")
    assert "4 weights adapted" in text
    assert "with gradient checkpointing" in text
    facts = json.loads(run(folder, "--rank", 4, "--where", "q_proj", "--where", "v_proj", "--json").stdout)
    assert facts["trainable"] == count
    assert facts["memory"]["trained"] == 16 * count
    assert {p.name for p in folder.parent.iterdir()} == {"model"}


def test_the_folder_is_one_that_peft_trains(folder: Path, tmp_path: Path) -> None:
    text = run(folder, "--rank", 4, "--alpha", 8, "-o", tmp_path / "out").stdout
    assert "in the form peft" in text
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "out", is_trainable=True)
    assert model.peft_config["default"].r == 4
    trainable, total = model.get_nb_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in text


def test_a_recipe_with_several_methods(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "adapt.yaml"
    recipe.write_text(
        "adapt:\n- {where: '*.q_proj', method: miss, parameters: {rank: 4}}\n"
        "- {where: '*.up_proj', method: lora, parameters: {rank: 3}}\nmodules_to_save: [lm_head]\ntoken_rows: [5, 6]\n"
    )
    facts = json.loads(run(folder, "--recipe", recipe, "-o", tmp_path / "out", "--json").stdout)
    assert facts["form"] == "weft"
    assert facts["trainable"] == 2 * 4 * 32 + 2 * 3 * (32 + 48) + 64 * 32 + 2 * 32
    model = llama()
    loaded = weft.adapt.load_adapter_(model, tmp_path / "out", train=True)
    assert loaded.parameters == facts["trainable"]


def test_an_adapter_that_starts_from_data(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    with pytest.raises(RecipeError, match="data"):
        run(folder, "--method", "eva", "--rank", 2, "-o", tmp_path / "out")
    facts = json.loads(
        run(folder, "--method", "eva", "--rank", 2, "--data", data, "-o", tmp_path / "out", "--json").stdout
    )
    assert facts["form"] == "peft"
    peft.PeftModel.from_pretrained(llama(), tmp_path / "out")


def test_what_a_user_gets_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean --rank"):
        run(folder, "--rnk", 4)
    with pytest.raises(RecipeError, match="is not an adapter"):
        run(folder, "--method", "ties")
    with pytest.raises(RecipeError, match="Did you mean q_proj"):
        run(folder, "--where", "q_prj")
    with pytest.raises(RecipeError, match="one model"):
        run(folder, folder)
    weft.save(torch.nn.Linear(2, 2), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path / "plain")
    run(folder, "--rank", 2, "-o", tmp_path / "out")
    with pytest.raises(OutputError, match="force=True"):
        run(folder, "--rank", 2, "-o", tmp_path / "out")
    for text, message in (
        ("adapt: []", "needs a list"),
        ("adapt: [{where: a}]", "needs a method"),
        ("adapt: [{method: lora, were: a}]", "Did you mean where"),
        ("adapt: [{method: lora}]\nmodules_to_sav: a", "Did you mean modules_to_save"),
        ("adapt: [{method: lora}]\ntoken_rows: [a]", "token ids"),
        ("adapt: [", "YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            run(folder, "--recipe", tmp_path / "bad.yaml")
    with pytest.raises(RecipeError, match="leave --where"):
        run(folder, "--recipe", tmp_path / "bad.yaml", "--where", "a")


def test_the_forecast_is_what_a_pass_keeps() -> None:
    model = llama().train()
    weft.adapt_(model, weft.adapt.LoRA(rank=4))
    said = forecast(model, 2, 16)
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(input_ids=torch.zeros(2, 16, dtype=torch.long))
    measured = sum(s.nbytes() for s in kept.values())
    assert out is not None
    assert said["kept"] == pytest.approx(measured, rel=0.1)
    assert said["kept_with_checkpointing"] < said["kept"]
    assert said["weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(
        b.nbytes for b in model.buffers()
    )


def test_messages_name_the_option_and_adapters_only(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"--token-rows: '1,x'"):
        run(folder, "--token-rows", "1,x")
    with pytest.raises(RecipeError, match=r"galore is not an adapter\. (?!.*galore)"):
        run(folder, "--method", "galore")
