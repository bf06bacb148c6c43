"""NF4 and FP4: tables from their laws, the nearest entry by trying all, bounds of errors, and packing."""

import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.packed.levels import dynamic_map
from weft.quantize import Codebook, codebook_codes
from weft.quantize.nf4 import FP4, NF4, TABLES

# where bitsandbytes is installed, files and codes are compared with it as well
CONFIGS = [Codebook(table, size, double) for table in TABLES for size in (7, 64, 5000) for double in (False, True)]


def weights(rows: int = 33, columns: int = 130, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    w = 0.02 * torch.randn(rows, columns, generator=generator)
    w[0] = 0
    w[1, 7] = 3
    w[2] *= 1e-6
    return w.to(dtype)


def test_nf4_is_quantiles_of_the_normal_law() -> None:
    scipy = pytest.importorskip("scipy.stats")
    positive = scipy.norm.ppf(torch.linspace(0.9677083, 0.5, 9)[:-1].numpy().astype("float64"))
    negative = -scipy.norm.ppf(torch.linspace(0.9677083, 0.5, 8)[:-1].numpy().astype("float64"))
    table = torch.tensor(sorted([*positive, 0.0, *negative])) / positive[0]
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), table, rtol=0, atol=3e-7)
    # o itself is the mean of 1 − 1/30 and 1 − 1/32: ends of 15 and 16 equal parts, halved
    assert pytest.approx((1 - 1 / 30 + 1 - 1 / 32) / 2, abs=1e-7) == 0.9677083
    assert all(torch.tensor(v).double() == v for v in NF4)  # the digits are float32's


def test_fp4_is_sign_exponent_and_mantissa() -> None:
    for code, value in enumerate(FP4):
        sign, exponent, mantissa = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
        # exponents in the order of the hardware's tree: 1 is the largest, then 2, 3; 0 holds zero and a subnormal
        power = {1: 8.0, 2: 4.0, 3: 2.0}
        expected = power[exponent] * (1 + mantissa / 2) if exponent else mantissa / 16
        assert value * 12 == pytest.approx(sign * expected)
    assert max(FP4) == 1


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_codes_are_the_nearest_and_the_error_has_a_bound(config: Codebook) -> None:
    weight = weights()
    made = codebook_codes(weight, config)
    table = torch.tensor(TABLES[config.table]).double()
    flat = weight.double().flatten()
    parts = flat.split(config.block_size)
    largest = torch.stack([p.abs().max() for p in parts])
    codes = made.codes.flatten().split(config.block_size)
    for part, top, code in zip(parts, largest, codes):
        values = table * top
        distance = (values[code.long()] - part).abs()
        assert bool((distance <= (values - part[:, None]).abs().amin(1) + 1e-7 * top).all())
    scales = made.scales()
    if config.double:
        limits = made.nested_scale.double().repeat_interleave(256)[: len(largest)]
        assert bool(((scales.double() - largest).abs() <= 0.0071 * limits + 1e-6 * largest.max()).all())
    else:
        assert torch.equal(scales, largest.float())
    gap = float((table.sort().values.diff() / 2).max())
    found = made.dequantize()
    off = (scales.double() - largest).abs().repeat_interleave(config.block_size)[: flat.numel()]
    limit = largest.repeat_interleave(config.block_size)[: flat.numel()] * gap + off + 1e-7
    assert bool(((found.double().flatten() - flat).abs() <= limit).all())
    assert found.dtype == torch.float32


def test_the_largest_of_a_block_is_kept() -> None:
    made = codebook_codes(weights(), Codebook(block_size=130, double=False)).dequantize()
    rows = weights().abs()
    assert torch.equal(made.abs().amax(1), rows.amax(1))
    assert torch.equal(made[0], torch.zeros(130))
    again = codebook_codes(made, Codebook(block_size=130, double=False)).dequantize()
    assert torch.equal(again, made)


def test_blocks_run_over_rows() -> None:
    weight = weights()[3:7, :6].contiguous()
    whole = codebook_codes(weight, Codebook(block_size=8, double=False))
    flat = codebook_codes(weight.reshape(1, 24), Codebook(block_size=8, double=False))
    assert torch.equal(whole.scale, flat.scale)
    assert torch.equal(whole.codes.flatten(), flat.codes.flatten())


def test_values_of_quantised_scales() -> None:
    values = dynamic_map().double()
    assert len(values.unique()) == 256
    assert bool((values.diff() > 0).all())
    # symmetric but for the largest
    assert torch.equal(values[:127], -values[128:255].flip(0))
    largest = values[192:255]
    torch.testing.assert_close(largest.diff()[1:], torch.full((61,), 0.9 / 64, dtype=torch.float64), rtol=1e-4, atol=0)


def test_relative_error_of_normal_weights() -> None:
    weight = 0.02 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    errors = {
        t: float((codebook_codes(weight, Codebook(t)).dequantize() - weight).norm() / weight.norm()) for t in TABLES
    }
    assert errors["nf4"] == pytest.approx(0.0915, abs=0.001)
    assert errors["fp4"] > 1.2 * errors["nf4"]


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError):
        Codebook(table="nf5")
    with pytest.raises(RecipeError):
        Codebook(block_size=0)
    with pytest.raises(RecipeError, match="float32"):
        codebook_codes(torch.full((1, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("table", sorted(TABLES))
def test_bitsandbytes_agrees(table: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=table, compress_statistics=False)
    mine = codebook_codes(weight, Codebook(table, 64, double=False))
    assert torch.equal((mine.codes.flatten()[::2] << 4) | mine.codes.flatten()[1::2], packed.flatten())
    assert torch.equal(mine.scale, state.absmax)
    assert torch.equal(mine.dequantize(), functional.dequantize_4bit(packed, state))
    assert torch.equal(functional.create_dynamic_map(), dynamic_map())
