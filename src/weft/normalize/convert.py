"""Put this family's norms in the place of torch's layers, in a model that is there already.

    BatchNorm → GhostBatchNorm: the same parameters and running statistics; evaluation is the same to the last bit
    nn.LSTMCell, a layer of nn.LSTM → LayerNormLSTMCell:   W_x, W_h as they are; b = b_x + b_h; s₁ … s₃ at their start
    nn.GRUCell, a layer of nn.GRU → LayerNormGRUCell:      W, U as they are; shifts of the four norms: the four biases

Gates lie in torch's order on both sides (i, f, g, o and r, z, n), so matrices are copied whole. A recurrent cell's
outputs change, since its sums are normalised now: what is kept is the direction of each matrix, as a start for training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.normalize.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d
from weft.normalize.layer_norm import LayerNormGRUCell, LayerNormLSTMCell

_GHOSTS = {nn.BatchNorm1d: GhostBatchNorm1d, nn.BatchNorm2d: GhostBatchNorm2d}


def convert_ghost_batch_norm_(model: nn.Module, ghost_size: int = 128) -> list[str]:
    """Replace each batch norm of a model by ghost batch norm, in place.

    Parameters are the same objects, so an optimizer made before goes on. ``num_batches_tracked`` goes. A norm without
    learned scale gets one of ones and zeros that does not train.

    Args:
        model: holds ``nn.BatchNorm1d`` or ``nn.BatchNorm2d``; subclasses and other norms are left alone.
        ghost_size: samples in each part of a batch.

    Returns:
        Full names of what was replaced.

    Raises:
        RecipeError: the model is a batch norm itself, or one has no running statistics or averages over all batches
            (``momentum=None``), which ghost batch norm does not. Nothing is changed then.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> convert_ghost_batch_norm_(model, 32), model[1]
    (['1'], GhostBatchNorm1d(4, ghost_size=32, momentum=0.1, eps=1e-05))
    """
    if ghost_size < 1:
        raise RecipeError(f"A ghost batch has one sample at least, got ghost_size={ghost_size}.")
    for path, module in model.named_modules():
        if type(module) not in _GHOSTS:
            continue
        if module is model:
            raise RecipeError(
                "The model is a batch norm itself and cannot be replaced in place; convert what holds it."
            )
        if not module.track_running_stats or module.momentum is None:
            raise RecipeError(
                f"{path}: ghost batch norm keeps running statistics that move by a momentum, this norm does not "
                f"(track_running_stats={module.track_running_stats}, momentum={module.momentum})."
            )
    return _replace(model, lambda old: _ghost(old, ghost_size) if type(old) in _GHOSTS else None)


def convert_layer_norm_cells_(model: nn.Module, *, per_gate: bool = False, eps: float = 1e-5) -> list[str]:
    """Replace each ``nn.LSTMCell`` and ``nn.GRUCell`` of a model by the cell with layer norm, in place.

    Outputs change: see the module's docstring. Parameters are new, so make the optimizer afterwards. ``nn.LSTM`` and
    ``nn.GRU`` are called otherwise and are left alone; :func:`layer_norm_lstm_cell` takes one of their layers.

    Returns:
        Full names of what was replaced.

    >>> model = nn.ModuleDict({"cell": nn.GRUCell(3, 4)})
    >>> convert_layer_norm_cells_(model)
    ['cell']
    """

    def made(old: nn.Module) -> nn.Module | None:
        if type(old) is nn.LSTMCell:
            return layer_norm_lstm_cell(old, per_gate=per_gate, eps=eps)
        return layer_norm_gru_cell(old, per_gate=per_gate, eps=eps) if type(old) is nn.GRUCell else None

    if type(model) in (nn.LSTMCell, nn.GRUCell):
        raise RecipeError("The model is a cell itself and cannot be replaced in place; use what makes one cell.")
    return _replace(model, made)


@torch.no_grad()
def layer_norm_lstm_cell(
    source: nn.Module, *, layer: int = 0, reverse: bool = False, per_gate: bool = False, eps: float = 1e-5
) -> LayerNormLSTMCell:
    """A cell with layer norm that starts from the weights of torch's.

    Args:
        source: ``nn.LSTMCell`` or ``nn.LSTM``.
        layer, reverse: which layer of an ``nn.LSTM``, and whether the one that reads backwards.
        per_gate: normalise each gate by itself.
        eps: added to variances.

    Raises:
        RecipeError: another module, a layer that there is not, or projections, which the cell does not have.

    >>> layer_norm_lstm_cell(nn.LSTM(3, 5, num_layers=2), layer=1).weight_ih.shape
    torch.Size([20, 5])
    """
    w, u, b, c = _parts(source, (nn.LSTMCell, nn.LSTM), layer, reverse)
    cell = LayerNormLSTMCell(w.shape[1], u.shape[1], per_gate=per_gate, eps=eps).to(w).train(source.training)
    cell.weight_ih.copy_(w)
    cell.weight_hh.copy_(u)
    cell.bias.copy_(b + c)
    return cell


@torch.no_grad()
def layer_norm_gru_cell(
    source: nn.Module, *, layer: int = 0, reverse: bool = False, per_gate: bool = False, eps: float = 1e-5
) -> LayerNormGRUCell:
    """A cell with layer norm that starts from the weights of torch's; as :func:`layer_norm_lstm_cell`.

    >>> layer_norm_gru_cell(nn.GRUCell(3, 5)).weight_hh.shape
    torch.Size([15, 5])
    """
    w, u, b, c = _parts(source, (nn.GRUCell, nn.GRU), layer, reverse)
    hidden = u.shape[1]
    cell = LayerNormGRUCell(w.shape[1], hidden, per_gate=per_gate, eps=eps).to(w).train(source.training)
    cell.weight_ih.copy_(w)
    cell.weight_hh.copy_(u)
    for bias, gates, candidate in (
        (b, cell.norm_input, cell.norm_input_candidate),
        (c, cell.norm_hidden, cell.norm_hidden_candidate),
    ):
        gates.bias.copy_(bias[: 2 * hidden])
        candidate.bias.copy_(bias[2 * hidden :])
    return cell


def _parts(source: Any, kinds: Any, layer: int, reverse: bool) -> tuple[Tensor, ...]:
    """W_x, W_h, b_x, b_h of one cell; zeros for biases that there are not."""
    if not isinstance(source, kinds):
        raise RecipeError(
            f"An {' or '.join(k.__name__ for k in kinds)} of torch.nn is needed, got {type(source).__name__}."
        )
    if getattr(source, "proj_size", 0):
        raise RecipeError(
            f"The cell has no projection, this {type(source).__name__} has (proj_size={source.proj_size})."
        )
    end = ""
    if isinstance(source, nn.RNNBase):
        if not 0 <= layer < source.num_layers or (reverse and not source.bidirectional):
            raise RecipeError(
                f"Layer {layer}{' read backwards' if reverse else ''} is not in this {type(source).__name__}: "
                f"num_layers={source.num_layers}, bidirectional={source.bidirectional}."
            )
        end = f"_l{layer}{'_reverse' if reverse else ''}"
    elif layer or reverse:
        raise RecipeError("A cell is one layer that reads forwards; leave out `layer` and `reverse`.")
    weights = [getattr(source, name + end).detach() for name in ("weight_ih", "weight_hh")]
    biases = [getattr(source, name + end).detach() if source.bias else None for name in ("bias_ih", "bias_hh")]
    return *weights, *(weights[0].new_zeros(len(weights[0])) if b is None else b for b in biases)


def _ghost(old: Any, ghost_size: int) -> nn.Module:
    made: Any = _GHOSTS[type(old)](old.num_features, ghost_size=ghost_size, momentum=old.momentum, eps=old.eps)
    if old.affine:
        made.weight, made.bias = old.weight, old.bias
    else:
        made.to(old.running_mean).requires_grad_(False)
    made.running_mean, made.running_var = old.running_mean, old.running_var
    made.train(old.training)
    converted: nn.Module = made
    return converted


def _replace(model: nn.Module, make: Any) -> list[str]:
    """Replace modules for which ``make`` makes another; one that stands in two places stays one."""
    made: dict[nn.Module, nn.Module] = {}
    names = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            new = made.get(child) or make(child)
            if new is not None:
                made[child] = parent._modules[name] = new
                names.append(f"{path}.{name}" if path else name)
    return names
