"""Choosing layers."""

import pytest
import torch
from torch import nn

import weft
from weft.adapt import LoRA
from weft.errors import RecipeError
from weft.function.where import matches, most_specific, nearest_names, output_heads, texts
from weft.normalize import SigmaReparam, WeightStandardization

LINEAR = nn.Linear(4, 4)
NAME = "model.layers.10.self_attn.q_proj"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm, self.conv = Attention(), nn.LayerNorm(4), nn.Conv1d(4, 4, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (NAME, True),
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("proj", False),  # a suffix is whole components
        ("*.q_proj", True),
        ("model.layers.1*.q_proj", True),
        ("model.layers.1.*", False),
        ("layers.*.q_proj", False),  # a glob is the whole name
        ("*.[qv]_proj", True),
        ("re:.*\\.q_proj", True),
        ("re:q_proj", False),
        ("re:model\\.layers\\.(1|10)\\..*", True),
        ("all-linear", True),
        ("*", True),
        (nn.Linear, True),
        (nn.Conv1d, False),
        (nn.Module, True),
        (lambda name, module: "10" in name, True),
        (lambda name, module: False, False),
        (["k_proj", "q_proj"], True),
        (("k_proj", nn.Linear), True),
        ({"k_proj"}, False),
        ([], False),
    ],
)
def test_a_selector_chooses(selector: object, chosen: bool) -> None:
    assert matches(selector, NAME, LINEAR) is chosen


@pytest.mark.parametrize("selector", [7, None, [3.5], ["q_proj", None]])
def test_what_is_no_selector_is_refused(selector: object) -> None:
    with pytest.raises(RecipeError, match="chooses no layers"):
        matches(selector, "other", LINEAR)


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'re:\(' is not a regular expression"):
        matches("re:(", NAME, LINEAR)


def test_the_most_specific_wins_whatever_the_order() -> None:
    anything = lambda name, module: True  # noqa: E731
    ranked = ["*", "all-linear", anything, nn.Module, nn.Linear, "*proj", "*.q_proj", "*.self_attn.q_proj", NAME]
    for i in range(1, len(ranked)):
        few = ranked[: i + 1]
        assert most_specific(few, NAME, LINEAR) is ranked[i]
        assert most_specific(few[::-1], NAME, LINEAR) is ranked[i]
    assert most_specific(["*.v_proj"], NAME, LINEAR) is None


def test_of_equals_the_first_wins_and_a_list_is_as_specific_as_its_best_match() -> None:
    assert most_specific(["*q_proj", "q_proj*", "q_proj"], NAME, LINEAR) == "*q_proj"
    few = ("*", NAME)
    assert most_specific(["*.self_attn.q_proj", few], NAME, LINEAR) is few
    assert most_specific(["*.q_proj", ("*", "model.other")], NAME, LINEAR) == "*.q_proj"


def test_expressions_count_letters_and_not_their_syntax() -> None:
    assert most_specific(["re:.*\\.\\w+\\.q_proj", "*.attn*.q_proj", "*n.q_proj"], NAME, LINEAR) == "*n.q_proj"


def test_configurations_by_pattern() -> None:
    model = Model()
    rules = {
        "*": None,
        nn.Linear: LoRA(rank=2),
        "*.v_proj": LoRA(rank=3),
        "layers.1.self_attn.v_proj": WeightStandardization(),
        nn.Conv1d: SigmaReparam(),
    }
    report = weft.parametrize_(model, rules, ignore="lm_head")
    assert report.touched == {
        "layers.0.self_attn.q_proj.weight": LoRA(rank=2),
        "layers.0.self_attn.v_proj.weight": LoRA(rank=3),
        "layers.1.self_attn.q_proj.weight": LoRA(rank=2),
        "layers.1.self_attn.v_proj.weight": WeightStandardization(),
        "layers.0.conv.weight": SigmaReparam(),
        "layers.1.conv.weight": SigmaReparam(),
    }
    assert report.ignored == ["embed.weight", "lm_head.weight"]
    assert report.untouched == []  # norms have one axis and are no candidates
    assert list(weft.functions(model)) == [n for n, _ in plain_names(Model()) if n in report.touched]


