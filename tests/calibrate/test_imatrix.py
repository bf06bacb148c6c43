"""Importance matrices of llama.cpp: both forms, statistics in and out, hostile files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import weft.calibrate
from weft.calibrate import Imatrix, imatrix_from_statistics, read_imatrix, statistics_from_imatrix, write_imatrix
from weft.calibrate.facts import Facts
from weft.calibrate.statistics import Statistics
from weft.errors import CheckpointError, OutputError, RecipeError


def sample() -> Imatrix:
    random = np.random.default_rng(0)
    squares = {
        "blk.0.attn_q.weight": random.random((1, 8)),
        "blk.0.ffn_down_exps.weight": random.random((3, 4)),
        "output.weight": random.random((1, 6)),
    }
    counts = {"blk.0.attn_q.weight": [1000], "blk.0.ffn_down_exps.weight": [7, 0, 993], "output.weight": [1000]}
    return Imatrix(
        {n: s.astype(np.float32) * 100 for n, s in squares.items()},
        {n: np.array(c, np.int64) for n, c in counts.items()},
        ("first.txt", "second.txt"),
        256,
    )


def test_gguf_form_is_what_llama_cpp_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = sample()
    write_imatrix(tmp_path / "i.gguf", made)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    facts = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert facts == {
        "general.type": "imatrix", "imatrix.datasets": ["first.txt", "second.txt"], "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 256,
    }  # fmt: skip
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == [f"{n}.{k}" for n in sorted(made.square_sum) for k in ("in_sum2", "counts")]
    experts = tensors["blk.0.ffn_down_exps.weight.in_sum2"]
    assert experts.shape.tolist() == [4, 3]  # inputs, experts
    assert np.array_equal(np.asarray(experts.data), made.square_sum["blk.0.ffn_down_exps.weight"])
    assert np.asarray(tensors["blk.0.ffn_down_exps.weight.counts"].data).tolist() == [[7], [0], [993]]
    back = read_imatrix(tmp_path / "i.gguf")
    assert back.datasets == made.datasets
    assert back.chunk_size == 256
    for name, squares in made.square_sum.items():
        assert np.array_equal(back.square_sum[name], squares)
        assert np.array_equal(back.counts[name], made.counts[name])


def test_a_file_of_the_reference_writer_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 2)
    for kind, value in (("in_sum2", [[8.0, 18.0]]), ("counts", [[2.0]]), ("in_sum", [[1.0, -1.0]])):
        writer.add_tensor(f"blk.0.attn_v.weight.{kind}", np.float32(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "i.gguf").mean_squares()["blk.0.attn_v.weight"].tolist() == [4, 9]


def test_older_form_is_what_llama_cpp_writes(tmp_path: Path) -> None:
    made = sample()
    write_imatrix(tmp_path / "i.dat", made)
    raw = (tmp_path / "i.dat").read_bytes()
    assert struct.unpack_from("<i", raw) == (3,)
    name = b"blk.0.attn_q.weight"
    assert raw[4 : 8 + len(name)] == struct.pack("<i", len(name)) + name
    at = 8 + len(name)
    assert struct.unpack_from("<ii", raw, at) == (4, 8)  # 1000 tokens are four chunks of 256, counted up
    values = np.frombuffer(raw, "<f4", 8, at + 8)
    np.testing.assert_allclose(values, made.square_sum[name.decode()][0] / 1000 * 4, rtol=1e-6)
    assert raw.endswith(struct.pack("<ii", 4, 10) + b"second.txt")
    back = read_imatrix(tmp_path / "i.dat")
    assert back.datasets == ("second.txt",)
    for key in ("blk.0.attn_q.weight", "output.weight"):
        np.testing.assert_allclose(back.mean_squares()[key], made.mean_squares()[key], rtol=1e-6)
    experts = back.square_sum["blk.0.ffn_down_exps.weight"].reshape(3, 4) / back.counts["blk.0.ffn_down_exps.weight"]
    np.testing.assert_allclose(experts[0], made.square_sum["blk.0.ffn_down_exps.weight"][0] / 7, rtol=1e-6)
    np.testing.assert_allclose(experts[1], 1)  # an expert without tokens
    (tmp_path / "old.dat").write_bytes(raw[: -len(struct.pack("<ii", 4, 10) + b"second.txt")])
    assert read_imatrix(tmp_path / "old.dat").datasets == ()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict()})])})
        for part in "qk":
            self.model["layers"][0]["self_attn"][f"{part}_proj"] = nn.Linear(4, 4)
        self.other = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.model["layers"][0]["self_attn"]
        return self.other(torch.relu(layer["q_proj"](x) + layer["k_proj"](x)))


def test_statistics_go_out_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    found = weft.calibrate.collect(Tiny(), [x[:20], x[20:]], "scales")
    made = imatrix_from_statistics(found, "llama", ("x",))
    names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert sorted(made.square_sum) == sorted(names)
    for name in names:
        np.testing.assert_allclose(made.square_sum[name][0], x.double().square().sum(0).numpy(), rtol=1e-5)
        assert made.counts[name].tolist() == [50]
    for file in ("i.gguf", "i.dat"):
        write_imatrix(tmp_path / file, made)
        back = statistics_from_imatrix(read_imatrix(tmp_path / file), "llama")
        assert sorted(back.layers) == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
        for layer in back.layers:
            ours, rows = found.norm(layer) / 50**0.5, back.rows(layer)
            torch.testing.assert_close(back.norm(layer) / rows**0.5, ours.float(), rtol=1e-5, atol=0)
    back.save(tmp_path / "stats")
    again = Statistics.load(tmp_path / "stats")
    assert torch.equal(again.norm("model.layers.0.self_attn.q_proj"), back.norm("model.layers.0.self_attn.q_proj"))


def test_what_has_no_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="Did you mean llama"):
        imatrix_from_statistics(Statistics({}, Facts()), "lama")
    found = weft.calibrate.collect(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], "scales")
    with pytest.raises(RecipeError, match="names none of the layers, such as 0"):
        imatrix_from_statistics(found)
    with pytest.raises(RecipeError, match="has none of the names"):
        statistics_from_imatrix(Imatrix({"x": np.ones((1, 2), np.float32)}, {"x": np.array([1])}))


def test_a_matrix_without_tokens_counts_all_inputs_alike() -> None:
    made = Imatrix({"x": np.zeros((1, 2), np.float32)}, {"x": np.array([0])})
    assert made.mean_squares()["x"].tolist() == [1, 1]


def test_an_existing_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(tmp_path / "i.dat", sample())
    with pytest.raises(OutputError, match="cannot be written"):
        write_imatrix(tmp_path / "none" / "i.dat", sample())
    assert [p.name for p in tmp_path.iterdir()] == ["i.dat"]


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for form in ("dat", "gguf"):
        write_imatrix(tmp_path / f"i.{form}", sample())
        raw = (tmp_path / f"i.{form}").read_bytes()
        end = raw.index(b"second.txt") - 8 if form == "dat" else len(raw) - 32
        for length in range(0, end, 3):
            (tmp_path / "cut").write_bytes(raw[:length])
            with pytest.raises(CheckpointError):
                read_imatrix(tmp_path / "cut")


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<i", -1) + bytes(20),
        struct.pack("<i", 2**31 - 1) + bytes(20),
        struct.pack("<ii", 1, -5) + bytes(20),
        struct.pack("<ii", 1, 2**31 - 1) + bytes(20),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**31 - 1) + bytes(20),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, -1) + bytes(20),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", 1, 1, np.nan),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", 1, 1, -1.0),
        struct.pack("<i", 2) + (struct.pack("<i", 1) + b"x" + struct.pack("<iif", 1, 1, 1.0)) * 2,
    ],
)
def test_hostile_files_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "i.dat")


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    from weft.checkpoint.gguf_blocks import ggml_type
    from weft.checkpoint.gguf_header import build_gguf_header, value_bytes

    def write(entries: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[int, ...]]) -> Path:
        prefix, _, size = build_gguf_header(entries, [(n, ggml_type("F32"), s) for n, s in tensors.items()])
        (tmp_path / "i.gguf").write_bytes(prefix + bytes(size - len(prefix)))
        return tmp_path / "i.gguf"

    kind = {"general.type": value_bytes("string", "imatrix")}
    with pytest.raises(CheckpointError, match=r"general\.type is not imatrix"):
        read_imatrix(write({}, {"x.in_sum2": (1, 2), "x.counts": (1, 1)}))
    with pytest.raises(CheckpointError, match="holds no importance"):
        read_imatrix(write(kind, {"x.in_sum": (1, 2)}))
    for tensors in (
        {"x.in_sum2": (1, 2)},
        {"x.in_sum2": (2, 2), "x.counts": (1, 1)},
        {"x.in_sum2": (0, 2), "x.counts": (0, 1)},
    ):
        with pytest.raises(CheckpointError, match="needs in_sum2"):
            read_imatrix(write(kind, tensors))
