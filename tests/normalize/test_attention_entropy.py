import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.normalize import EntropyMonitor, attention_entropy, attention_entropy_bound, logit_deviation


def test_entropy_against_a_loop() -> None:
    weights = torch.randn(2, 3, 4, 5, dtype=torch.float64).softmax(-1)
    made = attention_entropy(weights)
    for index in np.ndindex(2, 3, 4):
        assert float(made[index]) == pytest.approx(-sum(a * math.log(a) for a in weights[index].tolist()))


def test_extremes_and_zeros() -> None:
    assert float(attention_entropy(torch.full((1, 7), 1 / 7))) == pytest.approx(math.log(7))
    one_hot = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    entropy = attention_entropy(one_hot)
    entropy.sum().backward()
    assert entropy.tolist() == [0]
    assert torch.isfinite(one_hot.grad).all()


def test_gradient() -> None:
    weights = torch.rand(3, 5, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(attention_entropy, (weights,))


@pytest.mark.parametrize("keys", [2, 3, 17, 256])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_the_bound_is_never_above_the_entropy(keys: int, scale: float) -> None:
    torch.manual_seed(keys)
    logits = scale * torch.randn(4000, keys, dtype=torch.float64)
    bound = attention_entropy_bound(logit_deviation(logits), keys)
    assert bool((attention_entropy(logits.softmax(-1)) >= bound - 1e-12).all())
    assert bool((bound >= 0).all())


@pytest.mark.parametrize("keys", [2, 5, 100])
def test_one_high_logit_attains_the_bound(keys: int) -> None:
    logits = torch.zeros(6, keys, dtype=torch.float64)
    logits[:, 1] = torch.tensor([0.0, 0.1, 1.0, 3.0, 8.0, 20.0])
    torch.testing.assert_close(
        attention_entropy(logits.softmax(-1)), attention_entropy_bound(logit_deviation(logits), keys), atol=1e-12, rtol=1e-9
    )  # fmt: skip


def test_no_search_finds_less_than_the_bound() -> None:
    torch.manual_seed(0)
    free = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        centred = free - free.mean(-1, keepdim=True)
        entropy = attention_entropy((2 * centred / centred.norm(dim=-1, keepdim=True)).softmax(-1))
        optimizer.zero_grad()
        entropy.sum().backward()
        optimizer.step()
    bound = float(attention_entropy_bound(torch.tensor(2.0, dtype=torch.float64), 6))
    assert bound - 1e-12 <= float(entropy.detach().min()) <= bound + 1e-6


def test_a_causal_mask_gives_each_query_its_own_number_of_keys() -> None:
    logits = torch.randn(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    bound = attention_entropy_bound(logit_deviation(logits), torch.arange(1, 6))
    entropy = attention_entropy(logits.softmax(-1))
    assert float(bound[0]) == 0 == float(entropy[0])
    assert bool((entropy >= bound - 1e-6).all())
    torch.testing.assert_close(logit_deviation(logits)[2], logits[2, :3].sub(logits[2, :3].mean()).norm())


def test_the_monitor_changes_no_output() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0), 3, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 8)
    expected = model(x)
    with EntropyMonitor(model) as monitor:
        # the fused path sums in another order
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        assert list(monitor.entropy) == [f"layers.{i}.self_attn" for i in range(3)]
        assert 0 < float(monitor.lowest()) <= math.log(5)
    monitor.entropy.clear()
    model(x)
    assert monitor.entropy == {}


@pytest.mark.parametrize(("wanted", "averaged"), [(True, True), (True, False), (False, True)])
def test_the_caller_gets_what_it_asked_for(wanted: bool, averaged: bool) -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    expected = attention(x, x, x, need_weights=wanted, average_attn_weights=averaged)
    with EntropyMonitor(attention) as monitor:
        made = attention(x, x, x, need_weights=wanted, average_attn_weights=averaged)
    torch.testing.assert_close(made[0], expected[0])
    assert (made[1] is None) == (expected[1] is None)
    if wanted:
        torch.testing.assert_close(made[1], expected[1])
    with EntropyMonitor(attention):
        given = attention(x, x, x, None, wanted, None, averaged)  # by position
    torch.testing.assert_close(given, made)
    heads = attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(monitor.entropy[""], attention_entropy(heads).mean())


class Eager(nn.Module):
    def __init__(self, weights: Tensor | None):
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, self.weights


def test_other_attention_layers_return_their_weights_second() -> None:
    model = nn.ModuleDict({"attn": Eager(torch.full((1, 2, 3, 4), 0.25)), "other": Eager(None)})
    with EntropyMonitor(model, where="attn") as monitor:
        model["attn"](torch.ones(1))
        assert float(monitor.lowest()) == pytest.approx(math.log(4))
    with (
        EntropyMonitor(model, where="other"),
        pytest.raises(RecipeError, match="other: this attention layer returned no"),
    ):
        model["other"](torch.ones(1))
    with pytest.raises(RecipeError, match="No layer matched"):
        EntropyMonitor(model)
    with EntropyMonitor(model, where="attn") as monitor, pytest.raises(RecipeError, match="No forward pass"):
        monitor.lowest()
