"""Error curves: each measure against its definition, bytes against files, runs that are resumed, what is chosen from them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.calibrate import Change, Statistics, Walk, collect
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.quantize import GPTQ, RTN, Codebook, Curves, choose_bits, error_curves, evaluate, quantize_model

CANDIDATES: dict[str, Change | None] = {"2": RTN(2, 16), "4": GPTQ(4, 16), "8": RTN(8, 16)}


def plain(curves: Curves) -> dict[str, Any]:
    """Everything but the times."""
    found = asdict(curves)
    for layer in found["layers"].values():
        for one in layer["candidates"].values():
            one.pop("seconds")
    return found


@pytest.fixture
def llama(tmp_path: Path) -> tuple[nn.Module, list[Any], Path]:
    model, batches = build("llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    return model, batches, tmp_path / "model"


def test_measures_are_what_they_say(llama: tuple[nn.Module, list[Any], Path]) -> None:
    model, batches, folder = llama
    gradients = collect(model, [{**b, "labels": b["input_ids"]} for b in batches], "gradient,fisher_empirical")
    curves = error_curves(folder, CANDIDATES, batches, block_errors=True, gradients=gradients)
    statistics = collect(model, batches, "gram")
    assert list(curves.layers) == statistics.layers
    assert curves.labels == ["2", "4", "8"]
    name = "model.layers.1.self_attn.o_proj"
    layer = model.get_submodule(name)
    weight, gram = layer.weight.detach().clone(), statistics.gram(name)
    outputs: list[Tensor] = []
    hook = model.get_submodule("model.layers.1").register_forward_hook(
        lambda m, a, out: outputs.append((out[0] if isinstance(out, tuple) else out).detach())
    )

    def hidden() -> Tensor:
        outputs.clear()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        tokens = [
            o[b["attention_mask"].bool()] if "attention_mask" in b else o.flatten(0, 1)
            for o, b in zip(outputs, batches)
        ]
        return torch.cat(tokens).double()

    before = hidden()
    for label, config in CANDIDATES.items():
        assert config is not None
        value = config.fit(name, weight, statistics).dequantize()
        delta = value - weight
        found = curves.layers[name].candidates[label].errors
        assert found["weight"] == pytest.approx(float(delta.square().sum() / weight.square().sum()), rel=1e-3)
        moved = float((delta @ gram @ delta.T).trace())
        assert found["output"] == pytest.approx(moved / statistics.rows(name), rel=1e-3)
        assert found["relative"] == pytest.approx(moved / float((weight @ gram @ weight.T).trace()), rel=1e-3)
        key = f"{name}.weight"
        g, f = gradients.gradient(key), gradients.fisher(key, "empirical")
        expected = (g * delta).abs().sum() + (f * delta.square()).sum() / 2
        assert found["importance"] == pytest.approx(float(expected), rel=1e-3)
        with torch.no_grad():
            layer.weight.copy_(value)
        shares = (hidden() - before).square().sum(-1) / before.square().sum(-1)
        assert found["block"] == pytest.approx(float(shares.mean()), rel=1e-3)
        with torch.no_grad():
            layer.weight.copy_(weight)
    hook.remove()


def test_bytes_of_candidates_of_several_formats(tmp_path: Path) -> None:
    """Where the chosen ones are fewer, files are still those that were counted."""
    model, batches = build("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    candidates = {"nf4": Codebook(block_size=8), "rtn": RTN(3, 16), "8": RTN(8, 16)}
    found = choose_bits(tmp_path / "model", candidates, batches, target_bits=12, together=())
    assert found.format == "weft"
    assert "nf4" not in found.allocation.choices.values()
    quantize_model(tmp_path / "model", tmp_path / "out", found.config, format=found.format)
    size = file_bytes(tmp_path / "out") - file_bytes(tmp_path / "model")
    assert size == found.allocation.nbytes - 2 * sum(found.curves.sizes.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_bytes_are_those_of_the_files(architecture: str, tmp_path: Path) -> None:
    model, batches = build(architecture, torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    candidates = {"2": RTN(2, 16), "4": RTN(4, 16), "dense": None}
    found = choose_bits(tmp_path / "model", candidates, batches, target_bits=5, together=())
    assert set(found.allocation.choices.values()) >= {"2", "4"}
    config = [name for names in found.config for name in names]
    quantize_model(tmp_path / "model", tmp_path / "out", found.config, format=found.format)
    report = json.loads((tmp_path / "out" / "weft.json").read_text())
    assert set(report["layers"]) == set(config)
    size = file_bytes(tmp_path / "out") - file_bytes(tmp_path / "model")
    chosen = sum(found.curves.layers[n].candidates[found.allocation.choices[n]].nbytes for n in config)
    dense = 2 * sum(found.curves.layers[n].size for n in config)
    assert size == chosen - dense
    assert found.allocation.nbytes <= 5 * sum(found.curves.sizes.values()) / 8


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors in the files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        total += path.stat().st_size - 8 - header
    return total


class Breaks(RTN):
    """Stops in the second block the first time."""

    armed: ClassVar[bool] = True

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        if Breaks.armed and ".1." in name:
            raise KeyboardInterrupt
        return super().fit(name, weight, statistics)


def test_a_run_that_is_stopped_goes_on(
    llama: tuple[nn.Module, list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batches, folder = llama
    candidates = {"a": Breaks(3, 16), "b": GPTQ(3, 16)}
    out = tmp_path / "curves.json"
    with pytest.raises(KeyboardInterrupt):
        error_curves(folder, candidates, batches, output=out)
    assert not out.exists()
    monkeypatch.setattr(Breaks, "armed", False)
    visited: list[str] = []
    walked = Walk.__iter__

    def watched(self: Walk) -> Iterator[Any]:
        for block in walked(self):
            visited.append(block.name)
            yield block

    monkeypatch.setattr(Walk, "__iter__", watched)
    resumed = error_curves(folder, candidates, batches, output=out)
    assert visited == ["model.layers.1", "model.layers.2"]
    monkeypatch.setattr(Walk, "__iter__", walked)
    assert plain(resumed) == plain(error_curves(folder, candidates, batches)) == plain(Curves.load(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.json", "model"]
    with pytest.raises(OutputError, match="exists already"):
        error_curves(folder, candidates, batches, output=out)
    error_curves(folder, {"a": RTN(3, 16)}, batches, output=out, force=True)
    assert Curves.load(out).labels == ["a"]
    with pytest.raises(OutputError, match="no error curves"):
        error_curves(folder, candidates, batches, output=folder / "config.json", force=True)


def test_saved_statistics_give_the_same(llama: tuple[nn.Module, list[Any], Path], tmp_path: Path) -> None:
    model, batches, folder = llama
    walked = error_curves(folder, CANDIDATES, batches)
    collect(folder, batches, "gram", output=tmp_path / "stats")
    held = error_curves(folder, CANDIDATES, statistics=tmp_path / "stats")
    assert {**plain(held), "facts": 0} == {**plain(walked), "facts": 0}
    in_memory = error_curves(model, CANDIDATES, batches)
    for name, layer in in_memory.layers.items():  # the same but for the files' type of scales
        for label, one in layer.candidates.items():
            assert one.errors["relative"] == pytest.approx(
                walked.layers[name].candidates[label].errors["relative"], rel=0.02
            )
    other, _ = build("llama", torch.float32)
    with torch.no_grad():
        other.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(2)
    with pytest.raises(CheckpointError, match="another model"):
        error_curves(other, CANDIDATES, statistics=tmp_path / "stats")


def test_a_model_is_quantised_as_chosen(llama: tuple[nn.Module, list[Any], Path], tmp_path: Path) -> None:
    model, batches, folder = llama
    candidates = {str(b): GPTQ(b, 16) for b in (2, 3, 4, 8)}
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = choose_bits(model, candidates, batches, target_bits=6)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    groups = found.curves.together()
    assert sorted(len(g) for g in groups) == [2, 2, 2, 3, 3, 3]
    for group in groups:
        assert len({found.allocation.choices[n] for n in group}) == 1
    curves = found.curves.by("relative")
    uniform = {b: (sum(c[b][0] for c in curves.values()), sum(c[b][1] for c in curves.values())) for b in candidates}
    for nbytes, error in uniform.values():
        assert found.frontier.best(nbytes).error <= error + 1e-12
    chosen = choose_bits(folder, candidates, batches, target_bytes=found.allocation.nbytes, measure="block")
    quantize_model(folder, tmp_path / "out", chosen.config, batches)
    made = json.loads((tmp_path / "out" / "weft.json").read_text())["layers"]
    bits = {n: int(chosen.allocation.choices[n]) for n in made}
    assert all(bits[n] <= notes["bits"] <= bits[n] + 3 for n, notes in made.items())
    assert evaluate(tmp_path / "out", batches, folder)["kl"] < 0.1


def test_a_few_tokens_say_the_same(llama: tuple[nn.Module, list[Any], Path]) -> None:
    model, batches, _ = llama
    few, first = (
        error_curves(model, {"3": RTN(3, 16)}, b, block_errors=True, block_tokens=t, where="up_proj")
        for b, t in ((batches, 1), (batches[:1], 4096))
    )
    for name, layer in few.layers.items():
        found = layer.candidates["3"].errors
        assert found["block"] == first.layers[name].candidates["3"].errors["block"] > 0
        assert found["relative"] != first.layers[name].candidates["3"].errors["relative"]


def test_an_open_checkpoint_stays_open(llama: tuple[nn.Module, list[Any], Path], tmp_path: Path) -> None:
    _, batches, folder = llama
    with weft.open(folder) as opened:
        found = choose_bits(opened, CANDIDATES, batches, target_bits=6)
        for name in ("a", "b"):
            quantize_model(opened, tmp_path / name, found.config, batches)
        assert evaluate(tmp_path / "a", batches, opened) == {
            **evaluate(tmp_path / "b", batches, opened), "seconds": pytest.approx(0, abs=60)
        }  # fmt: skip


def test_what_fails_is_named(llama: tuple[nn.Module, list[Any], Path]) -> None:
    _, batches, folder = llama

    class Broken(Change):
        def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
            return weight / 0 if name.endswith("q_proj") else weight[1:]

    curves = error_curves(
        folder, {"groups": RTN(4, 20), "broken": Broken(), "4": RTN(4, 16), "nf4": Codebook()}, batches
    )
    one = curves.layers["model.layers.0.self_attn.q_proj"].candidates
    assert "do not divide" in one["groups"].failed
    assert "NaN" in one["broken"].failed
    assert "[31, 32]" in curves.layers["model.layers.0.self_attn.o_proj"].candidates["broken"].failed
    assert not one["4"].failed
    assert not one["nf4"].failed
    assert set(curves.frontier().best(10**9).choices.values()) <= {"4", "nf4"}
    only = error_curves(folder, {"groups": RTN(4, 20)}, batches)
    with pytest.raises(RecipeError, match="no measure 'relative'"):
        only.frontier()


def test_experts_that_no_token_reached() -> None:
    model, batches = build("mixtral", torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gate.weight"):
                value.zero_()
                value[0, :] = 1  # ties: the same experts for every token
    curves = error_curves(model, {"2": GPTQ(2, 16), "4": GPTQ(4, 16)}, batches, block_errors=True)
    unseen = [layer for layer in curves.layers.values() if not layer.rows]
    assert unseen
    for layer in unseen:
        for one in layer.candidates.values():
            assert not one.failed
            assert one.errors["output"] == one.errors["block"] == 0
            assert one.errors["relative"] == one.errors["weight"] > 0
    curves.frontier("block").best(10**9)


def test_what_cannot_be(llama: tuple[nn.Module, list[Any], Path], tmp_path: Path) -> None:
    model, batches, _ = llama
    with pytest.raises(RecipeError, match="no candidates"):
        error_curves(model, {}, batches)
    with pytest.raises(RecipeError, match="need calibration data"):
        error_curves(model, CANDIDATES)
    with pytest.raises(RecipeError, match="one of them"):
        choose_bits(model, CANDIDATES, batches)
    with pytest.raises(RecipeError, match="one of them"):
        choose_bits(model, CANDIDATES, batches, target_bits=3, target_bytes=3)
    with pytest.raises(RecipeError, match=r"No layer was chosen.*q_proj"):
        error_curves(model, CANDIDATES, batches, where="q_prj")
    curves = error_curves(model, CANDIDATES, batches, where="q_proj")
    with pytest.raises(RecipeError, match="Did you mean relative"):
        curves.by("relativ")
    with pytest.raises(RecipeError, match="block_errors"):
        curves.by("block")
    with pytest.raises(RecipeError, match="groups of names"):
        curves.frontier(together="q_proj")
    with pytest.raises(RecipeError, match="bits per weight"):
        choose_bits(model, CANDIDATES, curves=curves, target_bits=1)
    with pytest.raises(RecipeError, match="other candidates"):
        choose_bits(model, {"5": RTN(5)}, curves=curves, target_bits=9)
    for text in ("{}", "[]", '{"format": "weft curves", "version": 1, "layers": {"a": {}}, "facts": {}}', "{"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError):
            Curves.load(tmp_path / "bad.json")


def test_the_page_shows_the_committed_measurements() -> None:
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("mixed_bits", root / "benchmarks" / "mixed_bits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in (root / "docs" / "quantize.md").read_text()
