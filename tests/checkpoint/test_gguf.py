"""Models as GGUF and back: names, orders, configuration, tokenizer, exact codes; held against gguf and transformers."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.checkpoint.gguf import open_gguf, row_in_file
from weft.checkpoint.gguf_blocks import encode_blocks, ggml_type
from weft.checkpoint.gguf_header import build_gguf_header, value_bytes
from weft.checkpoint.gguf_names import ARCHITECTURES
from weft.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, sentence_pieces, tokenizer_metadata
from weft.engine.gguf import write_gguf
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.packed import Affine, Binary
from weft.packed.gguf import from_blocks, to_blocks

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "llama-tied-biased": (
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-3.1": ("Llama", {"max_position_embeddings": 16384, "rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}),
    "qwen2-yarn": (
        "Qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 128}),
}  # fmt: skip
IDS = torch.arange(20).reshape(2, 10)


def make(name: str, folder: Path) -> Any:
    """A tiny model with weights that are not at their start, saved to a folder."""
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="f32", name="m")
    with weft.open(tmp_path / "model") as before, weft.open(tmp_path / "m.gguf") as after:
        assert set(after) == set(before)
        for key, tensor in before.items():
            assert np.array_equal(after[key].numpy(), tensor.numpy()), key
        config = after.config
    weft.run({"steps": [{"method": "passthrough", "models": [str(tmp_path / "m.gguf")]}]}, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_transformers_reads_what_we_write_as_we_do(name: str, kind: str, tmp_path: Path) -> None:
    make(name, tmp_path / "model")
    done = write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind=kind, name="m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    state = theirs.state_dict()
    with weft.open(tmp_path / "m.gguf") as ours:
        assert ours.config["model_type"] == theirs.config.model_type
        for key, tensor in ours.items():
            assert torch.equal(torch.from_numpy(tensor.numpy()), state[key]), key
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert sum(t.tensor_type.name == kind.upper() for t in reader.tensors) == done.types[kind.upper()]


def test_quantised_tensors_are_the_reference_s_blocks(tmp_path: Path) -> None:
    make("qwen3", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="q4_0", embeddings="q8_0")
    kinds = {
        "token_embd.weight": "Q8_0",
        "output.weight": "Q8_0",
        "output_norm.weight": "F32",
        "blk.1.ffn_down.weight": "Q4_0",
    }
    with weft.open(tmp_path / "model") as model:
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
            weight = model[ARCHITECTURES["qwen3"].to_hugging_face(tensor.name)].numpy()
            assert tensor.tensor_type.name == kinds.get(tensor.name, tensor.tensor_type.name)
            assert np.array_equal(np.asarray(tensor.data), gguf.quants.quantize(weight, tensor.tensor_type))


def test_names_are_those_of_the_reference() -> None:
    numbers = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    for name, row in ARCHITECTURES.items():
        theirs = gguf.get_tensor_name_map(numbers[name], 2)
        for part in (*row.layer, "token_embd", "output_norm", "output"):
            ours = f"blk.1.{part}.weight" if part in row.layer else f"{part}.weight"
            hugging_face = row.to_hugging_face(ours)
            assert hugging_face is not None
            assert row.to_gguf(hugging_face) == ours
            if not (part == "output" and row.shifted):  # always tied
                assert theirs.get_name(hugging_face, try_suffixes=(".weight",)) == ours
        for strange in (
            "blk.x.attn_q.weight",
            "blk.0.ffn_gate_exps.weight",
            "rope_freqs.weight",
            "weight",
            "blk.01.attn_q.weight",
        ):
            assert row.to_hugging_face(strange) is None
        assert row.to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq") is None


def test_rows_of_heads_are_put_back() -> None:
    weight = np.arange(24)  # three heads of 8 rows
    stored = weight.reshape(3, 2, 4).swapaxes(1, 2).reshape(24)  # as llama.cpp's converter stores them
    assert [stored[row_in_file(row, 4)] for row in range(24)] == weight.tolist()


def test_reads_may_begin_and_end_anywhere(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    for kind in ("q4_0", "f16"):
        write_gguf(tmp_path / "model", tmp_path / f"{kind}.gguf", kind=kind)
        with weft.open(tmp_path / f"{kind}.gguf") as opened:
            tensor = opened["model.layers.1.self_attn.k_proj.weight"]
            whole = tensor.numpy().tobytes()
            random = np.random.default_rng(0)
            for _ in range(50):
                start, stop = sorted(random.integers(0, tensor.nbytes + 1, 2).tolist())
                buffer = bytearray(stop - start)
                tensor.read_into(memoryview(buffer), start)
                assert bytes(buffer) == whole[start:stop]


def write(path: Path, entries: dict[str, tuple[int, bytes]], arrays: dict[str, np.ndarray]) -> Path:
    """A GGUF file of F32 tensors."""
    tensors = [(n, ggml_type("F32"), a.shape) for n, a in arrays.items()]
    prefix, place, size = build_gguf_header(entries, tensors)
    data = bytearray(size)
    data[: len(prefix)] = prefix
    for name, array in arrays.items():
        data[place[name].offset : place[name].offset + array.nbytes] = array.astype(np.float32).tobytes()
    path.write_bytes(data)
    return path


def test_norms_of_gemma_are_shifted_and_its_config_is_left_out(tmp_path: Path) -> None:
    arrays = {"blk.0.post_ffw_norm.weight": np.float32([1, 3]), "blk.0.attn_q.weight": np.float32([[1, 3]])}
    path = write(tmp_path / "g.gguf", {"general.architecture": value_bytes("string", "gemma2")}, arrays)
    with open_gguf(path) as opened:
        assert opened["model.layers.0.post_feedforward_layernorm.weight"].numpy().tolist() == [0, 2]
        assert opened["model.layers.0.self_attn.q_proj.weight"].numpy().tolist() == [[1, 3]]
        assert opened.config == {}
    with pytest.raises(RecipeError, match="not the opened checkpoint"):
        write_gguf(opened, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.expert_count": value_bytes("uint32", 8)}, "llama.expert_count says something"),
        ({"llama.attention.head_count_kv": value_bytes("uint32[]", [2, 2])}, "is not one whole number"),
        ({"llama.block_count": value_bytes("uint32", 3)}, "not those of such a model"),
        ({"llama.block_count": value_bytes("uint32", 2**31 - 1)}, "not those of such a model"),
        ({"llama.rope.dimension_count": value_bytes("uint32", 8)}, "differs from the size of a head"),
        ({"llama.vocab_size": value_bytes("uint32", 8)}, "differs from the rows"),
        ({"llama.rope.scaling.type": value_bytes("string", "longrope")}, "is not translated"),
        ({"llama.attention.layer_norm_rms_epsilon": value_bytes("string", "x")}, "is no number"),
        ({"general.architecture": value_bytes("string", "mamba")}, "no names for the architecture 'mamba'"),
    ],
)
def test_a_config_in_doubt_is_left_empty_with_the_reason(
    change: dict[str, tuple[int, bytes]], words: str, tmp_path: Path
) -> None:
    make("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="f32")
    with open_gguf(tmp_path / "m.gguf", "file") as opened:
        arrays = {n: t.numpy() for n, t in opened.items()}
        entries = {**opened.header.entries, **change}
    with open_gguf(write(tmp_path / "n.gguf", entries, arrays)) as opened:
        assert opened.config == {}
        assert words in opened.no_config


def test_other_rope_factors_leave_the_config_empty(tmp_path: Path) -> None:
    make("llama-3.1", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="f32")
    with open_gguf(tmp_path / "m.gguf") as opened:
        assert opened.config["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}
    with open_gguf(tmp_path / "m.gguf", "file") as opened:
        arrays = {n: t.numpy() for n, t in opened.items()}
        arrays["rope_freqs.weight"] = arrays["rope_freqs.weight"] * np.float32(1.5)
        entries = dict(opened.header.entries)
    with open_gguf(write(tmp_path / "n.gguf", entries, arrays)) as opened:
        assert opened.config == {}
        assert "rope_freqs.weight are not those" in opened.no_config
        assert "rope_freqs.weight" in opened


def test_types_that_are_not_decoded_are_refused_by_name(tmp_path: Path) -> None:
    prefix, _, size = build_gguf_header({}, [("x", ggml_type("IQ2_XXS"), (256,))])
    (tmp_path / "m.gguf").write_bytes(prefix + bytes(size - len(prefix)))
    with pytest.raises(CheckpointError, match=r"'x' is of the type IQ2_XXS.*llama-quantize"):
        weft.open(tmp_path / "m.gguf")


def test_a_split_model_is_one(tmp_path: Path) -> None:
    arrays = {"a": np.float32([1]), "b": np.float32([2])}
    for number, (name, array) in enumerate(arrays.items()):
        split = {"split.no": value_bytes("uint16", number), "split.count": value_bytes("uint16", 2)}
        write(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", split, {name: array})
    for opened in (weft.open(tmp_path / "m-00002-of-00002.gguf"), weft.open(tmp_path)):
        with opened:
            assert {n: t.numpy().tolist() for n, t in opened.items()} == {"a": [1], "b": [2]}
    write_gguf(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out" / "one.gguf", kind="f32")
    with weft.open(tmp_path / "out") as opened:
        assert set(opened) == {"a", "b"}
        assert "split.count" not in opened.metadata
    os.rename(tmp_path / "m-00001-of-00002.gguf", tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"m-00001-of-00002\.gguf is missing"):
        weft.open(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"part 0 \(from 0\) of 2 and is read as part 0 of 1"):
        weft.open(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        weft.open(tmp_path)


def test_what_lies_beside_the_file_in_a_folder_counts(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {}, {"a": np.float32([1])})
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with weft.open(tmp_path) as opened:
        assert opened.config == {"model_type": "mine"}
        assert opened.folder == tmp_path
    with weft.open(tmp_path / "m.gguf") as opened:
        assert opened.config == {}


def test_a_gguf_file_is_requantised_with_its_metadata(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="f32", name="m")
    with open_gguf(tmp_path / "m.gguf", "file") as opened:
        arrays = {n: t.numpy() for n, t in opened.items()}
        entries = {**opened.header.entries, "strange.key": value_bytes("string[]", ["a", "b"])}
    source = write(tmp_path / "source.gguf", entries, arrays)
    done = write_gguf(source, tmp_path / "q.gguf", kind="q4_0")
    assert done.types == {"Q8_0": 2, "Q4_0": 14, "F32": 5}
    with open_gguf(tmp_path / "q.gguf", "file") as made:
        assert made.header.get("general.file_type") == 2
        changed = {"general.file_type"}
        assert {k: v for k, v in made.header.entries.items() if k not in changed} == {
            k: v for k, v in entries.items() if k not in changed
        }
        for name, array in arrays.items():
            kind = made.stored[name][0].kind
            expected = array if kind.name == "F32" else gguf.quants.dequantize(
                gguf.quants.quantize(array, gguf.GGMLQuantizationType(kind.number)), gguf.GGMLQuantizationType(kind.number)
            )  # fmt: skip
            assert np.array_equal(made[name].numpy(), expected)
    write_gguf(tmp_path / "q.gguf", tmp_path / "again.gguf", kind="q4_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def grid(rows: int, columns: int, bits: int, group: int = 32) -> Affine:
    """Packed weights on a grid of GGUF."""
    low = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(low, -low, (rows, columns), dtype=torch.int16, generator=generator)
    scale = (0.01 + 0.1 * torch.rand(rows, columns // group, generator=generator)).half()
    return Affine(codes, scale, torch.zeros_like(scale), bits, low)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_packed_weights_on_the_grid_are_written_bit_for_bit(bits: int, kind: str, tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    packed = {q: grid(64, 64, bits), down: grid(64, 96, bits, group=96)}
    done = write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="q8_0", packed=packed)
    assert done.exact == 2
    with weft.open(tmp_path / "m.gguf") as opened:
        for name, value in packed.items():
            assert np.array_equal(opened[name].numpy(), value.dequantize().numpy())
            assert opened.stored[name][0].kind.name == kind
        stored, source = opened.stored[down]
        raw = np.empty(stored.nbytes, np.uint8)
        source.read_into(raw.data, stored.offset)
    back = from_blocks(stored.kind, raw.reshape(64, -1))
    assert torch.equal(back.codes, packed[down].codes)
    assert torch.equal(back.scale, packed[down].scale.repeat_interleave(3, 1))
    assert back.bits == bits


def test_what_gptq_rounded_is_exported_as_it_is(tmp_path: Path) -> None:
    from weft.quantize import GPTQ, gptq_codes, quantize_model

    model = make("llama", tmp_path / "model")
    config = GPTQ(bits=4, group_size=32, kind="symmetric", scale_dtype="float16", order="none")
    quantize_model(tmp_path / "model", tmp_path / "gptq", config, [{"input_ids": IDS}], format="dense")
    write_gguf(tmp_path / "gptq", tmp_path / "folder.gguf", kind="q4_0")
    with weft.open(tmp_path / "gptq") as before, weft.open(tmp_path / "folder.gguf") as after:
        for name, tensor in before.items():
            if "_proj" in name:
                assert after.stored[name][0].kind.name == "Q4_0"
                assert np.array_equal(after[name].numpy(), tensor.numpy()), name
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = model.state_dict()[name]
    rounded = gptq_codes(weight, torch.eye(64) + 0.5, config)
    packed = {name: rounded.codes}
    assert write_gguf(tmp_path / "model", tmp_path / "codes.gguf", kind="f16", packed=packed).exact == 1
    with weft.open(tmp_path / "codes.gguf") as after:
        assert np.array_equal(after[name].numpy(), rounded.codes.dequantize().numpy())


def test_zero_points_may_stand_for_the_shift() -> None:
    one = grid(4, 64, 4)
    shifted = Affine(one.codes + 8, one.scale.float(), torch.full_like(one.scale, 8).float(), 4, 0)
    kind, rows = to_blocks(one) or pytest.fail("not exact")
    other = to_blocks(shifted)
    assert other is not None
    assert kind is other[0]
    assert np.array_equal(rows, other[1])


def test_packed_weights_off_the_grid_are_rounded_again_with_a_note(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    one = grid(96, 64, 4)
    off = [
        Affine(one.codes, one.scale.float() * 1.0001, one.zero.float(), 4, -8),  # scales that are no float16
        Affine(one.codes, one.scale, one.zero + 0.5, 4, -8),
        grid(96, 64, 4, group=16),
        Binary(torch.ones(1, 96, 64, dtype=torch.bool), torch.ones(1, 96, 1), (1, 64)),
    ]
    for number, value in enumerate(off):
        assert to_blocks(value) is None
        done = write_gguf(tmp_path / "model", tmp_path / f"{number}.gguf", kind="q4_0", packed={name: value})
        assert "rounded again" in done.notes[-1]
        with weft.open(tmp_path / f"{number}.gguf") as opened:
            values = value.dequantize().numpy()
            again = gguf.quants.dequantize(
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
            )
            assert np.array_equal(opened[name].numpy(), again)
    with pytest.raises(RecipeError, match="Did you mean"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", packed={"model.layers.0.mlp.up_proj": one})
    with pytest.raises(RecipeError, match=r"\[96, 32\] is packed"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", packed={name: grid(96, 32, 4)})


def test_importance_moves_only_scales_of_q4_0(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    weights = {"blk.0.attn_q.weight": np.linspace(0, 3, 64).astype(np.float32)}
    plain = write_gguf(tmp_path / "model", tmp_path / "p.gguf", kind="q4_0").output.read_bytes()
    write_gguf(tmp_path / "model", tmp_path / "w.gguf", kind="q4_0", importance=weights)
    with weft.open(tmp_path / "p.gguf") as before, weft.open(tmp_path / "w.gguf") as after:
        changed = [n for n in before if not np.array_equal(before[n].numpy(), after[n].numpy())]
        assert changed == ["model.layers.0.self_attn.q_proj.weight"]
        with weft.open(tmp_path / "model") as model:
            exact = model[changed[0]].numpy()
        errors = [
            float(((m[changed[0]].numpy() - exact) ** 2 @ weights["blk.0.attn_q.weight"]).sum())
            for m in (before, after)
        ]
        assert errors[1] < errors[0]
    write_gguf(tmp_path / "model", tmp_path / "q.gguf", kind="q8_0", importance=weights)
    with pytest.raises(RecipeError, match="of none of the model's weights"):
        write_gguf(
            tmp_path / "model", tmp_path / "x.gguf", importance={"blk.9.attn_q.weight": weights["blk.0.attn_q.weight"]}
        )
    with pytest.raises(RecipeError, match="the weight 64 inputs"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", importance={"blk.0.attn_q.weight": np.ones(3, np.float32)})
    assert (tmp_path / "p.gguf").read_bytes() == plain


def byte_level(folder: Path, rule: Any = None) -> Any:
    """A byte-level BPE tokenizer in a folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = rule or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    trainer = trainers.BpeTrainer(
        vocab_size=140, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["weights are functions; a weight is a function of others"] * 20, trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = "{% for m in messages %}{{ m }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def test_a_byte_level_tokenizer_is_kept(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    fast = byte_level(tmp_path / "model")
    done = write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="q8_0", name="m")
    assert done.notes == []
    with open_gguf(tmp_path / "m.gguf") as opened:
        get = opened.header.get
    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 160
    known = fast.get_vocab()
    assert all(tokens[number] == token for token, number in known.items())
    assert (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    assert [kinds[known[t]] for t in ("<s>", "<|im_end|>", "<tool>", "w")] == [3, 3, 4, 1]
    assert tokens[159] == "[PAD159]"
    assert kinds[159] == 5
    vocabulary = gguf.SpecialVocab(tmp_path / "model", load_merges=True, n_vocab=160)
    assert get("tokenizer.ggml.merges") == vocabulary.merges
    assert get("tokenizer.chat_template") == vocabulary.chat_template == fast.chat_template
    assert {t: get(f"tokenizer.ggml.{t}_token_id") for t in ("bos", "eos")} == vocabulary.special_token_ids
    assert {t: get(f"tokenizer.ggml.add_{t}_token") for t in ("bos",)} == vocabulary.add_special_token
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "a weight is a function"
    assert theirs(text, add_special_tokens=False).input_ids == fast(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pattern", PRE_TOKENIZERS)
def test_the_cut_of_text_is_recognised_or_must_be_named(pattern: str, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    def cut(expression: str) -> Any:
        split = pre_tokenizers.Split(Regex(expression), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    byte_level(tmp_path / "known", cut(pattern))
    entries, _ = tokenizer_metadata(tmp_path / "known", 160)
    assert entries["tokenizer.ggml.pre"] == value_bytes("string", PRE_TOKENIZERS[pattern])
    byte_level(tmp_path / "other", cut(pattern + "|x"))
    with pytest.raises(RecipeError, match="--pre-tokenizer"):
        tokenizer_metadata(tmp_path / "other", 160)
    entries, _ = tokenizer_metadata(tmp_path / "other", 160, "mine")
    assert entries["tokenizer.ggml.pre"] == value_bytes("string", "mine")


def test_the_known_cuts_are_those_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRE_TOKENIZERS[PRETOKENIZE_REGEX] == "qwen2"
    assert PRE_TOKENIZERS[TikTokenConverter(vocab_file="x").pattern] == "llama-bpe"


def test_tokenizers_of_other_kinds_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    with pytest.raises(RecipeError, match="its tokenizer is WordPiece"):
        tokenizer_metadata(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 9}, "merges": []}}')
    with pytest.raises(RecipeError, match="token 9 has no row"):
        tokenizer_metadata(tmp_path, 8)
    for damaged in (
        '{"model": 3}',
        '{"model": {"type": "BPE", "vocab": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": "x"}}}',
    ):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            tokenizer_metadata(tmp_path, 8)
    none, notes = tokenizer_metadata(tmp_path / "none", 8)
    assert none == {"tokenizer.ggml.model": value_bytes("string", "no_vocab")}
    assert "no tokenizer" in notes[0]


def test_a_sentencepiece_model_is_read_as_its_library_reads_it(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    texts = tmp_path / "texts.txt"
    texts.write_text("weights are functions\na weight is a function of others\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, user_defined_symbols=["<tool>"], num_threads=1,
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = sentence_pieces(tmp_path / "tokenizer.model")
    assert [(p.decode(), s) for p, s, _ in pieces] == [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(300)]
    kinds = [k for _, _, k in pieces]
    assert kinds[0] == 2
    assert [k == 3 for k in kinds] == [theirs.is_control(i) for i in range(300)]
    assert [k == 6 for k in kinds] == [theirs.is_byte(i) for i in range(300)]
    assert kinds[theirs.piece_to_id("<tool>")] == 4
    entries, notes = tokenizer_metadata(tmp_path, 304)
    assert entries["tokenizer.ggml.model"] == value_bytes("string", "llama")
    assert notes == []
    raw = (tmp_path / "tokenizer.model").read_bytes()
    for length in np.random.default_rng(0).integers(0, len(raw), 60).tolist():
        (tmp_path / "tokenizer.model").write_bytes(raw[:length])
        try:
            sentence_pieces(tmp_path / "tokenizer.model")
        except CheckpointError as error:
            str(error).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "models of the type 'gpt2' are not written"),
        ({"num_local_experts": 4}, "num_local_experts is set"),
        ({"hidden_act": "gelu"}, "always silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' are not written"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "damaged or incomplete"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "damaged or incomplete"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "damaged or incomplete"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "with mscale = 0.7"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "with partial_rotary_factor = 0.5"),
        ({"intermediate_size": 2**40}, "damaged or incomplete"),
        ({"num_key_value_heads": "2"}, "damaged or incomplete"),
        ({"num_hidden_layers": 3}, "do not fit together"),
        ({"vocab_size": 99}, "do not fit together"),
        ({"num_attention_heads": 3}, "do not divide into 3 heads"),
        ({"hidden_size": "x"}, "needs a whole number hidden_size"),
    ],
)
def test_models_that_gguf_cannot_say_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(RecipeError, match=words):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_missing_head_is_no_tied_head(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(RecipeError, match=r"has no lm_head\.weight"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")


def test_outputs_are_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Callable[..., Path]
) -> None:
    make("llama", tmp_path / "model")
    output = tmp_path / "m.gguf"
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="no room for"):
            write_gguf(tmp_path / "model", output)
    with monkeypatch.context() as patch:
        patch.setattr("weft.engine.gguf_tensors.encode_blocks", lambda *_: np.zeros((1, 1), np.uint8))
        with pytest.raises(OutputError, match="bytes were made"):
            write_gguf(tmp_path / "model", output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    write_gguf(tmp_path / "model", output)
    made = output.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_gguf(tmp_path / "model", output)
    with pytest.raises(OutputError, match="is the model that is read"):
        write_gguf(output, output, force=True)
    assert output.read_bytes() == made
    assert write_gguf(tmp_path / "model", output, force=True).output.read_bytes() == made
    with pytest.raises(OutputError, match=r"called NAME\.gguf"):
        write_gguf(tmp_path / "model", tmp_path / "model.bin")
    with pytest.raises(RecipeError, match="Did you mean q4_0"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", kind="q4_1")
    with pytest.raises(RecipeError, match=r"has no config\.json"):
        write_gguf(tmp_path / "model" / "model.safetensors", tmp_path / "x.gguf")


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    model = make("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(OutputError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind="q4_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_pieces_do_not_change_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path / "model")
    whole = write_gguf(tmp_path / "model", tmp_path / "whole.gguf", kind="q4_0").output.read_bytes()
    monkeypatch.setattr("weft.engine.gguf_tensors.PIECE", 1000)
    assert write_gguf(tmp_path / "model", tmp_path / "pieces.gguf", kind="q4_0").output.read_bytes() == whole


def test_reading_decodes_in_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    kind = ggml_type("Q4_0")
    rows, columns = 64, 1 << 16  # one row is sixteen megabytes of float32 in all
    prefix, place, size = build_gguf_header({}, [("x", kind, (rows, columns))])
    with open(tmp_path / "m.gguf", "wb") as file:
        file.write(prefix)
        file.write(encode_blocks(np.ones((columns // 32, 32), np.float32), kind).tobytes() * rows)
        file.truncate(size)
    assert place["x"].nbytes == size - len(prefix)
    with weft.open(tmp_path / "m.gguf") as opened:
        tensor = opened["x"]
        buffer = memoryview(bytearray(1 << 20))
        tracemalloc.start()
        for start in range(0, tensor.nbytes, 1 << 20):
            tensor.read_into(buffer, start)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20 < tensor.nbytes
    assert np.frombuffer(buffer, np.float32).max() == 1
