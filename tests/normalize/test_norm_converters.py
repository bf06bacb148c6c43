"""Converting torch's layers, and the cells' order of gates, bias and weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.normalize import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    LayerNormGRUCell,
    LayerNormLSTMCell,
    convert_ghost_batch_norm_,
    convert_layer_norm_cells_,
    layer_norm_gru_cell,
    layer_norm_lstm_cell,
)
from weft.normalize.layer_norm import PartNorm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# batch norm


def network(dtype: torch.dtype = torch.float32, **options: object) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, eps=1e-3, momentum=0.3, **options),
        nn.Flatten(),
        nn.Sequential(nn.Linear(45, 7), nn.BatchNorm1d(7, **options)),
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for _ in range(3):
        model(2 * torch.randn(8, 3, 5, 5, dtype=dtype) + 1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_is_the_same_to_the_last_bit(dtype: torch.dtype, affine: bool) -> None:
    model = network(dtype, affine=affine).eval()
    x = 3 * torch.randn(6, 3, 5, 5, dtype=dtype) - 1
    before, parameters = model(x), {n: id(p) for n, p in model.named_parameters()}
    assert convert_ghost_batch_norm_(model, 4) == ["1", "3.1"]
    assert [type(m) for m in (model[1], model[3][1])] == [GhostBatchNorm2d, GhostBatchNorm1d]
    assert torch.equal(model(x), before)
    trained = {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == parameters, "an optimizer made before would lose them"
    assert not model[1].training


def test_training_goes_on_as_batch_norm_on_one_part_after_another() -> None:
    model = network(torch.float64)[:2].train()
    twin = copy.deepcopy(model)
    convert_ghost_batch_norm_(model, 4)
    x = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([twin(part) for part in x.split(4)]))
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


def test_a_norm_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    assert convert_ghost_batch_norm_(model) == ["0", "2"]
    assert model[0] is model[2]


def test_norms_that_cannot_be_converted_change_nothing() -> None:
    for options in ({"track_running_stats": False}, {"momentum": None}):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, **options))
        with pytest.raises(RecipeError, match=r"^1: ghost batch norm keeps running statistics"):
            convert_ghost_batch_norm_(model)
        assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(RecipeError, match="itself"):
        convert_ghost_batch_norm_(nn.BatchNorm1d(4))
    with pytest.raises(RecipeError, match="one sample at least"):
        convert_ghost_batch_norm_(nn.Sequential(nn.BatchNorm1d(4)), 0)
    assert convert_ghost_batch_norm_(nn.Sequential(nn.BatchNorm3d(4), nn.LayerNorm(4))) == []


# recurrent cells


class OnlyShift(nn.Module):
    """What is left of a norm that normalises nothing: its shift."""

    def __init__(self, norm: PartNorm):
        super().__init__()
        self.bias = norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def inactive(cell: nn.Module) -> nn.Module:
    for name, module in list(cell.named_children()):
        setattr(cell, name, OnlyShift(module))
    return cell


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("source", "make"), [(nn.LSTMCell, layer_norm_lstm_cell), (nn.GRUCell, layer_norm_gru_cell)])
def test_with_inactive_norms_a_cell_is_the_one_it_was_made_from(
    source: type, make: object, dtype: torch.dtype, bias: bool
) -> None:
    peer = source(3, 5, bias=bias).to(dtype)
    cell = inactive(make(peer))
    x, h, c = (torch.randn(2, n, dtype=dtype) for n in (3, 5, 5))
    state = (h, c) if source is nn.LSTMCell else h
    torch.testing.assert_close(cell(x, state), peer(x, state))
    torch.testing.assert_close(cell(x[0]), peer(x[0]))
    assert cell.weight_ih is not peer.weight_ih


@pytest.mark.parametrize(("source", "make"), [(nn.LSTM, layer_norm_lstm_cell), (nn.GRU, layer_norm_gru_cell)])
def test_with_inactive_norms_the_layers_of_a_network_are_those_it_was_made_from(source: type, make: object) -> None:
    peer = source(3, 5, num_layers=2, bidirectional=True).double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    y = x
    for layer in range(2):
        forwards, _ = inactive(make(peer, layer=layer)).unroll(y)
        backwards, _ = inactive(make(peer, layer=layer, reverse=True)).unroll(y.flip(0))
        y = torch.cat([forwards, backwards.flip(0)], -1)
    torch.testing.assert_close(y, peer(x)[0])


def test_with_norms_each_gate_stays_where_it_was() -> None:
    """Opening one gate by its bias does to the new cell what it does to torch's."""
    lstm, x = nn.LSTMCell(3, 64), torch.randn(2, 3)
    h, c = torch.randn(2, 64), torch.randn(2, 64)
    with torch.no_grad():
        lstm.bias_ih[:64] -= 50  # nothing comes in
        lstm.bias_ih[64:128] += 50  # nothing is forgotten
    torch.testing.assert_close(layer_norm_lstm_cell(lstm)(x, (h, c))[1], c)
    gru = nn.GRUCell(3, 64)
    with torch.no_grad():
        gru.bias_hh[64:128] += 50  # the state is kept
    torch.testing.assert_close(layer_norm_gru_cell(gru)(x, h), h)
    with torch.no_grad():
        gru.bias_hh[64:128] -= 100  # the state is the candidate,
        gru.bias_hh[:64] -= 50  # which does not see the state
    cell = layer_norm_gru_cell(gru)
    wide = x @ gru.weight_ih[128:].T
    normal = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(cell(x, h), (normal + gru.bias_ih[128:]).tanh())


def test_gains_and_options_at_the_start() -> None:
    cell = layer_norm_lstm_cell(nn.LSTMCell(3, 5).eval(), per_gate=True, eps=1e-3)
    for norm in (cell.norm_input, cell.norm_hidden, cell.norm_cell):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
        assert norm.eps == 1e-3
    assert (cell.norm_input.parts, cell.training) == (4, False)
    assert layer_norm_gru_cell(nn.GRUCell(3, 5), per_gate=True).norm_hidden.parts == 2


def test_cells_of_a_model_in_place() -> None:
    shared = nn.GRUCell(5, 5)
    model = nn.ModuleDict({"first": nn.LSTMCell(3, 5), "more": nn.ModuleList([shared, shared]), "whole": nn.LSTM(3, 5)})
    assert convert_layer_norm_cells_(model, per_gate=True) == ["first", "more.0", "more.1"]
    assert type(model["first"]) is LayerNormLSTMCell
    assert type(model["more"][0]) is LayerNormGRUCell
    assert model["more"][0] is model["more"][1]
    assert type(model["whole"]) is nn.LSTM
    with pytest.raises(RecipeError, match="itself"):
        convert_layer_norm_cells_(shared)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (nn.GRUCell(3, 5), {}, "LSTMCell or LSTM of torch.nn is needed, got GRUCell"),
        (nn.LSTM(3, 5, proj_size=2), {}, "proj_size=2"),
        (nn.LSTM(3, 5), {"layer": 1}, "Layer 1 is not in this LSTM: num_layers=1"),
        (nn.LSTM(3, 5), {"layer": -1}, "Layer -1"),
        (nn.LSTM(3, 5), {"reverse": True}, "Layer 0 read backwards is not"),
        (nn.LSTMCell(3, 5), {"reverse": True}, "one layer that reads forwards"),
    ],
)
def test_bad_requests(source: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        layer_norm_lstm_cell(source, **options)
