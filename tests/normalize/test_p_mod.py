import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.errors import RecipeError, ShapeError
from weft.normalize import MixtureOfDepths, progressive_ratios, select_tokens, tanh_norm


class Attending(nn.Module):
    """A block whose tokens see each other: x + attention, then an MLP branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 8)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + self.attention(x, x, x, need_weights=False)[0]
        return stream, self.mlp(stream).relu()

    def forward(self, x: Tensor) -> Tensor:
        stream, branch = self.parts(x)
        return stream + branch


def layer(**options: object) -> MixtureOfDepths:
    torch.manual_seed(0)
    return MixtureOfDepths(Attending(), 8, **options).double()  # type: ignore[arg-type]


def routed(made: MixtureOfDepths) -> MixtureOfDepths:
    with torch.no_grad():
        made.router.weight.normal_()
        made.router.bias.normal_()
    return made


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)


def test_dense_and_fresh_it_is_the_block(x: Tensor) -> None:
    made = layer(ratio=1.0)
    torch.testing.assert_close(made(x), made.block(x))


def test_fresh_it_leaves_skipped_tokens_alone_and_keeps_the_first(x: Tensor) -> None:
    made = layer(ratio=0.4)
    y = made(x)
    assert torch.equal(y[:, 4:], x[:, 4:])
    torch.testing.assert_close(y[:, :4], made.block(x[:, :4]))


def test_against_a_loop_over_tokens(x: Tensor) -> None:
    targets = torch.zeros(2, 10, dtype=torch.bool)
    targets[0, 2:8] = True
    targets[1, [0, 1, 3, 5, 8, 9]] = True
    for parts in (None, Attending.parts):
        made = routed(layer(ratio=0.5, parts=parts))
        y = made(x, targets, target_count=6)
        for sample in range(2):
            scores = made.router(x[sample]).squeeze(-1).tolist()
            ranked = sorted((t for t in range(10) if targets[sample, t]), key=lambda t: -scores[t])[:3]
            kept = sorted(ranked + [t for t in range(10) if not targets[sample, t]])
            inner = x[sample : sample + 1, kept]
            stream, branch = made.block.parts(inner) if parts else (inner, made.block(inner) - inner)
            for t in range(10):
                gate = 0.2 * np.tanh(scores[t]) + 1 if targets[sample, t] else 1.0
                if t in kept:
                    place = kept.index(t)
                    expected = stream[0, place] + gate * branch[0, place]
                else:
                    expected = gate * x[sample, t]
                torch.testing.assert_close(y[sample, t], expected)


def test_the_router_learns_from_skipped_tokens_too(x: Tensor) -> None:
    made = layer(ratio=0.4)
    made(x)[:, 4:].square().sum().backward()  # only skipped tokens are looked at
    assert float(made.router.weight.grad.abs().sum()) > 0
    assert all(p.grad is None or not p.grad.any() for p in made.block.parameters())


def test_other_samples_do_not_matter(x: Tensor) -> None:
    made = routed(layer(ratio=0.3))
    torch.testing.assert_close(made(x)[:1], made(x[:1]))


def test_gradients_and_compilation(x: Tensor) -> None:
    made = routed(layer(ratio=0.5))
    assert torch.autograd.gradcheck(made, (x[:1, :4].detach().requires_grad_(),))
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, backend="aot_eager")
    targets = torch.arange(10).expand(2, 10) < 6
    torch.testing.assert_close(compiled(x, targets, target_count=6), made(x, targets, target_count=6))


def test_inputs_of_each_token_go_along(x: Tensor) -> None:
    class Marks(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
            self.seen = position_ids
            return x + position_ids.unsqueeze(-1)

    made = MixtureOfDepths(Marks(), 8, ratio=0.5).double()
    with torch.no_grad():
        made.router.weight[0, 0] = 1.0
    positions = torch.arange(10).expand(2, 10)
    y = made(x, position_ids=positions)
    kept = select_tokens(made.router(x).squeeze(-1), 5)
    assert torch.equal(made.block.seen, kept)
    assert int((y != x * tanh_norm(made.router(x))).any(-1).sum()) == 2 * 5  # the kept ones


def test_a_real_decoder_layer_attends_causally_among_the_kept_tokens() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    block, x = LlamaDecoderLayer(config, 0).eval(), torch.randn(2, 6, 8)
    positions = torch.arange(6).unsqueeze(0)
    embeddings = LlamaRotaryEmbedding(config)(x, positions)
    made = routed(MixtureOfDepths(block, 8, ratio=0.5)).eval()
    y = made(x, position_embeddings=embeddings, position_ids=positions)
    gates, kept = tanh_norm(made.router(x)), select_tokens(made.router(x).squeeze(-1), 3)
    for sample in range(2):
        chosen = kept[sample]
        inner = x[sample : sample + 1, chosen]
        angles = tuple(e[:1, chosen] for e in embeddings)
        added = block(inner, position_embeddings=angles)[0] - inner[0]
        expected = (x * gates)[sample].clone()
        expected[chosen] = x[sample, chosen] + gates[sample, chosen] * added
        torch.testing.assert_close(y[sample], expected)
    later = x.clone()
    later[:, -1] = 0
    dense = MixtureOfDepths(block, 8, ratio=1.0)
    first, second = (dense(v, position_embeddings=embeddings) for v in (x, later))
    torch.testing.assert_close(first[:, :-1], second[:, :-1])


def test_saturated_scores_are_not_ties() -> None:
    logits = torch.tensor([[30.0, 50.0, 40.0]])
    assert tanh_norm(logits).unique().numel() == 1
    assert select_tokens(logits, 2).tolist() == [[1, 2]]
    assert select_tokens(-logits, 2).tolist() == [[0, 2]]
    assert select_tokens(torch.zeros(1, 4), 0).shape == (1, 0)


def test_the_schedule_of_32_layers() -> None:
    ratios = progressive_ratios(32)
    assert ratios[:8] == (1.0,) * 8
    assert all(r < 1 for r in ratios[8:])
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert min(ratios) == 0.15
    assert sum(ratios) / 32 == pytest.approx(0.5375, abs=5e-5)  # the share of the cache that the paper keeps
    assert progressive_ratios(1) == (1.0,)
    assert progressive_ratios(3, shift=0.4, dense_above=0.9, least=0.0) == pytest.approx((0.9, 0.4, 0.0))


def test_bad_requests(x: Tensor) -> None:
    with pytest.raises(RecipeError, match="target_count"):
        layer()(x, torch.ones(2, 10, dtype=torch.bool))
    with pytest.raises(RecipeError, match="at least one layer"):
        progressive_ratios(0)
    with pytest.raises(ShapeError, match="8 features"):
        layer()(x[..., :4])
