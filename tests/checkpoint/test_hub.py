"""The Hub, played by a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, Hub

import weft
from weft.checkpoint import remote
from weft.checkpoint.hub import is_hub_id

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(tensors)


TENSORS = {
    f"layers.{i}.weight": np.random.default_rng(i).standard_normal((50, 30)).astype(np.float32) for i in range(4)
}
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def sharded() -> dict[str, bytes]:
    files: dict[str, bytes] = {"config.json": CONFIG, "tokenizer.json": b'{"a": 1}', "README.md": b"# Model"}
    weight_map = {}
    for number, name in enumerate(TENSORS, 1):
        shard = f"model-{number:05d}-of-00004.safetensors"
        files[shard] = safetensors({name: TENSORS[name]})
        weight_map[name] = shard
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(
        {"org/whole": {"model.safetensors": safetensors(TENSORS), "config.json": CONFIG}, "org/shards": sharded()}
    )
    stop = hub.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    stop()


def assert_all(checkpoint: weft.Checkpoint) -> None:
    assert list(checkpoint) == list(TENSORS)
    for name, expected in TENSORS.items():
        assert np.array_equal(checkpoint[name].numpy(), expected)


@pytest.mark.parametrize("text", ["org/whole", "org/shards", "org/shards@main", "org/shards@v1", f"org/whole@{COMMIT}"])
def test_headers_only_until_weights_are_read(text: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEAD", 256)
    with weft.open(text) as checkpoint:
        read = sum(int(r.split("-")[1]) - int(r[6:].split("-")[0]) + 1 for r in hub.ranges())
        weights = sum(len(d) for n, d in hub.repositories[text.split("@")[0]].items() if n.endswith(".safetensors"))
        assert read < weights / 4, "opening transfers headers, not weights"
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.name == text
        assert checkpoint.fingerprint == f"{text.split('@')[0]}@{COMMIT}"
        assert checkpoint["layers.0.weight"].shape == (50, 30)
        assert_all(checkpoint)
    assert "Bearer hf_secret" in hub.tokens["127.0.0.1"]
    with pytest.raises(weft.WeftError, match="closed"):
        checkpoint["layers.3.weight"].numpy()


def test_a_quantised_repository_is_shown_plain(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(remote, "HEAD", 256)
    monkeypatch.setattr(remote, "BLOCK", 64)
    from weft.packed import Affine
    from weft.packed.formats import find_format

    form, tensors, layers = find_format("pack-quantized"), {}, {}
    for layer in range(12):
        codes = torch.randint(0, 16, (64, 96)).to(torch.int16)
        layers[f"layers.{layer}"] = Affine(codes, torch.rand(64, 3).half(), torch.full((64, 3), 5.0).half(), 4, 0)
    for name, packed in layers.items():
        tensors |= {n: t.numpy() for n, t in form.write(name, packed, torch.float16).items()}
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": form.config(layers, [])}
    hub.repositories["org/packed"] = {
        "model.safetensors": safetensors(tensors),
        "config.json": json.dumps(config).encode(),
    }
    with weft.open("org/packed") as checkpoint:
        assert len(hub.ranges()) <= 2  # shapes come from headers, not from a request for each layer
        assert list(checkpoint) == [f"{name}.weight" for name in layers]
        assert checkpoint.fingerprint.startswith(f"org/packed@{COMMIT}|quantization_config:")
        for name, packed in layers.items():
            assert np.array_equal(checkpoint[f"{name}.weight"].numpy(), packed.dequantize().numpy())


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
@pytest.mark.parametrize("head", [8, 100, 1 << 20])
def test_any_block_size_reads_the_same(block: int, head: int, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", block)
    monkeypatch.setattr(remote, "HEAD", head)
    with weft.open("org/whole") as checkpoint:
        tensor = checkpoint["layers.2.weight"]
        whole = TENSORS["layers.2.weight"].tobytes()
        random = np.random.default_rng(0)
        for _ in range(5):
            start, stop = sorted(random.integers(0, tensor.nbytes + 1, 2))
            buffer = bytearray(int(stop - start))
            tensor.read_into(memoryview(buffer), int(start))
            assert buffer == whole[start:stop]


def test_one_request_serves_neighbouring_reads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEAD", 256)
    with weft.open("org/whole") as checkpoint:
        before = len(hub.ranges())
        for tensor in checkpoint.values():
            for start in range(0, tensor.nbytes, 500):
                tensor.read_into(memoryview(bytearray(500)), start)
        assert len(hub.ranges()) - before == 1


def test_redirects_are_followed_without_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEAD", 256)
    hub.trouble = lambda path, wanted: "moved" if wanted else ""
    with weft.open("org/whole") as checkpoint:
        assert_all(checkpoint)
    assert hub.tokens == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {""}}


def test_threads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1000)
    monkeypatch.setattr(remote, "HEAD", 8)
    with weft.open("org/shards") as checkpoint, ThreadPoolExecutor(4) as pool:
        names = list(TENSORS) * 3
        for name, values in zip(names, pool.map(lambda n: checkpoint[n].numpy(), names)):
            assert np.array_equal(values, TENSORS[name])


def test_companions_are_downloaded_when_asked_for(hub: Hub) -> None:
    with weft.open("org/shards") as checkpoint:
        assert not any("tokenizer" in path for _, path, _ in hub.requests)
        assert checkpoint.folder is not None
        assert (checkpoint.folder / "tokenizer.json").read_bytes() == b'{"a": 1}'
        assert (checkpoint.folder / "README.md").is_file()
        assert not list(checkpoint.folder.glob("*.safetensors"))


def test_a_complete_snapshot_in_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hub.repositories["org/shards"]:
        huggingface_hub.hf_hub_download("org/shards", name, endpoint=hub.url)
    hub.requests.clear()
    with weft.open("org/shards") as checkpoint:
        assert_all(checkpoint)
        assert checkpoint.name == "org/shards"
        assert checkpoint.fingerprint == f"org/shards@{COMMIT}"
    assert not hub.ranges()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    for text in ("org/shards", "org/shards@main", f"org/shards@{COMMIT}"):
        with weft.open(text) as checkpoint:
            assert_all(checkpoint)
            assert checkpoint.fingerprint == f"org/shards@{COMMIT}"
    shard = next(Path(checkpoint.folder).glob("model-00002*"))
    shard.unlink()
    with pytest.raises(weft.WeftError, match="HF_HUB_OFFLINE is set"):
        weft.open("org/shards")


@pytest.mark.parametrize("trouble", ["503", "cut"])
def test_transfers_that_break_off_are_continued(trouble: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "HEAD", 256)
    left = [3]

    def misbehave(path: str, wanted: str) -> str:
        left[0] -= 1
        return trouble if wanted and left[0] >= 0 else ""

    with weft.open("org/whole") as checkpoint:
        hub.requests.clear()
        hub.trouble = misbehave
        assert_all(checkpoint)
    starts = [int(r[6:].split("-")[0]) for r in hub.ranges()]
    assert len(starts) == 4
    assert (len(set(starts)) == 1) == (trouble == "503"), "what has come is not asked for again"


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("whole", "does not send parts"),
        ("shifted", "does not send parts"),
        ("cut", "broke off 5 times"),
        ("503", "asked"),
    ],
)
def test_servers_that_stay_bad(trouble: str, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    hub.trouble = lambda path, wanted: trouble if wanted else ""
    # every attempt brings half of what is left: more than 2^5 bytes are never complete
    with pytest.raises(weft.WeftError, match=message):
        weft.open("org/whole")


def test_a_server_that_fails_while_weights_are_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "HEAD", 256)
    with weft.open("org/whole") as checkpoint:
        hub.trouble = lambda path, wanted: "503" if wanted else ""
        with pytest.raises(weft.WeftError, match="cannot be asked"):
            checkpoint["layers.0.weight"].numpy()
        hub.trouble = lambda path, wanted: ""
        assert_all(checkpoint)


def test_files_that_change_are_noticed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEAD", 256)
    with weft.open("org/whole") as checkpoint:
        hub.repositories["org/whole"]["model.safetensors"] += b"more"
        with pytest.raises(weft.WeftError, match="changed"):
            checkpoint["layers.0.weight"].numpy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/nothing", "no such folder here, and the Hub has no such repository"),
        ("org/whole@missing", "no such revision"),
        ("org/gated", "accept its terms"),
        ("org/empty", "holds no weights"),
        ("org/torn", "names model-00002-of-00004.safetensors, which the repository does not have"),
        ("org/hostile", "not a plain file name"),
        ("org/damaged", "truncated or damaged"),
        ("org/short", "too short"),
    ],
)
def test_what_can_be_wrong_is_said(text: str, message: str, hub: Hub) -> None:
    files = sharded()
    hub.gated.add("org/gated")
    hub.repositories |= {
        "org/gated": files,
        "org/empty": {"README.md": b""},
        "org/torn": {n: d for n, d in files.items() if "00002" not in n},
        "org/hostile": {"model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'},
        "org/damaged": {"model.safetensors": safetensors(TENSORS)[:-5]},
        "org/short": {"model.safetensors": b"abc"},
    }
    with pytest.raises(weft.WeftError, match=message):
        weft.open(text)


def test_no_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(weft.WeftError, match=r"cannot be asked.*not complete in the local cache"):
        weft.open("org/whole")


def test_adapters_and_torch_files_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    import torch

    torch.save({n: torch.from_numpy(v) for n, v in TENSORS.items()}, tmp_path / "model.bin")
    name = "base_model.model.layers.1"
    factors = {f"{name}.lora_A.weight": np.ones((1, 30), "f4"), f"{name}.lora_B.weight": np.ones((50, 1), "f4")}
    hub.repositories |= {
        "org/torch": {"pytorch_model.bin": (tmp_path / "model.bin").read_bytes(), "config.json": CONFIG},
        "org/lora": {
            "adapter_model.safetensors": safetensors(factors),
            "adapter_config.json": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}',
        },
    }
    with weft.open("org/torch") as checkpoint:
        assert_all(checkpoint)
        assert checkpoint.config["model_type"] == "llama"
    with weft.open("org/whole+org/lora@main") as adapted:
        assert adapted.name == "org/whole+org/lora@main"
        np.testing.assert_array_equal(adapted["layers.1.weight"].numpy(), TENSORS["layers.1.weight"] + 2)
        assert np.array_equal(adapted["layers.2.weight"].numpy(), TENSORS["layers.2.weight"])


def test_names() -> None:
    good = ["org/model", "o-1/m.2_x", "org/model@main", "org/model@refs/pr/3", "org/model@" + COMMIT]
    bad = ["model", "/org/model", "./model", "../model", "a/b/c", "org/", "/model", "org/mo del", "org/model@", "~/model",
           "org--x/model", "org/a..b", "org/model@a b", ".org/model", "org/.model", "örg/model", "org/model\n"]  # fmt: skip
    assert [t for t in good if not is_hub_id(t)] == []
    assert [t for t in bad if is_hub_id(t)] == []


def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import weft\n"
        "from weft.errors import MissingDependencyError\n"
        "try:\n    weft.open('org/model')\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert 'pip install "weft[hf]"' in run.stdout