def plain_names(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.named_parameters())


def test_where_narrows_a_mapping() -> None:
    report = weft.parametrize_(Model(), {nn.Linear: LoRA(rank=2), nn.Conv1d: LoRA(rank=1)}, where="layers.1.*")
    assert set(report.touched.values()) == {LoRA(rank=2), LoRA(rank=1)}
    assert all(n.startswith("layers.1.") for n in report.touched)
    assert "layers.0.conv.weight" in report.untouched


def test_patterns_that_chose_nothing_are_told() -> None:
    report = weft.parametrize_(Model(), LoRA(rank=2), where=["q_proj", "v_porj"], ignore="lm_haed")
    assert report.unmatched == ["v_porj", "lm_haed"]
    assert "no layer matched 'v_porj', 'lm_haed'" in str(report)


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("*.q_porj", "Did you mean q_proj"),
        ("layers.*.self_atn.q_proj", " or layers.0.self_attn.q_proj or "),
        (["v_porj"], "Did you mean v_proj"),
        ("re:.*q_porj$", "Did you mean q_proj"),
        (nn.Bilinear, "types are Conv1d, Embedding, Linear"),
        ("xyzzy", "Names end in conv, embed, lm_head, q_proj, v_proj"),
    ],
)
def test_nothing_matched(where: object, hint: str) -> None:
    model = Model()
    with pytest.raises(RecipeError) as caught:
        weft.parametrize_(model, LoRA(rank=2), where=where)
    assert hint in str(caught.value)
    assert "8 layers have one" in str(caught.value)
    assert weft.functions(model) == {}


def test_everything_ignored_is_nothing_chosen() -> None:
    with pytest.raises(RecipeError, match="1 of these are ignored"):
        weft.parametrize_(Model(), LoRA(rank=2), where="lm_head", ignore="*head")
    with pytest.raises(RecipeError, match="No layer with a tensor 'kernel'"):
        weft.parametrize_(Model(), LoRA(rank=2), name="kernel")
    with pytest.raises(RecipeError, match="0 layers have one"):
        weft.parametrize_(nn.LayerNorm(3), LoRA(rank=2))


def test_texts_and_hints_of_nested_lists() -> None:
    assert list(texts([["a", nn.Linear], "b", lambda n, m: True])) == ["a", "b"]
    assert nearest_names("q", []) == ""


def test_the_model_itself_is_a_layer() -> None:
    layer = nn.Linear(3, 2)
    assert list(weft.parametrize_(layer, LoRA(rank=1)).touched) == ["weight"]
    assert list(weft.parametrize_(layer, LoRA(rank=1), where=nn.Linear).touched) == ["weight"]
    assert [len(f) for f in weft.functions(layer).values()] == [2]


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("meta"):
        if kind == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **size))
        if kind == "gpt2":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
        if kind == "bert":  # its head has a name that no list of names holds
            return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=11, **size))
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, **size))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "classifier"])
def test_all_linear_is_what_peft_takes(kind: str) -> None:
    peft = pytest.importorskip("peft")
    ours = weft.parametrize_(hugging_face(kind), LoRA(rank=1), where="all-linear")
    task = "SEQ_CLS" if kind == "classifier" else None
    theirs = peft.get_peft_model(
        hugging_face(kind),
        # without this, PEFT notices the transposed layers of GPT-2 itself and warns
        peft.LoraConfig(r=1, target_modules="all-linear", task_type=task, fan_in_fan_out=kind == "gpt2"),
    )
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert {n.removesuffix(".weight") for n in ours.touched} == adapted
    assert adapted


def test_output_heads() -> None:
    model = hugging_face("bert")
    assert output_heads(model) == {id(model.cls.predictions.decoder)}
    assert output_heads(nn.Linear(1, 1)) == set()


def test_suffixes_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    names = ["q_proj", "mlp.up_proj"]
    ours = weft.parametrize_(hugging_face("llama"), LoRA(rank=1), where=names)
    theirs = peft.get_peft_model(hugging_face("llama"), peft.LoraConfig(r=1, target_modules=names))
    assert {n.removesuffix(".weight") for n in ours.touched} == set(theirs.targeted_module_names)
