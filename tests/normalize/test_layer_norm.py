import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.normalize import LayerNormGRUCell, LayerNormLSTMCell
from weft.normalize.layer_norm import PartNorm

CELLS = [LayerNormLSTMCell, LayerNormGRUCell]


def filled(cell: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell.double()


def test_one_part_is_torchs_layer_norm_and_more_parts_are_several() -> None:
    torch.manual_seed(0)
    whole, parts, peer = filled(PartNorm(6)), PartNorm(6, 2).double(), nn.LayerNorm(6).double()
    peer.load_state_dict(whole.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(whole(x), peer(x))
    expected = torch.cat([functional.layer_norm(p, (3,)) for p in x.chunk(2, -1)], -1)
    torch.testing.assert_close(parts(x), expected)
    assert PartNorm(6, bias=False).bias is None


def without_norms(cell: nn.Module) -> nn.Module:
    for name, module in list(cell.named_children()):
        if isinstance(module, PartNorm):
            setattr(cell, name, nn.Identity())
    return cell


def test_without_norms_they_are_torchs_cells() -> None:
    torch.manual_seed(0)
    lstm, peer = without_norms(LayerNormLSTMCell(3, 5)), nn.LSTMCell(3, 5)
    peer.load_state_dict(
        {"weight_ih": lstm.weight_ih, "weight_hh": lstm.weight_hh, "bias_ih": lstm.bias, "bias_hh": torch.zeros(20)}
    )
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(lstm(x, (h, c)), peer(x, (h, c)))
    torch.testing.assert_close(lstm(x), peer(x))
    gru, peer = without_norms(LayerNormGRUCell(3, 5)), nn.GRUCell(3, 5, bias=False)
    peer.load_state_dict({"weight_ih": gru.weight_ih, "weight_hh": gru.weight_hh})
    torch.testing.assert_close(gru(x, h), peer(x, h))
    torch.testing.assert_close(gru(x), peer(x))


def norm(x: Tensor, layer: PartNorm) -> Tensor:
    parts = [(p - p.mean(-1, keepdim=True)) / (p.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
             for p in x.chunk(layer.parts, -1)]  # fmt: skip
    return torch.cat(parts, -1) * layer.weight + layer.bias


@pytest.mark.parametrize("per_gate", [False, True])
def test_against_the_equations(per_gate: bool) -> None:
    torch.manual_seed(0)
    lstm, gru = (filled(c(3, 5, per_gate=per_gate)) for c in CELLS)
    x, h, c = (torch.randn(2, n, dtype=torch.float64) for n in (3, 5, 5))
    p = norm(x @ lstm.weight_ih.T, lstm.norm_input) + norm(h @ lstm.weight_hh.T, lstm.norm_hidden) + lstm.bias
    i, f, g, o = p.split(5, -1)
    kept = f.sigmoid() * c + i.sigmoid() * g.tanh()
    torch.testing.assert_close(lstm(x, (h, c)), (o.sigmoid() * norm(kept, lstm.norm_cell).tanh(), kept))
    wide, from_hidden = x @ gru.weight_ih.T, h @ gru.weight_hh.T
    r, z = (norm(wide[:, :10], gru.norm_input) + norm(from_hidden[:, :10], gru.norm_hidden)).sigmoid().split(5, -1)
    n = norm(wide[:, 10:], gru.norm_input_candidate) + r * norm(from_hidden[:, 10:], gru.norm_hidden_candidate)
    torch.testing.assert_close(gru(x, h), z * h + (1 - z) * n.tanh())


@pytest.mark.parametrize("cell_class", CELLS)
def test_unrolled_it_is_the_loop(cell_class: type) -> None:
    torch.manual_seed(0)
    cell, x = filled(cell_class(3, 5)), torch.randn(6, 2, 3, dtype=torch.float64)
    state, expected = None, []
    for one in x:
        state = cell(one, state)
        expected.append(state[0] if isinstance(state, tuple) else state)
    outputs, last = cell.unroll(x)
    torch.testing.assert_close(outputs, torch.stack(expected))
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(cell.unroll(x[3:], cell.unroll(x[:3])[1])[0], torch.stack(expected[3:]))


@pytest.mark.parametrize("cell_class", CELLS)
def test_scale_of_the_weight_matrices_does_not_matter_but_that_of_one_gate_does(cell_class: type) -> None:
    torch.manual_seed(0)
    cell, x = cell_class(3, 64, eps=1e-12).double(), torch.randn(4, 3, dtype=torch.float64)
    h = torch.randn(4, 64, dtype=torch.float64)
    state = (h, h) if cell_class is LayerNormLSTMCell else h

    def output() -> Tensor:
        made = cell(x, state)
        return made[0] if isinstance(made, tuple) else made

    before = output().detach()
    with torch.no_grad():
        cell.weight_ih.mul_(50)
        cell.weight_hh.mul_(50)
    torch.testing.assert_close(output(), before, atol=1e-8, rtol=0)
    with torch.no_grad():
        cell.weight_ih[:64].mul_(5)
    assert float((output() - before).abs().max().detach()) > 0.05


@pytest.mark.parametrize("cell_class", CELLS)
def test_gradients_and_compilation(cell_class: type) -> None:
    torch.manual_seed(0)
    cell, x = filled(cell_class(2, 3)), torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cell.unroll(x)[0], (x,))
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(cell, {"weight_hh": w}, (x[0],)),
        (cell.weight_hh.detach().requires_grad_(),),
    )
    torch._dynamo.reset()
    compiled = torch.compile(cell.unroll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cell.unroll(x))


@pytest.mark.parametrize("cell_class", CELLS)
def test_constant_inputs_and_one_hidden_unit_are_harmless(cell_class: type) -> None:
    for hidden in (1, 4):
        outputs, _ = cell_class(3, hidden).unroll(torch.zeros(5, 2, 3))
        outputs.sum().backward()
        assert torch.isfinite(outputs).all()
