"""Every pruning method keeps the contract."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.contract import run_battery
from weft.contract.pruners import CHECKS, run
from weft.errors import RecipeError
from weft.function.pruner import PruneMethod
from weft.method import parameter
from weft.prune import Wanda
from weft.registry import methods

NUMBER_OF_CHECKS = 22
ROWS = {name: row for name, row in methods().items() if isinstance(row, PruneMethod)}


def test_rows() -> None:
    assert set(ROWS) == {"magnitude", "wanda"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run_battery(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] != "passed"] == []


# a defect for each check


class Floats(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight, statistics).float()


class NegativeZeros(Wanda):
    def fit(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return weight * self.mask(name, weight, statistics)


class RoundsUp(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        more = math.ceil(self.sparsity * weight.shape[-1]) / weight.shape[-1]
        return Wanda(more, self.keep, self.group).mask(name, weight, statistics)


class NoGroups(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return Wanda(self.sparsity).mask(name, weight, statistics)


class Turns(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, 1 / weight if self.sparsity > 0.6 else weight, statistics)


class Shifted(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight + 1, statistics)


class Smallest(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, 1 / weight, statistics)


class Signed(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight.clamp(min=0), statistics)


class FirstColumnsFirst(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight * torch.arange(weight.shape[1]), statistics)


class Blind(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return ROWS["magnitude"].configure(dataclasses.asdict(self)).mask(name, weight, statistics)


class AsksForData(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        statistics.norm(name)
        return super().mask(name, weight, statistics)


class InMemoryOnly(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        held = all(isinstance(t, Tensor) for t in statistics._tensors.values())
        return super().mask(name, weight if held else 1 / weight, statistics)


class Draws(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, torch.rand(weight.shape), statistics)


class InPlace(Wanda):
    def fit(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return weight.masked_fill_(~self.mask(name, weight, statistics), 0)


class ByMemory(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight if weight.is_contiguous() else 1 / weight, statistics)


class Mends(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight.nan_to_num(), statistics)


class LetsThrough(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        try:
            return super().mask(name, weight, statistics)
        except RecipeError:
            return torch.ones_like(weight, dtype=torch.bool)


class KeepsRows(Wanda):
    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return super().mask(name, weight, statistics) | (len(weight) == 1)


@dataclasses.dataclass(frozen=True)
class AnyNumbers:
    sparsity: float = parameter(0.5, "")
    keep: int = parameter(0, "")
    group: int = parameter(0, "")

    def mask(self, name: str, weight: Tensor, statistics: Any) -> Tensor:
        return Wanda(self.sparsity, self.keep, self.group).mask(name, weight, statistics)

    fit = Wanda.fit
    needs = Wanda.needs


class LikeNoOther(Wanda):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


DEFECTS: dict[str, type] = {
    "a mask of the weight's shape": Floats,
    "zeros where the mask says so, the rest as it was": NegativeZeros,
    "the share is exact": RoundsUp,
    "so many of every group are kept": NoGroups,
    "what goes first stays away": Turns,
    "zeros go first": Shifted,
    "a large weight stays": Smallest,
    "scales and signs do not matter": Signed,
    "the order of units does not matter": FirstColumnsFirst,
    "dead inputs go first": Blind,
    "a layer that no data reached is pruned all the same": AsksForData,
    "statistics may come from a folder": InMemoryOnly,
    "statistics that do not fit are refused": Blind,
    "repeats itself": Draws,
    "inputs are left as they are": InPlace,
    "memory may lie anyhow": ByMemory,
    "NaN and infinity are refused": Mends,
    "what is no matrix is refused": LetsThrough,
    "one row and one column": KeepsRows,
    "wrong shares and groups are refused": AnyNumbers,
    "configuration round trip": LikeNoOther,
    "documented": AnyNumbers,
}


def test_every_check_has_a_defect() -> None:
    assert set(DEFECTS) == set(CHECKS)


@pytest.mark.parametrize("check", list(DEFECTS))
def test_every_check_finds_its_defect(check: str) -> None:
    row = dataclasses.replace(ROWS["wanda"], config=DEFECTS[check])
    (result,) = [r for r in run(row) if r["check"] == check]
    assert result["outcome"] == "failed"
    assert "Error: " not in result["reason"], "it crashed"
