"""Every optimizer keeps the contract of torch's."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from weft.contract.optimizers import CHECKS, run
from weft.function.optimizer import OptimizerMethod
from weft.method import parameter
from weft.registry import index, methods

NUMBER_OF_CHECKS = 22
ROWS = {name: row for name, row in methods().items() if isinstance(row, OptimizerMethod)}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] == "failed"] == []


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_call_of_the_index_makes_the_optimizer(name: str) -> None:
    import weft

    call = next(row["call"] for row in index() if row["name"] == name)
    made = eval(call, {"weft": weft, "model": nn.Sequential(nn.Linear(200, 300))})
    assert isinstance(made, ROWS[name].optimizer)
    assert all(made.defaults[key] == value for key, value in ROWS[name].defaults.items())


class AdamW(torch.optim.AdamW):
    """Torch's, with the checks that a method here makes of its own.

    Args:
        params: parameters.
        lr: learning rate.

    >>> AdamW([nn.Parameter(torch.ones(1))]).defaults["lr"]
    0.001
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay are at least 0, got {lr} and {weight_decay}")
        super().__init__(params, lr, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            raise ValueError("complex parameters are not supported")


@dataclasses.dataclass(frozen=True)
class Config:
    """Torch's AdamW as a method.

    >>> Config().lr
    0.001
    """

    lr: float = parameter(1e-3, "learning rate", minimum=0)
    weight_decay: float = parameter(0.0, "decoupled", minimum=0)

    def build(self, model: nn.Module) -> Optimizer:
        return AdamW([p for p in model.parameters() if p.requires_grad], self.lr, self.weight_decay)


def failures(config: type, optimizer: type, **row: str) -> set[str]:
    method = OptimizerMethod(
        "bad", "adapt", config, **{"summary": "A.", "goal": "train", "origin": "a test", **row}, optimizer=optimizer
    )  # type: ignore[arg-type]
    return {r["check"] for r in run(method) if r["outcome"] == "failed"}


def test_torchs_own_optimizer_passes() -> None:
    assert failures(Config, AdamW) == set()


class Careless(AdamW):
    """Breaks promises about what a step touches."""

    count = 0

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            closure()
        torch.rand(())
        type(self).count += 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.grad = torch.ones_like(p)
                    p.grad.nan_to_num_().add_(0.1 * p)
                    self.state[p].setdefault("total", torch.zeros(p.shape)).add_(p.grad.to_dense().float())
                    p.copy_((p + 0.01 * p.grad + 0.001 * (self.count % 7)).to(torch.float32)[...])
                    p.data = p.data.float()


@dataclasses.dataclass(frozen=True)
class CarelessConfig:
    """Without an example."""

    lr: float = parameter(2.0, "", minimum=0)
    weight_decay: tuple[int, ...] = parameter((1,), "decoupled")

    def build(self, model: nn.Module) -> Optimizer:
        return Careless([*model.parameters()][:-1], self.lr)


class Worse(Optimizer):
    """Breaks the others."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        params = list(params) or [nn.Parameter(torch.ones(1))]
        super().__init__(params, {"lr": 0.0})
        self.hidden = lambda: params[0].mT
        self.rate = lr

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    # float32 alone, and Adam's decay of the first kind
                    assert not p.is_complex(), "no"
                    grad = p.grad if p.grad is not None else 0
                    average = self.state[p].setdefault("average", torch.ones(len(p)))
                    average.mul_(0.9).add_(0.1 + 0 * self.rate + 0.1 * p.flatten()[0])
                    p.sub_(self.rate * (grad + p).sign() * average[0])


@dataclasses.dataclass(frozen=True)
class WorseConfig:
    """A learning rate that may be anything.

    >>> WorseConfig().lr
    0.001
    """

    lr: float = parameter(1e-3, "learning rate", minimum=-5)
    weight_decay: float = parameter(0.0, "ignored", minimum=0)

    def build(self, model: nn.Module) -> Optimizer:
        return Worse([p for m in model.modules() for p in m._parameters.values() if p is not None], self.lr)


def test_every_check_can_fail() -> None:
    assert failures(CarelessConfig, Careless) | failures(WorseConfig, Worse) == set(CHECKS)
