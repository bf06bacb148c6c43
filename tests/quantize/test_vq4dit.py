"""VQ4DiT: plain vectors as its limit, penalties and gradients in closed form, and a denoiser of digits without data."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.errors import RecipeError
from weft.quantize import VQ4DiT
from weft.quantize.kmeans import nearest
from weft.quantize.reconstruct import reconstruct_layer
from weft.quantize.soft import Descent, descend
from weft.quantize.vq4dit import SoftAssignment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def soft_of(weight: Tensor, **values: Any) -> SoftAssignment:
    return SoftAssignment(weight, VQ4DiT(**{"length": 2, "entries": 8, "overhead": 1e9, **values}), generator())


def weight_of(rows: int = 10, columns: int = 12) -> Tensor:
    return torch.randn(rows, columns, generator=generator(1))


def gram_of(columns: int = 12) -> Tensor:
    x = torch.randn(200, columns, generator=generator(2)) @ torch.randn(columns, columns, generator=generator(3))
    return x.T @ x


@pytest.mark.parametrize("columns", [12, 11])
def test_one_candidate_is_plain_vectors(columns: int) -> None:
    weight = weight_of(columns=columns)
    soft = soft_of(weight, candidates=1)
    torch.testing.assert_close(soft(), soft.packed().dequantize(), rtol=1e-3, atol=1e-3)  # stored in half precision
    book = soft.codebook.detach() * soft.unit
    vectors = torch.nn.functional.pad(weight, (0, columns % 2)).reshape(-1, 2)
    expected = book[nearest(vectors, book)].reshape(10, -1)[:, :columns]
    torch.testing.assert_close(soft().detach(), expected)
    # whatever the candidates, the start stands for the same
    assert torch.equal(soft_of(weight, candidates=3).packed().dequantize(), soft.packed().dequantize())


def test_shares() -> None:
    """They sum to one, fall with the distance as its inverse, and the mixture is theirs."""
    weight = weight_of()
    soft = soft_of(weight, candidates=3)
    torch.testing.assert_close(soft.shares().sum(1), torch.ones(60))
    vectors = weight.reshape(-1, 2) / soft.unit
    distances = (vectors.unsqueeze(1) - soft.codebook[soft.nearest]).norm(dim=2)
    inverse = 1 / distances
    free = soft.shares().max(1).values < 0.99
    torch.testing.assert_close(soft.shares()[free], (inverse / inverse.sum(1, keepdim=True))[free])
    mixed = torch.einsum("mn,mnd->md", soft.shares(), soft.codebook[soft.nearest]) * soft.unit
    torch.testing.assert_close(soft(), mixed.reshape(10, 12))


def test_nothing_is_undecided_if_and_only_if_all_is_decided() -> None:
    soft = soft_of(weight_of(), candidates=3)
    assert soft.undecided().item() > 0.1
    with torch.no_grad():
        soft.logits.copy_(torch.tensor([60.0, -60.0, -60.0]).expand(60, 3))
    assert soft.undecided().item() == 0
    with torch.no_grad():
        soft.logits[7] = torch.tensor([0.0, 0.0, -60.0])
    assert soft.undecided().item() == pytest.approx(2 / 60)  # 1 for each of two halves


def test_what_is_frozen_is_hard_and_stays() -> None:
    """A decided piece is exactly its entry, has no gradient, and the next projection keeps it."""
    soft = soft_of(weight_of(), candidates=2)
    with torch.no_grad():
        soft.logits[:, 0] = -5.0
        soft.logits[:, 1] = 0.0
        soft.logits[3] = 0.0
    soft.project()
    assert torch.equal(soft.shares()[:3], torch.tensor([[0.0, 1.0]]).expand(3, 2))
    assert soft.shares()[3].tolist() == [0.5, 0.5]
    soft().square().sum().backward()  # type: ignore[no-untyped-call]
    assert soft.logits.grad is not None
    assert bool((soft.logits.grad[:3] == 0).all())
    assert bool((soft.logits.grad[3] != 0).any())
    with torch.no_grad():
        soft.logits[3] = torch.tensor([9.0, 0.0])
        soft.logits[0] += torch.tensor([3.0, -3.0])  # what an optimizer's momentum does
    soft.project()
    hard = (soft.codebook[soft.packed().indices[0].flatten().long()] * soft.unit).reshape(10, 12)
    torch.testing.assert_close(soft(), hard, rtol=1e-6, atol=0)


@pytest.mark.parametrize("learn", ["both", "codebook", "assignments first"])
def test_training_lowers_the_loss_of_hard_choices(learn: str) -> None:
    weight, gram = weight_of(), gram_of()
    soft = soft_of(weight, learn=learn, steps=150)
    before, indices = soft.codebook.detach().clone(), soft.packed().indices
    start, end = reconstruct_layer(weight, gram, soft, soft.config.descent())
    assert end < 0.95 * start
    made = soft.packed().dequantize()
    delta = made - weight
    assert end == pytest.approx(float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum()), rel=1e-3)
    assert not torch.equal(soft.codebook, before) or learn == "assignments first"
    assert torch.equal(soft.packed().indices, indices) == (learn == "codebook")


def test_the_codebook_waits_where_assignments_go_first() -> None:
    soft = soft_of(weight_of(), learn="assignments first")
    for progress, expected in ((0.0, False), (0.49, False), (0.5, True)):
        soft.begin(progress)
        assert soft.codebook.requires_grad == expected


def test_a_codebook_that_is_too_large() -> None:
    weight = torch.randn(64, 64, generator=generator())
    packed = VQ4DiT(steps=0).soft(weight, generator()).packed()
    assert packed.codebooks[0].shape == (1, 16, 4)
    assert packed.bits_per_weight == pytest.approx(1.25)


def test_a_denoiser_without_data() -> None:
    """A teacher that takes noise off digits; students of two bits see only noise and the teacher's own answers.

    On noise that was held out, learned assignments are nearer to the teacher than a tuned codebook, and that nearer than
    k-means.
    """
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.data).float() / 8 - 1
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(65, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)

    def noised(clean: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        return torch.cat([(1 - time) * clean + time * noise, time], 1)

    for step in range(200):
        clean = images[torch.randint(len(images), (128,), generator=generator(step))]
        time, noise = torch.rand(128, 1, generator=generator(step)), torch.randn(128, 64, generator=generator(step + 1))
        optimizer.zero_grad()
        (teacher(noised(clean, time, noise)) - clean).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def trajectory(seed: int, count: int = 96, steps: int = 8) -> Tensor:
        """What the teacher sees on its way from noise to digits."""
        x, seen = torch.randn(count, 64, generator=generator(seed)), []
        for time in torch.linspace(1, 0.1, steps):
            inputs = torch.cat([x, time.expand(count, 1)], 1)
            seen.append(inputs)
            x = x + (teacher(inputs) - x) / time * (0.9 / (steps - 1))
        return torch.cat(seen)

    calibration, held_out = trajectory(100), trajectory(200)
    names = ["0.weight", "2.weight", "4.weight"]
    plain = {n: p.detach() for n, p in teacher.named_parameters()}
    with torch.no_grad():
        targets, expected = teacher(calibration), teacher(held_out)

    def student(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(teacher, {**plain, **weights}, inputs)

    found = {}
    for learn, steps in (("both", 0), ("codebook", 360), ("both", 360)):
        config = VQ4DiT(length=2, entries=16, overhead=1e9, learn=learn, steps=steps)
        softs = {n: config.soft(plain[n], generator()) for n in names}
        draws = generator(5)

        def loss(weights: dict[str, Tensor], draws: torch.Generator = draws) -> Tensor:
            picked = torch.randint(len(targets), (128,), generator=draws)
            return (student(weights, calibration[picked]) - targets[picked]).square().mean()

        def score(weights: dict[str, Tensor]) -> float:
            with torch.no_grad():
                return float((student(weights, calibration) - targets).square().mean())

        descend(softs, loss, score, Descent(steps, 1.0))
        hard = {n: s.packed().dequantize() for n, s in softs.items()}
        with torch.no_grad():
            found[learn, steps] = float((student(hard, held_out) - expected).square().mean())
    assert found["codebook", 360] < 0.8 * found["both", 0]
    assert found["both", 360] < 0.9 * found["codebook", 360], found


def test_what_is_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"length": 0}, {"entries": 1}, {"candidates": 0}, {"learn": "x"}, {"steps": -1}, {"rate": -1}, {"freeze": 0.4},
        {"decide": -1}, {"codebook_rate": float("nan")}, {"overhead": -1}, {"samples": 0},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(RecipeError):
            VQ4DiT(**wrong)
    with pytest.raises(RecipeError, match="NaN"):
        soft_of(torch.full((2, 2), float("nan")))
