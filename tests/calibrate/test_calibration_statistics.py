"""Statistics are what a count of the same inputs in float64 gives, on every architecture, without padding."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import MODELS, build

import weft
from weft.calibrate import Statistics, Walk, collect
from weft.calibrate.experts import unfused
from weft.calibrate.sums import gram, histogram, patches, percentile
from weft.calibrate.watch import experts_of, layers_of
from weft.errors import CheckpointError, NonFiniteError, OutputError, RecipeError

EVERYTHING = ("gram", "mean", "range", "scales", "percentiles", "routing")
ENCODER_OF_T5 = ("encoder.", "EncDecAttention.k", "EncDecAttention.v")


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@torch.no_grad()
def seen(name: str, model: nn.Module, batches: list) -> dict[str, list[np.ndarray]]:
    """The inputs of all layers in the plain forward pass, as float64 rows without padding, found in another way: tokens are
    told apart by their place, experts' tokens by looking their rows up in what the module of experts is given."""
    found: dict[str, list[np.ndarray]] = {}
    current: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> np.ndarray | None:
        if "attention_mask" not in current or (name == "t5" and not any(p in layer for p in ENCODER_OF_T5)):
            return None
        return current["attention_mask"].bool().numpy().reshape(-1)

    def hook(layer: str):
        def see(module, args, output):
            x = args[0].double().numpy()
            rows, mask = x.reshape(-1, x.shape[-1]), keep(layer)
            if mask is not None and ".experts." in layer:
                if not layer.endswith("down_proj"):
                    tokens = given[layer.rpartition(".experts.")[0]].double().numpy()
                    # the place of a row among the tokens: rows are equal bit for bit, and no two tokens are
                    places = [int(np.flatnonzero((tokens == row).all(1))[0]) for row in rows]
                    chosen[layer.rpartition(".")[0]] = np.array([mask[p] for p in places], bool)
                rows = rows[chosen[layer.rpartition(".")[0]]]
            elif mask is not None:
                rows = rows[mask]
            found.setdefault(layer, []).append(rows)

        return see

    chosen: dict[str, np.ndarray] = {}
    with unfused(model) as experts:
        handles = [
            m.register_forward_hook(hook(n))
            for n, m in {**layers_of(model), **experts}.items()
            if not isinstance(m, nn.Conv2d) and "pooler" not in n
        ]
        handles += [
            m.register_forward_pre_hook(lambda m, a, n=n: given.update({n.removesuffix(".experts"): a[0]}))
            for n, m in experts_of(model).items()
        ]
        for batch in batches:
            current = batch
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_statistic_of_every_layer_equals_a_count_in_float64(name: str, tmp_path: Path) -> None:
    model, batches = build(name)
    expected = seen(name, model, batches)
    model.save_pretrained(tmp_path)
    found = collect(tmp_path, batches, EVERYTHING, dtype="float64")
    assert len(found.layers) >= 12
    for layer in found.layers:
        if layer not in expected:  # an expert that no token chose
            assert found.rows(layer) == 0
            with pytest.raises(RecipeError, match="no row of the data"):
                found.gram(layer)
            continue
        x = np.concatenate(expected[layer])
        assert found.rows(layer) == len(x)
        if not len(x):
            continue
        for kind, value in {
            "gram": x.T @ x, "mean": x.mean(0), "minimum": x.min(0), "maximum": x.max(0), "mean_abs": abs(x).mean(0),
            "max_abs": abs(x).max(0), "norm": np.sqrt((x * x).sum(0)),
        }.items():  # fmt: skip
            scale = max(1e-12, np.abs(x.T @ x).max() if kind == "gram" else np.abs(x).max())
            np.testing.assert_allclose(
                getattr(found, kind)(layer).numpy(), value, rtol=1e-6, atol=2e-6 * scale, err_msg=layer
            )
        for share in (0.0, 0.01, 0.5, 0.99, 1.0):
            exact = np.quantile(x, share, method="inverted_cdf")
            assert abs(found.percentile(layer, share) - exact) <= abs(exact) / 128
    in_memory = collect(model, batches, EVERYTHING, dtype="float64")
    assert in_memory.layers == found.layers
    assert in_memory.names == found.names
    assert all(torch.equal(in_memory._tensors[n], found._tensors[n]) for n in found.names)


