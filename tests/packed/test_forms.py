"""Forms of packed weights: what a file holds is the same weight, each value is its formula, damage is refused."""

import copy
import json
from typing import Any

import pytest
import torch
from packed_weights import affine, codes, every_form, lookup, minifloat
from torch import Tensor

from weft.errors import CheckpointError
from weft.packed import Activations, Affine, Binary, Lookup, LowRank, Minifloat, Packed, Transposed, Vectors, unpack
from weft.packed.form import FORMS
from weft.packed.levels import dynamic_map, quantize_inputs

MADE = every_form()


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_there_is_one_of_every_form() -> None:
    found: set[type] = set()

    def walk(packed: Packed) -> None:
        found.add(type(packed))
        if hasattr(packed, "inner"):
            walk(packed.inner)

    for made in MADE.values():
        walk(made)
    assert found == {form for form in FORMS.values() if form.__module__.startswith("weft.")}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_files_hold_the_same_weight(made: Packed) -> None:
    tensors, settings = made.tensors(), made.settings()
    again = unpack({n: t.clone() for n, t in tensors.items()}, json.loads(json.dumps(settings)))
    assert type(again) is type(made)
    assert again.shape == made.shape == tuple(made.dequantize().shape)
    assert torch.equal(again.dequantize(), made.dequantize())
    assert again.dequantize().dtype == torch.float32
    assert again.settings() == settings
    assert {n: bits_of(t).tolist() for n, t in again.tensors().items()} == {
        n: bits_of(t).tolist() for n, t in tensors.items()
    }
    assert all("." not in name for name in tensors)
    assert made.nbytes == sum(t.nbytes for t in tensors.values())
    assert torch.equal(made.to("cpu").dequantize(), made.dequantize())


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_parts_are_rows(made: Packed) -> None:
    rows, weight = made.shape[0], made.dequantize()
    for first, last in ((0, rows), (0, 7), (8, 9), (8, rows), (rows - 1, rows), (128, rows)):
        part = made.part(first, last) if last > first else None
        if part is not None:
            assert part.shape == (last - first, made.shape[1])
            assert torch.equal(part.dequantize(), weight[first:last])
            assert torch.equal(unpack(part.tensors(), part.settings()).dequantize(), weight[first:last])
    apart = made.part(0, 8) is not None
    assert apart is not isinstance(made.inner if isinstance(made, Activations) else made, Transposed | LowRank)


