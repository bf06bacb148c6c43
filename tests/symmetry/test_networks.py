"""Plain networks: the groups that are there, and that each leaves the function as it is."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import Attention, GatedMLP, Grouped, ResNet, check, outputs, randomize, roll

from weft.errors import RecipeError
from weft.symmetry import Group, Loop, Member, Symmetry, find_symmetry

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def shapes(symmetry: Symmetry) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {g.name: (g.kind, symmetry.shape(g)) for g in symmetry.groups}


def found(model: nn.Module, inputs: Tensor) -> Symmetry:
    """The symmetry of a randomised model, after it held, with nothing unknown."""
    symmetry = find_symmetry(randomize(model), inputs)
    check(model, symmetry, inputs)
    assert symmetry.unknown == ()
    return symmetry


def test_mlp() -> None:
    symmetry = found(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)), ROWS)
    assert shapes(symmetry) == {"0.intermediate": ("intermediate", (9,)), "2.intermediate": ("intermediate", (7,))}
    assert symmetry["2.intermediate"].members == (
        Member("2.weight", 0, 0, 1), Member("2.bias", 0, 0, 1), Member("4.weight", 1, 0, 1),
    )  # fmt: skip
    assert symmetry.why_frozen("0.weight", 1) == ("an input of the model",)
    assert symmetry.why_frozen("4.bias", 0) == ("an output of the model",)


def test_gated_mlp_with_both_halves_in_one_matrix() -> None:
    group = found(GatedMLP(), ROWS)["gate_up.intermediate"]
    assert [(m.tensor, m.axis, m.start) for m in group.members] == [
        ("gate_up.weight", 0, 0), ("gate_up.weight", 0, 12), ("gate_up.bias", 0, 0), ("gate_up.bias", 0, 12),
        ("down.weight", 1, 0),
    ]  # fmt: skip


def test_flatten_moves_whole_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(),
        nn.Linear(10, 2),
    )  # fmt: skip
    symmetry = found(model, IMAGE)
    assert shapes(symmetry) == {"0.channels": ("channels", (6,)), "5.intermediate": ("intermediate", (10,))}
    assert symmetry["0.channels"].members[-3] == Member("5.weight", 1, 0, 9, (Loop(3, 3), Loop(3, 1)))
    assert {"1.running_mean", "1.running_var", "1.weight", "1.bias"} < set(symmetry["0.channels"].tensors)


def test_resnet_streams() -> None:
    symmetry = found(ResNet(), IMAGE)
    assert {g.name: (g.size, len(g.members)) for g in symmetry.groups} == {
        "stem.channels": (8, 19),  # the stem, its norm, what the two blocks and the next stage read and write
        "stage1.0.channels": (8, 6), "stage1.1.channels": (8, 6), "stage2.0.channels": (12, 6),
        "stage2.0.conv2.channels": (12, 17), "stage2.1.channels": (12, 6),
    }  # fmt: skip
    assert {g.kind for g in symmetry.groups} == {"channels"}


def test_grouped_depthwise_and_transposed_convolutions() -> None:
    symmetry = found(Grouped(), IMAGE)
    assert [(g.kind, symmetry.shape(g)) for g in symmetry.groups] == [
        ("channels", (4,)), ("channels", (4, 3)), ("channels", (4, 5)),  # groups; what goes in and out of each
        ("channels", (6,)), ("channels", (6, 2)), ("channels", (7,)),
    ]  # fmt: skip


def test_groups_of_a_norm_that_cut_across_those_of_a_convolution_freeze() -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 1, groups=4), nn.GroupNorm(5, 20), nn.Conv2d(20, 2, 1))
    symmetry = found(model, IMAGE)
    assert "factors do not match in aten.group_norm (2)" in symmetry.why_frozen("2.weight", 0)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("cut", ["split", "unbind", "interleaved"])
def test_fused_attention(cut: str, rotary: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 24), Attention(cut, rotary), nn.Linear(24, 2))
    symmetry = found(model, TOKENS)
    expected = {"hidden": ("hidden", (24,)), "1.heads": ("heads", (3,)), "1.head_dim": ("head_dim", (3, 8))}
    if not rotary:
        expected["1.qkv.head_dim"] = ("head_dim", (3, 8))
    assert shapes(symmetry) == expected
    assert symmetry["1.head_dim"].within == ("1.heads",)
    assert symmetry["1.head_dim"].tensors == ("1.qkv.weight", "1.qkv.bias", "1.out.weight")
    assert len(symmetry["1.heads"].members) == 7  # three parts of the weight and of the bias, and the output


def test_a_false_group_is_caught() -> None:
    """Inside a head, queries and keys do not permute under rotary positions: the check must see it."""
    model = randomize(nn.Sequential(nn.Linear(5, 24), Attention("split", rotary=True), nn.Linear(24, 2)))
    free = randomize(nn.Sequential(nn.Linear(5, 24), Attention("split"), nn.Linear(24, 2)))
    truth, other = find_symmetry(model, TOKENS), find_symmetry(free, TOKENS)
    false = Symmetry((*truth.groups, other["1.qkv.head_dim"]), (), (), truth.shapes, {})
    check(model, truth, TOKENS)
    with pytest.raises(AssertionError, match=r"1\.qkv\.head_dim"):
        check(model, false, TOKENS)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_of_torch(tied: bool) -> None:
    model = nn.Sequential(
        nn.Embedding(11, 24), nn.TransformerEncoderLayer(24, 3, 32, batch_first=True), nn.Linear(24, 11)
    )
    if tied:
        model[2].weight = model[0].weight
    tokens = torch.arange(10).view(2, 5)
    symmetry = found(model, tokens)
    kinds = [(g.kind, symmetry.shape(g)) for g in symmetry.groups]
    assert kinds == [
        ("hidden", (24,)), ("heads", (3,)), ("head_dim", (3, 8)), ("head_dim", (3, 8)), ("intermediate", (32,)),
    ]  # fmt: skip
    assert symmetry.aliases == ({"2.weight": "0.weight"} if tied else {})
    assert "entries of a table, looked up by number (embedding)" in symmetry.why_frozen("0.weight", 0)
    if tied:
        assert symmetry.why_frozen("2.weight", 0) == symmetry.why_frozen("0.weight", 0)
        assert [m.tensor for m in symmetry["hidden"].members].count("0.weight") == 1


class Mixed(nn.Module):
    """A softmax over the two halves of a projection: what it mixes may not permute differently in each half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 12), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).view(-1, 2, 6).softmax(1).unbind(1)
        return self.second(a) + self.third(b)