def test_layers_with_one_input_share_one_matrix() -> None:
    model, batches = build("llama")
    found = collect(model, batches)
    layer = "model.layers.1"
    assert found.gram(f"{layer}.self_attn.q_proj") is found.gram(f"{layer}.self_attn.v_proj")
    assert found.gram(f"{layer}.mlp.up_proj") is found.gram(f"{layer}.mlp.gate_proj")
    assert found.shared(f"{layer}.self_attn.k_proj") == [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
    assert len(found.names) == 3 * 4
    assert found.gram(f"{layer}.mlp.down_proj").shape == (48, 48)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_routing_equals_a_recount_from_the_routers(name: str) -> None:
    model, batches = build(name)
    found = collect(model, batches, "routing,mean", dtype="float64")
    routers = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Router")}
    assert len(routers) == len(found.experts) == 3
    for name, router in routers.items():
        experts = f"{name.rpartition('.')[0]}.experts"
        count = torch.zeros(4, dtype=torch.int64)
        weights = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            outputs = []
            handle = router.register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out))
            with torch.no_grad():
                model(**batch)
            handle.remove()
            _, scores, chosen = outputs[0]
            for token, counts in enumerate(batch["attention_mask"].flatten().tolist()):
                for place, expert in enumerate(chosen[token].tolist() if counts else ()):
                    count[expert] += 1
                    weights[expert] += scores[token, place].double()
        assert torch.equal(found.routing(experts), count)
        torch.testing.assert_close(found.routing_weights(experts), weights)
        for expert in range(4):
            assert found.rows(f"{experts}.{expert}.down_proj") == count[expert]
    assert sum(found.facts.experts.values()) == 3 * sum(int(b["attention_mask"].sum()) for b in batches)


def test_padding_changes_nothing() -> None:
    model, _ = build("llama")
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([tokens, torch.full((2, 4), 7)], 1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 4)], 1).long()
    a = collect(model, [{"input_ids": tokens}], EVERYTHING)
    b = collect(model, [{"input_ids": padded, "attention_mask": mask}], EVERYTHING)
    for layer in a.layers:
        assert a.rows(layer) == b.rows(layer) == 18
        torch.testing.assert_close(a.gram(layer), b.gram(layer), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.max_abs(layer), b.max_abs(layer), rtol=1e-4, atol=1e-5)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(
            4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2, padding_mode="reflect"
        )
        self.two = nn.Conv1d(6, 8, 3, padding="same")
        self.three = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).mean(3)).relu().mean(2))


def test_convolutions_by_their_patches() -> None:
    torch.manual_seed(0)
    net, data = Network().train(), [torch.randn(3, 4, 7, 8), torch.randn(2, 4, 7, 8)]
    found = collect(net, data, ("gram", "mean"), dtype="float64")
    assert net.training
    grams = torch.zeros(2, 12, 12, dtype=torch.float64)
    for x in data:
        padded = nn.functional.pad(x.double(), (1, 1, 2, 2), mode="reflect")
        unfolded = nn.functional.unfold(padded, (3, 2), dilation=(2, 1), stride=(1, 2))  # (batch, 24, places)
        rows = unfolded.transpose(1, 2).reshape(-1, 2, 12)
        grams += torch.einsum("rgi,rgj->gij", rows, rows)
    torch.testing.assert_close(found.gram("one"), grams, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.mean("one"), torch.cat([x.double().mean((2, 3)) for x in data]).mean(0), rtol=1e-5, atol=1e-7
    )
    assert found.rows("three") == 5
    x = net.one(data[0]).mean(3)
    out = patches(x, net.two) @ net.two.weight.flatten(1).T + net.two.bias
    torch.testing.assert_close(out.reshape(3, -1, 8).mT, net.two(x))
    assert patches(torch.randn(2, 3, 5, 6, 7), nn.Conv3d(3, 4, 2)).shape == (2 * 4 * 5 * 6, 24)


def test_percentiles_of_bfloat16_are_exact() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = histogram(x)
    for share in (0.0, 0.07, 0.5, 0.999, 1.0):
        assert percentile(counts, share) == np.quantile(x.float().numpy(), share, method="inverted_cdf")
    assert percentile(histogram(torch.arange(1.0, 101.0)), 0.07) == 7
    assert percentile(histogram(torch.tensor([0.0, -0.0])), 0.5) == 0
    with pytest.raises(RecipeError, match="no values"):
        percentile(torch.zeros(65536, dtype=torch.int64), 0.5)
    with pytest.raises(RecipeError, match="from 0 to 1"):
        percentile(counts, 50)


