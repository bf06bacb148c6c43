"""The engine of reconstruction: losses by hand, what is kept, padding, single samples, architectures, and models on disk."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import BlockTask, Statistics, Walk
from weft.calibrate.facts import Facts
from weft.calibrate.watch_block import block_layers
from weft.errors import RecipeError
from weft.packed import Affine
from weft.quantize import GradientPTQ, Grid, SignRound, fit_grid, quantize, quantize_model, round_to_nearest
from weft.quantize._block_data import BlockData
from weft.quantize.flexround import FlexRounding
from weft.quantize.reconstruct import reconstruct_block, reconstruct_layer
from weft.quantize.signround import SignRounding
from weft.quantize.soft import Descent, Soft, angles, descend, divergences, sizes, squares, through, weighted


class Scaled(Soft):
    """A weight times a number, packed in eight bits: what a descent does is seen in one number."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight * self.factor

    def packed(self) -> Affine:
        grid = Grid(8, 0)
        now = self.forward().detach()
        return quantize(now, *fit_grid(now, grid), grid)


def test_losses_are_those_of_torch() -> None:
    torch.manual_seed(0)
    y, t, fisher = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.rand(7)
    assert torch.allclose(squares(y, t).mean() / 7, functional.mse_loss(y, t))
    assert torch.allclose(sizes(y, t).mean() / 7, functional.l1_loss(y, t))
    assert torch.allclose(angles(y, t).flatten(), functional.cosine_embedding_loss(
        y.flatten(0, 1), t.flatten(0, 1), torch.ones(15), reduction="none"), atol=1e-6)  # fmt: skip
    expected = functional.kl_div(y.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(divergences(y, t), expected, atol=1e-6)
    assert torch.allclose(weighted(fisher)(y, t), torch.einsum("btc,c->bt", (y - t) ** 2, fisher))


def test_through_has_the_very_values_and_the_gradient_of_the_other() -> None:
    x = torch.tensor([1e8, 0.3], requires_grad=True)
    y = through(x, torch.tensor([0.1, 0.7]))
    assert y.tolist() == torch.tensor([0.1, 0.7]).tolist()
    (y * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("optimizer", ["adam", "adamax", "momentum", "sign"])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_a_descent_finds_the_minimum(optimizer: str, decay: str) -> None:
    soft = Scaled(torch.tensor([[1.0, -2.0]]))
    goal = 1.5 * soft.weight

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (weights["w"] - goal).square().sum()

    before, after = descend({"w": soft}, loss, lambda w: float(loss(w)), Descent(120, 0.02, optimizer, decay))
    assert after < 1e-3 * before
    assert abs(soft.factor.item() - 1.5) < 0.02


def test_the_best_state_is_kept_and_the_start_is_one() -> None:
    soft = Scaled(torch.tensor([[1.0, -2.0]]))
    # the loss pulls away from what is judged
    before, after = descend(
        {"w": soft},
        lambda w: -w["w"].square().sum(),
        lambda w: float((w["w"] - soft.weight).norm()) + 1,
        Descent(16, 0.1),
    )
    assert before == after
    assert soft.factor.item() == 1
    # it passes the best point: the check that was nearest is kept
    descend(
        {"w": soft},
        lambda w: -w["w"].square().sum(),
        lambda w: float((w["w"][0, 1] + 2.4).abs()),
        Descent(8, 0.1, "sign"),
    )
    assert abs(soft.factor.item() - 1.2) < 0.11
    # NaN in the loss: the start
    soft = Scaled(torch.tensor([[1.0, -2.0]]))
    descend({"w": soft}, lambda w: w["w"].sum() * float("nan"), lambda w: 1.0, Descent(4, 0.1))
    assert soft.factor.item() == 1


def test_the_layers_score_is_the_share_of_its_output_that_changed() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64) @ torch.randn(64, 64), torch.randn(6, 64)
    grid = Grid(3, 0)
    soft: Soft = FlexRounding(weight, grid)
    start, end = reconstruct_layer(weight, x.T @ x, soft, Descent(100, 1e-2))
    for found, new in ((start, round_to_nearest(weight, grid)), (end, soft.packed().dequantize())):
        assert found == pytest.approx(
            float((x @ (new - weight).T).square().sum() / (x @ weight.T).square().sum()), rel=1e-4
        )
    assert end < 0.8 * start
    halves = torch.stack([x.T @ x, 2 * x.T @ x])
    soft = SignRounding(weight, grid)
    start, _ = reconstruct_layer(weight, halves, soft, Descent(0))
    delta = round_to_nearest(weight, grid) - weight
    expected = [
        float((k * (x @ v.T).square()).sum()) for v in (delta, weight) for k in [torch.tensor([1.0] * 3 + [2.0] * 3)]
    ]
    assert start == pytest.approx(expected[0] / expected[1], rel=1e-4)
    for bad in (torch.eye(11), torch.zeros(5, 64, 64), torch.ones(64)):
        with pytest.raises(RecipeError, match="Gram"):
            reconstruct_layer(weight, bad, soft, Descent(1))
    with pytest.raises(RecipeError, match="NaN"):
        reconstruct_layer(weight, torch.full((64, 64), float("nan")), soft, Descent(1))


def walked(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model, batches = build(name, dtype)
    return model, Walk(model, batches, check=False, targets=True)


def task_of(block: Any) -> BlockTask:
    return BlockTask(block, block.linears(), Statistics({}, Facts()), seed=3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "vit", "gemma3"])
def test_a_blocks_loss_is_that_of_its_module_without_padding(name: str) -> None:
    """The loss of the engine, where layers are replaced from outside, and by putting the weights into the block itself."""
    _, walk = walked(name)
    with walk:
        for block in walk:
            if block.number != 1:
                continue
            task = task_of(block)
            data = BlockData(task, Descent())
            weights = {n: round_to_nearest(task.weight(n), Grid(2, 0)) for n in task.layers}
            assert data.sliced
            found = data.score(weights)
            for layer, weight in weights.items():
                task.put(layer, weight)
            total, whole = 0.0, 0.0
            with torch.no_grad():
                for number, rows in data.judge.items():
                    args, kwargs = block.batch(number)
                    out = block.module(*args, **kwargs)
                    out = (out[0] if isinstance(out, tuple) else out)[rows]
                    target = block.target(number)[rows]
                    mask = walk.batches[number].get("attention_mask")
                    keep = torch.ones(out.shape[:2]) if mask is None else mask[rows].float()
                    total += float(((out - target).square().sum(-1) * keep).sum())
                    whole += float((target.square().sum(-1) * keep).sum())
            assert 0 < found == pytest.approx(total / whole, rel=1e-3)
            break


def test_every_layer_has_a_gradient_and_padding_has_none() -> None:
    for name in ("llama", "t5", "mixtral", "gpt2"):
        _, walk = walked(name)
        with walk:
            for block in walk:
                task = task_of(block)
                data = BlockData(task, Descent(samples=8))
                weights = {n: round_to_nearest(task.weight(n), Grid(2, 0)).requires_grad_() for n in task.layers}
                loss = sum((data.loss(weights) for _ in range(6)), torch.zeros(()))
                loss.backward()
                assert all(w.grad is not None and w.grad.abs().max() > 0 for w in weights.values()), block.name
                break


def test_samples_that_depend_on_each_other_stay_together() -> None:
    class Mixing(nn.Module):
        """Rows see the mean over the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + x.mean(0, keepdim=True))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Sequential(Mixing(), Mixing()))
    with Walk(model, [torch.randn(6, 3, 4) for _ in range(2)], blocks="1", targets=True) as walk:
        block = next(iter(walk))
        data = BlockData(task_of(block), Descent())
        assert not data.sliced
        assert data.judge == {0: [-1], 1: [-1]} == data.train


def test_convolutions_are_trained_in_their_own_layout() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv1d(16, 16, 3, padding=1, groups=g), nn.GELU()) for g in (1, 2)))
    model = nn.Sequential(nn.Identity(), blocks)
    # of channels and positions that go together: with white inputs nothing is better than the nearest value
    batches = [torch.einsum("bct,cd->bdt", torch.randn(16, 3, 20).cumsum(2), torch.randn(3, 16)) for _ in range(2)]
    with Walk(model, batches, blocks="1", targets=True) as walk:
        for block in walk:
            layers = block_layers(block)
            task = BlockTask(block, layers, Statistics({}, Facts()))
            softs = {n: SignRounding(task.weight(n), Grid(3, 0)) for n in layers}
            start, end = reconstruct_block(task, softs, Descent(40, 1 / 40, "sign", "linear"))
            assert end < start
            data = BlockData(task, Descent())
            assert data.score({}) == pytest.approx(end, rel=1e-3)  # what was put is what was trained


def test_a_block_is_better_than_rounding_and_draws_are_repeated() -> None:
    found = []
    for _ in range(2):
        _, walk = walked("llama")
        with walk:
            block = next(iter(walk))
            task = task_of(block)
            softs = {n: SignRounding(task.weight(n), Grid(3, 8)) for n in task.layers}
            start, end = reconstruct_block(task, softs, Descent(40, 1 / 40, "sign", "linear", 2))
            assert end < start
            assert set(task.packed) == set(softs)
            found.append(torch.cat([task.weight(n).flatten() for n in softs]))
    assert torch.equal(found[0], found[1])


def test_biases_are_trained_and_written(tmp_path: Path) -> None:
    model, batches = build("gpt2")
    model.save_pretrained(tmp_path / "model")
    config = GradientPTQ(3, 8, steps=16, variable="straight-through", optimizer="sign", biases=True, scales=True)
    out = quantize_model(tmp_path / "model", tmp_path / "out", config, batches, format="dense")
    report = json.loads((out / "weft.json").read_text())
    losses = {(v["block_loss_before"], v["block_loss"]) for v in report["layers"].values()}
    assert len(losses) == 3
    assert all(after <= before for before, after in losses)
    assert any(name.endswith(".bias") for name in report["changed"])


@pytest.mark.filterwarnings("ignore:.*too few rows")  # of this little data
@pytest.mark.parametrize(
    ("name", "dtype"), [("mixtral", torch.bfloat16), ("t5", torch.float32), ("modernbert", torch.float32)]
)
def test_models_on_disk(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batches = build(name, dtype)
    model.save_pretrained(tmp_path / "model")
    out = quantize_model(tmp_path / "model", tmp_path / "out", SignRound(4, 8, steps=4), batches, format="dense")
    reread = type(model).from_pretrained(out).eval()
    with torch.no_grad():
        a, b = model(**batches[0])[0].float(), reread(**batches[0])[0].float()
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98
    report = json.loads((out / "weft.json").read_text())["layers"]
    assert sum(v.get("form") == "affine" for v in report.values()) > 10


def test_held_out_text_on_a_small_llama_that_was_trained(tmp_path: Path) -> None:
    """The standard library's source by bytes: reconstruction loses less of the held-out likelihood than rounding."""
    import sysconfig

    import transformers

    text = (Path(sysconfig.get_path("stdlib")) / "typing.py").read_bytes()[:49152]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127).reshape(-1, 32)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    train, held = data[:1400], data[1400:]
    for step in range(80):
        batch = train[(torch.arange(16) * 87 + step * 5) % len(train)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "model")

    def loss(path: Path) -> float:
        with torch.no_grad():
            return float(transformers.LlamaForCausalLM.from_pretrained(path)(held, labels=held).loss)

    batches = [{"input_ids": train[i : i + 16]} for i in range(0, 64, 16)]
    from weft.quantize import RTN

    quantize_model(tmp_path / "model", tmp_path / "rtn", RTN(2, 0), None, format="dense")
    quantize_model(tmp_path / "model", tmp_path / "sign", SignRound(2, 0, steps=60), batches, format="dense")
    original, nearest, found = (loss(tmp_path / name) for name in ("model", "rtn", "sign"))
    assert original < nearest
    assert found - original < 0.7 * (nearest - original), (original, nearest, found)
