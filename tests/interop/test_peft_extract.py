"""Adapters that weft writes, loaded by PEFT: outputs equal the fine-tune's, sums equal the sum of the changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import TOLERANCE, gpt2, llama, saved, train

import weft
from weft.checkpoint.adapter import with_adapter
from weft.edit.extract_lora import extract_lora
from weft.edit.merge_adapters import merge_adapters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::DeprecationWarning", "ignore::UserWarning")
IDS = torch.arange(7)[None]


def tune(model: Any, changes: dict[str, int | None], seed: int = 1) -> Any:
    """Change the tensors whose names end so, by a matrix of the given rank, or freely (None)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for end, rank in changes.items():
                if name.endswith(end):
                    if rank is None:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    else:
                        rows, columns = parameter.shape
                        parameter.add_(torch.randn(rows, rank) @ torch.randn(rank, columns) * 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, int | None], dict[str, Any]]] = {
    "matrices": (llama, {}, {"q_proj.weight": 3, "down_proj.weight": 2}, {}),
    "everything": (llama, {}, {"": None}, {"rank": 16}),
    "energy": (llama, {}, {"q_proj.weight": 3, "v_proj.weight": 1}, {"min_energy": 1 - 1e-12, "rank": 16}),
    "alpha": (llama, {}, {"q_proj.weight": 3}, {"alpha": 7.0}),
    "alpha and energy": (llama, {}, {"q_proj.weight": 3, "v_proj.weight": 1}, {"min_energy": 0.999999, "alpha": 7.0}),
    "biases": (llama, {}, {"q_proj.weight": 3, "q_proj.bias": None, "k_proj.bias": None}, {}),
    "only norms": (llama, {}, {"norm.weight": None}, {}),
    "tied, embedding saved": (llama, {"tie_word_embeddings": True}, {"q_proj.weight": 3, "tokens.weight": None}, {}),
    "tied, embedding factored": (
        llama, {"tie_word_embeddings": True}, {"q_proj.weight": 3, "tokens.weight": 3}, {"embeddings": "factor"},
    ),
    "embedding factored": (llama, {}, {"tokens.weight": 4, "lm_head.weight": 2}, {"embeddings": "factor"}),
    "gpt2": (gpt2, {}, {"c_attn.weight": 3, "c_proj.weight": 2, "c_fc.weight": 4}, {}),
    "gpt2, everything": (gpt2, {}, {"": None}, {"rank": 16}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_on_the_base_is_the_fine_tune(case: str, tmp_path: Path) -> None:
    make, settings, changes, options = CASES[case]
    base, tuned = saved(make(**settings), tmp_path / "base"), tune(make(**settings), changes)
    expected = logits(tuned)
    report = extract_lora(saved(tuned, tmp_path / "tuned"), base, tmp_path / "adapter", **{"rank": 5} | options)
    assert not report.left_out
    assert report.kept > 0.999999
    actual = logits(loaded(make(**settings), tmp_path / "adapter"))
    scale = max(1.0, expected.abs().max().item())
    assert (logits(make(**settings)) - expected).abs().max() > 1e-2 * scale  # the change is not too small to matter
    # the factors are rounded to float32, and the model adds them in another order: like the adapters of the peer
    assert (actual - expected).abs().max() <= 16 * TOLERANCE * scale
    # and weft reads its own adapter as PEFT does
    ours = with_adapter(weft.open(base), weft.open(tmp_path / "adapter"))
    for name, tensor in weft.open(tmp_path / "tuned").items():
        wanted = tensor.numpy()
        assert np.abs(ours[name].numpy() - wanted).max() <= 4 * TOLERANCE * max(1.0, np.abs(wanted).max()), name


def test_truncation_loses_what_the_report_says(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    tuned = saved(tune(llama(), {"q_proj.weight": None}), tmp_path / "tuned")
    report = extract_lora(tuned, base, tmp_path / "adapter", rank=4)
    ours, old, new = with_adapter(weft.open(base), weft.open(tmp_path / "adapter")), weft.open(base), weft.open(tuned)
    lost = total = 0.0
    for module, share in report.lost.items():
        name = f"{module}.weight"
        delta = new[name].numpy().astype(np.float64) - old[name].numpy()
        values = np.square(np.linalg.svd(delta, compute_uv=False))
        assert share == pytest.approx(values[4:].sum() / values.sum(), rel=1e-4)
        assert np.square(new[name].numpy() - ours[name].numpy()).sum() / values.sum() == pytest.approx(share, rel=1e-3)
        lost, total = lost + values[4:].sum(), total + values.sum()
    assert report.kept == pytest.approx(1 - lost / total, rel=1e-6)
    assert "4 (rank" not in report.text()
    assert "rank 4" in report.text()


def test_policies_and_globs(tmp_path: Path) -> None:
    changes: dict[str, int | None] = {
        "q_proj.weight": 2,
        "v_proj.weight": 2,
        "tokens.weight": None,
        "norm.weight": None,
    }
    base, tuned = saved(llama(), tmp_path / "base"), saved(tune(llama(), changes), tmp_path / "tuned")
    report = extract_lora(
        tuned, base, tmp_path / "a", include=["*q_proj*", "*norm*", "*embed*"], embeddings="leave", others="leave"
    )
    assert set(report.ranks) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert set(report.left_out.values()) == {"left out on request"}
    assert "model.embed_tokens.weight" in report.left_out
    assert "not in the adapter: model.norm.weight" in report.text()
    report = extract_lora(tuned, base, tmp_path / "b", exclude=["*embed*"], dtype="bfloat16")
    assert {t.dtype.name for n, t in weft.open(tmp_path / "b").items() if "lora" in n} == {"BF16"}
    assert "model.norm.weight" in report.saved
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "base")
    assert json.loads((tmp_path / "b" / "weft.json").read_text())["output"] == "b"


def test_new_heads_and_resized_embeddings_are_saved_whole(tmp_path: Path) -> None:
    old = {k: v for k, v in llama().state_dict().items() if k != "lm_head.weight"}
    new = dict(old) | {"score.weight": torch.ones(2, 16), "model.embed_tokens.weight": torch.ones(40, 16)}
    report = extract_lora(new, old, tmp_path / "a")
    assert set(report.saved) == {"score.weight", "model.embed_tokens.weight"}
    base = weft.open(old)
    base.config = {"vocab_size": 37}
    ours = with_adapter(base, weft.open(tmp_path / "a"))
    assert ours["score.weight"].shape == (2, 16)
    assert ours["model.embed_tokens.weight"].shape == (40, 16)
    assert ours.config["vocab_size"] == 40


def test_nothing_to_extract_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(weft.WeftError, match=r"no tensor differs .*29 are equal"):
        extract_lora(llama().state_dict(), llama().state_dict(), tmp_path / "a")
    damaged = dict(llama().state_dict())
    damaged["model.layers.0.mlp.up_proj.weight"] = torch.full((24, 16), torch.nan)
    with pytest.raises(weft.WeftError, match=r"up_proj.*NaN"):
        extract_lora(damaged, llama().state_dict(), tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    tuned = tune(llama(), {"q_proj.weight": 1}).state_dict()
    for force in (False, True):
        with pytest.raises(weft.WeftError, match="exists already"):
            extract_lora(tuned, llama().state_dict(), tmp_path / "a", force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    extract_lora(tuned, llama().state_dict(), tmp_path / "b")
    first = (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    extract_lora(tuned, llama().state_dict(), tmp_path / "b", force=True)
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == first


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each weight, by PEFT."""
    before, after = llama().state_dict(), loaded(llama(), folder).merge_and_unload().state_dict()
    return {n: (after[n] - before[n]).double().numpy() for n in before}


def test_merged_adapters_are_the_sum_of_their_changes(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
        {"target_modules": ["q_proj", "embed_tokens"], "r": 2, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 1}, "lora_alpha": 3},
    ]
    weights = (0.7, -1.2, 0.4)
    for number, each in enumerate(settings):
        train(llama(), tmp_path / str(number), seed=number, **each)
    folders = [tmp_path / str(n) for n in range(3)]
    report = merge_adapters(folders, tmp_path / "sum", weights=weights)
    parts, total = [deltas(f) for f in folders], deltas(tmp_path / "sum")
    for name, actual in total.items():
        wanted = sum(w * p[name] for w, p in zip(weights, parts))
        assert np.abs(actual - wanted).max() <= 4 * TOLERANCE * max(1.0, np.abs(wanted).max()), name
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 8
    assert report.ranks["model.layers.0.mlp.down_proj"] == 1
    assert report.kept == pytest.approx(1.0, abs=1e-12)

    report = merge_adapters(folders, tmp_path / "cut", weights=weights, rank=2)
    cut = deltas(tmp_path / "cut")
    for module, share in report.lost.items():
        wanted = sum(w * p[f"{module}.weight"] for w, p in zip(weights, parts))
        values = np.square(np.linalg.svd(wanted, compute_uv=False))
        assert share == pytest.approx(values[2:].sum() / values.sum(), abs=1e-5)
        assert np.square(cut[f"{module}.weight"] - wanted).sum() / values.sum() == pytest.approx(share, abs=1e-5)


def test_merged_adapters_with_saved_modules(tmp_path: Path) -> None:
    for number in (0, 1):
        modules = ["model.norm"] if number else None
        train(llama(), tmp_path / str(number), target_modules=["q_proj"], modules_to_save=modules, seed=number)
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(weft.WeftError, match=r"model\.norm\.weight: 1 of 2 adapters hold it whole"):
        merge_adapters(folders, tmp_path / "sum", weights=0.5)
    merge_adapters(folders, tmp_path / "sum", weights=0.5, base=saved(llama(), tmp_path / "base"))
    parts, total = [deltas(f) for f in folders], deltas(tmp_path / "sum")
    wanted = 0.5 * parts[1]["model.norm.weight"]
    assert np.abs(wanted).max() > 0.01
    assert np.abs(total["model.norm.weight"] - wanted).max() <= TOLERANCE
    merge_adapters([folders[1]] * 2, tmp_path / "same", weights=[0.25, 0.75])
    for name, actual in deltas(tmp_path / "same").items():
        assert np.abs(actual - parts[1][name]).max() <= 4 * TOLERANCE * max(1.0, np.abs(actual).max()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [1]}, "replaces rows"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_without_a_sum_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(llama(), tmp_path / "a", target_modules=["q_proj"], **settings)
    with pytest.raises(weft.WeftError, match=message):
        merge_adapters([tmp_path / "a"], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
