"""VPTQ: GPTQ where vectors have one value, the loop by brute force in float64, and the form by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.packed import Transposed, unpack
from weft.quantize import GPTQ, VPTQ, Grid, VectorQuantization, fit_grid, gptq_codes, vptq_codes
from weft.quantize import vptq as module
from weft.quantize.kmeans import nearest


def layer(rows: int = 12, columns: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of very different sizes; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(40 * columns, columns, generator=generator, dtype=torch.float64) @ mix * sizes
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def damped(gram: Tensor) -> Tensor:
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    delta = weight - found.double()
    return float(((delta @ gram) * delta).sum()) / 2


@pytest.mark.parametrize("bits", [2, 3])
def test_one_value_and_equal_steps_is_gptq(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of length 1 from a table of 2ᵇ equally spaced values are GPTQ with one grid for the whole matrix."""
    weight, gram = layer()
    config = GPTQ(bits=bits, group_size=0, order="static")
    # one grid for the matrix: a row that holds its extremes decides, and every row is given them in turn
    scale, zero = fit_grid(weight.reshape(1, -1), Grid(bits, 0))
    levels = ((torch.arange(2**bits) - zero) * scale).double().T  # (2ᵇ, 1)
    monkeypatch.setattr(module, "weighted_kmeans", lambda *a, **k: levels / weight.abs().max())
    monkeypatch.setattr(module, "as_half", lambda table: table)
    made = vptq_codes(weight, gram, VPTQ(length=1, entries=2**bits, overhead=1e9))
    monkeypatch.setattr(
        "weft.quantize.gptq.fit_grid", lambda w, g: (scale.expand(len(w), 1).clone(), zero.expand(len(w), 1).clone())
    )
    expected = gptq_codes(weight, gram, config)
    torch.testing.assert_close(made.packed.dequantize(), expected.codes.dequantize(), rtol=1e-5, atol=1e-6)
    assert float(made.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def by_definition(weight: Tensor, gram: Tensor, book: Tensor) -> Tensor:
    """Column after column to its nearest vectors; the others move to the minimum of the loss given all that are rounded."""
    h, v = damped(gram), book.shape[1]
    w, rounded = weight.clone(), []
    for j in sorted(range(weight.shape[1]), key=lambda j: -gram[j, j]):
        for p in range(0, len(w), v):
            piece = w[p : p + v, j]
            w[p : p + v, j] = min((b[: len(piece)] for b in book), key=lambda b: float((b - piece).square().sum()))
        rounded.append(j)
        free = [i for i in range(weight.shape[1]) if i not in rounded]
        if free:
            delta = weight[:, rounded] - w[:, rounded]
            w[:, free] = weight[:, free] + delta @ h[rounded][:, free] @ torch.linalg.inv(h[free][:, free])
    return w


@pytest.mark.parametrize("rows", [12, 14, 2])
def test_the_loop_is_the_greedy_definition(rows: int) -> None:
    """Also where the last vector of a column is cut, or the only one."""
    weight, gram = layer(rows)
    made = vptq_codes(weight, gram, VPTQ(length=4, entries=16, overhead=1e9, block_size=7))
    assert isinstance(made.packed, Transposed)
    inner: Any = made.packed.inner
    book = inner.codebooks[0][0].double()
    assert inner.indices.shape == (1, 20, math.ceil(rows / 4))
    torch.testing.assert_close(
        made.packed.dequantize().double(), by_definition(weight, gram, book), rtol=1e-4, atol=1e-5
    )
    assert float(made.loss) == pytest.approx(loss(weight, made.packed.dequantize(), damped(gram)), rel=1e-4)
    other = vptq_codes(weight, gram, VPTQ(length=4, entries=16, overhead=1e9, block_size=128)).packed
    assert torch.equal(made.packed.dequantize(), other.dequantize())


def test_making_up_is_better_than_plain_vectors() -> None:
    for seed in range(3):
        weight, gram = layer(64, 48, seed)
        config = VPTQ(length=2, entries=16, overhead=1e9)
        plain = vptq_codes(weight, None, config).packed.dequantize()
        made = vptq_codes(weight, gram, config).packed.dequantize()
        assert loss(weight, made, gram) < 0.8 * loss(weight, plain, gram)


def test_white_inputs_are_plain_vectors() -> None:
    weight = layer()[0].float()
    config = VPTQ(length=4, entries=8, overhead=1e9)
    made, plain = vptq_codes(weight, 3 * torch.eye(20), config), vptq_codes(weight, None, config)
    assert torch.equal(made.packed.dequantize(), plain.packed.dequantize())
    # and these are nearest
    inner: Any = plain.packed.inner  # type: ignore[attr-defined]
    vectors = weight.T.reshape(-1, 4)
    best = inner.codebooks[0][0].float()[nearest(vectors, inner.codebooks[0][0].float())]
    torch.testing.assert_close(plain.packed.dequantize().T.reshape(-1, 4), best)


@pytest.mark.parametrize(
    "config",
    [
        VPTQ(length=2, entries=8, overhead=1e9),
        VPTQ(length=2, entries=8, outliers=0.2, overhead=1e9),
        VPTQ(length=3, entries=8, residual=4, overhead=1e9),
    ],
    ids=str,
)
def test_decoding_and_encoding_again_changes_nothing(config: VPTQ) -> None:
    weight, gram = layer()
    once = vptq_codes(weight, gram, config).packed
    again = unpack(once.tensors(), once.settings())
    assert torch.equal(again.dequantize(), once.dequantize())
    if not config.residual and not config.outliers:  # every vector is in a codebook of that size
        twice = vptq_codes(once.dequantize(), gram, config).packed
        torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=1e-5, atol=1e-6)


