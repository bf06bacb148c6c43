"""Start attention so that it looks like that of trained vision transformers: tokens attend to themselves and their like.

Mimetic initialisation, Trockman and Kolter, arXiv:2305.09828 (2023), which the Kolmogorov–Arnold Transformer uses.

    for each head:  W_Qᵀ W_K = best rank-k part of  α₁ Z + β₁ I                 α₁ = β₁ = 0.7
    all heads:      W_O W_V  = α₂ Z − β₂ I                                      α₂ = β₂ = 0.4

W: (d, d) as ``nn.Linear`` stores them, W_Q and W_K of one head (k, d), k = d / heads; Z: (d, d) of variance 1/d, drawn
anew each time. From the singular value decomposition U S Vᵀ of a right side: W_Q = √S_k U_kᵀ, W_K = √S_k V_kᵀ;
W_O = U √S, W_V = √S Vᵀ.

Differences from the paper and its code: Z is normal, as in the paper; the code of the Kolmogorov–Arnold Transformer
draws it from a uniform law of the same variance. That code puts U √S into W_V and √S Vᵀ into W_O: their product has the
eigenvalues of α₂ Z − β₂ I, not its entries.
Complexity: heads + 1 decompositions of d × d matrices, O(heads d³), in float64. Re-implemented from the equations
(official code of the Kolmogorov–Arnold Transformer: MIT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, check_fillable, plain_parameter
from weft.method import configure, parameter


@dataclass(frozen=True)
class MimeticAttention:
    """Configuration of :func:`mimetic_attention_`."""

    query_key_noise: float = parameter(0.7, "α₁, of the noise in the product of queries and keys", minimum=0)
    query_key_identity: float = parameter(0.7, "β₁, of the identity in it")
    value_output_noise: float = parameter(0.4, "α₂, of the noise in the product of values and output", minimum=0)
    value_output_identity: float = parameter(0.4, "β₂, of the negative identity in it")


@torch.no_grad()
def mimetic_attention_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    heads: int,
    query_key_noise: float = 0.7,
    query_key_identity: float = 0.7,
    value_output_noise: float = 0.4,
    value_output_identity: float = 0.4,
    generator: Generator | None = None,
) -> None:
    """Fill the four weights of an attention layer by mimetic initialisation, in place; biases are left as they are.

    Args:
        query, key, value, output: weights (d, d) of the projections, outputs first; slices of a fused weight may be
            given, as ``attention.in_proj_weight.chunk(3)`` makes them.
        heads: of the layer; must divide d.
        query_key_noise: α₁.
        query_key_identity: β₁.
        value_output_noise: α₂.
        value_output_identity: β₂; the product has its negative.
        generator: of torch, on the CPU; torch's global one if None.

    Raises:
        RecipeError: weights are not square or not alike (keys shared by several heads), or heads do not divide d.

    Source: arXiv:2305.09828, section on initialisation.

    >>> attention = nn.MultiheadAttention(64, 4)
    >>> mimetic_attention_(*attention.in_proj_weight.chunk(3), attention.out_proj.weight, heads=4)
    >>> product = attention.out_proj.weight @ attention.in_proj_weight[128:]
    >>> abs(product.diagonal().mean().item() + 0.4) < 0.05
    True
    """
    config = configure(
        MimeticAttention,
        {
            "query_key_noise": query_key_noise,
            "query_key_identity": query_key_identity,
            "value_output_noise": value_output_noise,
            "value_output_identity": value_output_identity,
        },
    )
    weights = (query, key, value, output)
    check_fillable(*weights)
    d = query.shape[0]
    square = all(w.shape == (d, d) and w.is_floating_point() for w in weights)
    if not square or d == 0 or heads < 1 or d % heads:
        raise RecipeError(
            "Mimetic initialisation needs four floating-point weights (d, d) and heads that divide d; got "
            f"{[list(w.shape) for w in weights]} and {heads} heads."
        )
    size = d // heads
    for head in range(heads):
        u, s, vt = _decomposed(d, config.query_key_noise, config.query_key_identity, generator)
        rows, root = slice(head * size, (head + 1) * size), s[:size].sqrt().unsqueeze(1)
        query.detach()[rows] = (root * u.mT[:size]).to(query)
        key.detach()[rows] = (root * vt[:size]).to(key)
    u, s, vt = _decomposed(d, config.value_output_noise, -config.value_output_identity, generator)
    value.detach().copy_(s.sqrt().unsqueeze(1) * vt)
    output.detach().copy_(u * s.sqrt())


def _decomposed(d: int, noise: float, identity: float, generator: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(d, d, dtype=torch.float64, generator=generator) / d**0.5
    u, s, vt = torch.linalg.svd(noise * z + identity * torch.eye(d, dtype=torch.float64))
    return u, s, vt


METHODS = (
    InitMethod(
        name="mimetic_attention",
        family="init",
        config=MimeticAttention,
        summary="Attention weights drawn so that their products are near the identity, as in trained vision transformers.",
        goal="train",
        paper="kat",
        origin="mimetic initialisation, arXiv:2305.09828",
        function=mimetic_attention_,
        trial=lambda: nn.MultiheadAttention(12, 3),
        apply=lambda model, generator, **parameters: mimetic_attention_(
            *plain_parameter(model, "in_proj_weight").chunk(3),
            plain_parameter(model.out_proj),
            heads=model.num_heads,
            generator=generator,
            **parameters,
        ),
        fills=("in_proj_weight", "out_proj.weight"),
        checked_by=("closed form",),
    ),
)
