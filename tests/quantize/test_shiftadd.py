"""ShiftAddLLM: binary coding by brute force, uniform grids, powers of two, GPTQ's loop by definition, and look-up products."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.packed import Binary, unpack
from weft.quantize import ShiftAdd, binary_coding, lookup_product, shiftadd_codes, shiftadd_sensitivity
from weft.quantize.compensate import column_factor
from weft.quantize.shiftadd import powers_of_two


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


def decoded(made: tuple[Tensor, Tensor]) -> Tensor:
    signs, alpha = made
    return ((signs * 2.0 - 1).double() * alpha.double().unsqueeze(2)).sum(0)


def values(blocks: int = 6, count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(blocks, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_more_rounds_are_never_worse(bits: int) -> None:
    w = values()
    for terms in (0, 3):
        errors = torch.stack(
            [(decoded(binary_coding(w, bits, n, terms)) - w).square().sum(1) for n in (0, 1, 2, 5, 50)]
        )
        assert all((b <= a * (1 + 1e-12)).all() for a, b in pairwise(errors))
        assert bits == 1 or errors[-1].sum() < errors[0].sum()


def test_one_bit_is_the_mean_size_and_the_best_of_all() -> None:
    w = values(3, 8)
    signs, alpha = binary_coding(w, 1)
    torch.testing.assert_close(alpha[0], w.abs().mean(1))
    assert torch.equal(signs[0], w >= 0)
    for row, error in zip(w, (decoded((signs, alpha)) - w).square().sum(1)):
        every = torch.tensor(list(product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
        best = (row.square().sum() - (every @ row).square() / 8).min()  # with the best factor of each
        torch.testing.assert_close(error, best)


def test_the_end_is_a_fixed_point() -> None:
    """Factors are the least squares of the signs, signs the nearest of all sums of the factors."""
    w = values()
    signs, alpha = binary_coding(w, 3, 500)
    for block in range(len(w)):
        b = (signs[:, block] * 2.0 - 1).double().T
        torch.testing.assert_close(torch.linalg.lstsq(b, w[block].unsqueeze(1)).solution[:, 0], alpha[:, block])
        sums = torch.tensor(list(product((-1.0, 1.0), repeat=3)), dtype=torch.float64) @ alpha[:, block]
        nearest = (w[block].unsqueeze(1) - sums).square().min(1).values
        torch.testing.assert_close((decoded((signs, alpha))[block] - w[block]).square(), nearest)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_uniform_grid_is_reproduced_and_not_beaten(bits: int) -> None:
    """Factors 2ⁱ s are the grid ± s, ± 3 s, …: from that start no round is worse."""
    grid = 0.25 * torch.arange(1 - 2**bits, 2**bits, 2).double()
    w = grid[torch.randint(2**bits, (2, 64), generator=torch.Generator().manual_seed(0))]
    w[:, 0], w[:, 1] = grid[0], grid[-1]
    made = binary_coding(w, bits)
    torch.testing.assert_close(decoded(made), w, rtol=0, atol=1e-12)
    torch.testing.assert_close(made[1][:, 0], 0.25 * 2.0 ** torch.arange(bits - 1, -1, -1).double())


def test_factors_are_sums_of_powers_of_two() -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    for terms in (1, 2, 3, 5):
        made = powers_of_two(x, terms)
        for value in made.tolist():
            rest, used = value, 0
            while rest:
                # signed digits: a run of ones is one power less another
                power = 2.0 ** round(torch.tensor(abs(rest)).double().log2().item())
                rest -= power if rest > 0 else -power
                used += 1
            assert used <= terms
        error = ((made - x).abs() / x).max()
        assert error <= (2**0.5 - 1) ** terms + 2**-10
    assert torch.equal(powers_of_two(2.0 ** torch.arange(-30, 30).double(), 1), 2.0 ** torch.arange(-30, 30).double())
    assert torch.equal(powers_of_two(x, 0), x)
    half = powers_of_two(x / 8, 3)
    assert torch.equal(half.half().double(), half)


@pytest.mark.parametrize("blocks", ["column", "tile"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (16, 16), (5, 3)])
def test_the_loop(blocks: str, rows: int, columns: int) -> None:
    """The loss is ½ tr(Δ H Δᵀ), a file brings it back, factors are powers of two, and it beats doing without data."""
    weight, gram = layer(rows, columns)
    config = ShiftAdd(bits=2, blocks=blocks, block_size=7)
    made = shiftadd_codes(weight, gram, config)
    packed = made.packed
    assert isinstance(packed, Binary)
    assert float(made.loss) == pytest.approx(loss(weight, packed.dequantize(), damped(gram)), rel=1e-4)
    assert torch.equal(unpack(packed.tensors(), packed.settings()).dequantize(), packed.dequantize())
    assert torch.equal(powers_of_two(packed.alpha.double(), 3), packed.alpha.double())
    tall, wide = (rows, 1) if blocks == "column" else (-(-rows // 8), 8)
    assert packed.block == (tall, wide)
    plain = shiftadd_codes(weight, None, config).packed
    if rows > 5:  # of few columns greedy choices may lose
        assert loss(weight, packed.dequantize(), gram) < loss(weight, plain.dequantize(), gram)
    other = shiftadd_codes(weight, gram, ShiftAdd(bits=2, blocks=blocks, block_size=128)).packed
    torch.testing.assert_close(other.dequantize(), packed.dequantize())


def test_columns_by_definition() -> None:
    """Column after column is coded; the others move to the minimum of the loss given all that are rounded."""
    weight, gram = layer()
    h, w, rounded = damped(gram), weight.clone(), []
    for j in sorted(range(20), key=lambda j: -gram[j, j]):
        w[:, j] = decoded(binary_coding(w[:, j].unsqueeze(0), 2, 50, 3))[0]
        rounded.append(j)
        free = [i for i in range(20) if i not in rounded]
        if free:
            delta = weight[:, rounded] - w[:, rounded]
            w[:, free] = weight[:, free] + delta @ h[rounded][:, free] @ torch.linalg.inv(h[free][:, free])
    found = shiftadd_codes(weight, gram, ShiftAdd(bits=2)).packed.dequantize().double()
    torch.testing.assert_close(found, w, rtol=1e-5, atol=1e-6)


def test_tiles_stay_together() -> None:
    diagonal = torch.tensor([1.0, 1, 9, 2, 2, 2, 3, 0])
    assert column_factor(torch.diag(diagonal), 0.1, 2).order.tolist() == [2, 3, 4, 5, 6, 7, 0, 1]
    assert column_factor(torch.diag(diagonal[:5]), 0.1, 2).order.tolist() == [2, 3, 0, 1, 4]


@pytest.mark.parametrize("blocks", ["column", "tile"])
def test_tables_give_the_dense_product(blocks: str) -> None:
    weight, gram = layer(19, 21)
    packed = shiftadd_codes(weight, gram, ShiftAdd(bits=3, blocks=blocks)).packed
    assert isinstance(packed, Binary)
    whole = torch.randint(-50, 50, (2, 5, 21), generator=torch.Generator().manual_seed(0)).double()
    # sums of few powers of two times whole numbers are exact in float64, whatever their order
    assert torch.equal(lookup_product(whole, packed), whole @ packed.dequantize().double().T)
    x = torch.randn(7, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(lookup_product(x, packed), x @ packed.dequantize().double().T, rtol=1e-12, atol=1e-12)
    with pytest.raises(RecipeError, match="fit"):
        lookup_product(x[:, :5], packed)


def test_the_sensitivity_by_hand_and_what_it_means() -> None:
    weight, gram = layer()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram)[gram.diagonal().argsort(descending=True)][
        :, gram.diagonal().argsort(descending=True)
    ]), upper=True)  # fmt: skip
    scaled = weight[:, gram.diagonal().argsort(descending=True)] / upper.diagonal()
    expected = scaled.norm() * scaled.std(correction=0) ** 2
    torch.testing.assert_close(shiftadd_sensitivity(weight, gram), expected)
    assert shiftadd_sensitivity(weight, 4 * gram) == pytest.approx(8 * float(expected))
    assert shiftadd_sensitivity(weight, torch.zeros(20, 20)) == 0


def test_what_is_refused() -> None:
    weight, gram = layer()
    with pytest.raises(RecipeError, match="20 inputs"):
        shiftadd_codes(weight, gram[:8, :8])
    with pytest.raises(RecipeError, match="no Gram"):
        shiftadd_sensitivity(weight, gram[:8, :8])
    bad: list[dict[str, Any]] = [
        {"bits": 0}, {"bits": 9}, {"terms": -1}, {"rounds": -1}, {"blocks": "x"}, {"damping": -1}, {"block_size": 0},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(RecipeError):
            ShiftAdd(**wrong)