def test_one_weight_load_a_block(tmp_path: Path) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path)
    real: list[set[str]] = []
    plain = weft.calibrate.walker.Block.run

    def run(block, **options):
        real.append({n.split(".")[2] for n, p in block.walk.model.named_parameters() if not p.is_meta})
        return plain(block, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weft.calibrate.walker.Block, "run", run)
        collect(tmp_path, batches)
    assert real == [{"0"}, {"1"}, {"2"}]  # one block at a time, and each runs once


def test_saved_statistics_read_back(tmp_path: Path) -> None:
    model, batches = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    memory = collect(tmp_path / "model", batches, EVERYTHING)
    memory.save(tmp_path / "a")
    collect(tmp_path / "model", batches, EVERYTHING, output=tmp_path / "b", memory=0)
    assert not list(tmp_path.glob("*.partial"))
    for folder in ("a", "b"):
        read = Statistics.load(tmp_path / folder)
        assert read.names == memory.names
        assert read.facts == memory.facts
        assert read.layers == memory.layers
        for layer in read.layers:
            if read.rows(layer):
                assert torch.equal(read.gram(layer), memory.gram(layer))
        first = read.gram("model.layers.0.self_attn.q_proj")
        assert read.gram("model.layers.0.self_attn.k_proj") is first
        read.check(model)
        read.check(tmp_path / "model")
        with Walk(tmp_path / "model", batches) as walk:
            for block in walk:
                read.check(block.linears())
    text = (tmp_path / "b" / "statistics.json").read_text()
    assert str(tmp_path) not in text
    collect(tmp_path / "model", batches, EVERYTHING, output=tmp_path / "c")
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
    for other in (build("llama")[0], tmp_path / "b"):
        with pytest.raises(CheckpointError):
            read.check(other)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"another model: model\.layers\.2\.self_attn\.o_proj\.weight"):
        read.check(model)


