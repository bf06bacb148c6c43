"""Names of real architectures, sorted into stacks, layers and kinds."""

from __future__ import annotations

import pytest

from weft.measure.places import Place, layer_label, places, stacks_of


def kinds(*names: str) -> list[str]:
    return [place.kind for place in places(names).values()]


def test_llama() -> None:
    found = places(
        ["model.embed_tokens.weight", "model.layers.10.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.bias",
         "model.layers.10.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    )  # fmt: skip
    assert list(found.values()) == [
        Place("", None, "embed_tokens"),
        Place("model.layers", 10, "q_proj"),
        Place("model.layers", 10, "q_proj.bias"),
        Place("model.layers", 10, "up_proj"),
        Place("", None, "norm"),
        Place("", None, "lm_head"),
    ]


def test_experts_are_one_kind() -> None:
    names = [f"model.layers.3.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(8) for w in (1, 2)]
    assert set(kinds(*names)) == {"w1", "w2"}
    assert {place.layer for place in places(names).values()} == {3}


def test_a_kind_is_as_long_as_it_needs() -> None:
    assert kinds("h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight") == ["attn.c_proj", "mlp.c_proj"]
    assert kinds("h.0.norm.weight", "norm.weight") == ["norm", "norm"]
    assert kinds("h.0.mlp.norm.weight", "norm.weight") == ["mlp.norm", "norm"]


def test_two_stacks_keep_their_layers_apart() -> None:
    found = places(["encoder.block.1.layer.0.SelfAttention.q.weight", "decoder.block.1.layer.0.SelfAttention.q.weight"])
    stacks = stacks_of(found.values())
    assert stacks == ["encoder.block", "decoder.block"]
    assert [layer_label(p, stacks) for p in found.values()] == ["encoder.block.1", "decoder.block.1"]
    assert len({p.kind for p in found.values()}) == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layer1.0.conv1.weight", Place("layer1", 0, "conv1")),
        ("params/layer_2/kernel", Place("params", 2, "kernel")),
        ("0.weight", Place("", 0, "weight")),
        ("w", Place("", None, "w")),
        ("weight", Place("", None, "weight")),
        ("", Place("", None, "")),
        ("a.٣.b", Place("", None, "b")),
        ("layers.0", Place("layers", 0, "weight")),
        ("h.0.attn.q_proj.lora_A.weight", Place("h", 0, "q_proj.lora_A")),
    ],
)
def test_names_of_all_sorts(name: str, place: Place) -> None:
    found = places([name])[name]
    assert (found.stack, found.layer) == (place.stack, place.layer)
    assert found.kind == place.kind
