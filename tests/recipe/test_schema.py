"""The fields of a recipe: what is refused and how, and how parameters are evaluated."""

from __future__ import annotations

from typing import Any

import pytest

from weft.errors import RecipeError
from weft.recipe.read import read_recipe, validate
from weft.recipe.schema import Conditional, Recipe, Step, evaluate, step_models


def step(**fields: Any) -> dict[str, Any]:
    return {"method": "linear", "models": ["a", "b"], **fields}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"steps": [step(modles=["a"])]}, ("steps.0.modles", "Did you mean modules or models?")),
        ({"steps": [step()], "ouptut": {}}, ("ouptut", "Did you mean output?")),
        ({"steps": [step()], "output": {"dtpye": "float32"}}, ("output.dtpye", "Did you mean dtype?")),
        ({"steps": [step(tokenizer={"sources": "base"})]}, ("tokenizer.sources", "Did you mean source?")),
        ({"steps": [step(models=[{"model": "a", "weight": 1}])]}, ("there is no such field",)),
        ({"steps": []}, ("steps", "at least 1")),
        ({"steps": [{"method": "linear"}]}, ("one of models, slices and modules",)),
        ({"steps": [step(slices=[{"sources": [{"model": "a", "layers": [0, 1]}]}])]}, ("one of models",)),
        ({"steps": [step(missing="ignore")]}, ("missing", "'error', 'skip' or 'copy'")),
        ({"steps": [step(models=["@first", "b"])]}, ("step 1 names @first", "none so far")),
        ({"steps": [step(name="x"), step(models=["@y"])]}, ("@y", "@x")),
        ({"steps": [step(name="x"), step(name="x")]}, ("two steps are called 'x'",)),
        ({"steps": [step(like="@later"), step(name="later")]}, ("@later",)),
        ({"steps": [step()], "output": {"tokenizer": {"pad_to_multiple_of": 0}}}, ("pad_to_multiple_of",)),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as error:
        validate(data)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"model": "a", "layers": [2, 2]}], "first < past_last"),
        ([{"model": "a", "layers": [-1, 2]}], "first < past_last"),
        ([{"model": "a", "layers": 3}], "[first, past_last]"),
        ([{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 3]}], "equally many layers"),
    ],
)
def test_slices(sources: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate({"steps": [{"method": "linear", "slices": [{"sources": sources}]}]})
    assert words in str(error.value)


def test_the_base_of_a_slice_has_as_many_layers() -> None:
    cut = {"sources": [{"model": "a", "layers": [0, 2]}], "base": "b", "base_layers": [1, 4]}
    with pytest.raises(RecipeError, match="equally many layers"):
        validate({"steps": [{"method": "ties", "slices": [cut]}]})


@pytest.mark.parametrize(
    "source", [{"kind": "token"}, {"kind": "model_token", "model": "a"}, {"kind": "zero", "model": "a"}, {"model": "a"}]
)
def test_token_sources_have_three_forms(source: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="kind: model_token"):
        validate({"steps": [step(tokenizer={"tokens": {"<x>": {"source": source}}})]})


def test_scalars_keep_their_kind() -> None:
    parameters = {"a": True, "b": 1, "c": "text", "d": [True, False], "e": [1, 0], "f": ["x", "y"], "g": "1e-5"}
    found = Step.model_validate(step(parameters=parameters)).parameters
    assert found["a"] is True
    assert isinstance(found["b"], float)
    assert found["d"] == [True, False]
    assert all(isinstance(v, bool) for v in found["d"])
    assert found["e"] == [1.0, 0.0]
    assert all(isinstance(v, float) for v in found["e"])
    assert (found["c"], found["f"], found["g"]) == ("text", ["x", "y"], 1e-5)


@pytest.mark.parametrize(
    ("setting", "depth", "expected"),
    [
        (0.3, 0.9, 0.3),
        (True, 0.0, True),
        ("text", 1.0, "text"),
        ([2.0], 0.7, 2.0),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 1.0, 0.0], 0.5, 1.0),
        ([0.0, 1.0, 0.0], 0.75, 0.5),
        ([1.0, 2.0, 4.0], 1.0, 4.0),
        (["x", "y", "z"], 0.49, "x"),
        (["x", "y", "z"], 0.5, "y"),
        (["x", "y", "z"], 1.0, "z"),
        ([True, False], 0.9, True),
        ([True, False], 1.0, False),
    ],
)
def test_values_over_depth(setting: Any, depth: float, expected: Any) -> None:
    assert evaluate(setting, "any", depth) == expected


def test_the_first_filter_that_matches_wins() -> None:
    cases = [
        Conditional(filter="mlp.up", value=1),
        Conditional(filter="mlp", value=[2, 4]),
        Conditional(filter="attn", value=5),
    ]
    assert [evaluate(cases, n, 0.5) for n in ("l.mlp.up_proj", "l.mlp.down", "l.attn.q", "norm")] == [1, 3, 5, None]
    assert evaluate([*cases, Conditional(filter="*", value=6)], "norm", 0) == 6
    assert evaluate([*cases, Conditional(value=7)], "norm", 0) == 7


def test_models_are_listed_once_bases_last() -> None:
    cuts = [
        {"sources": [{"model": m, "layers": [0, 1]} for m in ("a", "b")], "base": "c"},
        {"sources": [{"model": "b", "layers": [1, 2]}]},
    ]
    assert step_models(Step.model_validate({"method": "ties", "slices": cuts, "base": "a"})) == ["a", "b", "c"]
    modules = {"x": {"models": ["m"]}, "y": {"slices": cuts}}
    assert step_models(Step.model_validate({"method": "ties", "modules": modules, "base": "z"})) == list("mabcz")


def test_a_recipe_survives_json() -> None:
    recipe = validate({"steps": [step(parameters={"weight": [{"filter": "x", "value": [1, 2]}, {"value": 0.5}]})]})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_python_data_is_a_recipe() -> None:
    recipe, written = read_recipe({"steps": [step()]})
    assert [s.model for s in recipe.steps[0].models] == ["a", "b"]
    assert written == {"steps": [step()]}
