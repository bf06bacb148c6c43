"""Adapters on a base: against the formula in float64, for any read, and everything that must be refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import weft
from weft.checkpoint import computed
from weft.checkpoint.adapter import with_adapter
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.lora_config import parse_lora_config
from weft.checkpoint.memory import from_mapping
from weft.errors import CheckpointError, ShapeError
from weft.kernels.convert import from_float32

PREFIX = "base_model.model."
EPS = float(np.finfo(np.float32).eps)
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def adapter(tensors: dict[str, np.ndarray], **config: Any) -> Checkpoint:
    checkpoint = from_mapping({PREFIX + n: t for n, t in tensors.items()}, "adapter")
    checkpoint.config = CONFIG | config
    return checkpoint


def factors(out: int, into: int, rank: int = 3, name: str = "fc", seed: int = 1) -> dict[str, np.ndarray]:
    down, up = random(rank, into, seed=seed), random(out, rank, seed=seed + 1)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def small_blocks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(computed, "BLOCK", elements)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 17])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 7), (40, 30)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_formula(
    block: int, shape: tuple[int, int], dora: bool, flipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, block)
    tensors = factors(*shape)
    a, b = (tensors[f"fc.lora_{x}.weight"].astype(np.float64) for x in "AB")
    base, magnitude = random(*shape), np.abs(random(shape[0], seed=4)) + 0.1
    expected = base + 2.0 * b @ a
    if dora:
        tensors["fc.lora_magnitude_vector"] = magnitude
        expected *= (magnitude / np.linalg.norm(expected, axis=1))[:, None]
    stored = base.T.copy() if flipped else base
    ours = with_adapter(weft.open({"fc.weight": stored}), adapter(tensors, use_dora=dora, fan_in_fan_out=flipped))
    actual = ours["fc.weight"].numpy()
    actual = actual.T if flipped else actual
    # three products and a sum in float32, then one quotient and one product
    bound = 8 * EPS * (np.abs(base) + 2 * np.abs(b) @ np.abs(a)).max() * (1 if not dora else np.abs(expected).max() + 1)
    assert np.abs(actual - expected).max() <= bound * (10 if dora else 1)


@pytest.mark.parametrize("shape", [(5, 9), (8, 600)])
def test_sums_round_as_blas_does(shape: tuple[int, int]) -> None:
    rank, scale = 7, np.float32(1.375)
    left, right, out = random(shape[0], rank), random(rank, shape[1], seed=1), random(*shape, seed=2)
    total = np.zeros(shape, np.float32)
    for k in range(rank):  # a product in float64 is exact, so this rounds once a step: a fused multiply and add
        total = (total + left[:, k : k + 1].astype(np.float64) * right[k]).astype(np.float32)
    expected = (out + np.float64(scale) * total).astype(np.float32)
    padded = computed.as_factors(left, right)
    computed.add_product(padded.left, padded.right, scale, out)
    if computed_is_fused():
        assert np.array_equal(out, expected)
    else:
        assert np.abs(out - expected).max() <= 8 * EPS * np.abs(expected).max()


def computed_is_fused() -> bool:
    """Whether this machine rounds a product and a sum once: 1 + ε squared minus its rounding is not zero then."""
    one = np.full((1, 1), 1 + EPS, np.float32)
    out = -(one * one)
    factors = computed.as_factors(one, np.ones((1, 1), np.float32))
    computed.add_product(factors.left, factors.right, one[0, 0], out)
    return bool(out[0, 0] != 0)


@pytest.mark.parametrize("flipped", [False, True])
def test_bits_do_not_depend_on_how_they_are_read(flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 100)
    tensors = {**factors(37, 23), "fc.lora_magnitude_vector": np.abs(random(37))}
    base = {"fc.weight": random(23, 37) if flipped else random(37, 23)}
    tensor = with_adapter(weft.open(base), adapter(tensors, use_dora=True))["fc.weight"]
    whole = tensor.bits().tobytes()
    generator = np.random.default_rng(0)
    spans = [tuple(sorted(generator.integers(0, tensor.nbytes + 1, 2))) for _ in range(100)] + [(0, tensor.nbytes)]

    def read(span: tuple[int, int]) -> bytes:
        buffer = bytearray(int(span[1] - span[0]))
        tensor.read_into(memoryview(buffer), int(span[0]))
        return bytes(buffer)

    with ThreadPoolExecutor(4) as pool:
        for (start, stop), data in zip(spans * 2, pool.map(read, spans * 2)):
            assert data == whole[start:stop]
    with pytest.raises(CheckpointError, match="beyond its end"):
        tensor.read_into(memoryview(bytearray(4)), tensor.nbytes - 3)


def test_reading_front_to_back_computes_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64)
    count = [0]
    original = computed.LowRankUpdate._change

    def counted(self: Any, values: np.ndarray, first: int) -> None:
        count[0] += 1
        original(self, values, first)

    monkeypatch.setattr(computed.LowRankUpdate, "_change", counted)
    tensor = with_adapter(weft.open({"fc.weight": random(32, 16)}), adapter(factors(32, 16)))["fc.weight"]
    for start in range(0, tensor.nbytes, 100):
        tensor.read_into(memoryview(bytearray(min(100, tensor.nbytes - start))), start)
    assert count[0] == 32 * 16 // 64


def test_interleaved_tensors_and_stacked_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 50)
    base = weft.open({"a.weight": random(20, 10), "b.weight": random(20, 10, seed=5)})
    both = {**factors(20, 10, name="a"), **factors(20, 10, name="b", seed=7)}
    once = with_adapter(base, adapter(both))
    twice = with_adapter(once, adapter(both, lora_alpha=-6))
    expected = {n: t.numpy() for n, t in once.items()}
    for name, seed in (("a", 1), ("b", 7)):
        alone = factors(20, 10, seed=seed)
        delta = 2 * alone["fc.lora_B.weight"] @ alone["fc.lora_A.weight"]
        wanted = base[f"{name}.weight"].numpy() + delta
        np.testing.assert_allclose(expected[f"{name}.weight"], wanted, atol=16 * EPS * np.abs(wanted).max())
    for start in range(0, 800, 40):
        for name in ("a.weight", "b.weight"):
            buffer = bytearray(40)
            once[name].read_into(memoryview(buffer), start)
            assert bytes(buffer) == expected[name].tobytes()[start : start + 40]
    for name, tensor in twice.items():  # adding and taking away again
        assert np.abs(tensor.numpy() - base[name].numpy()).max() <= 4 * EPS * np.abs(expected[name]).max()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_dtypes_of_base_and_factors(dtype: str) -> None:
    stored = DTYPES[dtype]
    torch = pytest.importorskip("torch")

    def as_stored(values: np.ndarray) -> Any:
        bits = torch.from_numpy(from_float32(values, stored).reshape(-1).copy())
        return bits.view(getattr(torch, stored.torch)).reshape(values.shape)

    base, tensors = as_stored(random(9, 5)), {n: as_stored(t) for n, t in factors(9, 5).items()}
    ours = with_adapter(weft.open({"fc.weight": base}), adapter(tensors))["fc.weight"]
    a, b = (tensors[f"fc.lora_{x}.weight"].double().numpy() for x in "AB")
    assert (ours.dtype.name, ours.natural_dtype.name) == ("F32", dtype)
    assert np.abs(ours.numpy() - (base.double().numpy() + 2 * b @ a)).max() <= 16 * EPS * np.abs(b @ a).max()


def test_a_row_without_length_stays_zero() -> None:
    tensors = {**factors(4, 6), "fc.lora_magnitude_vector": np.ones(4, np.float32)}
    tensors["fc.lora_B.weight"][1] = 0
    base = random(4, 6)
    base[1] = 0
    values = with_adapter(weft.open({"fc.weight": base}), adapter(tensors, use_dora=True))["fc.weight"].numpy()
    assert not values[1].any()
    np.testing.assert_allclose(np.linalg.norm(values[[0, 2, 3]], axis=1), 1, rtol=4 * EPS)


def test_zero_factors_change_nothing_and_nan_comes_through() -> None:
    tensors = factors(4, 6)
    tensors["fc.lora_B.weight"][:] = 0
    base = random(4, 6)
    assert np.array_equal(with_adapter(weft.open({"fc.weight": base}), adapter(tensors))["fc.weight"].numpy(), base)
    tensors["fc.lora_A.weight"][0, 0] = np.nan
    values = with_adapter(weft.open({"fc.weight": base}), adapter(tensors))["fc.weight"].numpy()
    assert np.isnan(values[:, 0]).all()
    assert np.isfinite(values[:, 1:]).all()


def test_closing_closes_both(tmp_path: Path) -> None:
    save_file({"fc.weight": random(4, 6), "other": random(2)}, tmp_path / "base.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({PREFIX + n: t for n, t in factors(4, 6).items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    with weft.open(f"{tmp_path / 'base.safetensors'}+{folder}") as checkpoint:
        name = checkpoint.name
        checkpoint["fc.weight"].numpy()
    assert name == "base.safetensors+adapter"
    with pytest.raises(CheckpointError, match="reading failed"):
        weft.open(checkpoint)["other"].numpy()
    before = checkpoint.fingerprint
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 7}))
    assert weft.open(f"{tmp_path / 'base.safetensors'}+{folder}").fingerprint != before


def test_scales() -> None:
    raw = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q": 16, r"layers\.1\.v": 2},
        "alpha_pattern": {"^v": 3.5, "layers.[01].q": 1},
    }  # fmt: skip
    plain, rslora = parse_lora_config(raw, "x"), parse_lora_config(raw | {"use_rslora": True}, "x")
    for module, (alpha, rank) in {
        "k": (8, 4), "q": (8, 16), "layers.0.q": (1, 16), "v": (3.5, 4), "layers.1.v": (8, 2), "layers.11.v": (8, 4),
        "iq": (8, 4), "q.x": (8, 4),
    }.items():  # fmt: skip
        assert plain.rank_of(module) == rank
        assert plain.scale_of(module) == alpha / rank
        assert rslora.scale_of(module) == alpha / math.sqrt(rank)


BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "no type": ({"peft_type": None}, "names no peft_type"),
    "other type": ({"peft_type": "IA3"}, "adapter of the type IA3"),
    "rank zero": ({"r": 0}, "r must be a positive whole number"),
    "rank of text": ({"r": "8"}, "r must be a positive whole number"),
    "fraction of a rank": ({"r": 2.5}, "r must be a positive whole number"),
    "huge rank": ({"r": 10**400}, "r must be a positive whole number"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
    "alpha missing": ({"lora_alpha": None}, "lora_alpha must be a number"),
    "pattern list": ({"rank_pattern": ["a"]}, "rank_pattern must map"),
    "pattern that is none": ({"rank_pattern": {"(": 3}}, "not a name pattern"),
    "pattern with flags": ({"alpha_pattern": {"(?i)a": 3}}, "not a name pattern"),
    "endless pattern": ({"alpha_pattern": {"a" * 5000: 3}}, "not a name pattern"),
    "pattern to text": ({"alpha_pattern": {"a": "b"}}, "alpha_pattern must be a number"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
    "experts": ({"target_parameters": ["experts.gate"]}, "uses target_parameters"),
    "activated": ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
    "quantisation-aware": ({"use_qalora": True}, "uses use_qalora"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "was started with 'pissa_niter_16'"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base model too"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_that_mean_something_else(case: str) -> None:
    config, message = BAD_CONFIGS[case]
    with pytest.raises(CheckpointError, match=f"adapter.*{message}"):
        with_adapter(weft.open({"fc.weight": random(4, 6)}), adapter(factors(4, 6), **config))


BASE = {"layers.0.fc.weight": random(4, 6), "layers.0.fc.bias": random(4), "layers.10.fc.weight": random(4, 6)}
GOOD = factors(4, 6, name="layers.0.fc")
A, B = GOOD.values()
BAD_TENSORS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "unknown module": (factors(4, 6, name="layers.2.fc"), {}, r"no tensor 'layers\.2\.fc\.weight'.*Did you mean layers"),
    "one of two": (GOOD | factors(4, 6, name="layers.0.fd"), {}, r"layers\.0\.fd.*\(1 of 2 are not.*layers\.0\.fc\.weight"),
    "only A": ({"layers.0.fc.lora_A.weight": A}, {}, "has lora_A but not both"),
    "only B": ({"layers.0.fc.lora_B.weight": B}, {}, "has lora_B but not both"),
    "empty factor": (GOOD | {"layers.0.fc.lora_A.weight": A[:0]}, {}, "before a distributed run gathered"),
    "flat factor": (GOOD | {"layers.0.fc.lora_A.weight": A[0]}, {}, "before a distributed run gathered"),
    "other rank": (GOOD, {"r": 4}, "configuration says rank 4"),
    "ranks differ": (GOOD | {"layers.0.fc.lora_B.weight": B[:, :2].copy()}, {}, "configuration says rank 3"),
    "other shape": (factors(5, 6, name="layers.0.fc"), {}, "do not fit the base's weight"),
    "embedding the wrong way round": (
        {"layers.0.fc.lora_embedding_A": A, "layers.0.fc.lora_embedding_B": B}, {}, "do not fit the base's weight",
    ),
    "dora without magnitude": (GOOD, {"use_dora": True}, "has no magnitude that fits, and use_dora is True"),
    "magnitude without dora": (GOOD | {"layers.0.fc.lora_magnitude_vector": random(4)}, {}, "use_dora is False"),
    "magnitude of another size": (
        GOOD | {"layers.0.fc.lora_magnitude_vector": random(6)}, {"use_dora": True}, "magnitude that fits",
    ),
    "saved module of another shape": (GOOD | {"layers.0.fc.bias": random(5)}, {}, r"replaces layers\.0\.fc\.bias"),
    "unknown tensor": (GOOD | {"layers.0.fc.lora_E": random(3)}, {}, r"no tensor 'layers\.0\.fc\.lora_E'"),
    "misplaced saved module": (GOOD | {"model.fc.weight": random(4, 6)}, {"modules_to_save": ["fc"]}, "no tensor 'model"),
    "bias of a layer without": (
        factors(4, 6, name="layers.10.fc") | {"layers.10.fc.lora_B.bias": random(4)}, {}, "changes layers.10.fc.bias",
    ),
    "rows without numbers": (
        {"layers.0.fc.token_adapter.trainable_tokens_delta": random(2, 6)}, {}, "trainable_token_indices names none",
    ),
    "rows beyond the table": (
        {"layers.0.fc.token_adapter.trainable_tokens_delta": random(2, 6)}, {"trainable_token_indices": [1, 4]},
        r"replaces rows \[1, 4\]",
    ),
    "rows below the table": (
        {"layers.0.fc.token_adapter.trainable_tokens_delta": random(2, 6)}, {"trainable_token_indices": [-1, 2]},
        "names none",
    ),
    "nothing": ({}, {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_adapters_that_do_not_fit_are_refused_as_a_whole(case: str) -> None:
    tensors, config, message = BAD_TENSORS[case]
    with pytest.raises(CheckpointError, match=message):
        with_adapter(weft.open(BASE), adapter(tensors, **config))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_bases_are_refused(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    base = weft.open({"fc.weight": torch.zeros(4, 6, dtype=torch.uint8).view(getattr(torch, DTYPES[dtype].torch))})
    with pytest.raises(CheckpointError, match=f"stored as {dtype}.*Dequantise"):
        with_adapter(base, adapter(factors(4, 6)))


def test_a_module_that_fits_two_towers_is_ambiguous() -> None:
    base = weft.open({f"{t}.layers.0.fc.weight": random(4, 6) for t in ("text", "vision")})
    with pytest.raises(CheckpointError, match=r"several places: text\.layers\.0\.fc\.weight and vision\.layers"):
        with_adapter(base, adapter(factors(4, 6, name="layers.0.fc")))


def test_prefixes_are_not_guessed_without_a_layer_number() -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.fc\.weight'"):
        with_adapter(weft.open({"other.fc.weight": random(4, 6)}), adapter(factors(4, 6, name="model.fc")))


def test_square_weights_follow_the_flag() -> None:
    tensors, base = factors(5, 5), random(5, 5)
    delta = 2 * tensors["fc.lora_B.weight"] @ tensors["fc.lora_A.weight"]
    for flag, expected in ((False, base + delta), (True, base + delta.T)):
        ours = with_adapter(weft.open({"fc.weight": base}), adapter(tensors, fan_in_fan_out=flag))
        np.testing.assert_allclose(ours["fc.weight"].numpy(), expected, atol=16 * EPS * np.abs(expected).max())


def test_shapes_that_differ_raise_the_shape_error() -> None:
    with pytest.raises(ShapeError):
        with_adapter(weft.open({"fc.weight": random(4, 7)}), adapter(factors(4, 6)))


def test_tied_tensors_that_cannot_be_untied_are_refused() -> None:
    table = random(4, 6)
    base = weft.open({"shared.weight": table, "head.weight": table})
    base.config = {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="cannot be untied"):
        with_adapter(base, adapter(factors(4, 6, name="head")))


def tied_base() -> Checkpoint:
    """A language model whose output layer is its embedding, and stands in no file."""
    base = weft.open({"model.embed_tokens.weight": random(9, 6), "model.layers.0.fc.weight": random(4, 6)})
    base.config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    return base


def test_both_ends_of_tied_embeddings_are_adapted_from_the_base() -> None:
    table = "model.embed_tokens"
    down, up, head = random(3, 9, seed=1), random(6, 3, seed=2), factors(9, 6, name="lm_head", seed=8)
    both = {f"{table}.lora_embedding_A": down, f"{table}.lora_embedding_B": up, **head}
    for tensors in (both, dict(reversed(both.items()))):
        base = tied_base()
        ours = with_adapter(base, adapter(tensors))
        start = base[f"{table}.weight"].numpy()
        for name, delta in {
            f"{table}.weight": (up @ down).T, "lm_head.weight": head["lm_head.lora_B.weight"] @ head["lm_head.lora_A.weight"]
        }.items():  # fmt: skip
            wanted = start + 2 * delta
            np.testing.assert_allclose(ours[name].numpy(), wanted, atol=16 * EPS * np.abs(wanted).max())
        assert ours.config["tie_word_embeddings"] is False
        assert base.config["tie_word_embeddings"] is True


def test_embeddings_saved_beside_the_factors_stay_tied_unless_they_were_trained() -> None:
    tensors = {"model.embed_tokens.weight": random(9, 6, seed=3), **factors(4, 6, name="model.layers.0.fc")}
    beside = with_adapter(tied_base(), adapter(tensors))
    trained = with_adapter(tied_base(), adapter(tensors, modules_to_save=["embed_tokens"]))
    assert "lm_head.weight" not in beside
    assert beside.config["tie_word_embeddings"] is True
    assert np.array_equal(trained["lm_head.weight"].numpy(), tied_base()["model.embed_tokens.weight"].numpy())
    assert trained.config["tie_word_embeddings"] is False
    for ours in (beside, trained):
        assert np.array_equal(ours["model.embed_tokens.weight"].numpy(), tensors["model.embed_tokens.weight"])


def test_saved_modules_take_the_bases_dtype_where_it_is_a_plain_float() -> None:
    torch = pytest.importorskip("torch")
    half, eighth = torch.zeros(4, 6).bfloat16(), torch.zeros(4, 6, dtype=torch.uint8).view(torch.float8_e4m3fn)
    base = weft.open({"a.weight": half, "b.weight": eighth, "layers.0.fc.weight": half, "c.count": torch.tensor(3)})
    saved = {"a.weight": random(4, 6), "b.weight": random(4, 6), "c.count": np.array(5)}
    ours = with_adapter(base, adapter(GOOD | saved, modules_to_save=["a", "b", "c"]))
    natural = {n: t.natural_dtype.name for n, t in ours.items()}
    assert natural == {"a.weight": "BF16", "b.weight": "F32", "layers.0.fc.weight": "BF16", "c.count": "I64"}
    assert ours["c.count"].numpy() == 5


def test_resized_embeddings_change_the_vocabulary_and_bring_the_tokenizer(tmp_path: Path) -> None:
    base = weft.open({"layers.0.fc.weight": random(4, 6), "embed.weight": random(10, 6)})
    base.config, base.folder = {"vocab_size": 10}, tmp_path / "base"
    change = adapter(GOOD | {"embed.weight": random(12, 6)}, modules_to_save=["embed"])
    change.folder = tmp_path / "adapter"
    ours = with_adapter(base, change)
    assert ours["embed.weight"].shape == (12, 6)
    assert ours.config["vocab_size"] == 12
    assert ours.folder == tmp_path / "adapter"
    assert base.config["vocab_size"] == 10


def test_merging_adapted_models_keeps_the_bases_dtype(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    base = torch.from_numpy(random(8, 6)).bfloat16()
    (tmp_path / "base").mkdir()
    save_torch({"layers.0.fc.weight": base, "norm.weight": base[0].clone()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "tiny"}')
    total = base.double().numpy()
    for number in (1, 2):
        tensors = factors(8, 6, name="layers.0.fc", seed=10 * number)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({PREFIX + n: t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        b, a = tensors["layers.0.fc.lora_B.weight"], tensors["layers.0.fc.lora_A.weight"]
        total = total + 0.5 * 2 * b.astype(np.float64) @ a
    models = [f"{tmp_path / 'base'}+{tmp_path / str(n)}" for n in (1, 2)]
    weft.run({"steps": [{"method": "linear", "models": models}]}, tmp_path / "out")
    with weft.open(tmp_path / "out") as merged:
        assert {t.dtype.name for t in merged.values()} == {"BF16"}
        # rounded once from float32: half a unit in the last of eight bits
        error = np.abs(merged["layers.0.fc.weight"].numpy() - total)
        assert (error <= 2.0**-8 * np.abs(total) + 16 * EPS * np.abs(total).max()).all()
        assert torch.equal(merged["norm.weight"].torch(), base[0])
