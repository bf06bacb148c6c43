"""Task vectors: the model at c = 0 and c = 1, task arithmetic, names, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from weft.adapt import TaskVectors
from weft.errors import CheckpointError, RecipeError
from weft.merge import task_arithmetic


class Model(nn.Module):
    """Every layout, and a norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 8)
        self.mix = Conv1D(6, 8)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(self.table(tokens)))))


TOKENS = torch.tensor([[1, 2], [8, 2]])


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    for seed in (1, 2):
        weft.save(Model(seed).double(), tmp_path / str(seed))
    return tuple(str(tmp_path / str(seed)) for seed in (1, 2))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in weft.plain_state_dict(model).items() if n.endswith("weight")}


def coefficients(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: fs[-1].coefficients for n, fs in weft.functions(model).items()}


def close(model: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(weights(model), expected)


@pytest.mark.parametrize("options", [{}, {"partitions": 3}, {"granularity": "model"}])
def test_zero_is_the_model_and_one_is_the_checkpoint(files: tuple[str, ...], options: dict[str, object]) -> None:
    model = Model(0).double()
    before = {n: t.clone() for n, t in weights(model).items()}
    report = weft.adapt_(model, TaskVectors(checkpoints=files, **options), where="*")
    assert list(report.touched) == list(before)
    assert report.trainable == 2 * (1 if options.get("granularity") else 4) * options.get("partitions", 1)
    assert {n: torch.equal(t, before[n]) for n, t in weights(model).items()} == dict.fromkeys(before, True)
    for one in range(2):
        with torch.no_grad():
            for value in coefficients(model).values():
                value.zero_()
                value[one] = 1
        close(model, weights(Model(one + 1).double()))


def test_one_number_a_checkpoint_for_the_model_is_task_arithmetic(files: tuple[str, ...]) -> None:
    model = Model(0)
    base = {n: t.clone() for n, t in weights(model).items()}
    weft.adapt_(model, TaskVectors(checkpoints=files, granularity="model"), where="*")
    with torch.no_grad():
        next(iter(coefficients(model).values())).copy_(torch.tensor([0.7, -0.4]))
    deltas = [{n: t.float() - base[n] for n, t in weights(Model(s)).items()} for s in (1, 2)]
    merged = task_arithmetic(deltas, weights=[0.7, -0.4])
    close(model, {n: base[n] + merged[n] for n in base})


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_gradients_are_inner_products_with_the_task_vectors(files: tuple[str, ...], granularity: str) -> None:
    model = Model(0).double()
    plain = copy.deepcopy(model)
    weft.adapt_(model, TaskVectors(checkpoints=files, granularity=granularity), where="*")
    model(TOKENS).square().sum().backward()
    plain(TOKENS).square().sum().backward()
    others = [weights(Model(s).double()) for s in (1, 2)]
    expected = {
        n: torch.stack([(p.grad * (o[n] - p)).sum() for o in others]).detach()
        for n, p in plain.named_parameters()
        if n.endswith("weight")
    }
    total = sum(expected.values())
    for name, value in coefficients(model).items():
        torch.testing.assert_close(value.grad, expected[name] if granularity == "tensor" else total)


def test_from_another_base(files: tuple[str, ...]) -> None:
    model = Model(0).double()
    before = weights(copy.deepcopy(model))
    weft.adapt_(model, TaskVectors(checkpoints=files[:1], base=files[1], start=0.5), where="*")
    first, second = (weights(Model(s).double()) for s in (1, 2))
    close(model, {n: t + 0.5 * (first[n] - second[n]) for n, t in before.items()})


def test_a_learned_soup_starts_at_the_mean(files: tuple[str, ...]) -> None:
    model = Model(0).double()
    weft.adapt_(model, TaskVectors(checkpoints=files, softmax=True, granularity="model"), where="*")
    first, second = (weights(Model(s).double()) for s in (1, 2))
    close(model, {n: (t + second[n]) / 2 for n, t in first.items()})


def test_on_top_of_another_adapter_one_is_still_the_checkpoint(files: tuple[str, ...]) -> None:
    model = Model(0).double()
    weft.adapt_(model, weft.adapt.LoRA(rank=2), where="head", name="first")
    nn.init.normal_(weft.functions(model)["head.weight"][0].B)
    weft.adapt_(model, TaskVectors(checkpoints=files[:1], start=1.0), where="*", name="second")
    close(model, weights(Model(1).double()))


def test_biases_too(files: tuple[str, ...]) -> None:
    model = Model(0).double()
    weft.adapt_(model, TaskVectors(checkpoints=files[:1], start=1.0), where="*")
    weft.adapt_(model, TaskVectors(checkpoints=files[:1], start=1.0), where="*", tensor="bias", name="biases")
    torch.testing.assert_close(weft.plain_state_dict(model), Model(1).double().state_dict())


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float32", torch.float32), ("float16", torch.float16), ("weight", torch.bfloat16)]
)
def test_types(files: tuple[str, ...], dtype: str, kept: torch.dtype) -> None:
    model = Model(0).bfloat16()
    weft.adapt_(model, TaskVectors(checkpoints=files, dtype=dtype), where="head")
    (function,) = weft.functions(model)["head.weight"]
    assert function.vectors.dtype == kept
    assert function.coefficients.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16