def test_a_residual_codebook_refines() -> None:
    weight, gram = layer(64, 48)
    coarse = loss(weight, vptq_codes(weight, gram, VPTQ(4, 16, overhead=1e9)).packed.dequantize(), gram)
    config = VPTQ(4, 16, residual=16, overhead=1e9)
    made = vptq_codes(weight, gram, config)
    assert loss(weight, made.packed.dequantize(), gram) < 0.5 * coarse
    assert made.packed.inner.indices.shape[0] == 2  # type: ignore[attr-defined]
    assert config.bits == 2.0


def test_outliers_have_a_table_and_norms_two_numbers() -> None:
    weight, gram = layer(64, 40)
    weight[:, 3] *= 30
    inner: Any = vptq_codes(weight, gram, VPTQ(4, 16, outliers=0.1, overhead=1e9)).packed.inner  # type: ignore[attr-defined]
    assert sorted(inner.table.nonzero().flatten().tolist()) == sorted(gram.diagonal().topk(4).indices.tolist())
    assert inner.codebooks[0].shape == (2, 16, 4)
    plain = loss(weight, vptq_codes(weight, gram, VPTQ(4, 16, overhead=1e9)).packed.dequantize(), gram)
    for norm, low, high in (("range", 0, 1), ("deviation", None, None)):
        made = vptq_codes(weight, gram, VPTQ(4, 16, norm=norm, overhead=1e9))
        inner = made.packed.inner  # type: ignore[attr-defined]
        scaled = (weight - inner.offset.double()) / inner.scale.double()
        if norm == "range":
            torch.testing.assert_close(scaled.amin(0), torch.full((40,), low).double(), atol=5e-3, rtol=0)
            torch.testing.assert_close(scaled.amax(0), torch.full((40,), high).double(), atol=5e-3, rtol=0)
        else:
            torch.testing.assert_close(scaled.mean(0), torch.zeros(40).double(), atol=5e-3, rtol=0)
            torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(40).double(), atol=5e-3, rtol=0)
        assert loss(weight, made.packed.dequantize(), gram) < plain  # a column of other size


def test_codebooks_that_are_too_large_are_halved() -> None:
    weight, gram = layer(64, 64)
    made = vptq_codes(weight, gram, VPTQ(length=4, entries=256, overhead=0.25))
    inner: Any = made.packed.inner  # type: ignore[attr-defined]
    assert inner.codebooks[0].shape == (1, 16, 4)
    assert inner.codebooks[0].nbytes * 8 <= 0.25 * weight.numel()
    assert "16 entries instead of 256" in made.notes[0]
    # log₂(16) / 4 bits of indices, and the codebook's
    assert made.packed.bits_per_weight == pytest.approx(1 + 0.25)


def test_a_convolution_with_groups_takes_the_sum() -> None:
    weight, first = layer()
    _, second = layer(seed=1)
    config = VPTQ(2, 8, overhead=1e9)
    made = vptq_codes(weight, torch.stack([first, second]), config).packed
    assert torch.equal(made.dequantize(), vptq_codes(weight, first + second, config).packed.dequantize())


def test_inputs_that_were_never_seen() -> None:
    weight, gram = layer()
    gram[:, [3, 9]] = 0
    gram[[3, 9]] = 0
    assert vptq_codes(weight, gram, VPTQ(2, 8, overhead=1e9)).packed.dequantize().isfinite().all()
    nothing = vptq_codes(weight, torch.zeros(20, 20), VPTQ(2, 8, overhead=1e9))
    plain = vptq_codes(weight, None, VectorQuantization(2, 8, overhead=1e9))
    assert torch.equal(nothing.packed.dequantize(), plain.packed.dequantize())
    assert "never" not in "".join(plain.notes)
    assert "no input" in nothing.notes[0]


def test_a_trained_layer_at_two_bits() -> None:
    """Of a real layer's held-out outputs: compensated vectors change less than GPTQ's grids of more bits, plain ones more."""
    from real_layer import held_out_error, real_layer

    parts = real_layer()
    vectors = VPTQ(length=2, entries=16)
    assert vptq_codes(parts[0], parts[1], vectors).packed.bits_per_weight < 2.1
    made, grid, plain = (
        held_out_error(c, *parts) for c in (vectors, GPTQ(2, 64), VectorQuantization(length=2, entries=16))
    )
    assert made < 0.9 * grid
    assert grid < plain


def test_what_is_refused() -> None:
    weight, gram = layer()
    with pytest.raises(RecipeError, match="20 inputs"):
        vptq_codes(weight, gram[:8, :8])
    bad: list[dict[str, Any]] = [
        {"length": 0}, {"entries": 1}, {"residual": -1}, {"outliers": 0.6}, {"norm": "x"}, {"damping": -1},
        {"overhead": -1}, {"iterations": 0}, {"block_size": 0},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(RecipeError):
            VPTQ(**wrong)
