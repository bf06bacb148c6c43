"""Architectures of transformers: the groups that are there, and that each leaves the function as it is."""

import copy
import importlib.util
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import check, outputs, randomize

pytest.importorskip("transformers")
from weft.symmetry import Symmetry, find_symmetry

_SPEC = importlib.util.spec_from_file_location(
    "architectures", Path(__file__).parents[1] / "calibrate" / "architectures.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
architectures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(architectures)

GQA = {"hidden": [(32,)], "key_value_heads": [(2,)], "query_heads": [(2, 2)], "head_dim": [(2, 8)]}
DECODER = {**GQA, "intermediate": [(48,)]}
EXPERTS = {**GQA, "experts": [(4,)], "intermediate": [(4, 16)]}
MHA = {"hidden": [(32,)], "heads": [(4,)], "intermediate": [(48,)]}
# of a model with 3 layers, or 4: shapes of the groups of one layer by kind; hidden is there once
EXPECTED: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "llama": DECODER,
    "qwen3": DECODER,
    "gemma3": DECODER,
    "mixtral": {**EXPERTS, "intermediate": [(4, 48)]},
    "qwen2_moe": {**EXPERTS, "intermediate": [(4, 16), (24,)]},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {**EXPERTS, "intermediate": [(4, 48)]},
    "gpt2": {**MHA, "intermediate": [(128,)], "head_dim": [(4, 8), (4, 8)]},
    "bert": {**MHA, "head_dim": [(4, 8), (4, 8)]},
    "bert_masked": {**MHA, "head_dim": [(4, 8), (4, 8)]},
    "modernbert": {**MHA, "head_dim": [(4, 8)]},
    "vit": {**MHA, "head_dim": [(4, 8), (4, 8)]},
}


@cache
def built(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], Symmetry]:
    """A randomised float64 model, a batch, and its symmetry after it held."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, batches = architectures.build(name, torch.float64)
    randomize(model)
    symmetry = find_symmetry(model)
    # norms of transformers compute in float32 whatever the model's type: sums in another order differ by 1e-7
    check(model, symmetry, batches[0], tolerance=1e-5)
    assert symmetry.unknown == ()
    return model, batches[0], symmetry


def kinds(symmetry: Symmetry) -> dict[str, Counter[tuple[int, ...]]]:
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for group in symmetry.groups:
        found.setdefault(group.kind, Counter())[symmetry.shape(group)] += 1
    return found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_groups_and_their_truth(name: str) -> None:
    model, _, symmetry = built(name)
    layers = model.config.num_hidden_layers
    expected = {
        kind: Counter({shape: shapes.count(shape) * (1 if kind == "hidden" else layers) for shape in shapes})
        for kind, shapes in EXPECTED[name].items()
    }
    if name == "bert":  # its hidden states are an output
        del expected["hidden"]
        assert "an output of the model" in symmetry.why_frozen("encoder.layer.0.output.dense.weight", 0)
    assert kinds(symmetry) == expected


def test_t5() -> None:
    """Heads of self-attention share their positions with those of all layers; those of cross-attention do not."""
    _, _, symmetry = built("t5")
    assert kinds(symmetry) == {
        "hidden": {(32,): 1}, "heads": {(4,): 2 + 3}, "head_dim": {(4, 8): 2 * 9}, "intermediate": {(48,): 6},
    }  # fmt: skip
    assert {a for a, first in symmetry.aliases.items() if first == "shared.weight"} == {
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip


def test_what_is_frozen_in_a_decoder_says_why() -> None:
    model, batch, symmetry = built("llama")
    attention = "model.layers.0.self_attn."
    assert set(symmetry.why_frozen(attention + "k_proj.weight", 0)) == {"constant model.rotary_emb.inv_freq"}
    assert symmetry.why_frozen(attention + "v_proj.weight", 0) == ()
    assert symmetry.why_frozen("lm_head.weight", 0) == ("an output of the model",)
    assert symmetry.why_frozen("model.embed_tokens.weight", 0)[0].startswith("entries of a table")
    assert [f.tensor for f in symmetry.frozen if f.axis == 1] == []
    given = find_symmetry(model, batch)  # with a mask of padding: the same
    assert given.groups == symmetry.groups


def test_queries_and_keys_inside_a_head_are_not_free_under_rotary_positions() -> None:
    """Planted by hand: the permutation that the symmetry refuses does change the outputs."""
    model, batch, symmetry = built("llama")
    model = copy.deepcopy(model)
    before = outputs(model, batch)
    swap = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])  # pairs of rotary halves move together, and still it is false
    state = model.state_dict()
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        key = f"model.layers.0.self_attn.{name}.weight"
        state[key] = state[key].view(heads, 8, 32)[:, swap].reshape(heads * 8, 32)
        assert not any(m.stride == 1 for g in symmetry.groups for m in g.members if m.tensor == key and m.axis == 0)
    model.load_state_dict(state)
    assert (outputs(model, batch) - before).abs().max() > 1e-3


def test_experts_permute_with_their_router() -> None:
    _, _, symmetry = built("qwen2_moe")
    group = symmetry["model.layers.0.mlp.experts"]
    assert [(m.tensor.rpartition("mlp.")[2], m.axis) for m in group.members] == [
        ("gate.weight", 0), ("experts.gate_up_proj", 0), ("experts.down_proj", 0),
    ]  # fmt: skip
    inside = symmetry["model.layers.0.mlp.experts.intermediate"]
    assert inside.within == ("model.layers.0.mlp.experts",)
    assert [(m.tensor.rpartition(".")[2], m.axis, m.start) for m in inside.members] == [
        ("gate_up_proj", 1, 0), ("gate_up_proj", 1, 16), ("down_proj", 2, 0),
    ]  # fmt: skip


def test_a_folder_is_enough(tmp_path: Path) -> None:
    """From config.json alone, on the meta device, the same as from the live model."""
    model, _ = architectures.build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    assert find_symmetry(tmp_path) == find_symmetry(model)
    assert find_symmetry(str(tmp_path / "config.json")).groups