def test_a_tied_weight_is_found_under_either_name(tmp_path: Path) -> None:
    from weft.contract.models import Tied

    value = torch.randn(16, 8)
    for name in ("embedding.weight", "head.weight"):
        save_file({name: value}, tmp_path / "one.safetensors")
        model = Tied()
        weft.adapt_(model, TaskVectors(checkpoints=(str(tmp_path / "one.safetensors"),), start=1.0), where="*")
        torch.testing.assert_close(model.head.weight, value)


def test_few_numbers_find_the_way_to_a_mixture(files: tuple[str, ...]) -> None:
    model, target = Model(0).double(), Model(0).double()
    state, others = target.state_dict(), [Model(s).double().state_dict() for s in (1, 2)]
    wanted = torch.tensor([0.3, 0.2])
    target.load_state_dict({n: t + sum(c * (o[n] - t) for c, o in zip(wanted, others)) for n, t in state.items()})
    for name in ("weight", "bias"):
        config = TaskVectors(checkpoints=files, granularity="model")
        weft.adapt_(model, config, where="*", tensor=name, name=name)
    for parameter in (values := {id(p): p for p in coefficients(model).values()}).values():
        parameter.requires_grad_(True)
    tokens = torch.arange(9)
    optimizer = torch.optim.LBFGS(values.values(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (model(tokens) - target(tokens)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    for value in values.values():
        torch.testing.assert_close(value.detach(), wanted.double(), atol=1e-3, rtol=0)


def test_refusals(files: tuple[str, ...], tmp_path: Path) -> None:
    model = Model(0)
    state = weights(copy.deepcopy(model))
    save_file({**state, "head.weight": torch.zeros(4, 6)}, tmp_path / "shape.safetensors")
    save_file({**state, "head.weight": torch.full((3, 6), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({**state, "head.weight": torch.full((3, 6), 1e6)}, tmp_path / "large.safetensors")
    save_file({f"inner.{n}": t for n, t in state.items()}, tmp_path / "names.safetensors")
    for paths, options, error, message in (
        ((), {}, RecipeError, "one checkpoint or more"),
        (("nowhere",), {}, CheckpointError, "nowhere"),
        ((str(tmp_path / "shape.safetensors"),), {}, RecipeError, r"head.weight is \[3, 6\], and \[4, 6\] in shape"),
        ((str(tmp_path / "nan.safetensors"),), {}, RecipeError, "head.weight holds NaN"),
        ((str(tmp_path / "large.safetensors"),), {"dtype": "float16"}, RecipeError, "too large for float16"),
        ((str(tmp_path / "names.safetensors"),), {}, CheckpointError, "no tensor 'table.weight'"),
        (files, {"partitions": 0}, RecipeError, "partitions"),
        (files, {"granularity": "layer"}, RecipeError, "granularity"),
    ):
        with pytest.raises(error, match=message):
            weft.adapt_(model, TaskVectors(checkpoints=paths, **options), where="*")
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.head) is nn.Linear
    with pytest.raises(RecipeError, match="by names"):
        TaskVectors(checkpoints=files).build(torch.ones(2, 2), batched=False)
