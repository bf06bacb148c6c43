"""Robust weight signatures: geometry of the rejection, patches on and off, alone, together, and on files."""

import numpy as np
import pytest
import torch

import weft
from weft.edit.originals import Originals, restore
from weft.edit.rws import add_signatures, signature
from weft.edit.weight_patch import WeightPatch
from weft.errors import CheckpointError, MissingTensorError, OutputError, RecipeError, ShapeError

SHAPES = [(7, 5), (5,), (), (1,), (0, 3), (2, 3, 3, 3), (40, 30)]
NAMES = ("features.0.weight", "features.0.bias", "features.1.running_var", "features.4.weight", "head.weight")


def triple(shape, seed=0):
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.standard_normal(shape), np.float32)
    standard = np.asarray(base + 0.1 * rng.standard_normal(shape), np.float32)
    robust = np.asarray(standard + 0.1 * rng.standard_normal(shape) - 0.3 * (standard - base), np.float32)
    return base, standard, robust


def reference(base, standard, robust):
    """In float64, from v and d."""
    d, v = (np.asarray(t, np.float64) - base for t in (standard, robust))
    square = (d * d).sum()
    return v - d * ((d * v).sum() / square) if square else v


def models(seed=0, dtype=torch.float32):
    """base, standard, robust state dicts of torch tensors, with a counter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(zip(NAMES, [(4, 3, 3, 3), (4,), (4,), (6, 4, 3, 3), (10, 6)]))
    result = []
    for scale in (1.0, 0.1, 0.1):
        start = result[0] if result else None
        state = {n: torch.randn(s, generator=generator) * scale for n, s in shapes.items()}
        state = {n: t.float() + (start[n].float() if start else 0) for n, t in state.items()}
        state["features.1.running_var"] = state["features.1.running_var"].abs() + 1
        state = {n: t.to(dtype) for n, t in state.items()}
        result.append({**state, "features.1.num_batches_tracked": torch.tensor(7)})
    return result


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and np.array_equal(bits(one[n]), bits(other[n])) for n in one
    )


def bits(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor.reshape(-1).view(np.uint8)
    return tensor.reshape(-1).view(torch.uint8).numpy()


# the signature


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape):
    base, standard, robust = triple(shape)
    got = signature(base, standard, robust)
    assert got.shape == shape
    # the differences are rounded in float32, at the size of the differences; a full rejection leaves nothing but that
    size = max(np.abs(robust - base).max(initial=0), np.abs(standard - base).max(initial=0))
    np.testing.assert_allclose(got, reference(base, standard, robust), rtol=0, atol=4e-7 * size)


@pytest.mark.parametrize("shape", [(40, 30), (2, 3, 3, 3), (500, 400)])
def test_orthogonal_to_the_clean_direction_and_pythagoras(shape):
    base, standard, robust = triple(shape)
    r = signature(base, standard, robust).astype(np.float64)
    d, v = (t.astype(np.float64) - base for t in (standard, robust))
    norm = np.linalg.norm
    assert abs((r * d).sum()) < 1e-6 * norm(r) * norm(d)
    along = (d * v).sum() / norm(d)
    assert norm(v) ** 2 == pytest.approx(norm(r) ** 2 + along**2, rel=1e-6)


def test_linear_in_the_robust_difference():
    base, standard, one = triple((20, 30), 1)
    two = triple((20, 30), 2)[2] - triple((20, 30), 2)[0] + base
    r1, r2 = signature(base, standard, one), signature(base, standard, two)
    both = signature(base, standard, base + (one - base) / 2 + (two - base) / 2)
    np.testing.assert_allclose(both, (r1 + r2) / 2, rtol=0, atol=2e-7 * 4)  # rounding of numbers up to 4


def test_special_cases():
    base, standard, robust = triple((6, 6))
    np.testing.assert_array_equal(signature(base, base, robust), robust - base)  # d = 0: the plain difference
    np.testing.assert_array_equal(signature(base, standard, standard), 0)
    np.testing.assert_array_equal(signature(base, base, base), 0)
    along = base + 2 * (standard - base)
    assert np.abs(signature(base, standard, along)).max() < 1e-6
    np.testing.assert_array_equal(signature(base, standard, robust, layers="other.*"), 0)
    np.testing.assert_array_equal(signature(base, standard, robust, whole="tens*"), robust - standard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    base, standard, robust = (torch.from_numpy(t).to(dtype) for t in triple((20, 30)))
    exact = signature(*(t.float().numpy() for t in (base, standard, robust)))
    got = signature(base, standard, robust)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(exact).to(dtype))


def test_two_half_weights_act_as_one_half():
    target, one, two = (np.asarray(t) for t in triple((5, 5)))
    got = add_signatures(target, [one, two], weights=0.5)
    np.testing.assert_allclose(got, target + 0.5 * one.astype(np.float64) + 0.5 * two, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(add_signatures(target, [one], scale=0), target)


def test_the_clean_model_and_its_patch_differ_from_the_robust_one_along_the_clean_direction_only():
    base, standard, robust = (t.astype(np.float64) for t in triple((20, 30)))
    patched = add_signatures(
        standard.astype(np.float32), [signature(*(t.astype(np.float32) for t in (base, standard, robust)))]
    )
    d, rest = standard - base, robust - patched
    cosine = (d * rest).sum() / np.linalg.norm(d) / np.linalg.norm(rest)
    assert abs(cosine) == pytest.approx(1, abs=1e-6)


# the patch


def test_a_patch_holds_the_layers_that_were_chosen():
    base, standard, robust = models()
    patch = WeightPatch.extract(base, standard, robust, layers="features.0.* features.1.*")
    assert set(patch.tensors) == {"features.0.weight", "features.0.bias", "features.1.running_var"}
    torch.testing.assert_close(
        patch.tensors["features.0.weight"],
        signature(base["features.0.weight"], standard["features.0.weight"], robust["features.0.weight"]),
        rtol=0, atol=0,
    )  # fmt: skip
    patched = patch.apply(standard)
    assert list(patched) == list(standard)
    for name in ("features.4.weight", "head.weight", "features.1.num_batches_tracked"):
        assert patched[name] is standard[name]
    # on the clean model the statistics become the robust model's, but for one rounding
    torch.testing.assert_close(patched["features.1.running_var"], robust["features.1.running_var"])


def test_apply_scale_and_compose():
    base, standard, robust = models()
    other = models(1)[2]
    target = models(2)[1]
    one = WeightPatch.extract(base, standard, robust, layers="*weight")
    two = WeightPatch.extract(base, standard, other, layers="features.0.*")
    both = (one.scaled(0.5) + two.scaled(0.5)).apply(target)
    for name in NAMES:
        expected = target[name].double()
        expected = expected + 0.5 * one.tensors.get(name, torch.zeros(())).double()
        expected = expected + 0.5 * two.tensors.get(name, torch.zeros(())).double()
        torch.testing.assert_close(both[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert same_bits(one.scaled(0.5).apply(target), one.apply(target, 0.5))
    assert [source["scale"] for source in (one.scaled(0.5) + two).sources] == [0.5, 1.0]
    assert one.sources[0]["base"] != two.sources[0]["base"]  # other tensors
    assert one.sources[0] == WeightPatch.extract(base, standard, robust, layers="*weight").sources[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_originals_bring_every_bit_back(dtype):
    base, standard, robust = models(dtype=dtype)
    target = models(3, dtype)[1]
    patch = WeightPatch.extract(base, standard, robust)
    patched = patch.apply(target, 3.7)
    kept = Originals.keep(target, patched)
    assert set(kept.tensors) == set(patch.tensors)
    assert same_bits(kept.restore(patched), target)
    assert not same_bits(patch.remove(patched, 3.7), target)  # rounding is lost here


def test_subtracting_is_exact_where_nothing_was_rounded():
    # multiples of 2⁻⁷ below 1: their sums fit into bfloat16's 8 bits
    rng = np.random.default_rng(0)
    target = {"w": torch.from_numpy(rng.integers(-60, 60, (30, 20)) / 128).to(torch.bfloat16)}
    patch = WeightPatch({"w": torch.from_numpy(rng.integers(-60, 60, (30, 20)) / 128).to(torch.bfloat16)})
    assert same_bits(patch.remove(patch.apply(target)), target)
    tiny, huge = {"w": np.float32([1e-8])}, WeightPatch({"w": np.float32([1.0])})
    assert huge.remove(huge.apply(tiny))["w"] == 0
    assert Originals.keep(tiny, huge.apply(tiny)).restore(huge.apply(tiny))["w"] == tiny["w"]


def test_originals_refuse_a_model_that_was_changed_since():
    base, standard, robust = models()
    patched = WeightPatch.extract(base, standard, robust).apply(standard)
    kept = Originals.keep(standard, patched)
    changed = {**patched, "head.weight": patched["head.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"head\.weight: is not what the edit left"):
        kept.restore(changed)
    with pytest.raises(MissingTensorError, match="no tensor"):
        kept.restore({n: t for n, t in patched.items() if n != "head.weight"})
    trained = {**patched, "features.1.num_batches_tracked": torch.tensor(8)}  # not edited: free to move
    assert kept.restore(trained)["features.1.num_batches_tracked"] == 8
    patched["features.0.bias"][0] = float("nan")
    nan = Originals.keep(patched, standard)
    assert torch.isnan(nan.restore(standard)["features.0.bias"][0])


def test_originals_are_copies():
    before, after = {"w": np.float32([1, 2])}, {"w": np.float32([3, 4])}
    kept = Originals.keep(before, after)
    before["w"][:] = 0
    np.testing.assert_array_equal(kept.restore(after)["w"], [1, 2])


def test_ties_are_kept():
    base, standard, robust = models()
    for state in (base, standard, robust):
        state["embed.weight"] = state["head.weight"]
    patch = WeightPatch.extract(base, standard, robust)
    patched = patch.apply(standard)
    assert patched["embed.weight"] is patched["head.weight"]
    restored = Originals.keep(standard, patched).restore(patched)
    assert restored["embed.weight"] is restored["head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_round_trip(tmp_path, dtype):
    base, standard, robust = models(dtype=dtype)
    patch = WeightPatch.extract(base, standard, robust)
    patch.save(tmp_path / "patch.safetensors")
    loaded = WeightPatch.load(tmp_path / "patch.safetensors")
    assert same_bits(loaded.tensors, patch.tensors)
    assert loaded.sources == patch.sources
    patched = patch.apply(standard)
    kept = Originals.keep(standard, patched)
    kept.save(tmp_path / "originals.safetensors")
    assert same_bits(Originals.load(tmp_path / "originals.safetensors").restore(patched), standard)
    from safetensors.torch import load_file

    assert same_bits(load_file(tmp_path / "patch.safetensors"), patch.tensors)
    with pytest.raises(OutputError, match="exists"):
        patch.save(tmp_path / "patch.safetensors")
    with pytest.raises(CheckpointError, match="no weight patch"):
        WeightPatch.load(tmp_path / "originals.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        patch.save(tmp_path / "nowhere" / "patch.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["originals.safetensors", "patch.safetensors"]


def test_what_does_not_fit_is_refused():
    base, standard, robust = models()
    patch = WeightPatch.extract(base, standard, robust)
    with pytest.raises(RecipeError, match="no floating-point tensor matches"):
        WeightPatch.extract(base, standard, robust, layers="*tracked nothing")
    with pytest.raises(MissingTensorError, match=r"The base has no tensor 'head\.weight'"):
        WeightPatch.extract({n: t for n, t in base.items() if n != "head.weight"}, standard, robust)
    with pytest.raises(ShapeError, match=r"head\.weight"):
        WeightPatch.extract({**base, "head.weight": torch.zeros(3, 6)}, standard, robust)
    with pytest.raises(MissingTensorError, match="The model has no tensor"):
        patch.apply({"x": torch.zeros(1)})
    with pytest.raises(ShapeError, match=r"head\.weight"):
        patch.apply({**standard, "head.weight": torch.zeros(3, 6)})
    with pytest.raises(ShapeError, match="cannot be added"):
        patch + WeightPatch({"head.weight": torch.zeros(3, 6)})
    with pytest.raises(RecipeError, match="variance"):
        patch.apply({**standard, "features.1.running_var": torch.zeros(4)}, 10.0 if negative(patch) else -10.0)


def negative(patch):
    return bool((patch.tensors["features.1.running_var"] < 0).any())


def test_numpy_and_torch_states_give_the_same():
    base, standard, robust = models()
    numpy = [{n: t.numpy() for n, t in state.items()} for state in (base, standard, robust)]
    one, two = WeightPatch.extract(base, standard, robust), WeightPatch.extract(*numpy)
    assert one.sources == two.sources
    patched = two.apply(standard)  # a numpy patch on a torch model
    assert same_bits(patched, one.apply(standard))


# recipes


def write(folder, state):
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    return str(folder)


def read(path):
    with weft.open(path) as written:
        return {n: t.torch() for n, t in written.items()}


def test_extract_apply_and_take_off_in_recipes(tmp_path):
    base, standard, robust = models()
    target = models(5)[1]
    given = {
        name: write(tmp_path / name, state)
        for name, state in {"base": base, "standard": standard, "robust": robust, "target": target}.items()
    }
    extract = {
        "method": "rws_extract",
        "base": given["base"],
        "models": [given["standard"], given["robust"]],
        "parameters": {"layers": "features.*"},
    }
    weft.run({"steps": [extract]}, tmp_path / "patch.safetensors")
    found = read(tmp_path / "patch.safetensors")
    patch = WeightPatch.extract(base, standard, robust, layers="features.*")
    for name in NAMES:
        assert torch.equal(found[name], patch.tensors.get(name, torch.zeros(found[name].shape)))
    apply = {"method": "rws_apply", "base": given["target"], "models": [str(tmp_path / "patch.safetensors")]}
    weft.run({"steps": [apply | {"parameters": {"scale": 0.5}}]}, tmp_path / "patched")
    patched = read(tmp_path / "patched")
    assert same_bits(dict(sorted(patched.items())), dict(sorted(patch.apply(target, 0.5).items())))
    # a file with the chosen layers only
    patch.save(tmp_path / "small.safetensors")
    small = apply | {"models": [str(tmp_path / "small.safetensors")], "missing": "copy", "parameters": {"scale": 0.5}}
    weft.run({"steps": [small]}, tmp_path / "patched from small")
    assert same_bits(read(tmp_path / "patched from small"), patched)
    # both steps in one recipe, without a file between them
    steps = [extract | {"name": "patch"}, apply | {"models": ["@patch"], "parameters": {"scale": 0.5}}]
    weft.run({"steps": steps}, tmp_path / "in one go")
    assert same_bits(read(tmp_path / "in one go"), patched)
    # off again: by subtraction nearly, by kept originals exactly
    off = apply | {"base": str(tmp_path / "patched"), "parameters": {"scale": -0.5}}
    weft.run({"steps": [off]}, tmp_path / "subtracted")
    for name, tensor in read(tmp_path / "subtracted").items():
        torch.testing.assert_close(tensor, target[name], rtol=1e-6, atol=1e-6)
    with weft.open(given["target"]) as before, weft.open(tmp_path / "patched") as after:
        Originals.keep(before, after).save(tmp_path / "originals.safetensors")
    back = {
        "method": "restore",
        "base": str(tmp_path / "patched"),
        "models": [str(tmp_path / "originals.safetensors")],
        "missing": "copy",
    }
    weft.run({"steps": [back]}, tmp_path / "restored")
    assert same_bits(dict(sorted(read(tmp_path / "restored").items())), dict(sorted(target.items())))


def test_a_negative_variance_is_refused_on_files_too(tmp_path):
    state = {"bn.running_var": np.float32([1, 2]), "w": np.zeros((2, 2), np.float32)}
    change = {"bn.running_var": np.float32([-1, -2.5]), "w": np.ones((2, 2), np.float32)}
    step = {"method": "rws_apply", "base": "target", "models": ["patch"]}
    with pytest.raises(RecipeError, match=r"bn\.running_var: .* -0\.5"):
        weft.run({"steps": [step]}, tmp_path / "out", models={"target": state, "patch": change})
    weft.run(
        {"steps": [step | {"parameters": {"scale": 0.5}}]},
        tmp_path / "out",
        models={"target": state, "patch": change},
    )
    assert read(tmp_path / "out")["bn.running_var"].tolist() == [0.5, 0.75]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_restore_is_bit_for_bit(dtype):
    values = np.array([0.0, -0.0, 1e-7, -3.5, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], dtype)
    assert restore(np.ones_like(values), values).tobytes() == values.tobytes()
