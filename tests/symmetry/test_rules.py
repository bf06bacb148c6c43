"""Rules of single operations, each in a network whose groups are known, and the algebra of factors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from networks import check, randomize

from weft.symmetry import find_symmetry
from weft.symmetry.axes import Axes
from weft.symmetry.factors import Misaligned

TOKENS = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def lin(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b)


def conv(a: int, b: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, **options)


def w(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def heads(y: Tensor, number: int) -> Tensor:
    return y.unflatten(-1, (number, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def written(net: Any, x: Tensor) -> Tensor:
    z = torch.zeros(*x.shape[:-1], 12, dtype=x.dtype)
    z[..., :6].copy_(net.a(x))
    z[..., 6:].add_(net.a(x).relu())
    return net.b(z)


def filled_twice(net: Any, x: Tensor) -> Tensor:
    z = torch.zeros(*x.shape[:-1], 6, dtype=x.dtype)
    first = net.a(x) + z
    z.add_(net.c(x))
    return net.b(first + z)


def dense_experts(net: Any, x: Tensor) -> Tensor:
    values, index = net.g(x).softmax(-1).topk(2)
    y = torch.einsum("bteh,ehd->bted", torch.einsum("btd,edh->bteh", x, net.w).relu(), net.v)
    chosen = functional.one_hot(index, 4).to(x.dtype) * values[..., None]
    return (y * chosen.sum(-2)[..., None]).sum(2)


def apart(change: Callable[[Tensor], Tensor], more: Callable[[Any, Tensor], Tensor] | None = None) -> Net:
    """Two halves of a projection in two roles, after something was done to both."""

    def function(net: Any, x: Tensor) -> Tensor:
        y = change(net.a(x).unflatten(-1, (2, 6)))
        out = net.c(y[:, :, 0].relu()) + net.d(y[:, :, 1].tanh())
        return out if more is None else out + more(net, y)

    return Net(function, a=lin(5, 12), c=lin(6, 2), d=lin(6, 2))


GQA = {"q": lin(5, 12), "k": lin(5, 6), "v": lin(5, 6), "o": lin(12, 2)}
KV = [(2,), (2, 2), (2, 3), (2, 3)]
PAIR = {"a": lin(5, 6), "b": lin(6, 2)}

# name -> (network, input, shapes of its groups)
CASES: dict[str, tuple[nn.Module, Tensor, list[tuple[int, ...]]]] = {
    "writing into a part of zeros": (Net(written, a=lin(5, 6), b=lin(12, 2)), TOKENS, [(6,)]),
    "zeros, used before they are written": (Net(filled_twice, a=lin(5, 6), c=lin(5, 6), b=lin(6, 2)), TOKENS, [(6,)]),
    "roll": (Net(lambda n, x: n.b(n.a(x).roll(1, -1)), **PAIR), TOKENS, []),
    "flip": (Net(lambda n, x: n.b(n.a(x).flip(-1)), **PAIR), TOKENS, []),
    "cumsum": (Net(lambda n, x: n.b(n.a(x).cumsum(-1)), **PAIR), TOKENS, []),
    "sort": (Net(lambda n, x: n.b(n.a(x).sort(-1)[0]), **PAIR), TOKENS, [(6,)]),
    "eye": (Net(lambda n, x: n.b(n.a(x) @ torch.eye(6, dtype=x.dtype)), **PAIR), TOKENS, []),
    "single units by number": (
        Net(lambda n, x: n.b(torch.stack([n.a(x)[..., i] for i in (5, 3, 1, 0, 2, 4)], -1)), **PAIR), TOKENS, [],
    ),
    "standardise": (
        Net(lambda n, x: n.b((n.a(x) - n.a(x).mean(-1, True)) / n.a(x).std(-1, keepdim=True)), **PAIR), TOKENS, [(6,)],
    ),
    "every second": (Net(lambda n, x: n.b(n.a(x)[..., ::2]), a=lin(5, 12), b=lin(6, 2)), TOKENS, []),
    "overlapping slices": (
        Net(lambda n, x: n.b(n.a(x)[..., :8] * n.a(x)[..., 4:]), a=lin(5, 12), b=lin(8, 2)), TOKENS, [(4,)],
    ),
    "parts joined in two orders": (
        Net(lambda n, x: n.b(torch.cat([n.a(x), n.c(x)], -1) * torch.cat([n.c(x), n.a(x)], -1)), a=lin(5, 6), c=lin(5, 4), b=lin(10, 2)),
        TOKENS, [(2,)],
    ),
    "glu": (Net(lambda n, x: n.b(functional.glu(n.a(x))), a=lin(5, 12), b=lin(6, 2)), TOKENS, [(6,)]),
    "maxout": (Net(lambda n, x: n.b(n.a(x).unflatten(-1, (4, 3)).amax(-1)), a=lin(5, 12), b=lin(4, 2)), TOKENS, [(4,), (4, 3)]),
    "repeat": (Net(lambda n, x: n.b(n.a(x).repeat(1, 1, 2)), a=lin(5, 3), b=lin(6, 2)), TOKENS, [(3,), (3, 2)]),
    "outer product with itself": (
        Net(lambda n, x: n.b((n.a(x)[..., None] * n.a(x)[..., None, :]).flatten(-2)), a=lin(5, 3), b=lin(9, 2)), TOKENS, [(3,)],
    ),
    "gram matrix of heads": (
        Net(lambda n, x: n.b((heads(n.a(x), 3) @ heads(n.a(x), 3).mT).softmax(-1).flatten(1, 2).sum(-1)), a=lin(5, 12), b=lin(21, 2)),
        TOKENS, [(3,), (3, 4)],
    ),
    "one layer twice": (
        Net(lambda n, x: n.o(n.m(n.m(n.a(x)).relu()).relu()), a=lin(5, 6), m=lin(6, 6), o=lin(6, 2)), TOKENS, [(6,)],
    ),
    "tied autoencoder": (
        Net(lambda n, x: functional.linear(functional.linear(x, n.w).relu(), n.w.t()), w=w(6, 5)), TOKENS, [(6,)],
    ),
    "bilinear": (Net(lambda n, x: n.c(n.b(n.a(x), x)), a=lin(5, 6), b=nn.Bilinear(6, 5, 4), c=lin(4, 2)), TOKENS, [(6,), (4,)]),
    "weight norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(lin(5, 6)), nn.ReLU(), lin(6, 2)), TOKENS, [(6,)]),
    "batched product": (
        Net(lambda n, x: (x.flatten(0, 1).expand(4, 21, 5).bmm(n.w).relu().bmm(n.v)).mean(0), w=w(4, 5, 6), v=w(4, 6, 5)),
        TOKENS, [(4,), (4, 6)],
    ),
    "repeated keys": (
        Net(lambda n, x: n.o(attend(heads(n.q(x), 4), *(heads(f(x), 2).repeat_interleave(2, 1) for f in (n.k, n.v)))), **GQA),
        TOKENS, KV,
    ),
    "grouped queries by a flag": (
        Net(lambda n, x: n.o(attend(heads(n.q(x), 4), heads(n.k(x), 2), heads(n.v(x), 2), is_causal=True, enable_gqa=True)), **GQA),
        TOKENS, KV,
    ),
    "one key for all heads": (
        Net(
            lambda n, x: n.o(((heads(n.q(x), 4) @ n.k(x)[:, None].mT).softmax(-1) @ n.v(x)[:, None]).transpose(1, 2).flatten(2)),
            q=lin(5, 12), k=lin(5, 3), v=lin(5, 3), o=lin(12, 2),
        ),
        TOKENS, [(4,), (3,), (3,)],
    ),
    "softmax over heads": (
        Net(lambda n, x: n.b(n.a(x).unflatten(-1, (4, 3)).softmax(2).flatten(2)), a=lin(5, 12), b=lin(12, 2)), TOKENS, [(3,), (3, 4)],
    ),
    "softmax inside of heads": (
        Net(lambda n, x: n.b(n.a(x).unflatten(-1, (4, 3)).softmax(3).flatten(2)), a=lin(5, 12), b=lin(12, 2)), TOKENS, [(4,), (4, 3)],
    ),
    "experts, all computed": (Net(dense_experts, g=lin(5, 4), w=w(4, 5, 6), v=w(4, 6, 5)), TOKENS, [(4,), (4, 6)]),
    "a table by the largest": (
        Net(lambda n, x: n.o(n.e(n.g(x).argmax(-1))), g=lin(5, 4), e=nn.Embedding(4, 6), o=lin(6, 2)), TOKENS, [(4,), (6,)],
    ),
    "a position as a number": (Net(lambda n, x: n.o(x) * n.g(x).argmax(-1, keepdim=True), g=lin(5, 4), o=lin(5, 2)), TOKENS, []),
    "one by the order of another": (
        Net(lambda n, x: n.o(n.h(x).gather(-1, n.g(x).argsort(-1))), g=lin(5, 4), h=lin(5, 4), o=lin(4, 2)), TOKENS, [(4,)],
    ),
    "roles apart": (apart(lambda y: y), TOKENS, [(6,), (6,)]),
    "roles mixed by a flip": (apart(lambda y: y, lambda n, y: n.c((y + y.flip(2))[:, :, 0])), TOKENS, [(6,)]),
    "roles mixed by a sum": (apart(lambda y: y, lambda n, y: n.c(y.relu().sum(2))), TOKENS, [(6,)]),
    "roles mixed by a norm": (apart(lambda y: functional.layer_norm(y.mT, (2,)).mT), TOKENS, [(6,)]),
    "roles under a norm of all": (apart(lambda y: functional.layer_norm(y, (2, 6))), TOKENS, [(6,), (6,)]),
    "channel shuffle": (
        Net(
            lambda n, x: n.d(n.c(n.b(n.a(x).relu()).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)).relu()),
            a=conv(3, 12), b=conv(12, 12, 3, groups=3), c=conv(12, 12, 3, groups=3), d=conv(12, 2),
        ),
        IMAGE, [(4,), (4,)],
    ),
    "local response": (Net(lambda n, x: n.b(functional.local_response_norm(n.a(x), 3)), a=conv(3, 6), b=conv(6, 2)), IMAGE, []),
    "instance norm": (nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6, affine=True), conv(6, 2)), IMAGE, [(6,)]),
    "prelu": (nn.Sequential(conv(3, 6), nn.PReLU(6), conv(6, 2)), IMAGE, [(6,)]),
    "channels of zeros": (
        Net(lambda n, x: n.b(functional.pad(n.a(x), (0, 0, 0, 0, 1, 1)) + n.c(n.a(x))), a=conv(3, 6), c=conv(6, 8), b=conv(8, 2)),
        IMAGE, [(6,)],
    ),
    "dense connections": (
        Net(lambda n, x: n.c(n.n(torch.cat([n.a(x), n.b(x).relu()], 1))), a=conv(3, 4), b=conv(3, 5), n=nn.BatchNorm2d(9), c=conv(9, 2)),
        IMAGE, [(4,), (5,)],
    ),
    "transposed convolution in groups": (
        nn.Sequential(conv(3, 12), nn.ConvTranspose2d(12, 8, 2, 2, groups=4), conv(8, 2)), IMAGE, [(4,), (4, 3), (4, 2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    model, inputs, expected = CASES[name]
    randomize(model)
    symmetry = find_symmetry(model, inputs)
    assert sorted(symmetry.shape(g) for g in symmetry.groups) == sorted(expected)
    assert symmetry.unknown == ()
    if expected:
        check(model, symmetry, inputs)


def test_factors_refine_together() -> None:
    space = Axes()
    fused = [space.fresh(24)]
    q, k, v = space.slices(fused, (8, 8, 8))
    (heads_q, _), (heads_k, _) = space.regroup(q, (2, 4)), space.regroup(k, (2, 4))
    space.unify(heads_q, heads_k, "attention")
    assert [f.size for f in space.leaves(fused)] == [2, 4, 2, 4, 8]
    assert space.leaves(fused)[0] is space.leaves(fused)[2]
    space.freeze(v, "test")
    assert [bool(f.frozen) for f in space.leaves(fused)] == [False] * 4 + [True]
    with pytest.raises(Misaligned):
        space.regroup(v, (3, 3))


def test_halves_that_change_places_become_one() -> None:
    space = Axes()
    axis = [space.fresh(8)]
    first, second = space.slices(axis, (4, 4))
    space.unify(axis, [space.concatenate([second, first])], "rotary")
    left, right = space.leaves(axis)
    assert left is right
    assert not left.frozen


def test_what_does_not_match_is_frozen_on_both_sides() -> None:
    space = Axes()
    a, b = [space.fresh(3), space.fresh(4)], [space.fresh(4), space.fresh(3)]
    space.unify(a, b, "x")
    assert all(f.frozen == "factors that do not match: x" for f in [*space.leaves(a), *space.leaves(b)])
