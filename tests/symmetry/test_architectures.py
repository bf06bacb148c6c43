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
# shapes of the groups of one layer by kind; hidden is there once
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
    model_class, config = architectures.MODELS[name]()
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    if name == "t5":
        config.num_decoder_layers = 2
    config._experts_implementation = "eager"  # the others do not compute in float64
    torch.manual_seed(0)
    model = randomize(model_class(config))
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens).index_fill(1, torch.arange(3), 0)}
    if name == "t5":
        batch["decoder_input_ids"] = tokens[:, :7]
    if name == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    symmetry = find_symmetry(model)
    # norms of transformers compute in float32 whatever the model's type: sums in another order differ by 1e-7
    check(model, symmetry, batch, tolerance=1e-5)
    assert symmetry.unknown == ()
    return model, batch, symmetry


def kinds(symmetry: Symmetry) -> dict[str, Counter[tuple[int, ...]]]:
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for group in symmetry.groups:
        found.setdefault(group.kind, Counter())[symmetry.shape(group)] += 1
    return found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_groups_and_their_truth(name: str) -> None:
    model, _, symmetry = built(name)
    assert model.config.num_hidden_layers == 2
    expected = {
        kind: Counter({shape: shapes.count(shape) * (1 if kind == "hidden" else 2) for shape in shapes})
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
        "hidden": {(32,): 1}, "heads": {(4,): 2 + 2}, "head_dim": {(4, 8): 2 * 6}, "intermediate": {(48,): 4},
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


def test_experts_that_are_chosen_in_groups_permute_inside_of_them() -> None:
    """DeepSeek: groups of experts are chosen first; the router's correction, a buffer, follows."""
    import transformers

    config = transformers.DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, vocab_size=64, n_group=4,
        intermediate_size=48, n_routed_experts=8, num_experts_per_tok=2, topk_group=2, moe_intermediate_size=16,
        first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = randomize(transformers.DeepseekV3ForCausalLM(config))
    symmetry = find_symmetry(model)
    check(model, symmetry, {"input_ids": torch.arange(14).view(2, 7)}, tolerance=1e-5)
    assert symmetry.unknown == ()
    groups, experts = symmetry.of_kind("experts")
    assert (groups.size, symmetry.shape(experts)) == (4, (4, 2))
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in experts.tensors
    assert (4, 2, 16) in [symmetry.shape(g) for g in symmetry.of_kind("intermediate")]
    found = kinds(symmetry)  # latent attention: the latents, and heads with what has no position
    assert found["heads"] == {(4,): 2}
    assert found["head_dim"] == {(4, 6): 2, (4, 8): 2}


def test_outputs_of_another_kind_and_dead_code_freeze_nothing() -> None:
    """BART looks at the last hidden unit for its shape alone, and gives the encoder's states beside the logits."""
    import transformers

    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = randomize(transformers.BartForConditionalGeneration(config))
    symmetry = find_symmetry(model)
    ids = torch.arange(14).view(2, 7)
    check(model, symmetry, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}, tolerance=1e-5)
    assert kinds(symmetry) == {
        "hidden": {(32,): 1}, "heads": {(4,): 3}, "head_dim": {(4, 8): 6}, "intermediate": {(48,): 2},
    }  # fmt: skip


def test_a_folder_is_enough(tmp_path: Path) -> None:
    """From config.json alone, on the meta device, the same as from the live model."""
    model, _ = architectures.build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    assert find_symmetry(tmp_path) == find_symmetry(model)
    assert find_symmetry(str(tmp_path / "config.json")).groups
