from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.normalize import (
    CRMSNorm,
    RMSNorm,
    center_output,
    crms_norm,
    drop_input,
    fold_affine,
    restore_feature,
    rms_norm,
)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_torch_agrees(eps: float) -> None:
    torch.manual_seed(0)
    layer, peer = RMSNorm(7, eps=eps).double(), nn.RMSNorm(7, eps=eps).double()
    with torch.no_grad():
        peer.weight.copy_(layer.weight.normal_())
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), peer(x))
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, peer))
    torch.testing.assert_close(ours, theirs)


def test_layer_norm_is_the_rms_norm_of_what_has_no_mean() -> None:
    x = torch.randn(4, 9, dtype=torch.float64) + 3
    expected = functional.layer_norm(x, (9,), eps=0.1)
    torch.testing.assert_close(rms_norm(x - x.mean(-1, keepdim=True), eps=0.1), expected)


def test_the_last_of_features_without_mean_says_nothing() -> None:
    x = torch.randn(4, 9, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(restore_feature(x[..., :-1]), x)
    torch.testing.assert_close(crms_norm(x[..., :-1], eps=0.1), rms_norm(x, eps=0.1)[..., :-1])
    torch.testing.assert_close(restore_feature(crms_norm(x[..., :-1])), rms_norm(x))
    weight = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(x[..., :-1] @ drop_input(weight).T, x @ weight.T)
    assert CRMSNorm(8, affine=False).weight is None


def test_a_centred_writer_writes_the_same_without_the_mean() -> None:
    weight, bias, x = (torch.randn(*s, dtype=torch.float64) for s in ((6, 4), (6,), (3, 4)))
    centred = functional.linear(x, *center_output(weight, bias))
    plain = functional.linear(x, weight, bias)
    torch.testing.assert_close(centred, plain - plain.mean(-1, keepdim=True))
    once = center_output(weight, bias)
    torch.testing.assert_close(center_output(*once), once)
    assert center_output(weight)[1] is None


Block = dict[str, Tensor]


def network(embed: Tensor, blocks: list[Block], head: Block, norm: object) -> Tensor:
    """Residual blocks x + B gelu(A norm(x) + a) + b, then a head behind a norm."""
    for block in blocks:
        inner = functional.gelu(functional.linear(norm(embed, block), block["A"], block["a"]))  # type: ignore[operator]
        embed = embed + functional.linear(inner, block["B"], block["b"])
    return functional.linear(norm(embed, head), head["A"], head["a"])  # type: ignore[operator]


def test_layer_norm_rms_norm_and_crms_norm_networks_are_one_function() -> None:
    torch.manual_seed(0)
    width, hidden = 8, 12

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    sizes = {
        "A": (hidden, width),
        "a": (hidden,),
        "B": (width, hidden),
        "b": (width,),
        "gamma": (width,),
        "beta": (width,),
    }
    blocks = [{n: draw(*s) for n, s in sizes.items()} for _ in range(3)]
    head = {"A": draw(5, width), "a": draw(5), "gamma": draw(width), "beta": draw(width)}
    x = (draw(10, width) + 2).requires_grad_()
    plain = network(x, blocks, head, lambda v, b: functional.layer_norm(v, (width,), b["gamma"], b["beta"]))

    def readers(block: Block) -> Block:
        weight, bias = fold_affine(block["A"], block["a"], block["gamma"], block["beta"])
        made = {"A": weight, "a": bias}
        if "B" in block:
            made["B"], made["b"] = center_output(block["B"], block["b"])
        return made  # type: ignore[return-value]

    without_mean = x - x.mean(-1, keepdim=True)
    folded, folded_head = [readers(b) for b in blocks], readers(head)
    rms = network(without_mean, folded, folded_head, lambda v, b: rms_norm(v))
    narrow = [{"A": drop_input(b["A"]), "a": b["a"], "B": b["B"][:-1], "b": b["b"][:-1]} for b in folded]
    narrow_head = {"A": drop_input(folded_head["A"]), "a": folded_head["a"]}
    crms = network(without_mean[..., :-1], narrow, narrow_head, lambda v, b: crms_norm(v))
    expected = torch.autograd.grad(plain.square().sum(), x, retain_graph=True)[0]
    for made in (rms, crms):
        torch.testing.assert_close(made, plain, rtol=1e-10, atol=1e-10)
        gradient = torch.autograd.grad(made.square().sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("function", [rms_norm, crms_norm])
def test_gradients_of_all_orders(function: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: function(v, eps=0.1), (x,))
    assert torch.autograd.gradgradcheck(lambda v: function(v, eps=0.1), (x,))
    empty = torch.zeros(2, 4, requires_grad=True)  # a token of zeros, as padding makes them
    (gradient,) = torch.autograd.grad(function(empty, eps=0.25).sum(), empty)
    torch.testing.assert_close(gradient, torch.full((2, 4), 2.0))