def test_outputs_are_not_replaced_unasked(tmp_path: Path) -> None:
    model, batches = build("gpt2")
    found = collect(model, batches, "mean")
    found.save(tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        found.save(tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        collect(model, batches, "mean", output=tmp_path / "a")
    collect(model, batches, "scales", output=tmp_path / "a", force=True)
    assert Statistics.load(tmp_path / "a").max_abs("transformer.h.0.attn.c_attn").shape == (32,)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    with pytest.raises(OutputError, match="holds no statistics"):
        found.save(tmp_path / "b", force=True)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_goes_on(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    plain = weft.calibrate.walker.Block.run
    ran = []

    def run(block, **options):
        if len(ran) == stop:
            raise KeyboardInterrupt
        ran.append(block.number)
        return plain(block, **options)

    arguments = (tmp_path / "model", batches, "gram,scales")
    with monkeypatch.context() as patch:
        patch.setattr(weft.calibrate.walker.Block, "run", run)
        if stop < 3:
            with pytest.raises(KeyboardInterrupt):
                collect(*arguments, output=tmp_path / "a")
            with pytest.raises(OutputError, match="unfinished run"):
                collect(*arguments[:2], "mean", output=tmp_path / "a")
            stop = 9
        collect(*arguments, output=tmp_path / "a")
    assert ran == [0, 1, 2]
    collect(*arguments, output=tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model, batches = build("llama")
    good = tmp_path / "good"
    collect(model, batches, "gram", output=good)
    facts = json.loads((good / "statistics.json").read_text())
    layer = "model.layers.0.mlp.up_proj"

    def refused(match: str, **changes: object) -> None:
        import shutil

        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        (tmp_path / "bad" / "statistics.json").write_text(json.dumps({**facts, **changes}))
        with pytest.raises(CheckpointError, match=match):
            Statistics.load(tmp_path / "bad")

    with pytest.raises(CheckpointError, match=r"holds no statistics\.json"):
        Statistics.load(tmp_path)
    refused("version 1", version=2)
    refused("version 1", format="x")
    refused("needs layers", layers=[])
    refused("number of rows", layers={layer: [layer, -1]})
    refused("number of rows", layers={layer: ["nowhere", 1]})
    refused("number of rows", experts={layer: "many"})
    refused("fingerprint", fingerprints={layer: [1]})
    refused("no statistic of a layer", layers={}, fingerprints={})
    refused("not a plain file name", weight_map={"a": "../../etc/passwd"})
    refused("weight_map", weight_map=[])
    refused("is missing", weight_map={**facts["weight_map"], "b/gram": "other.safetensors"})
    refused("does not hold it", weight_map={**facts["weight_map"], f"{layer}/mean": "block-00000.safetensors"})
    for text in ("", "[]", "{", "null"):
        (tmp_path / "bad" / "statistics.json").write_text(text)
        with pytest.raises(CheckpointError):
            Statistics.load(tmp_path / "bad")
    refused("version", version=None)
    (tmp_path / "bad" / "statistics.json").write_text(json.dumps(facts))
    file = tmp_path / "bad" / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        Statistics.load(tmp_path / "bad")


def test_what_cannot_be_gathered_is_said(tmp_path: Path) -> None:
    model, batches = build("llama")
    with pytest.raises(RecipeError, match="Did you mean gram"):
        collect(model, batches, "gramm")
    with pytest.raises(RecipeError, match="No layer was chosen"):
        collect(model, batches, where="nowhere.at.all")
    with pytest.raises(RecipeError, match="no fused experts"):
        collect(model, batches, "routing")
    with pytest.raises(RecipeError, match="dtype"):
        collect(model, batches, dtype="int8")
    with pytest.raises(RecipeError, match="no calibration batches"):
        collect(model, [])
    with pytest.raises(RecipeError, match="no calibration batches"):
        collect(nn.Linear(2, 2), [])
    with pytest.raises(NonFiniteError, match="NaN"):
        collect(nn.Linear(2, 2), [torch.tensor([[1.0, float("nan")]])])
    found = collect(model, batches, "mean", where="*.q_proj")
    assert [n.rpartition(".")[2] for n in found.layers] == ["q_proj"] * 3
    with pytest.raises(RecipeError, match="gram was not gathered; there are mean"):
        found.gram("model.layers.0.self_attn.q_proj")
    with pytest.raises(RecipeError, match="Did you mean"):
        found.mean("model.layers.0.self_attn.k_proj")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError):
        collect(model, batches, "mean", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_is_shared_only_once_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x if len(x) == 1 else x.clone())

    with pytest.raises(RecipeError, match="cannot share statistics"):
        collect(Odd(), [torch.ones(1, 2), torch.ones(2, 2)])
    found = collect(Odd(), [torch.ones(2, 2), torch.ones(3, 2)])
    assert found.shared("b") == ["b"]


def test_a_tensor_that_changed_in_between_is_not_shared() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.add_(1))

    found = collect(Changes(), [torch.ones(1, 2)], "mean")
    assert found.mean("a").tolist() == [1, 1]
    assert found.mean("b").tolist() == [2, 2]


def test_matrices_that_are_not_counted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = build("mixtral")
    for module in ("collect", "watch", "experts"):
        name = "experts_of" if module == "collect" else "is_experts"
        target = sys.modules[f"weft.calibrate.{module}"]
        monkeypatch.setattr(target, name, (lambda *a: {}) if module == "collect" else (lambda m: False))
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.experts\.gate_up_proj and 5 others hold several matrices"):
        collect(model, batches, "mean")


@pytest.mark.parametrize("channels", [5, 512, 700, 1100])
def test_products_of_bfloat16_round_nothing_on_the_way(channels: int) -> None:
    x = torch.randn(300, channels, generator=torch.Generator().manual_seed(0))
    rounded = x.bfloat16().double()

    def away(total: torch.Tensor, values: torch.Tensor) -> float:
        sizes = values.square().sum(0).sqrt()
        return float(((total - values.T @ values) / (sizes[:, None] * sizes)).abs().max())

    assert away(gram(x), x.double()) < 3e-6
    assert away(gram(x.bfloat16()), rounded) < 3e-6
    with torch.autocast("cpu", torch.bfloat16):
        under = gram(x)  # what a layer multiplies then
    assert torch.equal(under, under.T)
    assert away(under, rounded) < 3e-6
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
