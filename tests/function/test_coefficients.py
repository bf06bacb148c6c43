"""A base plus differences times trained numbers: sums, groups, sharing and gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.coefficients import Combination, combinations, combine


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def brute(coefficients: Tensor, vectors: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return torch.einsum("k,k...->...", coefficients, vectors)
    chosen = coefficients[:, groups.long()]
    return (chosen * vectors).sum(0)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("partitions", [1, 3])
def test_against_the_equation_with_its_gradient(shape: tuple[int, ...], partitions: int) -> None:
    vectors = draws(2, *shape)
    groups = None if partitions == 1 else torch.randint(partitions, shape, dtype=torch.int32)
    ours = draws(2, *([] if groups is None else [partitions])).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    made, expected = combine(ours, vectors, groups), brute(theirs, vectors, groups)
    torch.testing.assert_close(made, expected)
    upstream = draws(*shape)
    made.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    if groups is None:  # the inner products of the paper
        torch.testing.assert_close(ours.grad, torch.stack([(upstream * v).sum() for v in vectors]))
    assert torch.autograd.gradcheck(lambda c: combine(c, vectors, groups), (ours,))
    assert torch.autograd.gradgradcheck(lambda c: combine(c, vectors, groups).pow(2).sum(), (ours,))


def test_groups_with_equal_coefficients_are_one_group() -> None:
    vectors, groups = draws(2, 4, 3), torch.randint(3, (4, 3), dtype=torch.int32)
    one = draws(2)
    torch.testing.assert_close(combine(one.unsqueeze(1).expand(2, 3), vectors, groups), combine(one, vectors))


def test_narrow_vectors_are_summed_wide_and_kept_narrow() -> None:
    vectors = draws(3, 40).to(torch.float16)
    coefficients = nn.Parameter(torch.randn(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = combine(coefficients, vectors)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, brute(coefficients.detach().double(), vectors.double(), None).float())
    assert {t.dtype for t in kept if t.numel() > 3} == {torch.float16}


def build(config: dict[str, object] | None = None, **weights: Tensor) -> dict[str, Combination]:
    vectors = {n: draws(2, *w.shape) for n, w in weights.items()}
    return {n: b.build(weights[n], batched=False) for n, b in combinations(weights, vectors, **(config or {})).items()}


def test_shared_coefficients_are_one_parameter_in_copies_too() -> None:
    made = nn.ModuleDict(build({"granularity": "model", "start": 0.5}, a=draws(3), b=draws(2, 2)))
    for holder in (made, copy.deepcopy(made)):
        assert len(list(holder.parameters())) == 1
        assert holder["a"].coefficients is holder["b"].coefficients
    assert made["a"].coefficients.tolist() == [0.5, 0.5]
    made["a"](torch.zeros(3)).sum().backward()
    alone = made["a"].coefficients.grad.clone()
    made["b"](torch.zeros(2, 2)).sum().backward()
    expected = torch.stack([v.sum() for v in made["b"].vectors])
    torch.testing.assert_close(made["b"].coefficients.grad - alone, expected)


def test_groups_belong_to_a_name_and_a_seed() -> None:
    weights = {"a": draws(30, 30), "b": draws(30, 30)}
    made, again = build({"partitions": 4}, **weights), build({"partitions": 4}, b=draws(30, 30))
    assert torch.equal(made["b"].groups, again["b"].groups)  # whatever else is attached
    assert not torch.equal(made["a"].groups, made["b"].groups)  # of one shape
    assert not torch.equal(made["a"].groups, build({"partitions": 4, "seed": 1}, **weights)["a"].groups)
    shares = torch.bincount(made["a"].groups.flatten().long()) / 900
    assert len(shares) == 4
    assert ((shares - 0.25).abs() < 5 * (0.25 * 0.75 / 900) ** 0.5).all()
    assert made["a"].coefficients.shape == (2, 4)


def test_a_softmax_makes_a_mean_of_models() -> None:
    base, models = draws(3, 4), draws(2, 3, 4)
    (function,) = (
        b.build(base, batched=False) for b in combinations({"a": base}, {"a": models - base}, softmax=True).values()
    )
    torch.testing.assert_close(function(base), models.mean(0))
    with torch.no_grad():
        function.coefficients.copy_(torch.tensor([0.0, 2.0]))
    share = 1 / (1 + torch.tensor(2.0).double().exp())
    torch.testing.assert_close(function(base), share * models[0] + (1 - share) * models[1])


def test_refusals() -> None:
    weight = {"a": draws(3), "b": draws(2)}
    good = {"a": draws(2, 3), "b": draws(2, 2)}
    for vectors, options, message in (
        (good | {"b": draws(3, 2)}, {}, "same number"),
        ({n: v[:0] for n, v in good.items()}, {}, "one or more"),
        (good | {"b": draws(2, 3)}, {}, r"b is \[2\].*\[3\]"),
        (good, {"partitions": 0}, "groups"),
        (good, {"granularity": "layer"}, "tensor, model"),
    ):
        with pytest.raises(RecipeError, match=message):
            combinations(weight, vectors, **options)
    with pytest.raises(RecipeError, match="one device"):
        combinations(weight | {"a": weight["a"].to("meta")}, good, granularity="model")