def test_bytes_are_those_of_files_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width and odd shapes; the bits are not packed to know how many bytes they take."""
    from weft.packed import Permuted, forms

    made: list[Packed] = list(MADE.values())
    for out, columns in ((1, 1), (3, 7), (5, 33), (2, 100)):
        order = torch.arange(columns)
        for bits in range(1, 16):
            one = affine(bits, columns, out=out, columns=columns, symmetric=bits % 2 == 0)
            real = Affine(one.codes, one.scale.float(), one.zero.float() + 0.5, bits, one.low)
            made += [one, real, Transposed(one), Permuted(one, order), Activations(one, "int8", torch.tensor(0.5))]
            made.append(LowRank(one, torch.ones(out, 3).half(), torch.ones(3, columns)))
        for kind in ("e2m1", "e3m0", "e4m3", "e5m2"):
            made += [minifloat(kind, (2, 16), out=out, columns=columns)]
        for entries in (1, 2, 3, 16, 17, 256):
            levels = torch.linspace(-1, 1, entries)[None]
            made += [lookup(levels, 64, out=out, columns=columns, nested=nested) for nested in (False, True)]
            book = torch.ones(1, entries, 3)
            made.append(Vectors(codes(entries, 1, out, -(-columns // 3)).to(torch.int32), (book,), columns))
        made.append(Binary(codes(2, 3, out, columns).bool(), torch.ones(3, -(-out // 2), -(-columns // 8)), (2, 8)))
    stored = [sum(t.nbytes for t in one.tensors().values()) for one in made]
    with monkeypatch.context() as patch:
        patch.setattr(forms, "pack_bits", None)
        assert [one.nbytes for one in made] == stored
    assert len(made) > 450


def test_values_are_their_formulas() -> None:
    a = affine(4, 32, out=3, symmetric=False)
    e = minifloat("e4m3", (2, 128), out=3, columns=200)
    e_values = e.codes.view(torch.float8_e4m3fn).float()  # torch's own reading of the bits
    t = MADE["nested"]
    assert isinstance(t, Lookup)
    v, b = MADE["vectors"], MADE["binary"]
    assert isinstance(v, Vectors)
    assert isinstance(b, Binary)
    for i, j in ((0, 0), (2, 40), (1, 95)):
        assert a.dequantize()[i, j] == (a.codes[i, j] - a.zero[i, j // 32].float()) * a.scale[i, j // 32].float()
        assert e.dequantize()[i, j] == e_values[i, j] * e.scale[i // 2, j // 128].float()
        block = (i * 130 + j) // 64
        assert t.nested_scale is not None
        assert t.mean is not None
        scale = dynamic_map()[t.scale[block].long()] * t.nested_scale[block // 256] + t.mean
        assert t.dequantize()[i, j] == t.levels[0, t.codes[i, j].long()] * scale
        signs = [1 if b.signs[k, i, j % 50] else -1 for k in range(3)]
        expected = sum(s * b.alpha[k, i // 8, j % 50 // 32].float() for k, s in enumerate(signs))
        torch.testing.assert_close(b.dequantize()[i, j % 50], expected, rtol=1e-6, atol=1e-6)
    for i, j in ((0, 0), (5, 14), (32, 7)):
        assert v.table is not None
        assert v.scale is not None
        assert v.offset is not None
        pieces = [book[v.table[i].long(), v.indices[k, i, j // 4].long()][j % 4] for k, book in enumerate(v.codebooks)]
        assert v.dequantize()[i, j] == sum(p.float() for p in pieces) * v.scale[i].float() + v.offset[i].float()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_levels_are_those_of_torch(kind: str) -> None:
    from weft.packed.levels import minifloat_levels

    mine = minifloat_levels(kind)
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    theirs = torch.arange(256).to(torch.uint8).view(dtype).float()
    theirs = torch.where(theirs.isfinite(), theirs, torch.nan)
    assert torch.equal(mine.nan_to_num(7e9), theirs.nan_to_num(7e9))
    assert int(mine.isnan().sum()) == (2 if kind == "e4m3" else 8)


def test_inputs_of_groups_have_their_own_scales() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("int8", "e4m3"):
        made = quantize_inputs(x, kind, None, 32)
        assert torch.equal(made, torch.cat([quantize_inputs(part, kind) for part in x.split(32, 1)], 1))
        assert not torch.equal(made, quantize_inputs(x, kind))


DAMAGE: list[tuple[str, Any]] = [
    ("affine 4", lambda t, s: t.pop("scale")),
    ("affine 4", lambda t, s: t.update(scale=t["scale"][:-1])),
    ("affine 4", lambda t, s: t.update(scale=t["scale"].int())),
    ("affine 4", lambda t, s: t.update(codes=t["codes"][:, 1:])),
    ("affine 4", lambda t, s: s.update(bits=0)),
    ("affine 4", lambda t, s: s.update(bits=10**9)),
    ("affine 4", lambda t, s: s.update(columns=10**15)),
    ("affine 4", lambda t, s: s.update(columns="many")),
    ("affine 4", lambda t, s: s.pop("low")),
    ("affine 4", lambda t, s: s.update(form="afine")),
    ("e4m3", lambda t, s: s.update(block=[0, 32])),
    ("e4m3", lambda t, s: s.update(block=[10**15, 10**15])),
    ("e4m3", lambda t, s: s.update(block=[1])),
    ("e4m3", lambda t, s: s.update(kind="e9m9")),
    ("e4m3", lambda t, s: t.update(scale=t["scale"].T)),
    ("lookup", lambda t, s: s.update(block_size=0)),
    ("lookup", lambda t, s: s.update(block_size=-3)),
    ("lookup", lambda t, s: t.update(levels=t["levels"][:, :9])),
    ("nested", lambda t, s: t.pop("mean")),
    ("nested", lambda t, s: t.update(nested_scale=t["nested_scale"].repeat(2))),
    ("tables", lambda t, s: t.update(table=t["table"] + 1)),
    ("vectors", lambda t, s: t.update(table=t["table"] + 2)),
    ("vectors", lambda t, s: t.update(codebook_0=t["codebook_0"][:, :5])),
    ("vectors", lambda t, s: t.update(scale=t["scale"][1:])),
    ("vectors", lambda t, s: s.update(stages=3)),
    ("binary", lambda t, s: t.update(alpha=t["alpha"][:, 1:])),
    ("binary", lambda t, s: s.update(block=[0, 0])),
    ("permuted", lambda t, s: t.update(order=t["order"] * 0)),
    ("permuted", lambda t, s: t.update(order=t["order"] + 1)),
    ("low rank", lambda t, s: t.update(left=t["left"][1:])),
    ("activations", lambda t, s: s.update(inner=[])),
    ("activations", lambda t, s: s.update(kind="int3")),
    ("groups of inputs", lambda t, s: s.update(group_size=7)),
    ("groups of inputs", lambda t, s: s.update(group_size=-1)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{i} {n}" for i, (n, _) in enumerate(DAMAGE)])
def test_damage_is_refused(name: str, damage: Any) -> None:
    tensors, settings = dict(MADE[name].tensors()), copy.deepcopy(MADE[name].settings())
    damage(tensors, settings)
    with pytest.raises(CheckpointError):
        unpack(tensors, settings)


def test_a_block_larger_than_the_matrix_takes_no_memory() -> None:
    made = Minifloat(codes(16, 2, 4).to(torch.uint8), torch.ones(1, 1), "e2m1", (10**12, 10**12))
    assert made.dequantize().shape == (2, 4)
    table = lookup(dynamic_map()[None, ::17], out=2, columns=4)
    huge = Lookup(table.codes, table.levels, table.scale, 10**15)
    assert torch.equal(huge.dequantize(), table.dequantize())


def test_nests_have_the_shape_of_what_they_stand_for() -> None:
    grid = Affine(torch.ones(4, 6, dtype=torch.int16), torch.ones(4, 1), torch.zeros(4, 1), 4, 0)
    made = Activations(LowRank(Transposed(grid), torch.ones(6, 1), torch.ones(1, 4)), "int8")
    assert made.shape == (6, 4)
    assert torch.equal(made.dequantize(), torch.full((6, 4), 2.0))
