"""What a plan decides: policies, ties, copies, slices, stages, parameters model by model, and the ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_llamas import llama_shapes, write_llama

import weft
from weft.engine.merging import Merge
from weft.engine.plan import Plan
from weft.errors import MissingTensorError, RecipeError, ShapeError
from weft.recipe.layers import LayerMap, find_layers, find_stacks
from weft.recipe.opened import Opened
from weft.recipe.run import make_plan

State = dict[str, np.ndarray]


def planned(recipe: Mapping[str, Any], models: Mapping[str, Any] | None = None) -> Plan:
    return make_plan(recipe, Opened(given=models or {}), "out")


def merged(
    recipe: Mapping[str, Any], output: Path, models: Mapping[str, Any] | None = None
) -> tuple[State, dict[str, Any]]:
    weft.run(recipe, output, models=models)
    config = output / "config.json"
    return load_file(output / "model.safetensors"), json.loads(config.read_text()) if config.exists() else {}


def linear(*models: Any, **fields: Any) -> dict[str, Any]:
    return {"steps": [{"method": "linear", "models": list(models), **fields}]}


def state(seed: int, **shapes: tuple[int, ...]) -> State:
    random = np.random.default_rng(seed)
    return {n.replace("__", "."): random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def rules(plan: Plan, model: str) -> dict[str, str]:
    return {row.tensor: row.rule for row in plan.ledger if row.model == model}


# tensors that not all models have


@pytest.fixture
def uneven() -> dict[str, State]:
    a, b, c = (state(s, x=(4, 3), y=(5,)) for s in (1, 2, 3))
    del b["y"]
    return {"a": a, "b": b, "c": c}


def test_a_missing_tensor_stops(uneven: dict[str, State]) -> None:
    with pytest.raises(MissingTensorError, match="b has no tensor 'y'"):
        planned(linear("a", "b", "c"), uneven)


def test_skip_merges_those_that_have_it(uneven: dict[str, State], tmp_path: Path) -> None:
    weights = {"weight": [1.0, 5.0, 3.0]}
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip("abc", weights["weight"])]
    found, _ = merged(linear(*models, missing="skip"), tmp_path / "out", uneven)
    np.testing.assert_allclose(found["y"], (uneven["a"]["y"] + 3 * uneven["c"]["y"]) / 4, rtol=1e-6)
    listed, _ = merged(
        linear("a", "b", "c", missing="skip", parameters={"weights": [1, 5, 3]}), tmp_path / "listed", uneven
    )
    np.testing.assert_array_equal(found["y"], listed["y"])


def test_copy_takes_the_first(uneven: dict[str, State], tmp_path: Path) -> None:
    found, _ = merged(linear("a", "b", "c", missing="copy"), tmp_path / "out", uneven)
    np.testing.assert_array_equal(found["y"], uneven["a"]["y"])


def test_a_tensor_of_one_model_passes_through(tmp_path: Path) -> None:
    models = {"a": state(1, x=(3,)), "b": state(2, x=(3,), extra=(7,))}
    found, _ = merged(linear("a", "b"), tmp_path / "out", models)
    np.testing.assert_array_equal(found["extra"], models["b"]["extra"])
    plan = planned(linear("a", "b"), models)
    assert rules(plan, "b")["extra"] == "copied: only in b"
    assert any("extra" in note for note in plan.notes)


def test_shapes_that_differ(tmp_path: Path) -> None:
    models = {"a": state(1, x=(3, 2), y=(2,)), "b": state(2, x=(4, 2), y=(2,))}
    with pytest.raises(ShapeError, match=r"x: b has shape \[4, 2\], a has \[3, 2\]"):
        planned(linear("a", "b"), models)
    found, _ = merged(linear("a", "b", mismatch="copy"), tmp_path / "out", models)
    np.testing.assert_array_equal(found["x"], models["a"]["x"])
    np.testing.assert_allclose(found["y"], (models["a"]["y"] + models["b"]["y"]) / 2, rtol=1e-6)


def test_crop_cuts_embeddings_only(tmp_path: Path) -> None:
    models = {"a": state(1, embed_tokens__weight=(6, 2)), "b": state(2, embed_tokens__weight=(4, 2))}
    found, _ = merged(linear("a", "b", mismatch="crop"), tmp_path / "out", models)
    mean = (models["a"]["embed_tokens.weight"][:4] + models["b"]["embed_tokens.weight"]) / 2
    np.testing.assert_allclose(found["embed_tokens.weight"], mean, rtol=1e-6)
    other = {"a": state(1, mlp__weight=(6, 2)), "b": state(2, mlp__weight=(4, 2))}
    with pytest.raises(ShapeError):
        planned(linear("a", "b", mismatch="crop"), other)


@pytest.mark.parametrize("rows", [3, 9])
def test_crop_follows_the_base(rows: int, tmp_path: Path) -> None:
    models = {"base": state(1, embed_tokens__weight=(5, 2)), "a": state(2, embed_tokens__weight=(rows, 2))}
    step = {"method": "task_arithmetic", "models": ["a"], "base": "base", "mismatch": "crop"}
    found, _ = merged({"steps": [{**step, "parameters": {"weight": 0.5}}]}, tmp_path / "out", models)
    base, a = models["base"]["embed_tokens.weight"], models["a"]["embed_tokens.weight"]
    expected = base.copy()
    same = min(rows, 5)
    expected[:same] += 0.5 * (a[:same] - base[:same])
    np.testing.assert_allclose(found["embed_tokens.weight"], expected, rtol=1e-6, atol=1e-7)


# what is not merged


def test_other_types_are_copied(tmp_path: Path) -> None:
    models = {m: state(i, x=(3,)) | {"ids": np.arange(i, i + 4)} for i, m in enumerate("ab")}
    found, _ = merged(linear("a", "b"), tmp_path / "out", models)
    np.testing.assert_array_equal(found["ids"], models["a"]["ids"])
    assert found["ids"].dtype == np.int64
    assert rules(planned(linear("a", "b"), models), "b")["ids"] == "copied: not floating point"


def test_include_and_exclude(tmp_path: Path) -> None:
    models = {m: state(i, mlp__up=(3,), mlp__down=(3,), norm=(2,)) for i, m in enumerate("ab")}
    found, _ = merged(linear("a", "b", include=["mlp.*"], exclude=["*.down"]), tmp_path / "out", models)
    np.testing.assert_array_equal(found["mlp.down"], models["a"]["mlp.down"])
    np.testing.assert_array_equal(found["norm"], models["a"]["norm"])
    np.testing.assert_allclose(found["mlp.up"], (models["a"]["mlp.up"] + models["b"]["mlp.up"]) / 2, rtol=1e-6)


def test_each_tensor_keeps_its_type_unless_asked(tmp_path: Path) -> None:
    models = {m: {"x": torch.ones(3, dtype=torch.bfloat16), "y": torch.ones(3)} for m in "ab"}
    types = {o.name: o.dtype.name for o in planned(linear("a", "b"), models).outputs}
    assert types == {"x": "BF16", "y": "F32"}
    plan = planned({**linear("a", "b"), "output": {"dtype": "float16"}}, models)
    assert {o.dtype.name for o in plan.outputs} == {"F16"}
    with pytest.raises(RecipeError, match="choose one of"):
        planned({**linear("a", "b"), "output": {"dtype": "int8"}}, models)


# tied weights


def test_tied_tensors_in_memory_are_merged_once() -> None:
    def tied(seed: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        return {"model.embed_tokens.weight": weight, "lm_head.weight": weight}

    plan = planned(linear("a", "b"), {"a": tied(1), "b": tied(2)})
    assert [o.name for o in plan.outputs] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_head_of_its_own_unties_the_result(tmp_path: Path) -> None:
    tied = write_llama(tmp_path / "tied", seed=1, tied=True)
    free = write_llama(tmp_path / "free", seed=2)
    found, config = merged(linear(str(tied), str(free)), tmp_path / "out")
    a, b = load_file(tied / "model.safetensors"), load_file(free / "model.safetensors")
    mean = (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2
    np.testing.assert_allclose(found["lm_head.weight"], mean, rtol=1e-6)
    assert config["tie_word_embeddings"] is False
    both, kept = merged(linear(str(tied), str(tied)), tmp_path / "both")
    assert "lm_head.weight" not in both
    assert kept["tie_word_embeddings"] is True


# slices


def test_slices_are_numbered_anew(tmp_path: Path) -> None:
    types = ["full", "sliding", "full", "sliding"]
    inner = {"vision_config": {"num_hidden_layers": 4}, "layer_types": types, "max_window_layers": 4}
    a = write_llama(tmp_path / "a", seed=1, config=inner)
    b = write_llama(tmp_path / "b", seed=2, config=inner)
    cuts = [{"sources": [{"model": str(m), "layers": r}]} for m, r in ((a, [0, 3]), (b, [1, 4]), (a, [0, 1]))]
    found, config = merged({"steps": [{"method": "passthrough", "slices": cuts}]}, tmp_path / "out")
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    origin = [(left, 0), (left, 1), (left, 2), (right, 1), (right, 2), (right, 3), (left, 0)]
    assert set(found) == set(llama_shapes(7, 22))
    for number, (source, layer) in enumerate(origin):
        for name in (n for n in source if n.startswith(f"model.layers.{layer}.")):
            rest = name.removeprefix(f"model.layers.{layer}.")
            np.testing.assert_array_equal(found[f"model.layers.{number}.{rest}"], source[name])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[name], left[name])
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == [types[i] for i in (0, 1, 2, 1, 2, 3, 0)]
    assert config["vision_config"] == {"num_hidden_layers": 4}


def test_what_follows_the_layers_comes_from_the_last_slice(tmp_path: Path) -> None:
    a, b = write_llama(tmp_path / "a", seed=1), write_llama(tmp_path / "b", seed=2)
    cuts = [{"sources": [{"model": str(m), "layers": r}]} for m, r in ((a, [0, 2]), (b, [2, 4]))]
    recipe = {"steps": [{"method": "passthrough", "slices": cuts}]}
    found, _ = merged(recipe, tmp_path / "out")
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], left["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["model.norm.weight"], right["model.norm.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], right["lm_head.weight"])
    unused = rules(planned(recipe), "a")
    assert unused["model.layers.2.mlp.up_proj.weight"].startswith("dropped")
    assert unused["lm_head.weight"].startswith("dropped")


def test_depth_runs_through_each_slice() -> None:
    models = {m: state(i, **{f"h__{n}__w": (2,) for n in range(5)}) for i, m in enumerate("ab")}
    cuts = [{"sources": [{"model": m, "layers": r} for m in "ab"]} for r in ([0, 3], [3, 4])]
    step = {"method": "linear", "slices": cuts, "parameters": {"weight": [1.0, 3.0]}}
    plan = planned({"steps": [step]}, models)
    assert [o.source.config.weights[0] for o in plan.outputs] == [1.0, 2.0, 3.0, 3.0]  # type: ignore[union-attr]


def test_a_slice_beyond_the_model(tmp_path: Path) -> None:
    models = {"a": state(1, h__0__w=(2,), h__1__w=(2,)), "b": state(2, x=(2,))}
    cut = {"sources": [{"model": "a", "layers": [0, 3]}]}
    with pytest.raises(RecipeError, match="a has 2 layers"):
        planned({"steps": [{"method": "passthrough", "slices": [cut]}]}, models)
    cut = {"sources": [{"model": "b", "layers": [0, 1]}]}
    with pytest.raises(RecipeError, match="no numbered layers"):
        planned({"steps": [{"method": "passthrough", "slices": [cut]}]}, models)
    cut = {"sources": [{"model": "a", "layers": [0, 1]}], "base": "a", "base_layers": [2, 3]}
    with pytest.raises(RecipeError, match="a has 2 layers"):
        planned({"steps": [{"method": "task_arithmetic", "slices": [cut]}]}, models)
    cut = {"sources": [{"model": "a", "layers": [0, 1]}]}
    with pytest.raises(RecipeError, match="name it"):
        planned({"steps": [{"method": "task_arithmetic", "slices": [cut]}]}, models)


# modules


def test_modules_are_merged_each_in_its_own_way(tmp_path: Path) -> None:
    shapes = {f"model__layers__{i}__w": (2,) for i in range(2)} | {f"visual__blocks__{i}__w": (2,) for i in range(3)}
    models = {m: state(i, **shapes, visual__merger__w=(2,), lm_head__weight=(2,)) for i, m in enumerate("ab")}
    modules = {
        "text_decoder": {"models": ["a", "b"], "parameters": {"weight": [1.0, 3.0]}},
        "vision_tower": {
            "slices": [
                {"sources": [{"model": "a", "layers": [0, 1]}, {"model": "b", "layers": [2, 3]}]},
                {"sources": [{"model": m, "layers": [2, 3]} for m in "ab"]},
            ]
        },
    }
    step = {"method": "linear", "modules": modules, "parameters": {"weight": 0.5, "normalize": False}}
    plan = planned({"steps": [step]}, models)
    weights = {o.name: o.source.config.weights for o in plan.outputs}  # type: ignore[union-attr]
    assert weights == {
        "model.layers.0.w": (1.0, 1.0),
        "model.layers.1.w": (3.0, 3.0),
        "lm_head.weight": (1.0, 1.0),
        "visual.blocks.0.w": (0.5, 0.5),
        "visual.blocks.1.w": (0.5, 0.5),
        "visual.merger.w": (0.5, 0.5),
    }
    found, _ = merged({"steps": [step]}, tmp_path / "out", models)
    a, b = models["a"], models["b"]
    expected = (a["visual.blocks.0.w"] + b["visual.blocks.2.w"]) / 2
    np.testing.assert_allclose(found["visual.blocks.0.w"], expected, rtol=1e-6)


def test_tensors_in_no_module_are_copied() -> None:
    models = {m: state(i, encoder__0__w=(2,), decoder__0__w=(2,), other=(3,)) for i, m in enumerate("ab")}
    modules = {m: {"models": ["a", "b"]} for m in ("encoder", "decoder")}
    plan = planned({"steps": [{"method": "linear", "modules": modules}]}, models)
    assert {o.name: o.rule for o in plan.outputs}["other"] == "copied: in no module"
    assert rules(plan, "b")["other"].startswith("dropped")


# parameters


def test_the_most_specific_parameter_wins() -> None:
    models = {m: state(i, h__0__mlp=(2,), h__0__attn=(2,), norm=(2,)) for i, m in enumerate("ab")}
    sources = [
        {"model": "a", "layers": [0, 1], "parameters": {"weight": [{"filter": "mlp", "value": 1.0}]}},
        {"model": "b", "layers": [0, 1]},
    ]
    cut = {"sources": sources, "parameters": {"weight": [{"filter": "attn", "value": 2.0}]}}
    module = {"slices": [cut], "parameters": {"weight": [{"filter": "mlp", "value": 3.0}]}}
    step = {"method": "linear", "modules": {"default": module}, "parameters": {"weight": 4.0}}
    plan = planned({"steps": [step]}, models)
    weights = {o.name: o.source.config.weights for o in plan.outputs}  # type: ignore[union-attr]
    assert weights == {"h.0.mlp": (1.0, 3.0), "h.0.attn": (2.0, 2.0), "norm": (4.0, 4.0)}


def test_depth_of_every_stack() -> None:
    shapes = {f"encoder__{i}__w": (2,) for i in range(3)} | {f"decoder__{i}__w": (2,) for i in range(2)}
    models = {m: state(i, **shapes, norm=(2,)) for i, m in enumerate("ab")}
    plan = planned(linear("a", "b", parameters={"weight": [0.0, 1.0], "normalize": False}), models)
    weights = {o.name: o.source.config.weights[0] for o in plan.outputs}  # type: ignore[union-attr]
    assert weights == {
        **{f"encoder.{i}.w": i / 2 for i in range(3)},
        **{f"decoder.{i}.w": float(i) for i in range(2)},
        "norm": 0.0,
    }


def test_numbers_that_are_no_stack_of_layers() -> None:
    assert find_stacks(["classifier.1.w", "classifier.3.w", "layer1.0.w", "layer1.1.w"]) == {LayerMap("layer1", 2): 2}
    assert find_layers(["conv1.weight", "bn1.weight"]).count == 0
    assert find_layers(["0.weight", "1.weight"]) == LayerMap("", 2)


def test_lists_with_one_value_a_model() -> None:
    models = {m: state(i, x=(2,)) for i, m in enumerate("ab")}
    plan = planned(linear("a", "b", parameters={"weights": [0.2, 0.8]}), models)
    assert isinstance(plan.outputs[0].source, Merge)
    assert plan.outputs[0].source.config.weights == (0.2, 0.8)
    with pytest.raises(RecipeError, match="3 values for 2 models"):
        planned(linear("a", "b", parameters={"weights": [1, 2, 3]}), models)


def test_parameters_that_do_not_exist() -> None:
    models = {m: state(i, x=(2,)) for i, m in enumerate("ab")}
    with pytest.raises(RecipeError, match=r"wieght.*Did you mean weight"):
        planned(linear({"model": "a", "parameters": {"wieght": 1}}, "b"), models)
    with pytest.raises(RecipeError, match="not given model by model"):
        planned(linear({"model": "a", "parameters": {"normalize": False}}, "b"), models)
    with pytest.raises(RecipeError, match="Did you mean normalize"):
        planned(linear("a", "b", parameters={"normalise": False}), models)


# stages


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("weight_matching", "weft align OTHER --to MODEL"),
        ("wanda", r"weft\.prune_\(model, weft\.prune\.Wanda\(\)\)"),
    ],
)
def test_methods_that_merge_nothing_say_how_they_run(method: str, how: str) -> None:
    with pytest.raises(RecipeError, match=f"does not run on checkpoints from a recipe. Run it as: {how}"):
        planned({"steps": [{"method": method, "models": ["a", "b"]}]}, {n: state(0, x=(2,)) for n in "ab"})


def test_stages_equal_separate_runs(tmp_path: Path) -> None:
    models = {m: state(i, h__0__w=(40, 30), h__1__w=(40, 30), norm=(30,)) for i, m in enumerate("abcd")}
    first = {"name": "first", "method": "ties", "models": ["b", "c"], "base": "a", "parameters": {"density": 0.4}}
    second = {"method": "slerp", "base": "@first", "models": ["d"], "parameters": {"t": [0.2, 0.8]}}
    together, _ = merged({"steps": [first, second]}, tmp_path / "together", models)
    stage, _ = merged({"steps": [first]}, tmp_path / "stage", models)
    apart, _ = merged({"steps": [{**second, "base": "s"}]}, tmp_path / "apart", {"s": stage, "d": models["d"]})
    assert set(together) == set(apart)
    for name in apart:
        np.testing.assert_array_equal(together[name], apart[name])


def test_a_stage_without_a_name_is_lost() -> None:
    models = {m: state(i, x=(2,)) for i, m in enumerate("ab")}
    with pytest.raises(RecipeError, match="has no name"):
        planned({"steps": [*linear("a", "b")["steps"], *linear("a", "b")["steps"]]}, models)


def test_an_adapter_on_a_stage(tmp_path: Path) -> None:
    a, b = write_llama(tmp_path / "a", seed=1), write_llama(tmp_path / "b", seed=2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    random = np.random.default_rng(0)
    down, up = (random.standard_normal(s).astype(np.float32) for s in ((2, 32), (32, 2)))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, str(adapter / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": ""}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    first = {"name": "first", "method": "linear", "models": [str(a), str(b)]}
    second = {"method": "passthrough", "models": [f"@first+{adapter}"]}
    found, _ = merged({"steps": [first, second]}, tmp_path / "out")
    q = "model.layers.0.self_attn.q_proj.weight"
    mean = (load_file(a / "model.safetensors")[q] + load_file(b / "model.safetensors")[q]) / 2
    np.testing.assert_allclose(found[q], mean + 2 * (up @ down), rtol=1e-5, atol=1e-5)


# the ledger


def test_the_ledger_covers_every_input_tensor_once(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "x" / "m", seed=1, layers=2)
    b = write_llama(tmp_path / "y" / "m", seed=2, layers=2)
    save_file({**load_file(b / "model.safetensors"), "extra": np.zeros(2, np.int64)}, str(b / "model.safetensors"))
    plan = planned(linear(str(a), str(b), exclude=["*norm*"]))
    assert {row.model for row in plan.ledger} == {"m", "m (2)"}, "two models of one name can be told apart"
    counts = Counter((row.model, row.tensor) for row in plan.ledger)
    assert set(counts.values()) == {1}
    names = set(llama_shapes(2, 22))
    assert set(counts) == {("m", n) for n in names} | {("m (2)", n) for n in names | {"extra"}}
    assert {o.name for o in plan.outputs} == {row.output for row in plan.ledger}


def test_checkpoints_that_are_given_keep_their_names(tmp_path: Path) -> None:
    folders = [write_llama(tmp_path / x / "m", seed=i, layers=1) for i, x in enumerate("ab")]
    with weft.open(folders[0]) as first, weft.open(folders[1]) as second:
        plan = planned(linear("x", "y"), {"x": first, "y": second})
        assert {row.model for row in plan.ledger} == {"m", "m (2)"}
        assert (first.name, second.name) == ("m", "m")


def test_the_base_among_the_models_is_counted_once() -> None:
    models = {m: state(i, x=(2,)) for i, m in enumerate("ab")}
    step = {"method": "task_arithmetic", "models": ["a", "b"], "base": "a"}
    plan = planned({"steps": [step]}, models)
    assert Counter((row.model, row.tensor) for row in plan.ledger) == {("a", "x"): 1, ("b", "x"): 1}


# files


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    a, b, c = (write_llama(tmp_path / "secret place" / m, seed=i, layers=1) for i, m in enumerate("abc"))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(a), "parameters": {"weight": 1, "normalize": True}}, {"model": {"model": str(b)}}],
        "tokenizer_source": {"model": {"path": str(c)}},
    }
    weft.run(recipe, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"secret place" not in file.read_bytes(), file.name


def test_config_and_files_come_from_the_model_named(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", seed=1, config={"mark": "a"}, template="template of a")
    b = write_llama(tmp_path / "b", seed=2, config={"mark": "b"}, template="template of b")
    for like, mark in ((None, "a"), (str(b), "b")):
        fields = {"like": like} if like else {}
        _, config = merged(linear(str(a), str(b), **fields), tmp_path / f"out {mark}")
        assert config["mark"] == mark
        written = json.loads((tmp_path / f"out {mark}" / "tokenizer_config.json").read_text())
        assert written["chat_template"] == f"template of {mark}"
