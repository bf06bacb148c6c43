"""mergekit's files as recipes: what each field becomes."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent
from typing import Any

import pytest
import yaml

from weft.errors import RecipeError
from weft.recipe.mergekit import translate
from weft.recipe.mergekit_methods import PARAMETERS, find_row
from weft.recipe.schema import Recipe, Step, evaluate


def read(text: str) -> Recipe:
    return translate(list(yaml.safe_load_all(dedent(text))))


def only(text: str) -> Step:
    (step,) = read(text).steps
    return step


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as error:
        read(text)
    return str(error.value)


SLERP = """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
DARE = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for the base
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
random_seed: 0
"""
STACK = """
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
"""


def test_slerp_with_gradients() -> None:
    step = only(SLERP)
    assert (step.method, step.base) == ("slerp", "OpenPipe/mistral-ft-optimized-1218")
    (cut,) = step.slices
    assert [(s.model, s.layers) for s in cut.sources] == [("mlabonne/NeuralHermes-2.5-Mistral-7B", (0, 32))]
    assert cut.base_layers == (0, 32)
    t = step.parameters["t"]
    assert evaluate(t, "model.layers.4.mlp.up_proj.weight", 0.25) == 0.5
    assert evaluate(t, "model.layers.4.self_attn.q_proj.weight", 1.0) == 1.0
    assert evaluate(t, "model.norm.weight", 0.0) == 0.5
    assert read(SLERP).output.dtype == "bfloat16"


def test_dare_with_the_base_among_the_models() -> None:
    recipe = read(DARE)
    (step,) = recipe.steps
    assert step.base == "mistralai/Mistral-7B-v0.1"
    assert [s.model for s in step.models] == ["samir-fama/SamirGPT-v1", "abacusai/Slerp-CM-mist-dpo"]
    assert step.models[0].parameters == {"density": 0.53, "weight": 0.4}
    assert step.method == "mergekit/dare_ties"
    assert step.parameters == {}
    assert any("int8_mask" in n for n in recipe.notes)
    assert any("random_seed" in n for n in recipe.notes)


def test_stacked_layers() -> None:
    step = only(STACK)
    assert step.method == "passthrough"
    assert step.base is None
    assert [[(s.model, s.layers) for s in cut.sources] for cut in step.slices] == [
        [("psmathur/orca_mini_v3_13b", (0, 24))],
        [("garage-bAInd/Platypus2-13B", (20, 40))],
    ]


def test_ties_with_filters_and_gradients() -> None:
    step = only(
        """
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters: {density: [1, 0.7, 0.1], weight: 1.0}
          - model: garage-bAInd/Platypus2-13B
            parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
          - model: WizardLM/WizardMath-13B-V1.0
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: TheBloke/Llama-2-13B-fp16
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """
    )
    assert step.method == "mergekit/ties"
    assert step.parameters == {"normalize": True}
    assert evaluate(step.models[1].parameters["weight"], "x", 0.5) == 0.5
    assert evaluate(step.models[2].parameters["weight"], "a.mlp.b", 0) == 0.5
    assert evaluate(step.models[2].parameters["weight"], "a.norm", 0) == 0


def test_a_base_that_the_method_has_no_use_for_is_a_model() -> None:
    step = only("{models: [{model: a, parameters: {weight: 2}}], merge_method: linear, base_model: b}")
    assert [(s.model, s.parameters) for s in step.models] == [("a", {"weight": 2.0}), ("b", {})]
    assert (step.base, step.like) == (None, "b")
    listed = only("{models: [{model: a}, {model: b}], merge_method: linear, base_model: b, parameters: {weight: 1}}")
    assert [s.model for s in listed.models] == ["a", "b"]


def test_the_base_alone_stays() -> None:
    cut = "[{sources: [{model: b, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [2, 4]}]}]"
    step = only(f"{{slices: {cut}, merge_method: task_arithmetic, base_model: b, parameters: {{weight: 1}}}}")
    assert [[s.model for s in c.sources] for c in step.slices] == [["b"], ["a"]]
    assert step.slices[0].base_layers == (0, 2)
    assert step.slices[1].base_layers is None


def test_a_slice_may_have_a_base_of_its_own() -> None:
    sources = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]"
    step = only(
        f"{{slices: [{{sources: {sources}, base_model: a, residual_weight: 0.5}}], merge_method: slerp, "
        "base_model: b, parameters: {t: 0.5}}"
    )
    assert step.slices[0].base == "a"
    assert [s.model for s in step.slices[0].sources] == ["b"]
    assert step.slices[0].base_layers == (0, 2)
    assert step.base == "b"


def test_parameters_stand_on_four_levels() -> None:
    step = only(
        """
        modules:
          text_decoder:
            slices:
              - sources:
                  - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
                  - {model: b, layer_range: [0, 2]}
                parameters: {weight: 2}
            parameters: {weight: 3}
          vision_tower:
            models: [{model: a}, {model: b, parameters: {weight: 5}}]
        merge_method: linear
        parameters: {weight: 4}
        """
    )
    text, vision = step.modules["text_decoder"], step.modules["vision_tower"]
    assert text.slices[0].sources[0].parameters == {"weight": 1.0}
    assert text.slices[0].parameters == {"weight": 2.0}
    assert text.parameters == {"weight": 3.0}
    assert step.parameters == {"weight": 4.0}
    assert vision.models[1].parameters == {"weight": 5.0}


def test_numbers_that_yaml_reads_as_texts() -> None:
    step = only("{models: [a, b], merge_method: nearswap, base_model: a, parameters: {t: 1e-3}}")
    assert step.parameters == {"t": 1e-3}


def test_one_condition_without_a_list() -> None:
    step = only("{models: [a], merge_method: passthrough, parameters: {scale: {filter: o_proj, value: 0.0}}}")
    assert evaluate(step.parameters["scale"], "l.0.o_proj.weight", 0) == 0
    assert evaluate(step.parameters["scale"], "l.0.q_proj.weight", 0) is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", "org/name"),
        ("org/name@abc123+org/lora@v2", "org/name@abc123+org/lora@v2"),
        ({"model": {"path": "org/name", "revision": "abc"}}, "org/name@abc"),
        ({"model": "m", "lora": {"path": "l"}, "override_architecture": "X"}, "m+l"),
        ({"model": {"path": "m"}, "lora": {"path": "l", "revision": "r"}}, "m+l@r"),
    ],
)
def test_model_references(model: Any, expected: str) -> None:
    recipe = translate([{"merge_method": "passthrough", "models": [{"model": model}]}])
    assert recipe.steps[0].models[0].model == expected


def test_documents_are_stages() -> None:
    recipe = read(
        """
        models: [{model: first}, {model: first+lora}, {model: second@v1}]
        merge_method: linear
        parameters: {weight: 1}
        tokenizer_source: first
        ---
        name: second
        models: [{model: first}, {model: x}]
        merge_method: slerp
        base_model: first
        parameters: {t: 0.3}
        chat_template: chatml
        ---
        name: first
        models: [{model: a, parameters: {weight: 1}}]
        merge_method: task_arithmetic
        base_model: b
        dtype: float32
        out_dtype: bfloat16
        tokenizer: {source: union}
        ---
        name: unused
        models: [a]
        merge_method: passthrough
        """
    )
    assert [s.name for s in recipe.steps] == ["first", "second", ""]
    assert [s.model for s in recipe.steps[2].models] == ["@first", "@first+lora", "@second"]
    assert recipe.steps[1].base == "@first"
    assert recipe.steps[0].tokenizer is not None
    assert recipe.steps[0].tokenizer.source == "union"
    assert recipe.steps[1].chat_template == "chatml"
    assert recipe.output.tokenizer is not None
    assert recipe.output.tokenizer.source == "@first"
    assert recipe.output.dtype == "bfloat16", "as the stage that it starts from"
    assert any("unused" in n for n in recipe.notes)


def test_without_an_unnamed_document_the_last_one_counts() -> None:
    recipe = read(
        "{name: one, models: [a], merge_method: passthrough}\n---\n{name: two, models: [one], merge_method: passthrough}"
    )
    assert [s.name for s in recipe.steps] == ["one", "two"]


def test_tokenizers() -> None:
    recipe = read(
        """
        models: [{model: a}, {model: b}]
        merge_method: linear
        base_model: a
        parameters: {weight: 1}
        tokenizer:
          tokens:
            <|im_start|>: {source: b}
            <|special|>: {source: {model: {path: a}}, force: true}
            <|renamed|>:
              source: {kind: model_token, model: {model: b}, token: <|original|>}
            <|empty|>: {source: {kind: zero}}
            <|kept|>:
          pad_to_multiple_of: 64
        chat_template: auto
        """
    )
    tokenizer = recipe.output.tokenizer
    assert tokenizer is not None
    assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 64)
    assert {t: (s.source, s.force) for t, s in tokenizer.tokens.items()} == {
        "<|im_start|>": ("b", False),
        "<|special|>": ("a", True),
        "<|renamed|>": ({"kind": "model_token", "model": "b", "token": "<|original|>"}, False),
        "<|empty|>": ({"kind": "zero"}, False),
        "<|kept|>": (None, False),
    }
    assert recipe.output.chat_template == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{models: [a, b], merge_method: task_swapping}", ("task_swapping",)),
        ("{models: [a, b], merge_method: tias, base_model: a}", ("tias", "ties")),
        ("{modles: [a, b], merge_method: linear}", ("modles", "Did you mean modules or models?")),
        ("{models: [{modl: a}], merge_method: linear}", ("modl", "model")),
        ("{models: [{model: a, weight: 1}], merge_method: linear}", ("weight", "outside of parameters")),
        ("{models: [a], merge_method: linear, parameters: {wieght: 1}}", ("wieght", "Did you mean weight")),
        ("{models: [a], merge_method: linear, parameters: [1]}", ("must be a mapping",)),
        ("{models: [a], slices: [b], merge_method: linear}", ("models and slices",)),
        ("{merge_method: linear}", ("none",)),
        ("{models: a, merge_method: linear}", ("models must be a list",)),
        ("{models: [a], merge_method: linear}\n---\n{models: [b]}", ("a name of its own",)),
        ("{models: [a], merge_method: linear}\n---\n{name: b, models: [b]}", ("no merge_method",)),
        (
            "{name: x, models: [y], merge_method: linear}\n---\n{name: y, models: [x], merge_method: linear}",
            ("circle", "y -> x -> y"),
        ),
        ("{models: [a], merge_method: linear, tokenizer: union}", ("tokenizer must be a mapping",)),
        ("{models: [a], merge_method: linear, tokenizer: {source: a}, tokenizer_source: a}", ("not both",)),
        (
            "{models: [a], merge_method: linear, tokenizer: {tokens: {x: {source: {kind: token}}}}}",
            ("kind: model_token",),
        ),
        ("{slices: [{sources: [{model: a}]}], merge_method: passthrough}", ("layers",)),
        ("{models: [a], merge_method: linear, parameters: {weight: [{filtr: x, value: 1}]}}", ("filtr",)),
        ("{models: [{model: 3}], merge_method: linear}", ("A model is a path",)),
    ],
)
def test_what_is_wrong_is_named(text: str, words: tuple[str, ...]) -> None:
    message = refused(text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{models: [{model: a, layer_range: [0, 2]}], merge_method: passthrough}", "layer_range"),
        ("{models: [a, b], merge_method: linear, parameters: {weight: 1, density: 0.5}}", "density has no effect"),
        ("{models: [a], merge_method: ties, base_model: b, parameters: {weight: 1, rescale: false}}", ""),
        ("{models: [{model: a, parameters: {weight: 1, normalize: true}}], merge_method: linear}", "normalize counts"),
        ("{models: [a, b], merge_method: linear}", "no weight is given"),
        ("{models: [a, b], merge_method: karcher, parameters: {weight: 3}}", "weight has no effect"),
        ("{models: [a], merge_method: linear, parameters: {weight: 1}, write_readme: x}", "write_readme"),
    ],
)
def test_what_is_ignored_is_said(text: str, words: str) -> None:
    notes = read(text).notes
    assert len(notes) == (1 if words else 0), notes
    assert not words or words in notes[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_method_of_mergekit_runs_with_its_defaults(name: str) -> None:
    row = find_row(name)
    document: dict[str, Any] = {"merge_method": name, "models": ["a", "b"][: row.models[1]]}
    if row.base == "required":
        document["base_model"] = "c"
    step = translate([document]).steps[0]
    parameters = row.parameters
    for key, default in PARAMETERS[name].items():
        if default is None:
            continue
        own = next(p for p in parameters.values() if key in (p.key, p.per_model))
        assert step.parameters.get(key, own.default) == default


def test_mergekits_methods_and_parameters_are_those_of_the_table() -> None:
    pytest.importorskip("mergekit")
    from mergekit.merge_methods import registered_methods  # type: ignore[attr-defined]
    from mergekit.merge_methods.base import MISSING

    ignored = {"int8_mask"}
    without_effect = {"task_arithmetic": {"density", "rescale"}}
    for method in registered_methods():
        name = method.spec.name
        theirs = {p.name: None if p.default is MISSING else p.default for p in method.spec.parameters}
        for key in ignored | without_effect.get(name, set()):
            theirs.pop(key, None)
        if name == "passthrough":
            theirs["scale"] = 1.0
        assert PARAMETERS[name] == theirs, name
    assert set(PARAMETERS) == {m.spec.name for m in registered_methods()}


def test_methods_that_mergekit_lacks_can_be_used_too() -> None:
    assert "pcb" not in PARAMETERS
    step = only("{models: [a, b], merge_method: pcb, base_model: c, parameters: {density: 0.1}}")
    assert step.method == "pcb"
    assert step.parameters == {"density": 0.1}


def test_a_file_is_read_without_torch() -> None:
    code = (
        "import sys; from weft.recipe.mergekit import translate\n"
        "translate([{'merge_method': 'ties', 'models': ['a'], 'base_model': 'b'}])\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
