"""Fisher diagonals and mean gradients against plain autograd, sample by sample and class by class, in float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from architectures import build

from weft.calibrate import Statistics, collect, source
from weft.calibrate.gradients import fisher_empirical, fisher_exact, fisher_sampled, mean_gradient
from weft.errors import CheckpointError, RecipeError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


def data() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 3)]
    return xs, [torch.randint(4, (len(x),), generator=generator) for x in xs]


def plain_gradient(model: nn.Module, x: Tensor, label: int) -> dict[str, Tensor]:
    """∇ −log p(label | x) of one sample."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x[None]), torch.tensor([label])).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("vectorized", [False, True])
def test_exact_fisher_equals_a_double_loop(vectorized: bool) -> None:
    model, (xs, _) = network().eval(), data()
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x in torch.cat(xs):
        for label, share in enumerate(model(x[None]).softmax(1)[0].detach()):
            for name, gradient in plain_gradient(model, x, label).items():
                expected[name] += share * gradient**2 / 7
    found = fisher_exact(model, xs, vectorized=vectorized)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("vectorized", [False, True])
def test_empirical_fisher_and_mean_gradient_equal_autograd(vectorized: bool) -> None:
    model, (xs, labels) = network().eval(), data()
    rows = [plain_gradient(model, x, int(y)) for x, y in zip(torch.cat(xs), torch.cat(labels))]
    squares, means = fisher_empirical(model, xs, labels, vectorized=vectorized), mean_gradient(model, xs, labels)
    for name in squares:
        gradients = torch.stack([r[name] for r in rows])
        torch.testing.assert_close(squares[name], (gradients**2).mean(0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(means[name], gradients.mean(0), rtol=1e-12, atol=1e-14)
        assert not torch.allclose(squares[name], gradients.mean(0) ** 2)
    model.zero_grad()
    nn.functional.cross_entropy(model(torch.cat(xs)), torch.cat(labels)).backward()
    assert all(torch.allclose(p.grad, means[n]) for n, p in model.named_parameters())


def test_sampled_fisher_converges_to_the_exact_one() -> None:
    model, (xs, _) = network().eval(), data()
    exact = torch.cat([f.flatten() for f in fisher_exact(model, xs).values()])
    errors = []
    for draws in (4, 64, 1024):
        generator = torch.Generator().manual_seed(2)
        found = fisher_sampled(model, xs, generator=generator, draws=draws, vectorized=True)
        errors.append(float((torch.cat([f.flatten() for f in found.values()]) - exact).norm() / exact.norm()))
    # the error falls as 1 / √draws: by 4 for each 16
    assert errors[2] < 0.05
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5


def test_a_model_in_training_is_evaluated_and_left_in_training() -> None:
    model, (xs, labels) = network(), data()
    model[0].weight.requires_grad_(False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    found = mean_gradient(model, xs, labels)
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert found.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", ["llama", "bert_masked", "t5"])
def test_language_models_token_by_token(name: str) -> None:
    model, batches = build(name)
    model = model.double()
    for batch in batches:
        batch["labels"] = (batch["decoder_input_ids"] if name == "t5" else batch["input_ids"]).clone()
        batch["labels"][1, -3:] = -100
    names = [n for n, _ in model.named_parameters()]
    total: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    for batch in batches:
        for row in range(2):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            counted = one["labels"][:, 1:] if name == "llama" else one["labels"]
            loss = model(**one).loss * int((counted != -100).sum())  # transformers' loss is a mean over tokens
            for n, g in zip(names, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)):
                total[n] = total[n] + (0 if g is None else g**2)
    found = fisher_empirical(model, batches)
    for n in names:
        expected = torch.as_tensor(total[n]) / 6 + torch.zeros_like(found[n])
        # transformers computes its loss in float32
        torch.testing.assert_close(found[n], expected, rtol=1e-3, atol=1e-7)
    sampled = fisher_sampled(model, batches, generator=torch.Generator().manual_seed(0))
    assert sampled.keys() == found.keys()


def test_sampled_labels_of_a_causal_model_have_the_right_law() -> None:
    """One token of context and a head only: the exact Fisher of the next token is known, and padding adds nothing."""

    class Causal(nn.Module):
        config = None

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def can_generate(self) -> bool:
            return True

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.table(input_ids)  # (rows, tokens, 3)

    torch.manual_seed(0)
    model = Causal().double()
    ids = torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0]])
    found = fisher_sampled(
        model, [{"input_ids": ids, "attention_mask": mask}], generator=torch.Generator().manual_seed(0), draws=3000
    )
    shares = model.table.weight.detach().softmax(1)
    exact = shares * (1 - shares)  # of a row that predicts one token
    torch.testing.assert_close(found["table.weight"][:2], exact[:2], rtol=0, atol=0.01)
    assert found["table.weight"][2:].abs().max() == 0  # token 2 predicts padding, 3 is padding, 4 is not there


def test_gradients_are_gathered_like_everything_else(tmp_path: Path) -> None:
    model, batches = build("vit")
    model.save_pretrained(tmp_path / "model")
    what = ("gram", "fisher_exact", "fisher_sampled")
    memory = collect(model, batches, what, where="*.0.*")
    disk = collect(tmp_path / "model", batches, what, where="*.0.*", output=tmp_path / "out", seed=0)
    read = Statistics.load(tmp_path / "out")
    assert read.names == disk.names == memory.names
    for name in read.names:
        torch.testing.assert_close(read._tensors[name].torch(), memory._tensors[name])
    some = next(n for n in read.names if n.endswith("fisher_exact")).rpartition("/")[0]
    assert read.fisher(some, "exact").shape == dict(model.named_parameters())[some].shape
    with pytest.raises(RecipeError, match="fisher_empirical was not gathered"):
        read.fisher(some, "empirical")
    read.check(model)


def test_what_has_no_gradient_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (xs, labels) = network(), data()
    with pytest.raises(RecipeError, match="needs the labels"):
        fisher_empirical(model, xs)
    with pytest.raises(RecipeError, match="needs the labels"):
        fisher_empirical(model, xs, [y.double() for y in labels])
    with pytest.raises(RecipeError, match="labels for 1 batches"):
        mean_gradient(model, xs, labels[:1])
    with pytest.raises(RecipeError, match="no labels in the data"):
        mean_gradient(model, xs, [torch.full_like(y, -100) for y in labels])
    with pytest.raises(RecipeError, match="draws"):
        fisher_sampled(model, xs, generator=torch.Generator(), draws=0)
    with pytest.raises(RecipeError, match="logits"):
        fisher_exact(nn.Sequential(nn.Conv2d(1, 1, 1)), [torch.ones(1, 1, 2, 2)])
    llama, batches = build("llama")
    with pytest.raises(RecipeError, match="Use fisher_sampled"):
        fisher_exact(llama, batches)
    llama.save_pretrained(tmp_path)
    monkeypatch.setattr(source, "physical_memory", lambda: 100_000)
    with pytest.raises(CheckpointError, match="needs the whole model in memory"):
        collect(tmp_path, batches, "fisher_sampled")