def test_halves_that_are_mixed_permute_alike() -> None:
    symmetry = found(Mixed(), ROWS)
    assert [(symmetry.shape(g), len(g.members)) for g in symmetry.groups] == [((6,), 4)]


class Position(nn.Module):
    """A stored table that is added, persistent or not."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("table", torch.randn(7, 8), persistent=persistent)
        self.register_buffer("scale", torch.tensor([[3.0]]), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.scale + self.table)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_constant_that_is_not_uniform_freezes_its_axis(persistent: bool) -> None:
    symmetry = find_symmetry(Position(persistent).double(), TOKENS)
    assert symmetry.groups == ()
    assert symmetry.why_frozen("first.weight", 0) == ("constant table",)


class Recurrent(nn.Module):
    """An operation without a rule between layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.mlp = nn.Linear(5, 8), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mlp(self.lstm(self.first(x))[0]).relu())


def test_an_unknown_operation_freezes_what_it_touches_and_is_named() -> None:
    model = randomize(Recurrent())
    symmetry = find_symmetry(model, TOKENS)
    assert shapes(symmetry) == {"mlp.intermediate": ("intermediate", (6,))}
    assert symmetry.unknown == (("aten.lstm.input", 1),)
    assert symmetry.why_frozen("first.weight", 0) == ("unknown operation aten.lstm.input (lstm)",)
    check(model, symmetry, TOKENS)


def test_unused_tensors_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2))
    model.register_parameter("spare", nn.Parameter(torch.zeros(4)))
    assert found(model, ROWS).why_frozen("spare", 0) == ("not used in the traced call",)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x[:, :2]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[y > 0]


class Into(nn.Module):
    """Writes over zeros by ``out=``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(*x.shape[:-1], 6, dtype=x.dtype)
        torch.add(self.first(x), 1.0, out=y)
        return self.last(y)


def test_what_is_written_by_out_is_no_constant() -> None:
    model = randomize(Into())
    symmetry = find_symmetry(model, ROWS)
    assert symmetry.groups == ()
    assert symmetry.unknown == (("aten.add.out", 1),)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="shape depends on values"):
        find_symmetry(Masked().double(), ROWS)
    with pytest.raises(RecipeError, match=r"torch\.export says: .*data-dependent"):
        find_symmetry(Branch().double(), ROWS)
    with pytest.raises(RecipeError, match="no parameters"):
        find_symmetry(nn.ReLU(), ROWS)
    with pytest.raises(RecipeError, match="needs example inputs"):
        find_symmetry(nn.Linear(5, 2))
    with pytest.raises(RecipeError, match=r"torch\.nn\.Module or a folder, got int"):
        find_symmetry(3)
    with pytest.raises(RecipeError, match="cannot be traced"):
        find_symmetry(nn.Linear(5, 2), torch.zeros(3, 4))


def test_a_trace_leaves_the_model_as_it_was_and_needs_no_memory() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.BatchNorm1d(9), nn.Linear(9, 2))
    model[2].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_symmetry(model, torch.zeros(3, 5))
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.device("meta"):
        large = nn.Sequential(nn.Linear(5, 2**20), nn.ReLU(), nn.Linear(2**20, 2**20), nn.ReLU(), nn.Linear(2**20, 2))
    assert [g.size for g in find_symmetry(large, torch.zeros(3, 5)).groups] == [2**20, 2**20]


def test_groups_in_rows_of_roll_are_permutations() -> None:
    """The permutations that the checks use move every unit, differently in each unit around."""
    symmetry = Symmetry((Group("h", "heads", 3, ()), Group("d", "head_dim", 5, (), ("h",))), (), (), {}, {})
    rows = roll(symmetry, "d")["d"]
    assert rows.shape == (3, 5)
    assert (np.sort(rows, -1) == np.arange(5)).all()
    assert not (rows == np.arange(5)).any()
    assert len({tuple(r) for r in rows}) == 3
    assert outputs(nn.Identity(), ROWS) is ROWS
