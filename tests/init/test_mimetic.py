import math

import pytest
import torch
from torch import nn

from weft.errors import RecipeError
from weft.init import mimetic_attention_


def fill(d: int, heads: int, **options: float) -> tuple[torch.Tensor, ...]:
    weights = tuple(torch.empty(d, d, dtype=torch.float64) for _ in range(4))
    mimetic_attention_(*weights, heads, generator=torch.Generator().manual_seed(0), **options)
    return weights


def test_products_are_those_of_the_paper() -> None:
    d, heads, k = 96, 4, 24
    generator = torch.Generator().manual_seed(0)
    query, key, value, output = fill(d, heads)
    identity = torch.eye(d, dtype=torch.float64)
    for head in range(heads):
        z = torch.randn(d, d, dtype=torch.float64, generator=generator) / math.sqrt(d)
        target = 0.7 * z + 0.7 * identity
        rows = slice(head * k, (head + 1) * k)
        product = query[rows].T @ key[rows]
        # by Eckart and Young the best of rank k leaves out exactly the smaller singular values
        rest = torch.linalg.svdvals(target)[k:].square().sum().sqrt()
        torch.testing.assert_close((product - target).norm(), rest)
        torch.testing.assert_close(query[rows].norm(dim=1), key[rows].norm(dim=1))  # balanced
    z = torch.randn(d, d, dtype=torch.float64, generator=generator) / math.sqrt(d)
    torch.testing.assert_close(output @ value, 0.4 * z - 0.4 * identity)


def test_without_noise_products_are_multiples_of_the_identity() -> None:
    query, key, value, output = fill(8, 1, query_key_noise=0.0, query_key_identity=2.0, value_output_noise=0.0)
    torch.testing.assert_close(query.T @ key, 2 * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(output @ value, -0.4 * torch.eye(8, dtype=torch.float64))


def test_tokens_attend_to_themselves() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 2, bias=False, batch_first=True)
    x = torch.randn(1, 10, 64)
    plain = attention(x, x, x)[1][0].diagonal().mean()
    mimetic_attention_(*attention.in_proj_weight.chunk(3), attention.out_proj.weight, heads=2)
    own = attention(x, x, x)[1][0].diagonal().mean()
    assert plain < 0.2
    assert own > 3 * plain


def test_slices_of_a_weight_that_trains_are_filled() -> None:
    qkv, out = nn.Linear(8, 24), nn.Linear(8, 8)
    before, bias = qkv.weight.clone(), qkv.bias.clone()
    mimetic_attention_(*qkv.weight.chunk(3), out.weight, heads=2)
    assert bool((qkv.weight != before).all())
    assert torch.equal(qkv.bias, bias)
    qkv(torch.ones(8)).sum().backward()
    assert qkv.weight.grad is not None


def test_refuses_shared_keys_and_odd_heads() -> None:
    square, wide = torch.empty(8, 8), torch.empty(4, 8)
    with pytest.raises(RecipeError, match=r"\[\[8, 8\], \[4, 8\]"):
        mimetic_attention_(square, wide, square, square, 2)
    with pytest.raises(RecipeError, match="3 heads"):
        mimetic_attention_(square, square, square, square, 3)
    with pytest.raises(RecipeError, match="query_key_noise"):
        mimetic_attention_(square, square, square, square, 2, query_key_noise=-1)
