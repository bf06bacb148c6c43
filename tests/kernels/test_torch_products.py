"""torch's operators for few bits: every width, whatever they themselves demand."""

import itertools

import pytest
import torch

from weft.kernels import torch_int4, torch_int8

WIDTHS = [(1, 1, 1), (33, 40, 1), (17, 33, 1), (16, 64, 2), (70, 512, 2), (64, 768, 2), (20, 1000, 1), (40, 256, 8)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "groups"), WIDTHS)
def test_int4(bits: int, rows: int, columns: int, groups: int) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (rows, columns), generator=draw)
    scale = torch.rand(rows, groups, generator=draw) + 0.1
    zero = torch.rand(rows, groups, generator=draw) * (1 << bits)
    ready = torch_int4.prepare(codes, scale, zero, bits)
    spread = [t.double().repeat_interleave(columns // groups, 1) for t in (scale, zero)]
    weight = (codes - spread[1]) * spread[0]
    # scale and (8 − zero) · scale are rounded to bfloat16, so an error is relative to these and not to the weight
    size = spread[0] * ((codes - (1 << (bits - 1))).abs() + ((1 << (bits - 1)) - spread[1]).abs())
    for batch in (1, 3, 20):
        x = torch.randn(batch, columns, generator=draw).to(torch.bfloat16)
        made = torch_int4.multiply(x, ready, rows).double()
        bound = x.double().abs() @ (size + weight.abs()).T * 2**-8 + 2**-8 * made.abs()
        assert made.shape == (batch, rows)
        assert ((made - x.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 40), (16, 33), (64, 64), (5, 1000)])
def test_int8(rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows, columns), generator=draw).to(torch.int8)
    scale = torch.rand(rows, 1, generator=draw)
    ready = torch_int8.prepare(codes, scale)
    offset = torch.randint(-255, 256, (rows,), generator=draw, dtype=torch.int32)
    for batch, shift in itertools.product((1, 2, 8, 9, 17), (None, offset)):
        x = torch.randn(batch, columns, generator=draw).to(torch.bfloat16)
        weight = codes.double() * scale.double()
        made = torch_int8.multiply(x, ready).double()
        bound = x.double().abs() @ weight.abs().T * 2**-8 + 2**-8 * made.abs()
        assert ((made - x.double() @ weight.T).abs() <= bound).all()
        steps = torch.randint(-128, 128, (batch, columns), generator=draw).to(torch.int8)
        exact = steps.long() @ (codes.long() - (0 if shift is None else shift.long().unsqueeze(1))).T
        assert torch.equal(torch_int8.multiply_integers(steps, codes, shift).long(), exact)


def test_sums_of_the_most_inputs_fit() -> None:
    codes = torch.full((1, torch_int8.MOST_INPUTS), -128, dtype=torch.int8)
    made = torch_int8.multiply_integers(codes, codes, torch.tensor([127], dtype=torch.int32))
    assert int(made) == torch_int8.MOST_INPUTS * 128 * 255
